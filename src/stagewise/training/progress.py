"""What a person sees while a model trains: a bar with time left, loss and tokens/s; a line per validation."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Progress:
    """A rich progress bar on a terminal, plain lines elsewhere, nothing when not `shown`."""

    def __init__(self, title: str, steps: int, done: int = 0, *, shown: bool = True):
        self.title, self.steps, self.done, self.shown = title, steps, done, shown
        self._bar: Any = None
        self._task: Any = None
        self._speed = ""

    def __enter__(self) -> Progress:
        if not self.shown:
            return self
        if self.title:
            print(self.title, flush=True)
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, TextColumn("eta"), TimeRemainingColumn(elapsed_when_finished=False))
            self._bar.start()
            self._task = self._bar.add_task("training", total=self.steps, completed=self.done)
        return self

    def advance(self, step: int, row: dict[str, Any]) -> None:
        """Show the step just done; `row` holds its figures, `tokens_per_second` when it was logged."""
        if not self.shown:
            return
        logged = "tokens_per_second" in row
        if logged:
            self._speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"loss {row['loss']:.4f}  {self._speed}")
        elif logged:
            left = (self.steps - step) * row["seconds"] / max(1, step)
            print(f"step {step}/{self.steps}  loss {row['loss']:.4f}  {self._speed}  eta {_clock(left)}", flush=True)

    def validated(self, step: int, results: list[dict[str, Any]]) -> None:
        """Show the bits per byte of every set validated at `step`."""
        if not self.shown:
            return
        show = self._bar.console.print if self._bar is not None else print
        for figures in results:
            parts = [
                f"{name}: {figures[f'{name}_bpb']:.4f}"
                for name in ("product", "final_path")
                if f"{name}_bpb" in figures
            ]
            stages = " ".join(f"{value:.4f}" for value in figures.get("stage_bpb", []))
            name = f" ({figures['set']})" if "set" in figures else ""
            parts += [f"stages: {stages}"] if stages else []
            show(f"step {step} validation{name}, bits per byte  {'  '.join(parts)}")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
