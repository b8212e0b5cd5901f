"""A model with its tokenizer, and the progress bar of a long pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stagewise.modeling import load, load_tokenizer


def load_pair(path: str, dtype: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer, ready to evaluate; on the accelerator where there is one."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(path, dtype=dtype, device=place).eval()
    return model, load_tokenizer(path)


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A rich progress bar; yields a function that takes the number done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
