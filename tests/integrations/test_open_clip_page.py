"""STEER_OPEN_CLIP.md runs as printed: its commands, its change of open_clip_train's main program, its code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip_train
import pytest
import torch
from PIL import Image

from experiments.clip.training.options import SHIPPED_REFERENCE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "drrho" / "integrations" / "STEER_OPEN_CLIP.md").read_text()
PAIRS = 40
TINY = """{"embed_dim": 8, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
"text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}"""
#: Makes a model of this test known to open_clip, as `pip install` would one of its own.
LAUNCH = "import sys, runpy, open_clip; open_clip.add_model_config('models'); sys.argv = sys.argv[1:]; "


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def run(command, folder):
    found = {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=os.environ | found, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs and a reference, with the features that the page's commands have cached."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(SHIPPED_REFERENCE, folder / "reference")
    lines = ["filepath,title"]
    for number in range(PAIRS):
        Image.new("RGB", (32, 32), (6 * number, 255 - 6 * number, 50)).save(folder / f"{number}.png")
        lines.append(f"{folder}/{number}.png,digit number {number}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    for line in blocks("bash")[0].splitlines():
        program, script, *arguments = line.split()
        assert program == "python"
        run(
            [sys.executable, ROOT / script, *arguments, *(["--workers", "0"] if "catalog" in arguments[:1] else [])],
            folder,
        )
    return folder


def changed_lines(diff):
    return [line for line in diff.splitlines() if line[:1] == "+"]


def applied(diff, source):
    """Replace, one hunk after another, the lines that it begins with by those that it ends with."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines()
        old, new = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source


@pytest.mark.slow
def test_the_code_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    first, keys, loop = blocks("python")
    names = {}
    exec(first, names)
    assert len(names["features"]) == PAIRS
    exec(loop, names)
    assert names["image"].grad.norm() > 0 and torch.isfinite(names["value"])
    exec(keys, names)
    assert callable(names["index"])


@pytest.mark.slow
def test_open_clip_train_itself_is_steered_by_three_lines(folder):
    pytest.importorskip("pandas", reason="open_clip_train reads csv files with pandas")
    (diff,) = blocks("diff")
    assert len(changed_lines(diff)) <= 3
    source = (Path(open_clip_train.__file__).parent / "main.py").read_text()
    (folder / "steered_main.py").write_text(applied(diff, source))
    (folder / "my_reference.py").write_text(blocks("python")[0])
    (folder / "models").mkdir()
    (folder / "models" / "tiny.json").write_text(TINY)
    command = blocks("bash")[1].replace("\\\n", " ").replace("ViT-B-32", "tiny").split()
    runs = []
    for coefficient in (", coefficient=0.0", ""):
        program = (folder / "steered_main.py").read_text().replace("features)", f"features{coefficient})")
        (folder / "program.py").write_text(program)
        launch = f"{LAUNCH} runpy.run_path('program.py', run_name='__main__')"
        printed = run([sys.executable, "-c", launch, *command[1:-1], f"run-{len(runs)}", "--lr", "0.01"], folder)
        runs.append(re.findall(r"Contrastive_loss: ([\d.]+)", printed))
    plain, steered = runs
    assert len(steered) == len(plain) > 0
    assert all(one != other for one, other in zip(plain, steered, strict=True))
