"""One training from its options to the exported model, in this process."""

import json

import pytest
import torch

from experiments.clip.catalog.catalog import make_catalog
from experiments.clip.cli.train import run_training
from experiments.clip.errors import UserError
from experiments.clip.io.files import claimed
from experiments.clip.models.clip import load_model
from experiments.clip.run import main, parse


@pytest.fixture(scope="module")
def words(glyph_cache):
    return [
        *("train", "--model", "glyph-micro", "--size", "small", "--cache", str(glyph_cache), "--method", "openclip"),
        *("--epochs", "2", "--batch-size", "64", "--warmup", "1", "--validations", "2", "--logs", "jsonl"),
    ]


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main([*words, "--best", "naming_top1", "--ema", "0.5", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_its_options_records_and_models(finished):
    record = json.loads((finished / "run.json").read_text())
    assert [each["step"] for each in record["history"]] == [3, 6]
    assert record["options"] == json.loads((finished / "config.json").read_text())
    assert list(record["settings"])[:5] == ["model", "pretrained", "lock", "unlocked_groups", "patch_dropout"]
    for name in ("model", "model-ema", "model-best"):
        assert load_model(finished / name).model.visual.conv1.weight.isfinite().all()
    assert {path.name for path in finished.glob("epoch_2*")} == {"epoch_2.pt", "epoch_2-ema.pt"}


@pytest.mark.slow
def test_scores_are_printed_and_written_at_each_validation(words, tmp_path, capsys):
    """Also where there is no terminal, as here."""
    assert main([*words, "--logs", "text", "--out", str(tmp_path / "run")]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation")]
    history = json.loads((tmp_path / "run" / "run.json").read_text())["history"]
    assert shown == [
        f"validation step {each['step']} of 6: naming_top1 {each['naming_top1']:.4f}, "
        f"naming_top5 {each['naming_top5']:.4f}"
        for each in history
    ]
    logged = [line.split("  ")[1:] for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    names = ("naming_top1", "naming_top5")
    assert [line for line in logged if line[1].startswith("validation")] == [
        [f"step {each['step']}", *(f"validation/{name} {each[name]:.6g}" for name in names)] for each in history
    ]


def test_a_metric_that_no_validation_has_is_refused_before_the_first_step(words, tmp_path, capsys):
    assert main([*words, "--best", "loss", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "--best loss is no metric of the validations: choose one of naming_top1, naming_top5" in error
    assert not (tmp_path / "run" / "log.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_ends_at_the_same_weights(words, finished):
    before = load_model(finished / "model").model.state_dict()
    assert main(["train", "--config", str(finished / "config.json")]) == 0
    after = load_model(finished / "model").model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_folder_that_another_run_writes_is_refused(words, tmp_path):
    (tmp_path / "out").mkdir()
    # Another process would hold it; within one, a lock is the process's own, so the claim is taken by a child.
    import multiprocessing

    held, release = multiprocessing.Event(), multiprocessing.Event()
    child = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "out" / ".claim", held, release))
    child.start()
    try:
        assert held.wait(30)
        with pytest.raises(UserError, match=r"--out .* is in use: wait for that run"):
            run_training(parse([*words, "--out", str(tmp_path / "out")]))
    finally:
        release.set()
        child.join()


def hold(path, held, release):
    with claimed(path):
        held.set()
        release.wait(60)


def test_a_run_on_a_catalog_says_what_is_larger_than_it_and_what_it_chose(tmp_path, capsys):
    make_catalog("synthetic:20:32", tmp_path / "catalog")
    words = ["train", "--catalog", str(tmp_path / "catalog"), "--model", "glyph-micro", "--method", "openclip"]
    words += ["--batch-size", "64", "--epochs", "2", "--warmup", "500", "--validations", "1", "--logs", "jsonl"]
    words += ["--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 steps, a warm-up of 500, towers in float32" in shown and "1 steps an epoch, 0 workers" in shown
    assert "--warmup 500 is not over when the run is, after 2 steps: the learning rate ends at 2e-06" in shown
    assert "--batch-size 64 is more than the 20 pairs of an epoch: every epoch is one step, on all of them" in shown
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["betas"], settings["adam_eps"], settings["precision"]) == ([0.9, 0.98], 1e-6, "float32")
    assert not {"momentum", "cooldown_power"} & set(settings)
