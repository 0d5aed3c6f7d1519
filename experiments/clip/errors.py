"""The exceptions that ``run.py`` turns into a single line on stderr and an exit status, and text fit for a terminal."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: What messages call this program, and what starts it: the file of a checkout, or the command of an installation.
PROGRAM, COMMAND = "run.py", "python experiments/clip/run.py"
if __package__ == "drrho_clip":
    PROGRAM = COMMAND = "drrho-clip"


class UserError(Exception):
    """An error that the user can correct, exit status 2; the message names what is wrong, its value and the remedy."""


class Interrupted(Exception):
    """Training was asked to stop, by the signal of number ``signal``, and its checkpoint is written."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def printable(text: str) -> str:
    """Return text on one line in which characters that do not print are escaped: they could steer a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """Return a hint at the known names that a mistyped one is nearest to; empty if none is near."""
    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name[:200].lower(), list(by_lower), n=most)
    return f" (nearest: {', '.join(by_lower[each] for each in found)})" if found else ""
