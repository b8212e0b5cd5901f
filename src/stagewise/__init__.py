"""Train, calibrate, run, specialise, publish and serve language models whose every stage is an expert.

Design choices:
- Five public names; everything else is imported from its room (`stagewise.training`, `stagewise.calibration`, ...).
- Importing the package registers its classes with transformers' AutoConfig, AutoModelForCausalLM and AutoTokenizer.
- The `stagewise` command is the one exception: it starts without torch, and registers when a command loads a model.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stagewise.modeling import PoEConfig, PoEForCausalLM, PoETokenizer, load, load_tokenizer

__all__ = ["PoEConfig", "PoEForCausalLM", "PoETokenizer", "load", "load_tokenizer"]

try:
    __version__ = importlib.metadata.version("stagewise")
except importlib.metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'stagewise' has no attribute {name!r}")
    return getattr(importlib.import_module("stagewise.modeling"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _started_as_command() -> bool:
    """Whether this process is the `stagewise` command, or `python -m stagewise` (argv[0] is "-m" while that starts)."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    return program == "-m" or Path(program).stem == "stagewise"


if not _started_as_command():
    importlib.import_module("stagewise.modeling")
