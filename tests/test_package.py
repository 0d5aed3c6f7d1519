"""What is built and installed: source distribution, wheel, the command `drrho-clip`, and the lowest versions allowed.

The wheel is built from the source distribution, as pip does, and installed into an environment that sees the packages
of the one which runs the tests, but not the checkout.
"""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import drrho

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WEIGHTS = {f"drrho_clip/{data}/reference_model/open_clip_model.safetensors" for data in ("glyphs", "icons")}
MILLION = 10**6


def run(*words, **more):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment, **more)


def checked(*words, **more):
    done = run(*words, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution."""
    folder = tmp_path_factory.mktemp("source")
    checked(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    checked(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "built", cwd=unpacked)
    (archive,) = (folder / "built").iterdir()
    return archive


@pytest.fixture(scope="module")
def sizes(wheel):
    """Compressed bytes of each file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.compress_size for entry in archive.infolist()}


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The folder of commands of an environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("environment") / "here"
    checked(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    checked(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", wheel)
    own = checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    packages = Path(np.__file__).parents[1]  # whose own .pth files are not read
    Path(own, "others.pth").write_text(f"{packages}\n")
    return folder / "bin"


def test_version_and_authors():
    assert drrho.__version__ == "0.2.0"
    assert f"## [{drrho.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    (author,) = PROJECT["authors"]
    assert f"Copyright (c) 2026 {author['name']}" in (ROOT / "LICENSE").read_text()


@pytest.mark.slow
def test_the_source_distribution_is_what_the_wheel_needs(source):
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {name.split("/")[0] for name in names} == {
        *("drrho", "experiments", "hatch_build.py", "pyproject.toml", "PKG-INFO", ".gitignore"),
        *("README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "NOTICE"),
    }
    assert not [name for name in names if name.endswith(".so") or "results" in name.split("/")]
    assert {name.split("/")[1] for name in names if name.startswith("experiments/")} == {"__init__.py", "clip"}


@pytest.mark.slow
def test_the_wheel_holds_library_trainer_and_nothing_else(wheel, sizes):
    """It is one for this platform, and brings the compiled kernels."""
    described = f"drrho-{drrho.__version__}.dist-info"
    assert {name.split("/")[0] for name in sizes} == {"drrho", "drrho_clip", described}
    assert "drrho/solvers/_kernels_default.so" in sizes and "py3-none-any" not in wheel.name
    assert {"drrho/py.typed", *WEIGHTS, "drrho_clip/models/configs/glyph-tiny.json", "drrho_clip/run.py"} <= set(sizes)
    assert {f"{described}/licenses/LICENSE", f"{described}/licenses/NOTICE"} <= set(sizes)
    kinds = {Path(name).suffix for name in sizes if not name.startswith(described)}
    assert kinds == {".py", ".md", ".typed", ".so", ".json", ".safetensors"}
    assert not [name for name in sizes if "test" in name or "results" in name.split("/")]
    tracked = checked("git", "ls-files", "drrho", "experiments/clip", cwd=ROOT).splitlines()
    modules = {name.replace("experiments/clip", "drrho_clip") for name in tracked if name.endswith(".py")}
    assert {name for name in sizes if name.endswith(".py")} == modules


@pytest.mark.slow
def test_sizes_of_the_wheel(wheel, sizes):
    """README and CONTRIBUTING state them: the library alone is below 1 MB, most of the rest are the shipped weights."""
    library = sum(size for name, size in sizes.items() if name.startswith("drrho/"))
    trainer = sum(size for name, size in sizes.items() if name.startswith("drrho_clip/") and name not in WEIGHTS)
    assert library < MILLION and trainer < MILLION / 2
    assert all(6.7 * MILLION < sizes[name] < 7.2 * MILLION for name in WEIGHTS)
    assert wheel.stat().st_size < 15 * MILLION


@pytest.mark.slow
def test_the_library_is_imported_where_it_is_installed(environment, tmp_path):
    code = (
        "import json, sys, drrho, drrho_clip; from drrho.solvers import native\n"
        "risk = drrho.constrained_risk([1.0, 2.0, 4.0], drrho.ChiSquare(), 0.1)\n"
        "print(json.dumps([drrho.__file__, drrho_clip.__file__, native.missing, float(risk.value)]))\n"
        "assert 'experiments' not in sys.modules"
    )
    done = checked(environment / "python", "-c", code, cwd=tmp_path)
    library, trainer, missing, value = json.loads(done)
    assert all(Path(place).is_relative_to(environment.parent) for place in (library, trainer))
    assert missing == ""
    ours = drrho.constrained_risk([1.0, 2.0, 4.0], drrho.ChiSquare(), 0.1).value.item()
    assert value == pytest.approx(ours, rel=1e-12)


@pytest.mark.slow
def test_the_command_names_itself(environment, tmp_path):
    program = environment / "drrho-clip"
    assert checked(program, "--help", cwd=tmp_path).startswith("usage: drrho-clip [COMMAND]")
    wrong = run(program, "train", "--epohcs", "3", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr == (
        "drrho-clip: error: Unrecognized options: --epohcs, 3 (nearest: --epochs): see `drrho-clip train --help`\n"
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A shard of 32 pairs."""
    shard = tmp_path_factory.mktemp("pairs") / "0.tar"
    with tarfile.open(shard, "w") as archive:
        for k in range(32):
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), (8 * k, 255 - 8 * k, 90)).save(stream, "PNG")
            for name, content in ((f"{k}.png", stream.getvalue()), (f"{k}.txt", f"letter {chr(97 + k)}".encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return shard


@pytest.mark.slow
def test_the_installed_trainer_steers_a_training(environment, pairs, tmp_path):
    """In an empty folder: by the command, again over two ranks to the same loss; open_clip reads the export."""
    program, ranks = environment / "drrho-clip", "-m torch.distributed.run --nproc-per-node 2 -m drrho_clip.run"
    checked(program, "catalog", pairs, "--out", "catalog", cwd=tmp_path)
    code = "from drrho_clip.training.options import SHIPPED_REFERENCE as reference; print(reference)"
    reference = Path(checked(environment / "python", "-c", code, cwd=tmp_path).strip())
    assert reference.is_relative_to(environment.parent)
    words = [
        "train",
        "--catalog",
        "catalog",
        "--model",
        "glyph-micro",
        "--reference",
        reference,
        "--temperature",
        "0.1",
    ]
    words += "--epochs 2 --batch-size 8 --warmup 2 --validations 1 --workers 0 --log-every 1 --device cpu".split()
    checked(program, *words, "--out", "one", cwd=tmp_path)
    settings = json.loads((tmp_path / "one" / "config.json").read_text())
    assert settings["loss"]["reference"] == "experiments/clip/glyphs/reference_model"  # as a checkout names it
    checked(environment / "python", *ranks.split(), *words, "--out", "two", cwd=tmp_path)
    one, two = (
        [
            json.loads(line)["loss"]
            for line in (tmp_path / out / "log.jsonl").read_text().splitlines()
            if '"loss"' in line
        ]
        for out in ("one", "two")
    )
    assert len(one) == 8 and two == pytest.approx(one, abs=1e-5)
    code = "import open_clip; print(open_clip.create_model('local-dir:one/model').logit_scale.item())"
    assert float(checked(environment / "python", "-c", code, cwd=tmp_path)) > 0


def test_lowest_versions_are_those_of_the_project():
    """tests/constraints-lowest.txt, which `make test-lowest` installs, pins each requirement at its lower bound."""
    lines = (ROOT / "tests" / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    extras = PROJECT["optional-dependencies"]
    lowest = {}
    for text in (*PROJECT["dependencies"], *extras["convex"], *extras["linear"], *extras["clip"]):
        requirement = Requirement(text)
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        lowest[canonicalize_name(requirement.name)] = bound.version
    assert {name: pinned[name] for name in lowest if not is_bound(pinned[name], lowest[name])} == {}
    assert "--constraint tests/constraints-lowest.txt" in (ROOT / "Makefile").read_text()


def is_bound(pinned, lowest):
    """Whether a pinned version is the first of a bound with fewer parts: 1.26 is pinned by 1.26.4, which has wheels."""
    return re.fullmatch(rf"{re.escape(lowest)}(\.\d+)*", pinned) is not None
