"""Figures of a run while it trains: metrics.jsonl always; TensorBoard, trackio or wandb by setting.

Design choices
- One JSON object a line. Training rows hold `loss`, `stage_loss` (a list), `lr_factor`, `tokens_per_second`; validation
  rows hold what `evaluation.bpb.evaluate_bpb` returns, and `set` when they are about a further validation set. Every
  row has `step`, `tokens` seen so far and `seconds` of training.
- A resumed run first drops the rows after its checkpoint, so a file never tells a step twice.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any


class Metrics:
    """Writes the rows of one run in `folder`; `tracker` is None, "trackio" or "wandb".

    `resumed_at` is the step of the checkpoint a run goes on from, None for a new run. Raises ImportError naming the
    extra to install when a tracker is missing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resumed_at: int | None = None,
        tensorboard: bool = False,
        tracker: str | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.path = folder / "metrics.jsonl"
        self._board = (
            _import("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard")) if tensorboard else None
        )
        self._tracker = _import(tracker) if tracker else None
        if self._tracker is not None:
            self._tracker.init(project="stagewise", name=folder.name, config=settings or {})
        self._keep_rows(0 if resumed_at is None else resumed_at)
        self._file = self.path.open("a", encoding="utf-8")

    def _keep_rows(self, last_step: int) -> None:
        kept = [json.dumps(row) for row in read_metrics(self.path) if row["step"] <= last_step] if last_step else []
        temporary = self.path.with_suffix(".writing")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers and lists of numbers also go to the trackers as `name` and `name/k`."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is None and self._tracker is None:
            return
        prefix = f"{row['set']}/" if "set" in row else ""
        flat = {f"{prefix}{name}": value for name, value in _flat(row).items() if name != "step"}
        if self._board is not None:
            for name, value in flat.items():
                self._board.add_scalar(name, value, row["step"])
        if self._tracker is not None:
            self._tracker.log(flat, step=row["step"])

    def close(self) -> None:
        """Flush and let the trackers finish."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._tracker is not None:
            self._tracker.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut short by a killed process is dropped. No file: no rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _flat(row: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
        elif isinstance(value, list):
            found |= {f"{name}/{k}": item for k, item in enumerate(value) if isinstance(item, int | float)}
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        wanted = "wandb" if name == "wandb" else "'stagewise[tracking]'"
        raise ImportError(f"{name} is not installed: pip install {wanted}, or leave that setting out") from None
