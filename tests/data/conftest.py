"""A byte tokenizer for the data tests, importable in spawned workers too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = str(Path(__file__).parent)


@pytest.fixture(scope="session")
def byte_tokenizer_class():
    """The class, from a module that worker processes find by its name on sys.path."""
    sys.path.insert(0, FOLDER)
    try:
        from byte_tokenizer import ByteTokenizer

        yield ByteTokenizer
    finally:
        sys.path.remove(FOLDER)


@pytest.fixture
def tokenizer(byte_tokenizer_class):
    """A tokenizer of bytes: ids 0..255, bos 256."""
    return byte_tokenizer_class()
