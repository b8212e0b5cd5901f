"""Commands of the serving room: `generate`, `compare`, `chat`. Each is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {"generate": "generate", "compare": "compare", "chat": "chat"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"stagewise.serving.{HOMES[name]}"), name)
