"""The examples run, print what their page says, and are short."""

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
PAGE = (FOLDER / "README.md").read_text()
MEASURES = "steer_your_trainer"  # not an example to copy
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", MEASURES))
IN_PROCESS = ("own_divergence", "certify_against_reference")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def printed_on_page(name):
    (text,) = re.findall(rf"## `{name}\.py`\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    return text


def assert_prints(name, text):
    """Same words, and numbers to within 3 %, or 0.03, of what another processor may round otherwise."""
    expected = printed_on_page(name)
    text = "\n".join(text.splitlines()[-len(expected.splitlines()) :]) + "\n"
    assert NUMBER.sub("#", text) == NUMBER.sub("#", expected)
    ours, theirs = ([float(number) for number in NUMBER.findall(each)] for each in (text, expected))
    assert ours == pytest.approx(theirs, rel=0.03, abs=0.03)


def test_every_example_is_on_the_page_and_short():
    assert len(NAMES) == 7
    assert set(re.findall(r"\]\((\w+)\.py\)", PAGE)) == {*NAMES, MEASURES}
    for name in NAMES:
        text = (FOLDER / f"{name}.py").read_text()
        assert len(text.splitlines()) < 60, name
        question = text.splitlines()[0].removeprefix('"""')
        assert question.endswith("?") and f"| {question} | [`{name}.py`]" in PAGE


@pytest.mark.parametrize("name", IN_PROCESS)
def test_example_in_this_process(name, capsys):
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert_prints(name, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in IN_PROCESS])
def test_example(name):
    if name == "steer_a_trainer" and not find_spec("transformers"):
        pytest.skip("needs the extra integrations (make test-integrations)")
    words = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(
        words, cwd=FOLDER.parent, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    if name == "steer_a_trainer":  # a training of seconds: which is lower is what it shows
        plain, ours = (float(number) for number in NUMBER.findall(done.stdout.splitlines()[-1]))
        assert ours < plain
    else:
        assert_prints(name, done.stdout)


def test_the_last_example_needs_no_drrho():
    assert "import drrho" not in (FOLDER / "read_a_checkpoint.py").read_text()
