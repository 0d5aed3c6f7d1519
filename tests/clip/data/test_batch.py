"""Rows of a batch: all that belongs to a pair stays together."""

import pytest
import torch

from experiments.clip.data.batch import Batch


@pytest.mark.parametrize("has_reference", [False, True])
def test_rows_of_a_batch_belong_together(has_reference):
    index = torch.arange(10, 16)
    image, text = index.float().view(6, 1, 1, 1).expand(6, 3, 2, 2), index.view(6, 1)
    inputs = (image[:, 0] / 2, text * 2) if has_reference else None
    rows = torch.tensor([4, 0, 4])
    part = Batch(image, text, index, {"cut off": 2}, inputs).rows(rows, rows)
    assert part.index.tolist() == part.text[:, 0].tolist() == part.image[:, 2, 1, 1].tolist() == [14, 10, 14]
    assert part.skipped == {"cut off": 2}
    if has_reference:
        assert part.reference_inputs[0][:, 0, 0].tolist() == [7, 5, 7]
        assert part.reference_inputs[1][:, 0].tolist() == [28, 20, 28]
    else:
        assert part.reference_inputs is None


def test_a_batch_has_no_skips_and_no_reference_unless_it_is_given_them():
    batch = Batch(torch.zeros(0, 3, 2, 2), torch.zeros(0, 1), torch.zeros(0))
    assert batch.skipped == {} and batch.reference_inputs is None
