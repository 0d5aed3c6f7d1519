"""The exceptions that ``run.py`` turns into a single line on stderr and an exit status."""


class UserError(Exception):
    """An error that the user can correct, exit status 2; the message names what is wrong, its value and the remedy."""


class Interrupted(Exception):
    """Training was asked to stop, by the signal of number ``signal``, and its checkpoint is written."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
