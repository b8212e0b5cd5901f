"""The embedded corpus: the installed Python's standard library, which everybody has.

Design choices:
- Sources (`.py`) and documentation (`.rst`, `.txt`, and the language reference inside `pydoc_data/topics.py`, one
  document a topic, instead of that file).
- Left out: tests, idlelib, caches, installed packages, and files that describe the build of this machine, so that the
  same Python version gives the same corpus wherever it was compiled.
- A manifest (Python version, documents, bytes, content hash) belongs to every figure made with it.
"""

from __future__ import annotations

import io
import os
import platform
import runpy
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from .documents import Document
from .splitting import content_hex, content_sum, document_sum

_LEFT_OUT_FOLDERS = {
    "__pycache__", "test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "lib-dynload",
}  # fmt: skip
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize", "_sysconfig_vars", "LICENSE")
_SUFFIXES = (".py", ".rst", ".txt")
_TOPICS = "pydoc_data/topics"


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def embedded_names() -> list[tuple[str, int]]:
    """Names of the corpus's files relative to the standard library, sorted, each with its size in bytes."""
    root = _root()
    names: list[tuple[str, int]] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in _LEFT_OUT_FOLDERS and not name.startswith("config-")
        ]
        for file in files:
            if file.endswith(_SUFFIXES) and not file.startswith(_LEFT_OUT_PREFIXES):
                path = Path(folder, file)
                names.append((path.relative_to(root).as_posix(), path.stat().st_size))
    return sorted(names)


def _decoded(raw: bytes, name: str) -> str | None:
    """The text of a source file in its declared encoding; None when it has none that holds."""
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0] if name.endswith(".py") else "utf-8-sig"
        return io.TextIOWrapper(io.BytesIO(raw), encoding=encoding).read()  # newlines become "\n"
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def embedded_documents(names: Iterable[str] | None = None) -> Iterator[Document]:
    """Documents of the embedded corpus, in the order of their names; `names` restricts them to some files."""
    root = _root()
    chosen = [name for name, _ in embedded_names()] if names is None else names
    for name in chosen:
        if name == _TOPICS + ".py":
            topics: dict[str, str] = runpy.run_path(str(root / name))["topics"]
            for topic in sorted(topics):
                if topics[topic].strip():
                    yield Document(f"{_TOPICS}/{topic}.rst", topics[topic])
            continue
        text = _decoded((root / name).read_bytes(), name)
        if text is not None and text.strip():
            yield Document(name, text)


def embedded_manifest() -> dict:
    """What the embedded corpus is on this machine: Python version, documents, bytes and the hash of the content."""
    documents = size = total = 0
    for document in embedded_documents():
        documents += 1
        size += len(document.text.encode("utf-8", "surrogatepass"))
        total = content_sum(total, document_sum(document.key, document.text))
    return {
        "name": "embedded",
        "python": platform.python_version(),
        "documents": documents,
        "bytes": size,
        "content_sha256": content_hex(total),
    }
