"""Checkpoints that are written: complete, kept as the policy says, whatever the disk does."""

import dataclasses
import errno
import time

import pytest
import torch
from safetensors import SafetensorError
from training_runs import contrastive, run

from experiments.clip.distributed import Ranks
from experiments.clip.errors import Interrupted, UserError
from experiments.clip.io import files
from experiments.clip.training import checkpoint_writer as writer_module
from experiments.clip.training.checkpoint import Checkpoint, latest_checkpoint, step_folder
from experiments.clip.training.checkpoint_writer import CheckpointWriter
from experiments.clip.training.methods import OpenCLIP
from experiments.clip.training.options import CheckpointPolicy
from experiments.clip.training.state import best_record


def test_a_folder_that_is_moved_while_a_checkpoint_is_made_is_named(tmp_path):
    writer = CheckpointWriter(tmp_path / "c", {}, Ranks(), keep=2)
    writer.start({"weight": torch.zeros(3)}, {}, {}, {"step": 1})
    while writer.is_writing:
        time.sleep(0.01)
    (tmp_path / "c").rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"cannot write .*step-00000001 .*has disappeared"):
        writer.commit()
    (tmp_path / "c").write_text("")
    writer.start({"weight": torch.zeros(3)}, {}, {}, {"step": 2})
    with pytest.raises(UserError, match=r"cannot write .*(Not a directory|File exists)"):
        writer.commit()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_changes_after_the_start_is_not_in_the_checkpoint(kind, tmp_path):
    """Twice: the second is copied to where the first was."""
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device(kind)
    writer = CheckpointWriter(tmp_path, {}, Ranks(device=device), keep=2)
    weight, state = torch.zeros(2**20, device=device), torch.zeros(5, device=device)
    for step in (1, 2):
        weight.fill_(step)
        state.fill_(10 * step)
        writer.start({"weight": weight, "count": torch.tensor(step)}, {"state": state}, {}, {"step": step})
        weight.fill_(-1)
        state.fill_(-1)
    writer.commit()
    for step in (1, 2):
        kept = Checkpoint(step_folder(tmp_path, step))
        assert torch.equal(kept.full_tensors("")["weight"], torch.full((2**20,), float(step)))
        assert int(kept.full_tensors("")["count"]) == step
        assert kept.own[0]["state"].tolist() == [10 * step] * 5


