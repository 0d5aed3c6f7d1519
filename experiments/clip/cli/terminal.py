"""What a person at the terminal sees: lines and bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors import printable


class PlainConsole(Console):
    """A console that shows names and texts as they are: no markup is read, and nothing in them steers a terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `Console.print` does, each line of a text with what does not print escaped."""
        super().print(*(_plain(each) if isinstance(each, str) else each for each in objects), **options)


def _plain(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


console = PlainConsole(highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[..., None]]:
    """Show a bar with the time left, once something is done; yields a function of how much, of how much, and a note."""
    columns = (
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    bars = Progress(*columns, console=console)
    task = bars.add_task(printable(title), total=None, note="")

    def advance(done: int, total: int, note: str = "") -> None:
        bars.start()
        bars.update(task, completed=done, total=total, note=note)

    try:
        yield advance
    finally:
        if bars.live.is_started:
            bars.stop()
