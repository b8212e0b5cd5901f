"""Notices a training run that has gone wrong, and a request to stop.

Design choices
- The loss guard compares with the best running mean so far: a spike passes, a divergence does not.
- A signal never interrupts a step; it is noticed between steps, when a checkpoint can be written.
"""

from __future__ import annotations

import math
import signal
from types import FrameType, TracebackType
from typing import Any


class LossGuard:
    """Stops a run whose loss is not finite, or whose running mean exceeds its best by the factor `abort_ratio`."""

    def __init__(self, abort_ratio: float | None = None, memory: float = 0.9, settle: int = 20):
        self.abort_ratio, self.memory, self.settle = abort_ratio, memory, settle
        self.mean: float | None = None
        self.best = math.inf
        self.seen = 0

    def problem(self, loss: float) -> str | None:
        """What is wrong with a run that has just seen `loss`, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        self.seen += 1
        self.mean = loss if self.mean is None else self.memory * self.mean + (1 - self.memory) * loss
        if self.seen >= self.settle:
            self.best = min(self.best, self.mean)
            if self.abort_ratio is not None and self.mean > self.abort_ratio * self.best:
                return (
                    f"the loss rose to {self.mean:.3f}, more than {self.abort_ratio:g} times its best, {self.best:.3f}"
                )
        return None

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on."""
        return {"mean": self.mean, "best": None if math.isinf(self.best) else self.best, "seen": self.seen}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.mean, self.seen = state["mean"], state["seen"]
        self.best = math.inf if state["best"] is None else state["best"]


class StopSignals:
    """While entered, SIGINT and SIGTERM set `received` instead of ending the process; a second SIGINT ends it."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in self.SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are someone else's business
                pass
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
