"""How do I use a trained model elsewhere, with open_clip alone?

    python examples/read_a_checkpoint.py                        # the shipped reference
    python examples/read_a_checkpoint.py outputs/demo/steered/model

The folder `model` of a run, and what `drrho-clip export` writes, are of open_clip's own layout: drrho is not imported.
"""

import sys
from pathlib import Path

import matplotlib
import open_clip
import torch
from PIL import Image, ImageDraw, ImageFont

folder = sys.argv[1] if len(sys.argv) > 1 else "experiments/clip/glyphs/reference_model"
if not Path(folder).is_dir():
    raise SystemExit(f"no model in {folder}: name the folder `model` of a run")
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
model.eval()

font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 24)
names = ["greek capital letter omega", "digit seven", "black chess knight", "rightwards arrow"]
with torch.no_grad():
    texts = model.encode_text(tokenizer(names), normalize=True)
    for character in "Ω7♞→":
        picture = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(picture).text((16, 16), character, fill="black", font=font, anchor="mm")
        image = model.encode_image(preprocess(picture)[None], normalize=True)
        shares = (model.logit_scale.exp() * image @ texts.T).softmax(1)[0]
        print(f"U+{ord(character):04X}  {names[int(shares.argmax())]:27s} {shares.max():.0%}")
