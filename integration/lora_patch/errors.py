"""The one kind of error that a person can mend; scripts and service print it as one line."""


class LoraError(ValueError):
    """An expected failure. The message is one line: the file, what is wrong, how to mend it."""


def listed(problems: list[str], limit: int = 20) -> str:
    """Return several problems as one message: a line each, at most ``limit`` of them."""
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n  ".join(problems[:limit] + more)


def one_line(error: BaseException | str) -> str:
    """Return an error's message on one line of at most 400 characters."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def first_of(problems: list[str]) -> str:
    """Return the first of several problems and how many more there are."""
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
