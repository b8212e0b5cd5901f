"""Training a specialist from a recipe: parent, conversations, optimizer and loop put together.

Design choices
- The loop, checkpoints, guards and parallelism are those of every training run; this file only builds the parts.
- RUN holds recipe.yaml, metrics.jsonl, checkpoints/ and at the end model/, each model folder a delta in fp32.
- The frozen tensors are hashed before the first step and after the last: a run that changed one ends in an error.
- Going on from a checkpoint reads its delta back over the same parent, whose hash must be the recorded one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stagewise.data.conversation_packing import ConversationPacker, batch
from stagewise.data.conversations import ConversationMixture, Messages
from stagewise.modeling import PoEConfig, PoEForCausalLM
from stagewise.modeling.byte_encoding import ASSISTANT_END
from stagewise.modeling.cascade import assemble
from stagewise.recipe import Recipe
from stagewise.specialist.delta import fill_delta_folder
from stagewise.specialist.growth import (
    Parent,
    build,
    frozen_hash,
    grow,
    grow_on_meta,
    open_parent,
    parent_tokenizer,
    refresh_overlay,
    trainable_names,
)
from stagewise.specialist.objective import SpecialistObjective, measure
from stagewise.training.checkpoint import changed_keys, checkpoints, read_state
from stagewise.training.distributed import Ranks, ShardedMuonAdamW, close_ranks, open_ranks
from stagewise.training.guard import LossGuard
from stagewise.training.loop import Outcome, Trainer
from stagewise.training.optimizer import MuonAdamW, Rates, parameter_groups
from stagewise.training.precision import ComputeModel
from stagewise.training.run import build_pace, build_schedule, checkpoint_activations

SAMPLES = 2
SAMPLE_TOKENS = 64


def open_mixture(recipe: Recipe) -> ConversationMixture:
    """The recipe's conversations, held-out ones apart."""
    assert recipe.specialist is not None
    section = recipe.specialist
    return ConversationMixture(
        section.conversations,
        seed=recipe.seed,
        held_out=section.held_out,
        limit=section.limit,
        greetings=section.greetings,
        reference_greetings=section.reference_greetings,
    )


def specialist_rates(recipe: Recipe) -> Rates:
    """Learning rates of the new tensors: `init_lr_frac` times the recipe's, the head's apart, lambdas without decay."""
    assert recipe.specialist is not None
    scaled = recipe.scaled_rates()
    return Rates(
        matrix_lr=scaled["matrix_lr"],
        scalar_lr=scaled["scalar_lr"],
        unembedding_lr=scaled["head_lr"],
        weight_decay=scaled["weight_decay"],
        head_weight_decay=recipe.specialist.head_weight_decay,
        resid_weight_decay=0.0,
    )


def build_optimizer(recipe: Recipe, model: PoEForCausalLM, ranks: Ranks) -> MuonAdamW:
    """MuonAdamW over exactly the trainable tensors."""
    groups = parameter_groups(model.named_parameters(), model.config.hidden_size, specialist_rates(recipe))
    names = {name for group in groups for name in group["names"]}
    assert names == set(trainable_names(model)), "the optimizer must hold exactly what trains"
    options = {
        "row_equilibration": recipe.optimizer.row_equilibration,
        "renormalise": recipe.optimizer.renormalise,
        "orthogonalise_dtype": getattr(torch, recipe.optimizer.orthogonalise_dtype),
    }
    if ranks.world > 1:
        return ShardedMuonAdamW(groups, ranks=ranks, **options)
    return MuonAdamW(groups, **options)


class SpecialistCompute(ComputeModel):
    """The compute model of a specialist, whose overlay follows its trained lambdas."""

    def refresh(self) -> None:
        refresh_overlay(self.master)  # type: ignore[arg-type]
        super().refresh()


@dataclass
class Validation:
    """Figures and samples of a specialist on held-out conversations; call it for the rows of figures."""

    model: Any
    tokenizer: Any
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    prompts: list[Messages]
    ranks: Ranks
    quiet: bool = False
    samples: list[dict[str, str]] = field(default_factory=list)

    def __call__(self) -> list[dict[str, Any]]:
        training = self.model.training
        self.model.eval()
        shared = self.ranks.world > 1 and len(self.batches) >= self.ranks.world
        batches = self.batches[self.ranks.rank :: self.ranks.world] if shared else self.batches
        figures: dict[str, Any] = dict(
            measure(self.model, batches, self.tokenizer.token_byte_lengths, self.ranks.sum if shared else None)
        )
        if self.ranks.first:
            self.samples = [self._sample(messages) for messages in self.prompts]
            figures["samples"] = self.samples
            if not self.quiet:
                print(f"bits per assistant token {figures['bits_per_assistant_token']:.4f}", flush=True)
                for sample in self.samples:
                    print(f"  > {sample['prompt']}\n  {sample['answer']}", flush=True)
        self.model.train(training)
        return [figures]

    @torch.no_grad()
    def _sample(self, messages: Messages) -> dict[str, str]:
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        ids = self.tokenizer.render_for_completion(messages[:first])
        room = self.model.config.max_position_embeddings - len(ids)
        answer = self.model.generate(
            torch.tensor([ids], device=self.model.device),
            max_new_tokens=max(1, min(SAMPLE_TOKENS, room)),
            do_sample=False,
            eos_token_id=self.tokenizer.chat_stop_ids,
            pad_token_id=self.tokenizer.bos_token_id,
        )
        text = self.tokenizer.decode_bytes(answer[0, len(ids) :].tolist(), skip_special_tokens=True)
        prompt = str(messages[first - 1]["content"])
        return {"prompt": prompt[:200], "answer": text.decode("utf-8", "replace")}


