"""The one kind of error that a user can cause, and nothing else."""

import click

from integration.lora_patch.errors import listed


class UserError(click.ClickException):
    """An expected failure: printed as one line ``Error: what; mend`` on stderr, exit code 1, no traceback.

    The message names the file, the row where there is one, and how to mend it.
    """


def refuse(problems: list[str], limit: int = 20) -> None:
    """Raise one `UserError` for all ``problems`` (a line each, at most ``limit``); return when there are none."""
    if problems:
        raise UserError(listed(problems, limit))
