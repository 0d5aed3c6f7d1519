"""Checkpoints that are read: damaged ones, of other settings or versions."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from training_runs import contrastive, run

from experiments.clip.distributed import ONE_PROCESS
from experiments.clip.errors import Interrupted, UserError
from experiments.clip.io import files
from experiments.clip.io.checksums import MANIFEST, checksum, fault_of, write_manifest
from experiments.clip.models.clip import new_model
from experiments.clip.run import main
from experiments.clip.training import checkpoint as checkpoint_module
from experiments.clip.training.checkpoint import (
    FORMAT,
    Checkpoint,
    Damaged,
    check_sound,
    latest_checkpoint,
    set_aside_damaged,
    step_folders,
)
from experiments.clip.training.checkpoint_writer import CheckpointWriter
from experiments.clip.training.methods import OpenCLIP

PART = "part-0-of-1.safetensors"


def test_checkpoint_of_other_settings_is_refused(pairs, tmp_path):
    run(pairs, OpenCLIP(), tmp_path / "c")
    with pytest.raises(UserError, match="method=OpenCLIP, now it is GlobalContrastive"):
        run(pairs, contrastive(len(pairs)), tmp_path / "c")
    with pytest.raises(UserError, match="seed=0, now it is 1"):
        run(pairs, OpenCLIP(), tmp_path / "c", seed=1)


@pytest.mark.slow
def test_damaged_checkpoint_is_refused(pairs, tmp_path):
    run(pairs, OpenCLIP(), tmp_path / "c")
    found = latest_checkpoint(tmp_path / "c")
    part = found / "part-0-of-1.safetensors"
    data = part.read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[8:]):
        part.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            run(pairs, OpenCLIP(), tmp_path / "c")
    part.unlink()
    with pytest.raises(UserError, match="damaged"):
        Checkpoint(found)


@pytest.mark.slow
def test_checkpoint_of_another_version_is_refused(pairs, tmp_path):
    run(pairs, OpenCLIP(), tmp_path / "c")
    part = latest_checkpoint(tmp_path / "c") / "part-0-of-1.safetensors"
    with safe_open(part, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    del metadata["format"]
    save_file(tensors, tmp_path / "older", metadata)
    (tmp_path / "older").replace(part)
    with pytest.raises(UserError, match=f"has format None, this program reads {FORMAT}"):
        run(pairs, OpenCLIP(), tmp_path / "c")


@pytest.mark.slow
def test_a_read_that_fails_for_a_while_is_no_damage(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAITS", (0.0,) * 5)
    run(pairs, OpenCLIP(), tmp_path / "c")
    opens, failures = checkpoint_module.safe_open, [5, 116]

    def failing(*arguments):
        if failures:
            raise SafetensorError(f"I/O error: what it says (os error {failures.pop()})")
        return opens(*arguments)

    monkeypatch.setattr(checkpoint_module, "safe_open", failing)
    run(pairs, OpenCLIP(), tmp_path / "c")
    failures.extend([5] * 100)
    with pytest.raises(UserError, match=r"cannot read checkpoint .* \(Input/output error\): check the storage"):
        run(pairs, OpenCLIP(), tmp_path / "c")


@pytest.mark.slow
def test_parameters_without_gradients_are_resumed(pairs, tmp_path):
    """A model with a bias that the method does not use: the optimizer has no state of it."""

    def start(folder, stop=int):
        clip = new_model("glyph-micro", 0, sigmoid=True)
        return run(pairs, OpenCLIP(), folder, clip=clip, stop=stop)[0]

    left = iter([False] * 4 + [True])
    with pytest.raises(Interrupted):
        start(tmp_path / "b", lambda: next(left))
    whole, again = start(tmp_path / "a"), start(tmp_path / "b")
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


# --- what a disk has changed ------------------------------------------------------------------------------------------


@pytest.fixture
def two_steps(tmp_path):
    """The checkpoints of steps 1 and 2 of two ranks' parts, written by real writers in turn."""
    for step in (1, 2):
        writer = CheckpointWriter(tmp_path, {"lr": 0.1}, ONE_PROCESS, keep=2)
        weight = torch.arange(1000.0) + step
        writer.start({"model.weight": weight, "model.bias": -weight}, {"running.log_u": weight}, {}, {"step": step})
        writer.commit()
    return tmp_path


