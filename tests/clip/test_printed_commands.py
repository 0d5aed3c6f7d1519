"""Every command of the program that a page prints is one that the program takes."""

import re
import shlex
from pathlib import Path

import pytest

from experiments.clip.run import parse

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "experiments/**/*.md", "drrho/**/*.md", "docs/**/*.md", "examples/*.md"]
#: What a page leaves out of a command by three dots.
LEFT_OUT = {"train": ["--catalog", "catalog", "--model", "ViT-B-32", "--method", "openclip"]}
PROGRAM = re.compile(r"(?:^|\s)(?:\S*run\.py|drrho-clip)\s+(?=[a-z])")


def printed():
    """Yield page, number and words of each command in a block of code, and of those in a line that have options."""
    for path in sorted({path for pattern in PAGES for path in ROOT.glob(pattern)}):
        text = path.read_text()
        blocks = [block for kind, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if kind in ("", "bash")]
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += [
            line.replace("\n", " ") for line in re.findall(r"`((?:\S*run\.py|drrho-clip) [a-z-]+ --[^`]*)`", text)
        ]
        for number, line in enumerate(lines):
            command, *words = shlex.split(PROGRAM.split(line, maxsplit=1)[-1], comments=True) or [""]
            if PROGRAM.search(line) and not {"embeddings", "linear", "results"} & set(path.parts):
                yield pytest.param([command, *words], id=f"{path.relative_to(ROOT)}-{number}-{command}")


@pytest.mark.parametrize("words", list(printed()))
def test_a_printed_command_is_taken(words, monkeypatch):
    command, *rest = ("1" if re.fullmatch("[A-Z]", word) else word for word in words)  # a letter for a number
    if "..." in rest:
        rest = [*LEFT_OUT[command], *(word for word in rest if word != "...")]
    monkeypatch.chdir(ROOT)
    if rest[-1:] == ["--help"]:
        with pytest.raises(SystemExit) as ended:
            parse([command, *rest])
        assert ended.value.code == 0
    else:
        assert parse([command, *rest]) is not None
