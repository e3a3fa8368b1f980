"""Our messages in the service's log."""

import logging
import sys

log = logging.getLogger("lora_patch")


def say(level: int, message: str) -> None:
    """Log, or print where the service has no logging set up: a refusal must not get lost."""
    if logging.getLogger().handlers or log.handlers:
        log.log(level, message)
    else:
        print(f"lora_patch: {message}", file=sys.stderr, flush=True)
