"""`python integration/lora_patch install|check|report ...`, from the repository or from the copied folder."""

import importlib
import sys
from pathlib import Path

if not __package__:  # Python puts the folder itself in front of sys.path; the package is found from the one above
    folder = Path(__file__).resolve().parent
    sys.path[0] = str(folder.parent)
    __package__ = folder.name

importlib.import_module(f"{__package__}.commands").main()
