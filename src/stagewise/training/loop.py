"""The training loop: steps, validation, checkpoints, stopping and going on.

Design choices
- A `Trainer` is given its parts (model, optimizer, objective, batches, how to validate and save) and only knows the
  order of things; base models and specialists train with the same loop.
- A step's loss is one mean over all its targets, whatever the micro-batches and ranks: every piece is divided by the
  count of the whole step.
- A run that goes on from a checkpoint computes, bit for bit, what it would have uninterrupted (same ranks, CPU).
- The loss is checked before the weights move, so a checkpoint never holds weights that saw a NaN.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stagewise.training.checkpoint import RunState, checkpoint_name, checkpoints, prune, save_checkpoint, write_folder
from stagewise.training.distributed import Ranks
from stagewise.training.guard import LossGuard, StopSignals
from stagewise.training.metrics import Metrics
from stagewise.training.objectives import StageLosses
from stagewise.training.optimizer import MuonAdamW
from stagewise.training.precision import ComputeModel
from stagewise.training.progress import Progress
from stagewise.training.schedule import Schedule


class Batches(Protocol):
    """Where training rows come from: this rank's share of an endless, restartable stream."""

    def next_batch(self, rows: int) -> tuple[Tensor, Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ForwardBackward(Protocol):
    """An objective, as `objectives.Objective`."""

    def forward_backward(
        self, model: Any, ids: Tensor, targets: Tensor, grad_scale: float = 1.0, normaliser: float | None = None
    ) -> StageLosses: ...


@dataclass
class Pace:
    """Sizes and intervals of a run. Intervals are in steps, 0 meaning only at the end; rows are of T tokens."""

    steps: int
    rows: int  # of a step, over all ranks
    micro_batch: int  # rows of one forward pass
    log_every: int = 10
    eval_every: int = 250
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_best: bool = True


@dataclass
class Outcome:
    """How a call of `Trainer.fit` ended: steps done so far, the last validation, the signal that stopped it or None."""

    step: int
    validation: dict[str, Any]
    stopped_by: str | None
    checkpoint: Path | None
    model: Path | None
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)  # all rows written, in memory


