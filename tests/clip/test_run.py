"""The command line: the quick demo as a user runs it, and refusals in one line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments.clip.cli import commands
from experiments.clip.cli.presets import PRESETS
from experiments.clip.io.files import write_atomically
from experiments.clip.run import main, parse
from experiments.clip.training.checkpoint import latest_checkpoint
from experiments.clip.training.options import SHIPPED_REFERENCE
from tests.clip.launched import PROGRAM, Launched


@pytest.mark.slow
def test_quick_demo_interrupted_resumed_and_reused(glyph_cache, tmp_path):
    """On a few glyphs that are there already: to draw them is `test_drawing`'s."""
    arguments = ("--quick", "--cache", glyph_cache, "--out", tmp_path / "out")
    process = Launched(*arguments)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "unsteered" / "config.json").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(90)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "resume with: python experiments/clip/run.py --quick" in errors.strip().splitlines()[-1]

    process = Launched(*arguments)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert "naming top-1" in output
    assert "reusing" in output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["scores"]) == {"reference", "unsteered", "steered"}
    assert results["scores"]["reference"]["naming"]["top1"] > 0.3
    assert results["runs"]["steered"]["settings"]["temperature"] > 0
    for name in ("curves.png", "predictions.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(2**24)) > 10
    assert "| naming top-1 |" in (tmp_path / "out" / "report.md").read_text()

    trained = (tmp_path / "out" / "steered" / "model" / "open_clip_model.safetensors").read_bytes()
    process = Launched(*arguments)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    assert "resuming from" in output
    assert (tmp_path / "out" / "steered" / "model" / "open_clip_model.safetensors").read_bytes() == trained


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bogus", "3"], "Unrecognized options: --bogus, 3"),
        (["--captions", "foo"], "--captions must be one of clean, vague, swapped, got 'foo'"),
        (["fly"], "no command is called 'fly': choose one of demo"),
        (["train", "--preset", "foo"], "no preset is called 'foo': choose one of glyph-reference"),
        (["train", "--epochs", "x"], "--epochs.*'x'"),
        (["train", "--epochs", "0"], "--epochs.*0"),
        (["train", "--batch-size", "1"], "--batch-size.*1"),
        (["train", "--temperature", "-1"], "--temperature.*-1"),
        (["train", "--final-gamma", "2"], "--final-gamma.*2"),
        (["train", "--model", "nosuch", "--method", "openclip"], "no model is called 'nosuch'"),
        (["train", "--method", "openclip", "--temperature", "0.1"], "--temperature 0.1 has no part in this run"),
        (["train", "--method", "fastclip", "--temperature", "0.1", "--coefficient", "0.5"], "--coefficient 0.5 has no"),
        (["train", "--rho", "0.5"], "--rho 0.5 has no part in this run: it is for --temperature-scheme global"),
        (["train", "--method", "siglip", "--reference", "there"], "--reference there has no part"),
        (["train", "--divergence", "chi-square", "--log-step", "1"], "--log-step 1.0 has no part"),
        (["train", "--temperature-bounds", "0.5", "0.1"], "--temperature-bounds must be two numbers, 0 < low <= high"),
        (["train", "--temperature", "2", "--temperature-scheme", "global"], "--temperature 2.0 must lie within"),
        (["train", "--method", "fastclip"], "--temperature auto needs a reference, which fastclip has not"),
        (["train", "--optimizer", "nosuch"], "--optimizer nosuch is not known"),
        (["train", "--schedule", "cooldown"], "--schedule cooldown and --cooldown-steps need each other"),
        (["train", "--schedule", "constant", "--lr-min", "1e-5"], "--lr-min 1e-05 has no part"),
        (["train", "--clip-norm", "-1"], "--clip-norm must be positive, got -1"),
        (["train", "--ema", "1"], "--ema must be in"),
        (["train", "--device", "cuda"], "--device cuda needs a GPU"),
        (["evaluate"], "Missing"),
        (["evaluate", "nowhere"], "no model is called 'nowhere'"),
        (["--reference", "nowhere"], "no model is called 'nowhere'"),
    ],
)
def test_wrong_options_get_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("run.py: error: ")
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


