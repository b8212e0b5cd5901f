"""A training run from a recipe: tokenizer, data, model and optimizer built, checkpoints found, `Trainer` started.

Design choices
- RUN holds everything: recipe.yaml, tokenizer/, metrics.jsonl, checkpoints/step-000100/, model/ at the end.
- A tokenizer that the recipe does not name is trained on its data once and kept in the run.
- Going on is refused when the recipe changed in anything that matters, naming the keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from stagewise.data import corpus_texts, open_training_data
from stagewise.data.training_data import TrainingData
from stagewise.evaluation.bpb import evaluate_bpb
from stagewise.modeling import PoEConfig, PoEForCausalLM, load, load_tokenizer
from stagewise.recipe import Recipe
from stagewise.tokenizer import train_tokenizer
from stagewise.training.checkpoint import changed_keys, checkpoints, read_state, write_folder
from stagewise.training.distributed import Ranks, ShardedMuonAdamW, close_ranks, open_ranks
from stagewise.training.guard import LossGuard
from stagewise.training.loop import Outcome, Pace, Trainer
from stagewise.training.objectives import Objective
from stagewise.training.optimizer import MuonAdamW, Rates, parameter_groups
from stagewise.training.precision import ComputeModel
from stagewise.training.schedule import Schedule


def run_tokenizer(recipe: Recipe, run: Path | None = None, ranks: Ranks | None = None) -> Any:
    """The recipe's tokenizer: the one it names, the run's own, or one trained on the data now (and kept in `run`).

    Raises ValueError when its vocabulary is not the model's.
    """
    ranks = ranks or Ranks()
    kept = None if run is None else run / "tokenizer"
    if recipe.tokenizer.path is not None:
        tokenizer = load_tokenizer(recipe.tokenizer.path)
    elif kept is not None and kept.is_dir():
        tokenizer = load_tokenizer(str(kept))
    else:
        if ranks.first:
            texts = corpus_texts(recipe.data, recipe.tokenizer.train_bytes)
            tokenizer = train_tokenizer(texts, recipe.model.vocab_size, add_bos_token=recipe.model.add_bos_token)
            if kept is not None:
                write_folder(kept, _saver(tokenizer))
        ranks.barrier()
        if not ranks.first:
            if kept is None:
                raise ValueError("several ranks share a tokenizer through the run folder: give --out")
            tokenizer = load_tokenizer(str(kept))
    if tokenizer.vocab_size != recipe.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size is {recipe.model.vocab_size}: "
            "set model.vocab_size to the tokenizer's, or leave tokenizer.path out to train one"
        )
    return tokenizer


def _saver(tokenizer: Any) -> Callable[[Path], None]:
    return lambda folder: tokenizer.save_pretrained(folder)


def build_optimizer(recipe: Recipe, model: torch.nn.Module, ranks: Ranks | None = None) -> MuonAdamW:
    """MuonAdamW at the recipe's scaled rates, sharded when there are several ranks."""
    rates = Rates(**recipe.scaled_rates())
    groups = parameter_groups(model.named_parameters(), recipe.model.hidden_size, rates)
    options = {
        "row_equilibration": recipe.optimizer.row_equilibration,
        "renormalise": recipe.optimizer.renormalise,
        "orthogonalise_dtype": getattr(torch, recipe.optimizer.orthogonalise_dtype),
    }
    if ranks is not None and ranks.world > 1:
        return ShardedMuonAdamW(groups, ranks=ranks, **options)
    return MuonAdamW(groups, **options)


def build_schedule(recipe: Recipe) -> Schedule:
    """The recipe's schedule over its steps."""
    return Schedule(steps=recipe.training.steps, **recipe.schedule.model_dump())


def build_pace(recipe: Recipe) -> Pace:
    """The recipe's sizes and intervals."""
    training = recipe.training
    names = ("steps", "micro_batch", "log_every", "eval_every", "checkpoint_every", "keep_last", "keep_best")
    return Pace(
        rows=training.batch_tokens // training.sequence_length, **{name: getattr(training, name) for name in names}
    )


def checkpoint_activations(model: Any) -> None:
    """Make every block of `model` keep only its input for backward and compute the rest again."""
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    for block in model.transformer["h"]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class Validation:
    """Bits per byte of `model` on a run's validation sets, divided among ranks; call it for the rows of figures."""

    def __init__(self, model: Any, data: TrainingData, tokens: int, rows: int, sets: list[str], ranks: Ranks):
        self.model, self.rows, self.ranks = model, rows, ranks
        self.lengths = data.tokenizer.token_byte_lengths
        chosen = ([None] if data.manifest["validation"]["documents"] else []) + list(sets)
        self.sets = [(name, *data.validation_rows(tokens, name)) for name in chosen]

    def __call__(self) -> list[dict[str, Any]]:
        results = []
        for name, inputs, targets in self.sets:
            shared = self.ranks.world > 1 and len(inputs) >= self.ranks.world
            if shared:
                inputs, targets = (part[self.ranks.rank :: self.ranks.world] for part in (inputs, targets))
            batches = zip(inputs.split(self.rows), targets.split(self.rows), strict=True)
            reduce = self.ranks.sum if shared else None
            figures = evaluate_bpb(self.model, batches, self.lengths, reduce=reduce)
            results.append(figures if name is None else {"set": name, **figures})
        return results


