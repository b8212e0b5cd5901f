"""Recipes: everything a training run depends on, typed, checked before anything is built.

Design choices:
- A recipe is one YAML file with a section for each concern. Unknown keys are errors that name the nearest known one.
- Learning rates and weight decay are written as they were tuned at the reference size; `Recipe.scaled_rates` says what
  they become at this batch and width, and `stagewise recipe show` prints both.
- A model preset is a shipped recipe's `model` section: there is one list of released shapes to read, the YAML files.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from stagewise.recipe.files import nearest, read_yaml, recipe_folder, recipe_names
from stagewise.recipe.sections import (
    Conversations,
    DataSection,
    ModelSection,
    OptimizerSection,
    ScheduleSection,
    Section,
    Source,
    SpecialistSection,
    TokenizerSection,
    TrainingSection,
)

__all__ = [
    "Conversations",
    "DataSection",
    "ModelSection",
    "OptimizerSection",
    "Recipe",
    "ScheduleSection",
    "Source",
    "SpecialistSection",
    "TokenizerSection",
    "TrainingSection",
    "list_recipes",
    "load_recipe",
    "recipe_folder",
    "recipe_names",
    "show",
]

REFERENCE_BATCH_TOKENS = 2**19
REFERENCE_LAYERS = 12
REFERENCE_WIDTH = 768


class Recipe(Section):
    """A whole training run. Build one with `load_recipe`."""

    name: str
    description: str = ""
    seed: int = 42
    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection
    specialist: SpecialistSection | None = None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        training, model = self.training, self.model
        if self.tokenizer.vocab_size not in (None, model.vocab_size):
            raise ValueError(
                f"tokenizer.vocab_size={self.tokenizer.vocab_size} is not model.vocab_size={model.vocab_size}: "
                "leave the first out"
            )
        if training.sequence_length > model.max_position_embeddings:
            raise ValueError(
                f"training.sequence_length={training.sequence_length} is longer than the context, "
                f"model.max_position_embeddings={model.max_position_embeddings}"
            )
        rows = training.micro_batch * training.sequence_length
        if training.batch_tokens % rows:
            raise ValueError(
                f"training.batch_tokens={training.batch_tokens} is not a multiple of "
                f"micro_batch x sequence_length = {training.micro_batch} x {training.sequence_length} = {rows}"
            )
        if self.specialist is None and not self.data.sources and not self.data.shards:
            raise ValueError("data.sources is empty: name at least one source, or data.shards")
        return self

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.training.steps * self.training.batch_tokens

    @property
    def parameters(self) -> int:
        """Parameters of the model trained, the frozen ones of a specialist's parent included."""
        return self.model.parameters(self.specialist.new_layers if self.specialist else 0)

    def scaled_rates(self) -> dict[str, float]:
        """Learning rates and Muon's weight decay as used: keys of `OptimizerSection`, and `head_lr` for specialists.

        Bases: every rate but `smear_lr` times sqrt(batch_tokens / 2^19). Weight decay times the same root and times
        D_ref / D, the token horizons of the 12-layer model of these proportions and of this one; at one ratio of
        tokens to parameters they stand as `ModelSection.matrix_parameters` do (nanochat's rule). Specialists: rates
        times `init_lr_frac`, the new head's apart, no batch scaling (stage-chat card). The factor sqrt(768 / D) of
        embeddings and heads is not in here: see `group_rates`.
        """
        optimizer = self.optimizer
        rates = {name: getattr(optimizer, name) for name in _RATES}
        if self.specialist is not None:
            scaled = {name: value * self.specialist.init_lr_frac for name, value in rates.items()}
            return {**scaled, "weight_decay": optimizer.weight_decay, "head_lr": self.specialist.head_lr}
        root = math.sqrt(self.training.batch_tokens / REFERENCE_BATCH_TOKENS)
        scaled = {name: value * root for name, value in rates.items()} | {"smear_lr": optimizer.smear_lr}
        return {**scaled, "weight_decay": optimizer.weight_decay * root * self._horizon_ratio()}

    def _horizon_ratio(self) -> float:
        model = self.model
        width = model.head_dim * math.ceil(
            REFERENCE_LAYERS * model.hidden_size / model.num_hidden_layers / model.head_dim
        )
        return model.matrix_parameters(REFERENCE_LAYERS, width) / model.matrix_parameters()

    def group_rates(self) -> dict[str, tuple[float, float]]:
        """For each kind of tensor, its learning rate as written in the recipe and as used at this batch and width."""
        before = {name: getattr(self.optimizer, name) for name in (*_RATES, "weight_decay")}
        after = self.scaled_rates()
        width = math.sqrt(REFERENCE_WIDTH / self.model.hidden_size)
        if self.specialist is not None:
            rows = {"lm_head_stage": (self.specialist.head_lr, self.specialist.head_lr * width)}
        else:
            rows = {
                "heads": (before["unembedding_lr"], after["unembedding_lr"] * width),
                "wte": (before["embedding_lr"], after["embedding_lr"] * width),
                "value_embeds": (before["embedding_lr"], after["embedding_lr"] * width / 2),
            }
        rows |= {
            "matrices": (before["matrix_lr"], after["matrix_lr"]),
            "resid_lambdas": (before["scalar_lr"], after["scalar_lr"] * 0.01),
            "x0_lambdas": (before["scalar_lr"], after["scalar_lr"]),
        }
        if self.specialist is None:
            rows["smear, backout"] = (before["smear_lr"], after["smear_lr"])
        return rows | {"matrices' weight decay": (before["weight_decay"], after["weight_decay"])}

    def to_yaml(self) -> str:
        """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True, width=100)


_RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "smear_lr")


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name or any YAML file by path, apply `overrides`, check everything.

    `overrides` are dotted keys and values: a mapping, or a list of `a.b=c` whose values are read as YAML. An entry of
    a list is reached by its index or its name: `data.sources.climbmix.path=texts/`. Raises ValueError naming every
    offending key, FileNotFoundError for a recipe that does not exist.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = recipe_folder() / f"{name_or_path}.yaml"
        if not path.is_file():
            names = recipe_names()
            hint = nearest(str(name_or_path), names) or f"; shipped recipes: {', '.join(names)}"
            raise ValueError(f"no recipe named {str(name_or_path)!r}{hint}; a path must end in .yaml")
    elif not path.is_file():
        raise FileNotFoundError(f"no recipe file {path}")
    tree = read_yaml(path)
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_parse_override, overrides)
    for key, value in pairs:
        _assign(tree, key, value)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors())
        raise ValueError(f"recipe {path.stem}: {problems}") from None


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override {text!r} is not of the form section.key=value")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:  # a glob such as *.jsonl, for instance: taken as it stands
        return key.strip(), value


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the entry of `tree` at the dotted `key`, making sections on the way."""
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = _entry(node, part, key) if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ValueError(f"override {key}: {part!r} is a value, not a section")
    if isinstance(node, list):
        raise ValueError(f"override {key}: name the entry's field too, as in {key}.path=...")
    node[last] = value


