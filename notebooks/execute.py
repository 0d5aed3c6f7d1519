"""Execute notebooks in place, to be committed: ``python notebooks/execute.py notebooks/*.ipynb`` (``make notebooks``).

What a notebook puts out is kept, nothing of when and where it ran. Pictures get a palette: lines and dots lose nothing
by it, and a file is less than half as large.
"""

import base64
import io
import sys

import nbformat
from PIL import Image

COLORS = 256
KERNEL = "python3"


def execute(path: str) -> None:
    """Execute a notebook from top to bottom and write it back."""
    from nbclient import NotebookClient  # takes seconds to load, which the fast tests should not pay

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, kernel_name=KERNEL, timeout=None, record_timing=False).execute()
    compact(notebook)
    nbformat.write(notebook, path)


def compact(notebook: nbformat.NotebookNode) -> None:
    """Give all pictures a palette, and leave of the metadata what does not depend on the machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": KERNEL},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = with_palette(output.data["image/png"])


def with_palette(picture: str) -> str:
    """Return a PNG in base64 with at most `COLORS` colors."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)), formats=("PNG",)).convert("RGB")
    stream = io.BytesIO()
    image.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(name)
        print(name)
