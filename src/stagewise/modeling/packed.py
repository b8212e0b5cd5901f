"""Packed weights for inference."""

from __future__ import annotations

from contextlib import contextmanager


@contextmanager
def unpacked(model):
    """The model's plain weights for the time of the block."""
    yield model