def _entry(entries: list[Any], part: str, key: str) -> Any:
    """The entry of a list by index or by its `name`."""
    if part.isdigit() and int(part) < len(entries):
        return entries[int(part)]
    named = {str(entry["name"]): entry for entry in entries if isinstance(entry, dict) and "name" in entry}
    if part not in named:
        raise ValueError(f"override {key}: no entry {part!r}{nearest(part, list(named))}")
    return named[part]


def _explain(problem: Any) -> str:
    """One validation problem as `section.key: what is wrong`, with the nearest known key for an unknown one."""
    location = list(problem["loc"])
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        prefix = ".".join(str(part) for part in location[:-1])
        hint = nearest(str(location[-1]), list(_section_at(location[:-1]).model_fields), prefix)
        return f"unknown key {key}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = f" (got {value!r})" if isinstance(value, str | int | float) and problem["type"] != "value_error" else ""
    return f"{key}: {message}{shown}" if key else message


def _section_at(location: Sequence[str | int]) -> type[BaseModel]:
    """The section class that a validation location lies in."""
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str):
            hints = typing.get_type_hints(section)
            section = next(_sections_in(hints[part]))
    return section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def show(name: str, *, set: list[str] | None = None) -> None:  # noqa: A002 (the option is called --set)
    """Print a recipe: every value, and what the learning rates become at its batch and width.

    Args:
        name: A shipped recipe's name, or the path of a YAML file.
        set: Values to change, as section.key=value. May be repeated.

    Example:
        stagewise recipe show quickstart --set training.steps=100
    """
    recipe = load_recipe(name, set or [])
    training = recipe.training
    print(recipe.to_yaml())
    print("What it comes to")
    print(f"  parameters            {recipe.parameters:,}")
    if recipe.specialist is not None:
        print(f"  of them appended      {recipe.parameters - recipe.model.parameters():,}")
    print(f"  stages                {recipe.model.poe_stage_layers or 'none'}")
    print(f"  steps                 {training.steps:,} of {training.batch_tokens:,} tokens")
    print(f"  tokens                {recipe.tokens:,} ({recipe.tokens / recipe.parameters:.2f} a parameter)")
    rows = training.micro_batch * training.sequence_length
    print(f"  forward passes a step {training.batch_tokens // rows:,} of {rows:,} tokens, shared by the ranks")
    print("Learning rates               in the recipe    as used")
    for kind, (before, after) in recipe.group_rates().items():
        print(f"  {kind:<26} {before:>13.6g} {after:>10.6g}")


def list_recipes() -> None:
    """List the shipped recipes.

    Example:
        stagewise recipe list
    """
    for name in recipe_names():
        print(f"{name:<16} {load_recipe(name).description}")
