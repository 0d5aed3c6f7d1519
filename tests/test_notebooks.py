"""Every notebook is committed executed, asks a question, ends with a picture, and runs again to what it shows."""

import base64
import io
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from notebooks.execute import with_palette

#: Notebooks that need more than the extras of `all`.
NEEDS = {"05_steer_your_trainer": "transformers"}
#: Trainings amplify rounding, which differs between processors: by how much their numbers may differ, relatively.
ROUNDING = {"04_steer_any_training_loop": 0.03, "05_steer_your_trainer": 0.1, "06_is_my_reference_any_good": 0.1}
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MOST_BYTES = 300_000
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    import nbformat  # takes a second to load

    return nbformat.read(path, as_version=4)


def outputs(notebook):
    """Return what each code cell has put out: its text, and how many pictures."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts = [output.text for output in cell.outputs if output.output_type == "stream"]
            pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
            found.append(("".join(texts), len(pictures)))
    return found


def check_same(now, before, rounding):
    """Assert that texts have equal words and numbers that agree."""
    assert _NUMBER.sub("#", now).split() == _NUMBER.sub("#", before).split()
    for number, stored in zip(_NUMBER.findall(now), _NUMBER.findall(before), strict=True):
        digits = len(stored.partition("e")[0].partition(".")[2])
        last = 2 * 10.0**-digits if "e" not in stored else 0.0
        expected = float(stored.replace(",", ""))
        assert float(number.replace(",", "")) == pytest.approx(expected, rel=rounding, abs=last), (number, stored)


@each_notebook
def test_notebook_is_executed_and_shows_nothing_of_the_machine(path):
    assert path.stat().st_size < MOST_BYTES
    notebook = read(path)
    first, last = notebook.cells[0], notebook.cells[-1]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "?" in first.source.splitlines()[0]
    assert "image/png" in last.outputs[-1].data  # the answer
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type in ("stream", "display_data")
        assert output.get("name", "stdout") == "stdout", output.text  # no warnings, no progress bars
    shown = "\n".join(text for text, _ in outputs(notebook)) + str(notebook.metadata)
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|usr|work|Users|private|opt)\b|[A-Z]:\\", shown)
    assert sys.prefix not in shown and "\x1b" not in shown and "\r" not in shown


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::ResourceWarning", "default::RuntimeWarning")
@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")
@each_notebook
def test_notebook_runs_to_what_it_shows(path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem], reason="needs the extra integrations (make test-integrations)")
    from nbclient import NotebookClient

    notebook = read(path)
    before = outputs(notebook)
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    now = outputs(notebook)
    assert [pictures for _, pictures in now] == [pictures for _, pictures in before]
    for (text, _), (stored, _) in zip(now, before, strict=True):
        check_same(text, stored, ROUNDING.get(path.stem, 1e-3))


def test_pictures_keep_rare_colors():
    picture = Image.new("RGB", (200, 100), "white")
    picture.paste(Image.linear_gradient("L").resize((200, 50)), (0, 50))
    picture.putpixel((3, 3), (213, 94, 0))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    stored = Image.open(io.BytesIO(base64.b64decode(with_palette(base64.b64encode(stream.getvalue()).decode()))))
    assert stored.mode == "P" and stored.size == picture.size
    red, green, blue = stored.convert("RGB").getpixel((3, 3))
    assert abs(red - 213) < 8 and abs(green - 94) < 8 and blue < 8


@pytest.mark.parametrize(
    "now, before, same",
    [
        ("rho 1.25, n = 1,000", "rho 1.25, n = 1,000", True),
        ("rho 1.26", "rho 1.25", True),
        ("rho 1.3", "rho 1.25", False),
        ("tau 1.25", "rho 1.25", False),
        ("1.0 2.0", "1.0", False),
        ("9 samples", "17 samples", False),
    ],
)
def test_texts_are_compared_by_words_and_numbers(now, before, same):
    try:
        check_same(now, before, 1e-3)
    except AssertionError:
        assert not same
    else:
        assert same