def train_recipe(
    recipe: Recipe,
    out: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    device: str | None = None,
    quiet: bool = False,
) -> Outcome:
    """Train what `recipe` describes and leave it in the run folder `out`; without `out` nothing is written.

    Under `torchrun` all ranks call this together. Raises ValueError for a recipe of a specialist, for a run folder that
    already has checkpoints without `resume`, and for one whose recipe was another.
    """
    if recipe.specialist is not None:
        raise ValueError(f"recipe {recipe.name!r} describes a specialist: train it with `stagewise specialise`")
    ranks = open_ranks(device)
    try:
        return build_trainer(recipe, out, resume=resume, ranks=ranks, quiet=quiet).fit()
    finally:
        close_ranks()


def build_trainer(
    recipe: Recipe,
    out: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    ranks: Ranks | None = None,
    quiet: bool = False,
    objective: Any = None,
) -> Trainer:
    """The `Trainer` of a base model's recipe, its state restored when `resume` finds a checkpoint in `out`."""
    ranks = ranks or Ranks()
    run = None if out is None else Path(out)
    settings = recipe.model_dump(mode="json")
    state, folder = None, None
    found = checkpoints(run) if run is not None else []
    if found and not resume:
        raise ValueError(f"{run} already holds checkpoints up to {found[-1].name}: add --resume, or give another --out")
    if found:
        folder = found[-1]
        state = read_state(folder)
        changed = changed_keys(state.recipe, settings)
        if changed:
            raise ValueError(
                f"cannot resume {run}: the recipe changed in {', '.join(changed)}; give it the old values or start anew"
            )
    if run is not None and ranks.first:
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    training = recipe.training
    tokenizer = run_tokenizer(recipe, run, ranks)
    data = _open_data(recipe, tokenizer, run, ranks)
    if folder is not None:
        master = load(folder, dtype=torch.float32, device=ranks.device)
    else:
        with ranks.device:
            master = PoEForCausalLM(PoEConfig(**recipe.model.config_arguments()))
        master.init_weights(recipe.seed)
    master.train()
    compute = ComputeModel(master, getattr(torch, training.dtype))
    if training.activation_checkpointing:
        checkpoint_activations(compute.model)
    if objective is None:
        run_stage: Any = compute.model.run_stage
        runner = torch.compile(run_stage) if training.compile else None
        objective = Objective.from_config(master.config, stage_runner=runner)

    def save_model(target: Path) -> None:
        disable_progress_bar()  # transformers' own, one a checkpoint
        master.save_pretrained(target)
        tokenizer.save_pretrained(target)

    sets = [source.name for source in recipe.data.validation_sources]
    validation = Validation(compute.model, data, training.eval_tokens, training.micro_batch, sets, ranks)
    trainer = Trainer(
        compute=compute,
        objective=objective,
        optimizer=build_optimizer(recipe, master, ranks),
        schedule=build_schedule(recipe),
        batches=data.train,
        pace=build_pace(recipe),
        validate=validation if validation.sets else None,
        save_model=save_model,
        ranks=ranks,
        run=run,
        recipe=settings,
        guard=LossGuard(training.abort_loss_ratio),
        tensorboard=training.tensorboard,
        tracker=training.tracker,
        quiet=quiet,
        announce=_announcement(recipe, state.step if state else 0, ranks),
    )
    if state is not None:
        trainer.restore(state)
    return trainer


def _open_data(recipe: Recipe, tokenizer: Any, run: Path | None, ranks: Ranks) -> TrainingData:
    """Open the data on every rank; the first one encodes what has to be encoded, the others read what it wrote."""
    cache = None if run is None else run / "data"

    def opened() -> TrainingData:
        return open_training_data(
            recipe.data,
            tokenizer,
            recipe.training.sequence_length,
            recipe.seed,
            rank=ranks.rank,
            world_size=ranks.world,
            cache_dir=cache,
        )

    data = opened() if ranks.first else None
    ranks.barrier()
    return data or opened()


def _announcement(recipe: Recipe, done: int, ranks: Ranks) -> str:
    training = recipe.training
    mode = "end to end" if recipe.model.poe_mode == "none" else f"stages {recipe.model.poe_stage_layers}"
    where = f"{ranks.world} ranks" if ranks.world > 1 else str(ranks.device)
    start = f", going on after step {done}" if done else ""
    return (
        f"{recipe.name}: {recipe.parameters:,} parameters, {mode}, {training.steps:,} steps of "
        f"{training.batch_tokens:,} tokens in {training.dtype} on {where}{start}"
    )
