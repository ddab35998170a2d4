"""Errors that are the user's to mend: one sentence saying what was wrong, where, and what would be right."""


class UserError(ValueError):
    """Bad input. The entry points print its message as one line and exit with status 2, without a traceback."""
