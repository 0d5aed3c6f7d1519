"""The one exception that ``run.py`` turns into a single line on stderr and exit status 2."""


class UserError(Exception):
    """An error that the user can correct; the message names what is wrong, the value it has and the remedy."""