class Trainer:
    """Trains `compute.master` with the parts it is given; everything about one run in one place.

    `validate()` returns rows of figures (the first one the main set's), called on every rank; `save_model(folder)`
    writes a complete model folder. Without `run` nothing is written.
    """

    def __init__(
        self,
        *,
        compute: ComputeModel,
        objective: ForwardBackward,
        optimizer: MuonAdamW,
        schedule: Schedule,
        batches: Batches,
        pace: Pace,
        validate: Callable[[], list[dict[str, Any]]] | None = None,
        save_model: Callable[[Path], None] | None = None,
        ranks: Ranks | None = None,
        run: Path | None = None,
        recipe: dict[str, Any] | None = None,
        guard: LossGuard | None = None,
        tensorboard: bool = False,
        tracker: str | None = None,
        quiet: bool = False,
        announce: str = "",
    ):
        self.compute, self.objective, self.optimizer, self.schedule = compute, objective, optimizer, schedule
        self.batches, self.pace, self.validate, self.save_model = batches, pace, validate, save_model
        self.ranks = ranks or Ranks()
        self.run, self.recipe, self.guard = run, recipe or {}, guard or LossGuard()
        self.tensorboard, self.tracker, self.quiet, self.announce = tensorboard, tracker, quiet, announce
        self.step, self.elapsed, self.tokens = 0, 0.0, 0
        self.best: dict[str, Any] = {}
        self.resumed_at: int | None = None
        self.history: list[dict[str, Any]] = []
        if pace.rows % self.ranks.world:
            raise ValueError(
                f"training.batch_tokens makes {pace.rows} rows a step, not divisible by {self.ranks.world} ranks"
            )

    def restore(self, state: RunState) -> None:
        """Go on from a checkpoint's state; the weights are loaded by whoever builds the model."""
        self.optimizer.load_named_state(state.optimizer)
        self.batches.load_state_dict(state.data)
        self.step, self.elapsed, self.best = state.step, state.elapsed, state.best
        self.guard.load_state(state.guard)
        self.tokens = state.tokens
        self.resumed_at = state.step

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over all ranks; returns its figures. Raises RuntimeError when the loss says to stop."""
        ids, targets = self.batches.next_batch(self.pace.rows // self.ranks.world)  # (R / W, T)
        valid = self.ranks.sum((targets >= 0).sum().double())
        count = max(1.0, float(valid))
        model, total = self.compute.model, None
        for rows, goal in zip(ids.split(self.pace.micro_batch), targets.split(self.pace.micro_batch), strict=True):
            rows = rows.to(self.ranks.device, non_blocking=True)
            goal = goal.to(self.ranks.device, non_blocking=True)
            losses = self.objective.forward_backward(model, rows, goal, normaliser=count)
            parts = [losses.total[None], losses.stage, *([] if losses.combined is None else [losses.combined])]
            figures = torch.cat([part.double() for part in parts])
            total = figures if total is None else total + figures
        assert total is not None
        loss, *rest = self.ranks.sum(total).tolist()
        problem = self.guard.problem(loss)
        if problem:
            raise RuntimeError(self._stopped(problem))
        factor = self.schedule.apply(self.optimizer, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.compute.refresh()
        self.step += 1
        self.tokens += int(count)
        row = {"step": self.step, "tokens": self.tokens, "loss": loss, "stage_loss": rest, "lr_factor": factor}
        if losses.combined is not None:
            row |= {"stage_loss": rest[: len(rest) // 2], "combined_loss": rest[len(rest) // 2 :]}
        return row

    def _stopped(self, problem: str) -> str:
        last = checkpoints(self.run)[-1:] if self.run else []
        way_out = f"the last good checkpoint is {last[0]}" if last else "there is no checkpoint yet"
        advice = "a lower matrix_lr or a longer warmup may help"
        return f"training stopped at step {self.step + 1}: {problem}; {way_out}; {advice}"

    def fit(self) -> Outcome:
        """Train to the last step, or to the end of the step in which SIGINT or SIGTERM arrived; save either way.

        Raises RuntimeError on a NaN or exploding loss, OSError when a checkpoint does not fit on the disk.
        """
        pace, validation, checkpoint, stop = self.pace, {}, None, False
        writes = self.run is not None and self.save_model is not None
        metrics = self._open_metrics()
        progress = Progress(self.announce, pace.steps, self.step, shown=self.ranks.first and not self.quiet)
        begun, before = time.perf_counter(), self.elapsed
        busy, busy_tokens = 0.0, self.tokens  # seconds and tokens of the steps since the last row
        try:
            with StopSignals() as signals, progress:
                while self.step < pace.steps and not stop:
                    step_begun = time.perf_counter()
                    row = self.train_step()
                    now = time.perf_counter()
                    busy, self.elapsed = busy + now - step_begun, before + now - begun
                    last = self.step == pace.steps
                    stop = self.ranks.any(signals.received is not None)
                    if self.step % pace.log_every == 0 or last or stop:
                        row |= {"tokens_per_second": (self.tokens - busy_tokens) / busy, "seconds": self.elapsed}
                        busy, busy_tokens = 0.0, self.tokens
                        self._note(metrics, row)
                    progress.advance(self.step, row)
                    if self.validate and (last or _due(self.step, pace.eval_every)):
                        validation = self._validate(metrics, progress)
                    if writes and (last or stop or _due(self.step, pace.checkpoint_every)):
                        checkpoint = self._save(validation)
                stopped_by = signals.received or ("another rank" if stop else None)
        finally:
            if metrics is not None:
                metrics.close()
        finished = self.step == pace.steps
        model = None
        if finished and writes:
            model = self.run / "model"  # type: ignore[operator]
            if self.ranks.first:
                write_folder(model, self.save_model)  # type: ignore[arg-type]
            self.ranks.barrier()
        self.elapsed = before + time.perf_counter() - begun
        stopped_by = None if finished else stopped_by
        return Outcome(self.step, validation, stopped_by, checkpoint, model, self.elapsed, self.history)

    def _open_metrics(self) -> Metrics | None:
        if self.run is None or not self.ranks.first:
            return None
        self.run.mkdir(parents=True, exist_ok=True)
        return Metrics(
            self.run,
            resumed_at=self.resumed_at,
            tensorboard=self.tensorboard,
            tracker=self.tracker,
            settings=self.recipe,
        )

    def _note(self, metrics: Metrics | None, row: dict[str, Any]) -> None:
        self.history.append(row)
        if metrics is not None:
            metrics.write(row)

    def _validate(self, metrics: Metrics | None, progress: Progress) -> dict[str, Any]:
        """Figures of the main validation set at this step, all sets noted."""
        assert self.validate is not None
        results = self.validate()
        for figures in results:
            self._note(metrics, {"step": self.step, "tokens": self.tokens, "seconds": self.elapsed, **figures})
        progress.validated(self.step, results)
        return {"step": self.step, **results[0]} if results else {}

    def _save(self, validation: dict[str, Any]) -> Path:
        """Write the checkpoint of this step (first rank), drop those no longer kept."""
        assert self.run is not None and self.save_model is not None
        figure = validation.get(f"{validation.get('default_output')}_bpb")
        fresh = figure is not None and validation["step"] == self.step
        if fresh and (not self.best or figure < self.best["bpb"]):
            self.best = {"step": self.step, "bpb": figure}
        state = RunState(
            step=self.step,
            tokens=self.tokens,
            optimizer=self.optimizer.named_state(),  # gathered: every rank takes part
            data=self.batches.state_dict(),
            recipe=self.recipe,
            best=self.best,
            elapsed=self.elapsed,
            guard=self.guard.state(),
        )
        if self.ranks.first:
            save_checkpoint(self.run, state, self.save_model)
            prune(self.run, self.pace.keep_last, self.best.get("step") if self.pace.keep_best else None)
        self.ranks.barrier()
        return self.run / "checkpoints" / checkpoint_name(self.step)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