def flip(path, place=-3):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "a bit": lambda one, two: flip(two / PART),
    "a bit of the header": lambda one, two: flip(two / PART, 30),
    "a bit of the format": lambda one, two: flip(two / PART, (two / PART).read_bytes().index(b'"format"') + 3),
    "zeros at the end": lambda one, two: (two / PART).write_bytes((two / PART).read_bytes()[:-512] + bytes(512)),
    "cut": lambda one, two: (two / PART).write_bytes((two / PART).read_bytes()[:-512]),
    "a part of another step": lambda one, two: shutil.copy(one / PART, two / PART),
    "all of another step": lambda one, two: [shutil.copy(path, two / path.name) for path in one.iterdir()],
    "a bit of the manifest": lambda one, two: flip(two / MANIFEST, 30),
    "an empty manifest": lambda one, two: (two / MANIFEST).write_bytes(b""),
    "a manifest of something else": lambda one, two: (two / MANIFEST).write_text('{"xxh3_128": [1, {}]}'),
    "no manifest": lambda one, two: (two / MANIFEST).unlink(),
    "no part": lambda one, two: (two / PART).unlink(),
    "nothing": lambda one, two: [path.unlink() for path in two.iterdir()],
    "another part": lambda one, two: shutil.copy(two / PART, two / "part-0-of-2.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_the_last(damage, two_steps):
    one, two = sorted(step_folders(two_steps))
    check_sound(one)
    check_sound(two)
    assert set_aside_damaged(two_steps, ONE_PROCESS) == []
    damage(one, two)
    with pytest.raises(Damaged, match="step-00000002 is damaged"):
        check_sound(two)
    [(path, moved_to, fault)] = set_aside_damaged(two_steps, ONE_PROCESS)
    assert path == two and moved_to.is_dir() and fault
    assert latest_checkpoint(two_steps) == one
    assert set_aside_damaged(two_steps, ONE_PROCESS) == []
    flip(one / PART)
    with pytest.raises(UserError, match=r"step-00000001 is damaged .*, and there is none before it"):
        set_aside_damaged(two_steps, ONE_PROCESS)
    with pytest.raises(UserError, match=r"the last checkpoint is damaged, .*damaged-step-00000001"):
        set_aside_damaged(two_steps, ONE_PROCESS)  # nor does it start from nothing when it is given again


def test_checksums_of_another_version_are_no_damage(two_steps):
    two = max(step_folders(two_steps))
    with safe_open(two / PART, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    save_file(tensors, two / PART, metadata | {"format": "2"})
    (two / MANIFEST).write_text(json.dumps({"sha256": {PART: "00"}}))
    for look in (check_sound, lambda path: set_aside_damaged(path.parent, ONE_PROCESS)):
        with pytest.raises(UserError, match=f"has format 2, this program reads {FORMAT}: resume with the version that"):
            look(two)
    assert two.is_dir()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_share_the_reading(rank, two_steps):
    two = max(step_folders(two_steps))
    (two / PART).rename(two / "part-0-of-2.safetensors")
    shutil.copy(two / "part-0-of-2.safetensors", two / "part-1-of-2.safetensors")
    names = ["part-0-of-2.safetensors", "part-1-of-2.safetensors"]
    write_manifest(two, {name: checksum(two / name) for name in names})
    flip(two / names[rank])
    faults = [fault_of(two, names, each, 2) for each in (0, 1)]
    assert [bool(fault) for fault in faults] == [each == rank for each in (0, 1)]


@pytest.mark.slow
def test_a_damaged_last_checkpoint_gives_the_run_that_resumes_from_the_one_before(glyph_cache, tmp_path, capsys):
    options = [
        "train",
        "--method",
        "openclip",
        "--model",
        "glyph-micro",
        "--size",
        "small",
        "--cache",
        str(glyph_cache),
    ]
    options += ["--epochs", "2", "--batch-size", "32", "--checkpoint-steps", "3", "--log-every", "1"]
    assert main([*options, "--out", str(tmp_path / "a")]) == 0
    whole = load_file(tmp_path / "a" / "model" / "open_clip_model.safetensors")
    flip(latest_checkpoint(tmp_path / "a" / "checkpoints") / PART)
    capsys.readouterr()
    assert main([*options, "--out", str(tmp_path / "a")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "step-00000010 is damaged (part-0-of-1.safetensors is not as it was written" in said
    assert "resuming from" in said and "step-00000009" in said
    again = load_file(tmp_path / "a" / "model" / "open_clip_model.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)
