"""The one exception that ``run.py`` turns into a single line on stderr and exit status 2."""


class UserError(Exception):
    """Something the user can mend; the message names the thing, the value it has and the remedy."""
