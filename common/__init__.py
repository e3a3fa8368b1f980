"""What the four scripts share. The scripts import it first: without the packages it says how to get them."""

import sys
from importlib.util import find_spec

if not all(map(find_spec, ("click", "mlx", "mlx_vlm"))):
    sys.exit(f'Error: {sys.executable} lacks this project\'s packages; run "make setup", then use .venv/bin/python')

_usual = sys.excepthook


def _quiet_interrupt(kind, error, trace) -> None:
    """End a Ctrl-C during the imports in one line; Python still exits by the signal."""
    if issubclass(kind, KeyboardInterrupt):
        print("Interrupted", file=sys.stderr)
    else:
        _usual(kind, error, trace)


sys.excepthook = _quiet_interrupt
