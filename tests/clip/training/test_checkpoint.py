"""Checkpoints that are read: damaged ones, of other settings or versions."""

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from training_runs import contrastive, run

from experiments.clip.errors import Interrupted, UserError
from experiments.clip.io import files
from experiments.clip.models.clip import new_model
from experiments.clip.training import checkpoint as checkpoint_module
from experiments.clip.training.checkpoint import Checkpoint, latest_checkpoint
from experiments.clip.training.methods import OpenCLIP


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
    [part] = latest_checkpoint(tmp_path / "c").iterdir()
    with safe_open(part, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    del metadata["format"]
    save_file(tensors, tmp_path / "older", metadata)
    (tmp_path / "older").replace(part)
    with pytest.raises(UserError, match="has format None, this program reads 1"):
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
