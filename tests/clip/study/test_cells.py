"""What tables call the captions of both data sets, and a reference's training."""

import pytest

from experiments.clip.cli.options import Data, Train
from experiments.clip.study.cells import captions_label, reference_cell
from experiments.clip.training.options import Loss


@pytest.mark.parametrize(
    "data, label",
    [
        (Data("vague"), "vague"),
        (Data(kind="icons"), "natural"),
        (Data(kind="icons", swapped=0.2), "swapped-20"),
    ],
)
def test_captions_have_a_label(data, label):
    assert captions_label(data) == label


def test_the_training_of_a_reference_is_called_by_its_method_and_name():
    train = Train(loss=Loss(method="openclip"))
    assert reference_cell("weak", train) == reference_cell("weak", train)
    assert (reference_cell("weak", train).method, reference_cell("weak", train).setting) == ("openclip", "weak")
