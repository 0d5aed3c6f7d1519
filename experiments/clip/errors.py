"""The exceptions that ``run.py`` turns into a single line on stderr and an exit status, and text fit for a terminal."""


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
