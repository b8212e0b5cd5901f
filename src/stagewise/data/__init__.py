"""Text to training rows: sources, mixture, augmentation, packing, shards, conversations.

`open_training_data` is what a training loop uses; `prepare_shards` is behind `stagewise data prepare`. The names
below are imported when first asked for, so that readers of text need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .documents import Document
    from .embedded import embedded_documents, embedded_manifest
    from .prepare import prepare_shards
    from .sources import SourceSpec, read_source
    from .training_data import TrainingData, corpus_texts, open_training_data

_HOME = {
    "Document": "documents",
    "SourceSpec": "sources",
    "TrainingData": "training_data",
    "corpus_texts": "training_data",
    "embedded_documents": "embedded",
    "embedded_manifest": "embedded",
    "open_training_data": "training_data",
    "prepare_shards": "prepare",
    "read_source": "sources",
}

__all__ = [
    "Document",
    "SourceSpec",
    "TrainingData",
    "corpus_texts",
    "embedded_documents",
    "embedded_manifest",
    "open_training_data",
    "prepare_shards",
    "read_source",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