def check_recipe_shape(recipe: Recipe, base: PoEConfig) -> None:
    """ValueError when the recipe's `model` is not the parent's shape."""
    wanted = PoEConfig(**recipe.model.config_arguments())
    parts = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    for name in (*parts, "base_layers"):
        if getattr(wanted, name) != getattr(base, name):
            raise ValueError(
                f"the recipe's model has {name}={getattr(wanted, name)}, the parent {recipe.specialist.parent} has "  # type: ignore[union-attr]
                f"{getattr(base, name)}: point specialist.parent at another model or mend the recipe's model section"
            )


def train_specialist(
    recipe: Recipe,
    out: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    device: str | None = None,
    quiet: bool = False,
    reference_layout: bool = False,
) -> Outcome:
    """Train the specialist that `recipe` describes and leave it in the run folder `out`.

    Under `torchrun` all ranks call this together. Raises ValueError for a recipe without a specialist, a parent of
    another shape, a run folder with checkpoints but no `resume`; RuntimeError when a frozen tensor changed.
    """
    if recipe.specialist is None:
        raise ValueError(f"recipe {recipe.name!r} has no specialist section: train it with `stagewise train`")
    ranks = open_ranks(device)
    try:
        trainer = build_trainer(recipe, out, resume=resume, ranks=ranks, quiet=quiet, reference_layout=reference_layout)
        model = trainer.compute.master
        before = frozen_hash(model)  # type: ignore[arg-type]
        outcome = trainer.fit()
        if frozen_hash(model) != before:  # type: ignore[arg-type]
            raise RuntimeError("a frozen tensor changed while the specialist trained: do not use this run")
        return outcome
    finally:
        close_ranks()


def build_trainer(
    recipe: Recipe,
    out: str | os.PathLike | None = None,
    *,
    resume: bool = False,
    ranks: Ranks | None = None,
    quiet: bool = False,
    reference_layout: bool = False,
) -> Trainer:
    """The `Trainer` of a specialist's recipe, its state restored when `resume` finds a checkpoint in `out`."""
    assert recipe.specialist is not None
    section, training = recipe.specialist, recipe.training
    ranks = ranks or Ranks()
    run = None if out is None else Path(out)
    settings = recipe.model_dump(mode="json")
    found = checkpoints(run) if run is not None else []
    if found and not resume:
        raise ValueError(f"{run} already holds checkpoints up to {found[-1].name}: add --resume, or give another --out")
    state = read_state(found[-1]) if found else None
    if state is not None and (changed := changed_keys(state.recipe, settings)):
        raise ValueError(
            f"cannot resume {run}: the recipe changed in {', '.join(changed)}; give it the old values or start anew"
        )
    parent = open_parent(section.parent, section.parent_revision)
    check_recipe_shape(recipe, parent.config)
    tokenizer = parent_tokenizer(parent.found.folder)
    if tokenizer.vocab_size != parent.config.vocab_size:
        raise ValueError(
            f"the parent's tokenizer has {tokenizer.vocab_size} tokens, "
            f"its config says vocab_size={parent.config.vocab_size}"
        )
    if run is not None and ranks.first:
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    if state is not None:
        master = build(assemble(found[-1].resolve()), torch.float32, ranks.device)
    else:
        master = grow(
            parent,
            section.new_layers,
            tokenizer=tokenizer if section.warm_init else None,
            base_head=section.specialist_base_head,
            recompute_windows=section.recompute_windows,
            seed=recipe.seed,
            device=ranks.device,
        )
    mixture = open_mixture(recipe)
    row_tokens = training.sequence_length + 1
    packing: dict[str, Any] = {"seed": recipe.seed, "long_turns": section.long_turns}
    batches = ConversationPacker(
        mixture, mixture.train, tokenizer, row_tokens, **packing, rank=ranks.rank, world=ranks.world
    )
    compute = SpecialistCompute(master, getattr(torch, training.dtype))
    runner: Any = compute.model.run_stage
    if training.activation_checkpointing:
        checkpoint_activations(compute.model)
    objective = SpecialistObjective(
        end_token=tokenizer.special_ids[ASSISTANT_END],
        end_token_weight=section.end_token_weight,
        label_smoothing=section.label_smoothing,
        stage_runner=torch.compile(runner) if training.compile else None,
    )
    held = ConversationPacker(mixture, mixture.validation, tokenizer, row_tokens, **packing, shuffle=False)
    rows = list(held.rows())
    validation = Validation(
        compute.model,
        tokenizer,
        [batch(rows[i : i + training.micro_batch]) for i in range(0, len(rows), training.micro_batch)],
        [mixture.conversation(entry) for entry in mixture.validation[:SAMPLES]],
        ranks,
        quiet,
    )
    trainer: Trainer

    def save_model(folder: Path) -> None:
        facts = stage_facts(recipe, parent, mixture, trainer)
        fill_delta_folder(folder, master, tokenizer, parent, stage_training=facts, reference_layout=reference_layout)

    trainer = Trainer(
        compute=compute,
        objective=objective,
        optimizer=build_optimizer(recipe, master, ranks),
        schedule=build_schedule(recipe),
        batches=batches,
        pace=build_pace(recipe),
        validate=validation,
        save_model=save_model,
        ranks=ranks,
        run=run,
        recipe=settings,
        guard=LossGuard(training.abort_loss_ratio),
        tensorboard=training.tensorboard,
        tracker=training.tracker,
        quiet=quiet,
        announce=announcement(recipe, master, mixture, parent),
    )
    if state is not None:
        trainer.restore(state)
    return trainer


