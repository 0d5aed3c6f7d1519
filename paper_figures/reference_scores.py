"""Score the shipped reference on the test pairs: ``results/reference.json``, which figures and claims read.

``python paper_figures/reference_scores.py`` takes 10 seconds, and a minute where the pairs are not drawn yet.
"""

import argparse
import json
from pathlib import Path

import torch

from experiments.clip.cli.options import Data
from experiments.clip.glyphs.evaluation import evaluate_model
from experiments.clip.glyphs.source import load_pairs, prepare
from experiments.clip.models.clip import load_model
from experiments.clip.training.options import SHIPPED_REFERENCE

HERE = Path(__file__).parent


def scores(cache: Path) -> dict[str, float]:
    """Return the reference's scores by the names of the study's columns."""
    reference = load_model(SHIPPED_REFERENCE)
    manifest = prepare(Data("clean", cache=cache))  # held-out captions are clean whatever the training's are
    found = evaluate_model(reference, load_pairs(manifest, "test", reference), manifest)
    return {
        "test_top1": found.naming.top1,
        "test_top5": found.naming.top5,
        "test_image_to_text_r1": found.retrieval.image_to_text[1],
        "test_text_to_image_r1": found.retrieval.text_to_image[1],
        "test_script_balanced": found.attributes["script"].balanced,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder of the drawn pairs")
    torch.set_num_threads(1)
    page = {
        "command": "python paper_figures/reference_scores.py",
        "scores": {name: float(f"{value:.10g}") for name, value in scores(parser.parse_args().cache).items()},
    }
    (HERE / "results" / "reference.json").write_text(json.dumps(page, indent=2) + "\n")
