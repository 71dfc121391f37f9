"""The error a user can mend."""

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input from outside (config, data file, checkpoint, a port in use): shown as one line, without a traceback.

    `exit_code` is 2 for a wrong command line or configuration, 1 for everything else.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def some(names: Sequence[str], limit: int = 5) -> str:
    """A list that fits into one line."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
