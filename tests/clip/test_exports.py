"""Exports of a run: at its end, while it goes on, of any checkpoint; runs that go on from another's state."""

import json
import subprocess

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from experiments.clip.models.clip import load_model
from experiments.clip.run import main


@pytest.fixture(scope="module")
def words(glyph_cache):
    return [
        *("train", "--model", "glyph-micro", "--size", "small", "--cache", str(glyph_cache), "--method", "openclip"),
        *("--batch-size", "64", "--warmup", "1", "--validations", "2", "--logs", "jsonl"),
    ]


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """Return a run of two epochs, three steps each, with an export after each epoch and after four steps."""
    out = tmp_path_factory.mktemp("finished") / "run [1] {x}"
    options = ("--epochs", "2", "--ema", "0.5", "--export-epochs", "1", "--export-steps", "4", "--keep", "3")
    assert main([*words, *options, "--checkpoint-steps", "3", "--out", str(out)]) == 0
    return out


def weights(folder):
    return load_file(folder / "open_clip_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_models_are_exported_by_epochs_and_by_steps(finished):
    """Also in a folder whose name has brackets."""
    names = {"epoch-1", "step-4", "epoch-2"}
    assert {path.name for path in (finished / "exports").iterdir()} == names | {f"{name}-ema" for name in names}
    assert same(weights(finished / "exports" / "epoch-2"), weights(finished / "model"))
    assert same(weights(finished / "exports" / "epoch-2-ema"), weights(finished / "model-ema"))
    assert not same(weights(finished / "exports" / "epoch-1"), weights(finished / "exports" / "step-4"))


def test_a_checkpoint_is_exported_as_the_run_exported_it(finished, tmp_path, capsys):
    assert main(["export", str(finished / "checkpoints" / "step-00000003"), "--out", str(tmp_path / "three")]) == 0
    assert same(weights(tmp_path / "three"), weights(finished / "exports" / "epoch-1"))
    assert main(["export", str(finished), "--ema"]) == 0
    assert "holds the model after 6 steps" in capsys.readouterr().out
    assert same(weights(finished / "exports" / "step-00000006-ema"), weights(finished / "model-ema"))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'three'}")
    assert same(dict(model.state_dict()), weights(tmp_path / "three"))
    assert main(["export", str(finished), "--out", str(tmp_path / "half"), "--weights", "float16"]) == 0
    assert weights(tmp_path / "half")["text_projection"].dtype == torch.float16


def test_an_export_of_nothing_or_of_a_damaged_checkpoint_is_refused(finished, tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert "has no checkpoint: name the folder of a run" in capsys.readouterr().err
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", finished, run], check=True)
    part = run / "checkpoints" / "step-00000006" / "part-0-of-1.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert main(["export", str(run)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert not (run / "exports" / "step-00000006" / "open_clip_model.safetensors").exists()


def test_a_command_that_is_refused_leaves_the_configuration_and_the_logs(words, finished, capsys):
    kept = {name: (finished / name).read_bytes() for name in ("config.json", "log.jsonl", "run.json")}
    for other in (("--epochs", "3"), ("--epochs", "2", "--lr", "1e-3"), ("--epochs", "2", "--best", "nosuch")):
        assert main([*words, "--ema", "0.5", *other, "--out", str(finished)]) == 2
    assert "--best nosuch is no metric" in capsys.readouterr().err
    assert kept == {name: (finished / name).read_bytes() for name in kept}


@pytest.mark.slow
def test_more_epochs_go_on_from_a_finished_run(words, finished, tmp_path, capsys):
    out = tmp_path / "longer"
    longer = [*words, "--ema", "0.5", "--out", str(out), "--resume"]
    assert main([*longer, str(finished), "--epochs", "2"]) == 2
    assert "has 6 steps, this run ends with 6: raise --epochs" in capsys.readouterr().err
    assert main([*longer, str(finished), "--epochs", "4", "--batch-size", "32"]) == 2
    assert "was made with batch_size=64, now it is 32: only accumulation, " in capsys.readouterr().err
    assert main([*words, "--ema", "0.5", "--epochs", "4", "--out", str(finished)]) == 2
    assert "epochs=2, now it is 4: choose another --out or delete that folder, or go on from it by" in (
        capsys.readouterr().err
    )
    for _ in range(2):  # given again, it has a checkpoint of its own
        assert main([*longer, str(finished), "--epochs", "4"]) == 0
        record = json.loads((out / "run.json").read_text())
        assert [each["step"] for each in record["history"]] == [12]
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["samples_trained"] for line in steps if "lr" in line] == [500, 600]


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_with_its_own_options_repeats_the_rest(words, finished, tmp_path):
    """The state is all there is: weights, averages and optimizer after the second epoch are those of the first run."""
    start = finished / "checkpoints" / "step-00000003"
    words = [*words, "--ema", "0.5", "--epochs", "2", "--out", str(tmp_path / "again"), "--resume", str(start)]
    assert main(words) == 0
    for name in ("model", "model-ema"):
        assert same(weights(tmp_path / "again" / name), weights(finished / name))
    assert load_model(tmp_path / "again" / "model").model.visual.conv1.weight.isfinite().all()


@pytest.mark.slow
def test_a_copy_elsewhere_resumes_on_another_machine(words, tmp_path):
    there = f"file://{tmp_path}/there"
    options = [*words, "--epochs", "2", "--remote-sync", there, "--out"]
    assert main([*options, str(tmp_path / "a" / "run")]) == 0
    copied = {path.name for path in (tmp_path / "there" / "run").iterdir()}
    assert {"checkpoints", "model", "epoch_2.pt", "config.json", "run.json", "log.jsonl"} == copied
    assert main([*options, str(tmp_path / "b" / "run")]) == 0
    logs = [(tmp_path / name / "run" / "log.jsonl").read_text() for name in "ab"]
    assert logs[0] == logs[1]  # no step was taken again
    assert same(weights(tmp_path / "a" / "run" / "model"), weights(tmp_path / "b" / "run" / "model"))