def test_cache_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["prepare", "--size", "small", "--cache", str(tmp_path / "file" / "cache")]
    assert main(arguments) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.slow
def test_output_folder_that_cannot_be_written_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["train", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A write past the file-size limit of a real process fails as on a full disk."""
    path = tmp_path / "state"
    write_atomically(path, b"old")
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from experiments.clip.errors import UserError\n"
        "from experiments.clip.io.files import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_atomically(Path(sys.argv[1]), bytes(5000))\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert "cannot write" in done.stdout
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_presets_are_overridden_by_options():
    options = parse(["train", "--preset", "glyph-reference", "--seed", "3"])
    assert options.seed == 3
    assert options.loss == PRESETS["glyph-reference"].loss
    assert options.split == "reference"


@pytest.mark.slow
def test_training_from_a_catalog_validated_on_tasks_and_exported(tmp_path, capsys):
    """From made-up pairs to scores, command by command; a wrong task ends the run at once, workers and all."""
    catalog, out = tmp_path / "catalog", tmp_path / "out"
    assert main(["catalog", "synthetic:96:32", "--out", str(catalog), "--workers", "0"]) == 0
    assert "96 pairs" in capsys.readouterr().out
    assert (
        main(["glyph-tasks", "--size", "small", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "t")]) == 0
    )
    tasks = [str(tmp_path / "t" / name) for name in ("glyph-script", "tasks.json")]  # as a shell gives them for t/*
    options = ["train", "--method", "openclip", "--catalog", str(catalog), "--batch-size", "32", "--epochs", "1"]
    options += ["--model", "glyph-small"]
    options += ["--validations", "1", "--workers", "1", "--out", str(out)]
    for wrong, message in (
        (["--tasks", str(tmp_path / "t" / "tasks.json")], "names no folder: name the folders beside it"),
        (["--tasks", *tasks, "--best", "glyph-script/acc"], "--best glyph-script/acc is no metric of the validations"),
    ):
        assert main([*options, *wrong]) == 2
        assert message in capsys.readouterr().err
        assert not (out / "checkpoints").exists() and not (out / "log.jsonl").exists()
    assert main([*options, "--tasks", *tasks, "--best", "glyph-script/acc1"]) == 0
    history = json.loads((out / "run.json").read_text())["history"]
    accuracy = f"{history[-1]['glyph-script/acc1']:.4f}"
    assert f"validation step 3 of 3: glyph-script acc1 {accuracy}, " in capsys.readouterr().out
    assert main(["evaluate", str(out / "model"), "--tasks", *tasks, "--out", str(tmp_path / "scores.json")]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["glyph-script", "acc1", accuracy] == [table[-1][0], *table[-1][2:4]]
    (row,) = json.loads((tmp_path / "scores.json").read_text())["results"]
    assert row["metrics"] == {
        name.removeprefix("glyph-script/"): pytest.approx(value, abs=1e-6)
        for name, value in history[-1].items()
        if name.startswith("glyph-script/")
    }
    assert main(["evaluate", str(out / "model")]) == 2
    assert "was not trained on the embedded pairs" in capsys.readouterr().err
    weights = torch.load(out / "epoch_1.pt", weights_only=True)["state_dict"]
    assert all(
        torch.equal(value, load_file(out / "model" / "open_clip_model.safetensors")[key])
        for key, value in weights.items()
    )
    assert main(["train", "--tasks", *tasks]) == 2
    assert "has no part in this run: it is for --catalog" in capsys.readouterr().err


@pytest.mark.slow
def test_steered_training_on_a_catalog_repeated_from_its_configuration(tmp_path, capsys):
    """Features computed beside the target, or cached in two views; locked, started from weights, patches dropped."""
    catalog, features = str(tmp_path / "catalog"), str(tmp_path / "features")
    assert main(["catalog", "synthetic:96:48", "--out", catalog, "--workers", "0"]) == 0
    short = ["train", "--catalog", catalog, "--batch-size", "32", "--epochs", "1", "--validations", "1"]
    steered = ["--reference", str(SHIPPED_REFERENCE)]
    short += ["--model", "glyph-small", *steered]
    assert main([*short, "--out", str(tmp_path / "live")]) == 0
    assert main(["cache-reference", "--catalog", catalog, "--out", features, "--views", "2", *steered]) == 0
    cached = [*short, "--reference-features", features, "--workers", "1", "--patch-dropout", "0.25", "--lock", "image"]
    cached += ["--pretrained", str(tmp_path / "live" / "epoch_1.pt"), "--seed", "3"]
    assert main([*cached, "--out", str(tmp_path / "a")]) == 0
    assert main(["train", "--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")]) == 0
    assert "views of a sample: 2" in capsys.readouterr().out
    live, first, again = (
        load_file(tmp_path / name / "model" / "open_clip_model.safetensors") for name in ("live", "a", "b")
    )
    for key, value in first.items():
        assert torch.equal(again[key], value), key
        if key.startswith("visual."):
            assert torch.equal(live[key], value), key
    assert not torch.equal(live["text_projection"], first["text_projection"])
    settings = json.loads((tmp_path / "a" / "run.json").read_text())["settings"]
    assert (settings["reference_views"], settings["lock"]) == (2, ["image"])
    # Another reference's features are refused, and a checkpoint of other settings is not taken up.
    other = ["--reference", str(tmp_path / "live" / "model"), "--out", str(tmp_path / "d")]
    assert main([*cached, *other]) == 2
    assert "were made for another reference" in capsys.readouterr().err
    assert main([*cached, "--out", str(tmp_path / "a"), "--patch-dropout", "0.5"]) == 2
    assert "was made with patch_dropout=0.25, now it is 0.5" in capsys.readouterr().err
    assert main([*cached, "--out", str(tmp_path / "e"), "--pretrained", str(tmp_path / "none.pt")]) == 2
    assert "there is no file of weights" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_at_the_end_of_its_time_writes_its_state_and_is_queued_again(glyph_cache, tmp_path):
    """The sbatch script itself, with srun and scontrol as a node has them: one task, and a note of what is asked."""
    bin = tmp_path / "bin"
    bin.mkdir()
    stated = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    (bin / "srun").write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec env "
        + " ".join(f"{key}={value}" for key, value in stated.items())
        + ' "$@"\n'
    )
    (bin / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n')
    for path in bin.iterdir():
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environment |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n1"}
    out = tmp_path / "out"
    options = ("--method", "openclip", "--size", "small", "--cache", glyph_cache, "--out", out, "--epochs", "5000")
    process = subprocess.Popen(
        ["bash", PROGRAM.parent / "slurm" / "train.sbatch", *map(str, options)],
        cwd=PROGRAM.parents[2],
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not (out / "log.jsonl").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    (task,) = subprocess.check_output(["pgrep", "-g", str(os.getpgid(process.pid)), "-f", "run.py"], text=True).split()
    os.kill(int(task), signal.SIGUSR1)
    output, errors = process.communicate(timeout=90)
    assert process.returncode == os.EX_TEMPFAIL, errors
    assert latest_checkpoint(out / "checkpoints") is not None
    assert (tmp_path / "asked").read_text().splitlines() == ["show hostnames n1", "requeue 77"]
    assert "back into the queue" in output


def test_the_command_that_resumes_can_be_pasted(tmp_path, monkeypatch, capsys):
    """Names with spaces, and patterns that a shell would expand, are quoted."""
    monkeypatch.setattr(commands, "catalog", lambda options: os.kill(os.getpid(), signal.SIGTERM))
    words = ["catalog", "my data/{0..9}.tar", "*.csv", "--out", f"{tmp_path}/o (2)"]
    assert main(words) == os.EX_TEMPFAIL
    _, _, again = capsys.readouterr().err.strip().partition("resume with: ")
    assert shlex.split(again)[-len(words) :] == words