@pytest.mark.slow
def test_checkpoints_are_whole_and_the_last_two_are_kept(pairs, tmp_path):
    def interrupted(steps):
        left = iter([False] * (steps - 1) + [True])
        with pytest.raises(Interrupted):
            run(pairs, contrastive(len(pairs)), tmp_path / "c", stop=lambda: next(left))

    for steps in (2, 1, 3):
        interrupted(steps)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000003", "step-00000006"]
    # One that was not finished counts for nothing.
    (tmp_path / "c" / ".partial-step-00000009").mkdir()
    assert latest_checkpoint(tmp_path / "c").name == "step-00000006"
    run(pairs, contrastive(len(pairs)), tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000006", "step-00000010"]
    run(pairs, contrastive(len(pairs)), tmp_path / "c")  # nothing is left to do; its last step is written again
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000006", "step-00000010"]
    files = {path.name for path in latest_checkpoint(tmp_path / "c").iterdir()}
    assert files == {"part-0-of-1.safetensors", "manifest.json"}


@pytest.mark.slow
def test_checkpoints_by_steps_and_the_best_are_kept(pairs, tmp_path):
    """Accuracies rise and fall: the highest one's checkpoint stays beside the last, also after an interruption."""
    scores = iter([0.1, 0.7, 0.3, 0.7, 0.2])
    keeping = CheckpointPolicy(checkpoint_minutes=1e9, checkpoint_steps=3, keep=1, best="accuracy")
    left = iter([False] * 6 + [True])

    def validated(**options):
        return run(
            pairs, OpenCLIP(), tmp_path / "c", keeping=keeping, validate=lambda: {"accuracy": next(scores)}, **options
        )

    with pytest.raises(Interrupted):
        validated(validations=5, stop=lambda: next(left))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000004", "step-00000007"]
    _, history, _ = validated(validations=5)
    assert [record["accuracy"] for record in history] == [0.1, 0.7, 0.3, 0.7, 0.2]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-00000004", "step-00000010"]
    assert best_record(history, "accuracy") is history[1]
    with pytest.raises(
        UserError, match=r"--best recall is no metric of the validations: choose one of step, samples_scored"
    ):
        run(pairs, OpenCLIP(), tmp_path / "c", keeping=dataclasses.replace(keeping, best="recall"))


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written(pairs, tmp_path, monkeypatch):
    """Writing is held up until three more steps are done: state is that of the step at which it began."""
    steps: list[int] = []
    saves = writer_module.save_file

    def slowly(*arguments):
        begun = len(steps)
        while len(steps) < min(begun + 3, 9):
            time.sleep(0.01)
        saves(*arguments)

    monkeypatch.setattr(writer_module, "save_file", slowly)
    keeping = CheckpointPolicy(checkpoint_minutes=1e9, checkpoint_steps=4)

    def on_step(step, total, log):
        steps.append(step)
        time.sleep(0.02)

    left = iter([False] * 8 + [True])
    with pytest.raises(Interrupted):
        run(pairs, contrastive(len(pairs)), tmp_path / "c", keeping=keeping, on_step=on_step, stop=lambda: next(left))
    monkeypatch.undo()
    plain, *_ = run(pairs, contrastive(len(pairs)), tmp_path / "plain")
    (tmp_path / "c" / "step-00000009").rename(tmp_path / "aside")
    assert latest_checkpoint(tmp_path / "c").name == "step-00000008"
    resumed, *_ = run(pairs, contrastive(len(pairs)), tmp_path / "c")
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


@pytest.mark.slow
def test_a_checkpoint_is_published_whatever_the_disk_says_of_its_folder(pairs, tmp_path, monkeypatch):
    """Syncing the folder fails once after the rename; then a process ends between the renames of a step made again."""
    monkeypatch.setattr(files, "WAITS", (0.0,) * 5)
    synced, failures = writer_module.sync, [OSError(errno.EIO, "Input/output error")]

    def failing(path):
        if path.name == "c" and failures:
            raise failures.pop()
        synced(path)

    monkeypatch.setattr(writer_module, "sync", failing)
    left = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        run(pairs, OpenCLIP(), tmp_path / "c", stop=lambda: next(left))
    assert not failures and [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000004"]
    (tmp_path / "c" / "step-00000004").rename(tmp_path / "c" / ".partial-old-step-00000004")
    (tmp_path / "c" / ".partial-step-00000004").mkdir()
    steps: list[int] = []
    run(pairs, OpenCLIP(), tmp_path / "c", on_step=lambda step, total, log: steps.append(step))
    assert steps == [5, 6, 7, 8, 9, 10]


@pytest.mark.slow
def test_the_best_of_an_older_checkpoint_stays_as_long_as_it_does(pairs, tmp_path):
    scores = iter([0.5, 0.1, 0.2, 0.3, 0.9])
    keeping = CheckpointPolicy(checkpoint_minutes=1e9, checkpoint_steps=3, keep=2, best="accuracy")
    run(pairs, OpenCLIP(), tmp_path / "c", keeping=keeping, validate=lambda: {"accuracy": next(scores)}, validations=5)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["step-00000002", "step-00000009", "step-00000010"]  # 2 is the best of 9
    (tmp_path / "c" / "step-00000010").rename(tmp_path / "aside")
    scores = iter([0.9])
    run(pairs, OpenCLIP(), tmp_path / "c", keeping=keeping, validate=lambda: {"accuracy": next(scores)}, validations=5)


@pytest.mark.slow
@pytest.mark.parametrize("number, attempts", [(errno.EIO, 6), (errno.ENOSPC, 1)])
def test_a_disk_that_fails_for_a_while_or_for_good(number, attempts, pairs, tmp_path, monkeypatch):
    """Errors of a network file system are waited for; a full disk ends the run, and earlier checkpoints stay."""
    monkeypatch.setattr(files, "WAITS", (0.0,) * 5)
    failures: list[int] = []
    saves = writer_module.save_file

    def failing(*arguments):
        if failures:
            raise SafetensorError(f"Error while serializing: I/O error: what it says (os error {failures.pop()})")
        saves(*arguments)

    monkeypatch.setattr(writer_module, "save_file", failing)
    keeping = CheckpointPolicy(checkpoint_minutes=1e9, checkpoint_steps=4)

    def at_step(step, total, log):
        failures.extend([number] * 50 * (step == 7))

    with pytest.raises(UserError, match=r"cannot write .*part-0-of-1.safetensors( after 6 attempts)? \("):
        run(pairs, OpenCLIP(), tmp_path / "c", keeping=keeping, on_step=at_step)
    assert len(failures) == 50 - attempts
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000004"]
    failures[:] = [errno.EIO] * 3
    run(pairs, OpenCLIP(), tmp_path / "c", keeping=keeping)
    assert not failures
    assert latest_checkpoint(tmp_path / "c").name == "step-00000010"
