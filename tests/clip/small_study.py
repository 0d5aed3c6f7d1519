"""`run.py study` with a grid of six trainings of seconds: ``python tests/clip/small_study.py study ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file

from experiments.clip.cli.options import Data, Train
from experiments.clip.run import main
from experiments.clip.study import grid as study_grid
from experiments.clip.study.cells import Cell, reference_cell
from experiments.clip.training.options import CheckpointPolicy, Loss, Optimization


def training(loss, seed=0, split="train"):
    return Train(
        model="glyph-micro",
        split=split,
        data=Data("swapped", "small"),
        loss=loss,
        optimization=Optimization(epochs=4, batch_size=32, warmup=2),
        seed=seed,
        keeping=CheckpointPolicy(checkpoint_minutes=0.0005),
        validations=2,
    )


REFERENCES = {"poor": training(Loss(method="openclip"), split="reference")}


def references(_):
    return [reference_cell("poor", REFERENCES["poor"])]


def methods(_):
    for seed in (0, 1):
        yield Cell("drrho", training(Loss(), seed))
        yield Cell("openclip", training(Loss(method="openclip"), seed))


def steered(_):
    yield Cell("drrho", training(Loss()), "shipped")  # the first of the methods
    yield Cell("drrho", training(Loss()), reference="poor")


STUDIES = {"references": references, "methods": methods, "steered": steered}


def install():
    """Put this grid in the place of the real one."""
    for own, other in ((study_grid.STUDIES, STUDIES), (study_grid.REFERENCES, REFERENCES)):
        own.clear()
        own.update(other)


if __name__ == "__main__":
    install()
    sys.exit(main(sys.argv[1:]))
