"""How do I train CLIP on my own pairs, steered by a reference?

    pip install . ./experiments/clip
    python examples/own_clip_data.py

The pairs are in one webdataset shard: NAME.png and NAME.txt of each. Here they are drawn; put yours in their place.
The shipped reference stands for your pretrained model: any folder of open_clip's layout is one.
"""

import io
import json
import tarfile
import tempfile
from pathlib import Path

from drrho_clip.run import main
from drrho_clip.training.options import SHIPPED_REFERENCE
from PIL import Image, ImageDraw

COLORS = ("red", "green", "blue", "orange", "purple", "black", "brown", "gray")
SHAPES = ("ellipse", "rectangle")


def write_shard(path: Path) -> None:
    """Write 16 pictures of colored shapes with their captions."""
    with tarfile.open(path, "w") as shard:
        for number, (color, shape) in enumerate((color, shape) for color in COLORS for shape in SHAPES):
            picture, stream = Image.new("RGB", (64, 64), "white"), io.BytesIO()
            getattr(ImageDraw.Draw(picture), shape)((12, 12, 52, 52), fill=color)
            picture.save(stream, "PNG")
            for name, content in ((f"{number}.png", stream.getvalue()), (f"{number}.txt", f"{color} {shape}".encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


with tempfile.TemporaryDirectory() as folder:
    shard, catalog, out = (str(Path(folder, name)) for name in ("0.tar", "catalog", "out"))
    write_shard(Path(shard))
    assert main(["catalog", shard, "--out", catalog]) == 0  # on a command line: drrho-clip catalog ...
    options = "--model glyph-micro --epochs 20 --batch-size 8 --lr 2e-3 --warmup 2 --temperature 0.1 --device cpu"
    words = [*options.split(), "--workers", "0", "--log-every", "1", "--validations", "1"]
    assert main(["train", "--catalog", catalog, "--reference", str(SHIPPED_REFERENCE), *words, "--out", out]) == 0
    losses = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    print(f"{len(losses)} steps; loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last")
    print("exported:", ", ".join(sorted(path.name for path in Path(out, "model").iterdir())))