def stage_facts(recipe: Recipe, parent: Parent, mixture: ConversationMixture, trainer: Trainer) -> dict[str, Any]:
    """The numbers of a specialist's training that its config keeps (`stage_training`)."""
    assert recipe.specialist is not None
    section = recipe.specialist
    measured = [row for row in trainer.history if "bits_per_assistant_token" in row]
    figures = ("step", "bits_per_assistant_token", "final_path_bpb", "assistant_accuracy")
    model = trainer.compute.master
    return {
        "recipe": recipe.name,
        "parent": parent.source,
        "data": [{"name": spec.name, "epochs": spec.epochs} for spec in mixture.specs],
        **mixture.summary(),
        "seed": recipe.seed,
        "steps": trainer.step,
        "tokens_per_step": recipe.training.batch_tokens,
        "sequence_length": recipe.training.sequence_length,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "matrix_lr": recipe.optimizer.matrix_lr,
        "init_lr_frac": section.init_lr_frac,
        "head_lr": section.head_lr,
        "head_weight_decay": section.head_weight_decay,
        "warmup_steps": recipe.schedule.warmup_steps,
        "warmdown_ratio": recipe.schedule.warmdown_ratio,
        "validation": [{key: row[key] for key in figures} for row in measured],
    }


def announcement(recipe: Recipe, model: PoEForCausalLM, mixture: ConversationMixture, parent: Parent) -> str:
    """What is about to be trained, in one line."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    section, training = recipe.specialist, recipe.training
    assert section is not None
    return (
        f"{recipe.name}: {section.new_layers} layers on {parent.source}, {trainable:,} of {total:,} parameters train; "
        f"{len(mixture.train):,} conversations, {len(mixture.validation):,} held out; "
        f"{training.steps:,} steps of {training.batch_tokens:,} tokens"
    )


def dry_run(recipe: Recipe) -> str:
    """What a specialist's recipe comes to, without its parent or its data: shapes, counts, rates."""
    if recipe.specialist is None:
        raise ValueError(f"recipe {recipe.name!r} has no specialist section: see `stagewise train --dry-run`")
    section, training = recipe.specialist, recipe.training
    base = PoEConfig(**recipe.model.config_arguments())
    model = grow_on_meta(base, section.new_layers, section.specialist_base_head)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    groups = parameter_groups(model.named_parameters(), base.hidden_size, specialist_rates(recipe))
    width = 2 if training.dtype == "bfloat16" else 4
    memory = total * 4 + (total * 2 if width == 2 else 0) + trainable * 12
    lines = [
        f"recipe      {recipe.name}: {section.new_layers} layers on {section.parent}",
        f"parameters  {total:,}, of which {trainable:,} train ({trainable / total:.1%})",
        f"tensors     {len(trainable_names(model))} train",
        f"path        {model.config.specialist_base_head}",
        f"data        {', '.join(f'{c.name} x{c.epochs:g}' for c in section.conversations)}",
        f"length      {training.steps:,} steps of {training.batch_tokens:,} tokens = {recipe.tokens:,} tokens",
        f"memory      {memory / 2**30:.1f} GiB for weights, gradients and optimizer state",
    ]
    lines += [f"rate        {group['label']:<8} {group['lr']:.3g}, decay {group['weight_decay']:g}" for group in groups]
    return "\n".join(lines)
