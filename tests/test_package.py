"""What is built and installed: drrho and drrho-clip, the command of that name, and the lowest versions allowed.

Wheels are built from source distributions, as pip does, and installed into an environment that sees the packages of the
one which runs the tests, but not the checkout.
"""

import io
import json
import os
import re
import shutil
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
TRAINER = "experiments/clip"
PROJECT, CLIP = (tomllib.loads((ROOT / place / "pyproject.toml").read_text())["project"] for place in (".", TRAINER))
BUILT_FROM = ("hatch_build.py", "README.md", "LICENSE")
WEIGHTS = {f"drrho_clip/{data}/reference_model/open_clip_model.safetensors" for data in ("glyphs", "icons")}
MILLION = 10**6


def run(*words, **more):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment, **more)


def checked(*words, **more):
    done = run(*words, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built(folder, target, out):
    """Build a project with hatchling, and return what was built."""
    checked(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out, cwd=folder)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The source distributions of library and trainer."""
    return {
        name: built(ROOT / place, "sdist", tmp_path_factory.mktemp("source"))
        for name, place in (("drrho", "."), ("drrho-clip", TRAINER))
    }


@pytest.fixture(scope="module")
def wheels(sources, tmp_path_factory):
    """The wheels of both, in a folder, each built from its source distribution."""
    built_from, folder = {}, tmp_path_factory.mktemp("wheels")
    for name, source in sources.items():
        unpacked = tmp_path_factory.mktemp("unpacked")
        with tarfile.open(source) as archive:
            archive.extractall(unpacked, filter="data")
        wheel = built(next(unpacked.iterdir()), "wheel", unpacked / "built")
        built_from[name] = wheel.rename(folder / wheel.name)
    return built_from


@pytest.fixture(scope="module")
def sizes(wheels):
    """Compressed bytes of each file in each wheel."""
    return {
        name: {entry.filename: entry.compress_size for entry in zipfile.ZipFile(wheel).infolist()}
        for name, wheel in wheels.items()
    }


class Installed:
    """An environment that sees the packages of the one which runs the tests, and what is installed into it."""

    def __init__(self, folder):
        checked(sys.executable, "-m", "venv", "--without-pip", folder)
        self.commands, self.python = folder / "bin", folder / "bin" / "python"
        self.own = Path(checked(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        packages = Path(np.__file__).parents[1]  # whose own .pth files, as that of this checkout, are not read
        (self.own / "others.pth").write_text(f"{packages}\n")

    def install(self, *words):
        checked(sys.executable, "-m", "pip", "--python", self.python, "install", "--no-index", *words)


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory):
    """The environment after `pip install 'drrho[clip]'`, which finds the trainer's wheel beside the library's."""
    installed = Installed(tmp_path_factory.mktemp("environment") / "here")
    installed.install("--find-links", wheels["drrho"].parent, f"{wheels['drrho']}[clip]")
    return installed


def test_version_and_authors():
    assert drrho.__version__ == "0.2.0"
    assert f"## [{drrho.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    (author,) = PROJECT["authors"]
    assert f"Copyright (c) 2026 {author['name']}" in (ROOT / "LICENSE").read_text()


def test_the_distributions_are_of_one_version():
    """drrho[clip] asks for its trainer, and the trainer for its library with the packages that both name once."""
    version = drrho.__version__
    assert PROJECT["optional-dependencies"]["clip"] == [f"drrho-clip=={version}"]
    assert CLIP["version"] == version and CLIP["dependencies"] == [f"drrho[clip-requirements]=={version}"]
    for key in ("authors", "license", "requires-python", "keywords", "classifiers"):
        differing = set(map(str, CLIP[key])) - set(map(str, PROJECT[key]))
        assert not differing, key
    assert (ROOT / TRAINER / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.slow
def test_the_source_distributions_are_what_the_wheels_need(sources):
    names = {}
    for project, source in sources.items():
        with tarfile.open(source) as archive:
            names[project] = {name.split("/", 1)[1] for name in archive.getnames()}
    always = {"README.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"}
    tops = {name.split("/")[0] for name in names["drrho"]}
    assert tops == always | {"drrho", "hatch_build.py", "CHANGELOG.md", "CITATION.cff"}
    rooms = {path.parent.name for path in (ROOT / TRAINER).glob("*/*.py")}
    files = {path.name for path in (ROOT / TRAINER).glob("*.py")}
    assert {name.split("/")[0] for name in names["drrho-clip"]} == always | rooms | files | {"NOTICE"}
    assert not [
        name for name in names["drrho"] | names["drrho-clip"] if name.endswith(".so") or "results" in name.split("/")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["drrho", "drrho-clip"])
def test_a_wheel_holds_its_package_and_nothing_else(name, wheels, sizes):
    """The library's is one for this platform, and brings the compiled kernels; the trainer's is for any."""
    package, found, place = name.replace("-", "_"), set(sizes[name]), {"drrho": "drrho", "drrho-clip": TRAINER}[name]
    described = f"{package}-{drrho.__version__}.dist-info"
    assert {file.split("/")[0] for file in found} == {package, described}
    kinds = {Path(file).suffix for file in found if not file.startswith(described)}
    licenses = {file.rpartition("/")[2] for file in found if "/licenses/" in file}
    if name == "drrho":
        assert kinds == {".py", ".md", ".typed", ".so"} and licenses == {"LICENSE"}
        assert {"drrho/solvers/_kernels_default.so", "drrho/py.typed"} <= found
    else:
        assert kinds == {".py", ".md", ".json", ".safetensors"} and licenses == {"LICENSE", "NOTICE"}
        pages = {file for file in found if file.endswith(".md")}
        assert {page.split("/")[2] for page in pages} == {"reference_model"}
        assert "drrho_clip/icons/reference_model/ATTRIBUTION.md" in pages
        assert {*WEIGHTS, "drrho_clip/models/configs/glyph-tiny.json"} <= found
    assert wheels[name].name.endswith("py3-none-any.whl") == (name == "drrho-clip")
    assert not [file for file in found if "test" in file or "results" in file.split("/")]
    tracked = checked("git", "ls-files", place, cwd=ROOT).splitlines()
    modules = {file.replace(place, package, 1) for file in tracked if file.endswith(".py")}
    assert {file for file in found if file.endswith(".py")} == modules


@pytest.mark.slow
def test_sizes_of_the_wheels(wheels, sizes):
    """CONTRIBUTING states them: the library's is below 1 MB, most of the trainer's are the weights that it ships."""
    assert wheels["drrho"].stat().st_size < MILLION
    assert all(6.7 * MILLION < sizes["drrho-clip"][name] < 7.2 * MILLION for name in WEIGHTS)
    weights = sum(sizes["drrho-clip"][name] for name in WEIGHTS)
    assert wheels["drrho-clip"].stat().st_size - weights < MILLION / 2


@pytest.mark.slow
def test_the_library_alone_brings_no_trainer(wheels, tmp_path):
    installed = Installed(tmp_path / "library")
    installed.install("--no-deps", wheels["drrho"])
    here = {path.name for path in installed.own.iterdir()}
    assert here == {"drrho", f"drrho-{drrho.__version__}.dist-info", "others.pth"}
    assert not (installed.commands / "drrho-clip").exists()


@pytest.mark.slow
def test_a_checkout_is_installed_with_its_trainer(tmp_path, monkeypatch):
    """`pip install --editable .`: the package and the command of the trainer stand for the files of the checkout.

    There is no compiler here, which is said, and no error.
    """
    monkeypatch.setenv("CC", "false")
    checkout = tmp_path / "checkout"
    for name in checked("git", "ls-files", "drrho", TRAINER, "pyproject.toml", *BUILT_FROM, cwd=ROOT).splitlines():
        if "results" not in name.split("/"):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, checkout / name)
    installed = Installed(tmp_path / "environment")
    installed.install("--no-deps", "--no-build-isolation", "--editable", checkout)
    code = "import drrho, drrho_clip.run; print(drrho.__file__, drrho_clip.run.__file__)"
    places = checked(installed.python, "-c", code, cwd=tmp_path).split()
    assert places == [str(checkout / "drrho" / "__init__.py"), str(checkout / TRAINER / "run.py")]
    assert not list(checkout.rglob("*.so"))
    assert checked(installed.commands / "drrho-clip", "--help", cwd=tmp_path).startswith("usage: drrho-clip [COMMAND]")


@pytest.mark.slow
def test_the_library_is_imported_where_it_is_installed(environment, tmp_path):
    code = (
        "import json, sys, drrho, drrho_clip; from drrho.solvers import native\n"
        "risk = drrho.constrained_risk([1.0, 2.0, 4.0], drrho.ChiSquare(), 0.1)\n"
        "print(json.dumps([drrho.__file__, drrho_clip.__file__, native.missing, float(risk.value)]))\n"
        "assert 'experiments' not in sys.modules"
    )
    done = checked(environment.python, "-c", code, cwd=tmp_path)
    library, trainer, missing, value = json.loads(done)
    assert all(Path(place).is_relative_to(environment.own) for place in (library, trainer))
    assert missing == ""
    ours = drrho.constrained_risk([1.0, 2.0, 4.0], drrho.ChiSquare(), 0.1).value.item()
    assert value == pytest.approx(ours, rel=1e-12)


@pytest.mark.slow
def test_the_command_names_itself(environment, tmp_path):
    program = environment.commands / "drrho-clip"
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
    program, ranks = (
        environment.commands / "drrho-clip",
        "-m torch.distributed.run --nproc-per-node 2 -m drrho_clip.run",
    )
    checked(program, "catalog", pairs, "--out", "catalog", cwd=tmp_path)
    code = "from drrho_clip.training.options import SHIPPED_REFERENCE as reference; print(reference)"
    reference = Path(checked(environment.python, "-c", code, cwd=tmp_path).strip())
    assert reference.is_relative_to(environment.own)
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
    checked(environment.python, *ranks.split(), *words, "--out", "two", cwd=tmp_path)
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
    assert float(checked(environment.python, "-c", code, cwd=tmp_path)) > 0


def test_lowest_versions_are_those_of_the_project():
    """tests/constraints-lowest.txt, which `make test-lowest` installs, pins each requirement at its lower bound."""
    lines = (ROOT / "tests" / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    extras = PROJECT["optional-dependencies"]
    lowest = {}
    for text in (*PROJECT["dependencies"], *extras["convex"], *extras["linear"], *extras["clip-requirements"]):
        requirement = Requirement(text)
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        lowest[canonicalize_name(requirement.name)] = bound.version
    assert {name: pinned[name] for name in lowest if not is_bound(pinned[name], lowest[name])} == {}
    assert "--constraint tests/constraints-lowest.txt" in (ROOT / "Makefile").read_text()


def is_bound(pinned, lowest):
    """Whether a pinned version is the first of a bound with fewer parts: 1.26 is pinned by 1.26.4, which has wheels."""
    return re.fullmatch(rf"{re.escape(lowest)}(\.\d+)*", pinned) is not None
