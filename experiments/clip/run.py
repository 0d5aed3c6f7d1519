"""Entry of the CLIP programs; without a command, the demo.

From a checkout ``python experiments/clip/run.py [COMMAND]``; installed ``drrho-clip [COMMAND]``, and on several ranks
``torchrun -m drrho_clip.run COMMAND``.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # until `handled` takes them
        signal.signal(number, lambda number, _: os._exit(130 if number == signal.SIGINT else os.EX_TEMPFAIL))
if not __package__:
    # Run as a file: the checkout takes the place of this folder, whose names are not for `import`.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "experiments.clip"

from .errors import COMMAND, PROGRAM, Interrupted, UserError, nearest, printable
from .signals import Stopped, asked, exit_in_time, handled, status_of, was_raised


class Command(NamedTuple):
    """What a command does, and where its parts are; they are imported when they are needed.

    Attributes
    ----------
    options : str
        ``module:class`` of its options, in a module that imports nothing heavy.
    run : str
        ``module:function`` that carries it out, given the options.
    on_many_ranks : bool
        Whether torchrun or srun may start it on several ranks.
    """

    summary: str
    options: str
    run: str
    on_many_ranks: bool = False


COMMANDS = {
    "demo": Command(
        "Train a steered model and its unsteered twin, evaluate both and the reference, write a report.",
        "glyphs.options:Demo",
        "glyphs.demo:run",
    ),
    "prepare": Command(
        "Draw pairs of pictures and names, of characters or icons, and write them as webdataset shards.",
        "icons.options:Prepare",
        "icons.source:run_prepare",
    ),
    "cache-reference": Command(
        "Compute the reference model's features of the training pairs; under torchrun or srun, over all ranks.",
        "cli.options:CacheReference",
        "cli.commands:cache_reference",
        on_many_ranks=True,
    ),
    "advise": Command(
        "Predict what each reference would gain over the unsteered run, and recommend one way to steer or none.",
        "cli.options:Advise",
        "cli.commands:advise",
    ),
    "train": Command(
        "Train one model, from --preset NAME, or from --config FILE of an earlier run, and other options.",
        "cli.options:Train",
        "cli.train:run",
        on_many_ranks=True,
    ),
    "evaluate": Command(
        "Score a model on zero-shot tasks and held-out pairs; under torchrun or srun, over all ranks.",
        "cli.options:Evaluate",
        "cli.commands:evaluate",
        on_many_ranks=True,
    ),
    "export": Command(
        "Write the model of a run, at one of its checkpoints, for open_clip; also while the run goes on.",
        "cli.options:Export",
        "cli.commands:export",
    ),
    "plan": Command(
        "Say what a run would take: parameters, operations, memory of a rank by part, disk, time.",
        "cli.options:Plan",
        "cli.plan:run",
    ),
    "catalog": Command(
        "Count the samples of shards once and give each an index, for `train --catalog`.",
        "cli.options:MakeCatalog",
        "cli.commands:catalog",
    ),
    "glyph-tasks": Command(
        "Write the held-out glyph pairs as zero-shot tasks in CLIP_benchmark's layout.",
        "glyphs.options:GlyphTasks",
        "glyphs.tasks:run_glyph_tasks",
    ),
    "icon-tasks": Command(
        "Write the held-out icons, emoji and stamps as zero-shot tasks in CLIP_benchmark's layout.",
        "icons.options:IconTasks",
        "icons.tasks:run_icon_tasks",
    ),
    "search": Command(
        "Show the icons, or pictures of a catalog, that a model finds for a description or a picture.",
        "icons.options:Search",
        "icons.search:run_search",
    ),
    "study": Command(
        "Run grids of trainings, one line of results for each; more processes, started alike, share the work.",
        "study.options:Study",
        "study.runner:run",
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Run a command; return its exit status.

    2 for what the user can mend, 130 after Ctrl-C, 75 (EX_TEMPFAIL: try again) after a scheduler's signal.
    """
    again = printable(f"{COMMAND} {shlex.join(arguments)}")
    with handled(again):
        return _run(arguments, again)


def _run(arguments: Sequence[str], again: str) -> int:
    options = None
    try:
        options = parse(arguments)
        command = COMMANDS[_name_and_words(arguments)[0]]
        _check_launch(command)
        _part(command.run)(options)
    except UserError as error:
        # What is wrong with the options is wrong on every rank: the first says so. What a rank meets later is its own.
        if options is not None or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"{PROGRAM}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(f"{PROGRAM}: {printable(str(interruption))}; resume with: {again}", file=sys.stderr)
        return status_of(interruption.signal)
    except Stopped as stopped:
        return _end_at_once(stopped.signal, again)
    except Exception:
        if not was_raised():  # in a library, which has made another error of it
            raise
        return _end_at_once(asked(), again)
    return 0


def _end_at_once(number: int, again: str) -> int:
    print(f"{PROGRAM}: {Stopped(number)}; what was finished is kept; resume with: {again}", file=sys.stderr)
    return status_of(number)


def parse(arguments: Sequence[str]) -> Any:
    """Return the options of the command that the words name.

    Raises
    ------
    UserError
        One line that names what is wrong. ``--help`` prints and exits.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {PROGRAM} [COMMAND] [OPTIONS]; COMMAND --help lists its options\n")
        print("\n".join(f"  {name:<17}{command.summary}" for name, command in COMMANDS.items()))
        raise SystemExit(0)
    name, words = _name_and_words(arguments)
    if name not in COMMANDS:
        raise UserError(f"no command is called {name!r}{nearest(name, COMMANDS)}: choose one of {', '.join(COMMANDS)}")
    from .cli.parser import parse_options

    return parse_options(_part(COMMANDS[name].options), words, name)


def _name_and_words(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the command's name, by default the demo's, and the words after it."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return "demo", arguments


def _part(place: str) -> Any:
    """Import a part of a command by its place in this folder."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"{__package__}.{module}"), name)


def _check_launch(command: Command) -> None:
    from .distributed import launched

    count = launched(os.environ)[1]
    if count > 1 and not command.on_many_ranks:
        raise UserError(f"this command takes one process, here are {count}: start it without torchrun or srun")


def console() -> NoReturn:
    """Run the command that this process was started with, and end it."""
    exit_in_time(main(sys.argv[1:]))


if __name__ == "__main__":
    console()
