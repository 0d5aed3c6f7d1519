"""Batches of a task: full ones across shards, and the part that is named when one cannot be decoded."""

import pytest
import torch
from task_folders import ABOUT, CAPTIONS, DATACOMP, LABELS, TARGETS, TASKS

from experiments.clip.errors import UserError
from experiments.clip.evaluation.task_batches import TaskBatches
from experiments.clip.evaluation.tasks import open_tasks


def batches(clip, folder, size):
    made = TaskBatches(open_tasks([folder])[0], size, clip.preprocess)
    return made, [made(number) for number in range(len(made))]


@pytest.mark.parametrize("size", [1, 4, 11, 64])
def test_batches_are_full_whatever_the_shards(size, reference, tmp_path):
    made, decoded = batches(reference, TASKS["classification"](tmp_path / "task"), size)
    assert [batch.first for batch in decoded] == list(range(0, len(LABELS), size))
    assert [len(batch.labels) for batch in decoded[:-1]] == [size] * (len(decoded) - 1)
    assert [label for batch in decoded for label in batch.labels] == LABELS
    assert made.end(len(made) - 1) == made.end(99) == len(LABELS)
    whole = batches(reference, tmp_path / "task", len(LABELS))[1][0]
    assert torch.equal(torch.cat([batch.images for batch in decoded]), whole.images)


def test_labels_are_of_the_kind_of_task(reference, tmp_path):
    _, (captions,) = batches(reference, TASKS["retrieval"](tmp_path / "captions"), 64)
    assert captions.labels == CAPTIONS
    _, (targets,) = batches(reference, TASKS["multilabel"](tmp_path / "targets"), 64)
    assert [label.tolist() for label in targets.labels] == TARGETS.astype(int).tolist()
    _, (groups,) = batches(reference, DATACOMP["wds_wilds-fmow_test"](tmp_path), 64)
    assert groups.labels == LABELS and groups.numbers.tolist() == ABOUT[:, :2].tolist()
    _, (first, _) = batches(reference, DATACOMP["wds_winogavil_test"](tmp_path), 3)
    assert [len(label.is_right) for label in first.labels] == [5, 6, 10] and len(first.images) == 21


def test_a_file_that_is_gone_is_named(reference, tmp_path):
    folder = TASKS["classification"](tmp_path / "task")
    made = TaskBatches(open_tasks([folder])[0], 4, reference.preprocess)
    (folder / "test" / "1.tar").unlink()
    made(0)
    with pytest.raises(UserError, match=r"a member in .*1\.tar is of no use \(.*No such file"):
        made(1)
