"""The table of open_clip_train's options: complete by that program's own parser, and true of this one's."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import open_clip_train.params
import pytest

from experiments.clip.cli.parser import _flags
from experiments.clip.run import COMMANDS, parse

PAGE = (Path(__file__).parents[2] / "experiments" / "clip" / "from_open_clip.md").read_text()
ROWS = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in PAGE.splitlines() if "| `--" in line]
#: Options of torchrun, which the remarks name.
LAUNCHER = {"--rdzv-endpoint"}


@pytest.fixture
def parser(monkeypatch):
    """Return open_clip_train's parser, which is made where it parses."""
    made = []
    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda self, *words: made.append(self) or parse_args(self, *words)
    )
    open_clip_train.params.parse_args([])
    return made[0]


@pytest.fixture(scope="module")
def ours():
    """Return the options of each command."""
    found = {}
    for name, command in COMMANDS.items():
        module, _, kind = command.options.partition(":")
        found[name] = set(_flags(getattr(import_module(f"experiments.clip.{module}"), kind)))
    return found


def test_every_option_of_open_clip_has_one_row(parser):
    theirs = [
        option for action in parser._actions for option in action.option_strings if option not in ("-h", "--help")
    ]
    assert len(theirs) > 80
    assert sorted(f"`{option}`" for option in theirs) == sorted(row[0] for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip("`") for row in ROWS])
def test_what_stands_for_it_is_there_or_a_reason_is(row, ours):
    assert len(row) == 3
    _, here, remark = row
    if here == "-":
        assert len(remark) >= 6
        return
    for words in re.findall(r"`([^`]*)`", here):
        command, option = words.split()
        assert option in ours[command] or (command, option) == ("catalog", "SOURCES")
    assert re.sub(r"`[^`]*`|, | then ", "", here) == "" or here.endswith("then `train --catalog`")


def test_the_remarks_name_options_that_are_there(ours, parser):
    known = set().union(*ours.values()) | set(parser._option_string_actions) | LAUNCHER
    assert set(re.findall(r"(?<!\S)`?(--[a-z][a-z-]*)", " ".join(row[2] for row in ROWS))) <= known


def test_both_commands_of_the_example_are_understood(parser):
    (block,) = re.findall(r"```\n(.*?)```", PAGE, re.S)
    theirs, catalog, train = (shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.strip())
    given = open_clip_train.params.parse_args(theirs[theirs.index("open_clip_train.main") + 1 :])
    assert parse(catalog[catalog.index("catalog") :]).sources == (given.train_data,)
    options = parse(train[train.index("train") :])
    assert options.model == given.model and options.loss.method == "openclip"
    assert options.optimization.batch_size == 8 * given.batch_size
    assert (options.optimization.epochs, options.optimization.warmup) == (given.epochs, given.warmup)
    assert options.shards.workers == given.workers
    assert [str(path) for path in options.shards.tasks] == [given.imagenet_val]
    # What both leave open is alike.
    assert options.optimization.lr == given.lr and options.optimization.weight_decay == given.wd
