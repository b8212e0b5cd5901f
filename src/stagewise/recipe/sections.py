"""The sections of a recipe: one class for each concern, every field with its type, default and limits.

Design choices:
- Unknown keys are refused and values are immutable once checked.
- Sizes are computed here by arithmetic, so that a recipe can be inspected without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from stagewise.recipe.files import preset_model

SMALLEST_VOCABULARY = 256 + 9  # every byte and the nine special tokens
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are immutable once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """Shape, conventions and objective; the names are those of `PoEConfig`. Fields left out take its defaults."""

    preset: str | None = None  # a shipped recipe whose model section these fields refine
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    vocab_size: PositiveInt
    num_key_value_heads: PositiveInt = 0  # left out: num_attention_heads
    head_dim: PositiveInt = 0  # left out: hidden_size / num_attention_heads
    intermediate_size: PositiveInt = 0  # left out: 4 x hidden_size
    max_position_embeddings: PositiveInt = 2048
    window_pattern: str = "SSSL"
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-6
    logit_softcap: float = 15.0
    qk_scale: float = 1.2
    ve_gate_channels: PositiveInt = 12
    ve_gate_scale: float = 3.0
    smear_channels: int = Field(24, ge=0)
    use_backout: bool = True
    fp32_attention: bool = False
    add_bos_token: bool = False
    poe_mode: Literal["none", "flat", "hier", "residual_logop"] = "none"
    poe_alpha: float = 0.0
    residual_weight: Fraction | None = None
    poe_stage_layers: list[PositiveInt] | None = None
    per_stage_head: bool = False

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Refine the preset, then derive the sizes left out."""
        if not isinstance(values, Mapping):
            return values
        if values.get("preset") is not None:
            values = {**preset_model(str(values["preset"])), **values}
        width, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if not (isinstance(width, int) and isinstance(heads, int) and width > 0 and heads > 0):
            return values  # the field's own check reports it
        if "head_dim" not in values and width % heads:
            raise ValueError(f"num_attention_heads={heads} does not divide hidden_size={width}")
        return {"num_key_value_heads": heads, "head_dim": width // heads, "intermediate_size": 4 * width, **values}

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocab_size={self.vocab_size} is smaller than the 256 bytes and 9 special tokens: "
                f"use at least {SMALLEST_VOCABULARY}"
            )
        if set(self.window_pattern) - {"S", "L"} or not self.window_pattern:
            raise ValueError(f"window_pattern={self.window_pattern!r} may hold only S (short) and L (long)")
        if self.poe_stage_layers is not None and sum(self.poe_stage_layers) != self.num_hidden_layers:
            raise ValueError(
                f"poe_stage_layers={self.poe_stage_layers} sums to {sum(self.poe_stage_layers)}, "
                f"not to num_hidden_layers={self.num_hidden_layers}"
            )
        if self.poe_mode != "none" and self.poe_stage_layers is None:
            raise ValueError(f"poe_mode={self.poe_mode!r} needs poe_stage_layers, the number of layers in each stage")
        if self.poe_mode == "none" and self.per_stage_head:
            raise ValueError("per_stage_head needs a stage objective: poe_mode 'none' would leave the heads untrained")
        return self

    def config_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `PoEConfig`: every field but `preset`, without those left to its defaults."""
        return self.model_dump(exclude={"preset"}, exclude_none=True)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embeddings and heads: the vocabulary rounded up to a multiple of 64."""
        return -(-self.vocab_size // 64) * 64

    def matrix_parameters(self, layers: int | None = None, width: int | None = None) -> int:
        """Parameters in the blocks' matrices and one head: what the token horizon is measured against.

        `layers` and `width` replace this model's, its other proportions kept.
        """
        layers = layers or self.num_hidden_layers
        width = width or self.hidden_size
        heads = max(1, width // self.head_dim) if width != self.hidden_size else self.num_attention_heads
        kv_heads = max(1, heads * self.num_key_value_heads // self.num_attention_heads)
        inner = width * self.intermediate_size // self.hidden_size
        attention = 2 * width * heads * self.head_dim + 2 * width * kv_heads * self.head_dim
        gates = kv_heads * self.ve_gate_channels * -(-layers // 2)
        return layers * (attention + 2 * width * inner) + gates + self.padded_vocab_size * width

    def parameters(self, new_layers: int = 0) -> int:
        """Parameters of the whole base, or of a specialist with `new_layers` appended blocks and one more head."""
        vocabulary, width, layers = self.padded_vocab_size, self.hidden_size, self.num_hidden_layers
        kv_width = self.num_key_value_heads * self.head_dim
        total = self.matrix_parameters() + vocabulary * width  # matrices, lm_head, wte
        total += -(-layers // 2) * vocabulary * kv_width + 2 * layers  # value embeddings, lambdas
        total += (self.smear_channels + 1 if self.smear_channels else 0) + self.use_backout
        if self.per_stage_head:
            total += len(self.poe_stage_layers or []) * vocabulary * width
        if new_layers:
            attention = 2 * width * self.num_attention_heads * self.head_dim + 2 * width * kv_width
            total += new_layers * (attention + 2 * width * self.intermediate_size + 2) + vocabulary * width
        return total


class TokenizerSection(Section):
    """A trained tokenizer's folder, or the size of one to train on the data first."""

    path: str | None = None
    vocab_size: PositiveInt | None = None  # left out: the model's
    train_bytes: PositiveInt = 20_000_000


class Source(Section):
    """One source of documents. A hub source with a `path` reads that local copy instead."""

    name: str
    kind: Literal["embedded", "text", "jsonl", "parquet", "hub"]
    path: str | list[str] | None = None  # files, folders or globs
    text_key: str | list[str] = "text"  # several columns are joined by `separator`
    separator: str | None = None
    repo: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    share: float = Field(1.0, gt=0.0)  # relative to the sum of all shares
    limit: PositiveInt | None = None  # documents
    train_only: bool = False

    @model_validator(mode="after")
    def _check(self) -> Source:
        if self.kind == "hub" and not (self.repo or self.path):
            raise ValueError(f"source {self.name!r} of kind hub needs repo, or path for a local copy")
        if self.kind in ("text", "jsonl", "parquet") and not self.path:
            raise ValueError(f"source {self.name!r} of kind {self.kind} needs path")
        return self


class DataSection(Section):
    """The mixture a base is trained on."""

    sources: list[Source] = []
    validation_sources: list[Source] = []  # further sets to validate on, each reported under its name
    validation_fraction: Fraction = 0.02
    case_augmentation: Fraction = 0.0  # share of training documents re-cased: 80% lowered, 20% raised
    shards: str | None = None  # a folder written by `stagewise data prepare`

    @field_validator("sources", "validation_sources")
    @classmethod
    def _unique_names(cls, sources: list[Source]) -> list[Source]:
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name!r}")
        return sources


class OptimizerSection(Section):
    """MuonAdamW's settings before scaling."""

    matrix_lr: Rate = 0.02
    embedding_lr: Rate = 0.3
    unembedding_lr: Rate = 0.008
    scalar_lr: Rate = 0.5
    smear_lr: Rate = 0.2
    weight_decay: Rate = 0.28
    row_equilibration: bool = False
    renormalise: bool = False
    orthogonalise_dtype: Literal["float32", "bfloat16"] = "bfloat16"


class ScheduleSection(Section):
    """How rate, momentum and decay move over the run; `warmdown_ratio` is a share of all steps."""

    warmup_steps: int = Field(40, ge=0)
    warmdown_ratio: Fraction = 0.65
    final_lr_frac: Fraction = 0.05
    momentum_start: Fraction = 0.85
    momentum_peak: Fraction = 0.97
    momentum_end: Fraction = 0.90
    momentum_warmup_steps: int = Field(400, ge=0)
    weight_decay_cosine: bool = True


class TrainingSection(Section):
    """Length of the run, its batches, and what is written when. Intervals of 0 mean only at the end."""

    steps: PositiveInt
    batch_tokens: PositiveInt  # over all ranks and accumulated micro-batches
    micro_batch: PositiveInt = 8  # rows a forward pass
    sequence_length: PositiveInt = 2048
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the compute; master weights are float32
    eval_every: int = Field(250, ge=0)
    eval_tokens: PositiveInt = 131_072
    checkpoint_every: int = Field(1000, ge=0)
    keep_last: PositiveInt = 2
    keep_best: bool = True
    log_every: PositiveInt = 10
    abort_loss_ratio: float | None = Field(None, gt=1.0)  # stop when the loss exceeds its best by this factor
    compile: bool = False
    activation_checkpointing: bool = False
    tensorboard: bool = False
    tracker: Literal["trackio", "wandb"] | None = None


class Conversations(Section):
    """One source of conversations, read `epochs` times. `shape` auto recognises the common layouts by their columns."""

    name: str
    kind: Literal["embedded", "jsonl", "parquet", "hub"]
    shape: str = "auto"
    path: str | None = None  # replaces a hub source by a local copy
    repo: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    epochs: float = Field(1.0, gt=0.0)
    count: PositiveInt | None = None  # conversations to make, of an embedded source
    limit: PositiveInt | None = None  # records to read
    invalid: Literal["error", "skip"] = "error"  # what to do with records that are no conversation

    @model_validator(mode="before")
    @classmethod
    def _local_copy(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("kind") == "hub" and values.get("path"):
            return {**values, "kind": "parquet" if str(values["path"]).endswith(".parquet") else "jsonl"}
        return values

    @model_validator(mode="after")
    def _check(self) -> Conversations:
        if self.kind == "hub" and not self.repo:
            raise ValueError(f"conversations {self.name!r} of kind hub need repo, or path for a local copy")
        if self.kind in ("jsonl", "parquet") and not self.path:
            raise ValueError(f"conversations {self.name!r} of kind {self.kind} need path")
        return self


class SpecialistSection(Section):
    """A stage delta on a frozen parent. The recipe's `model` describes the parent's shape."""

    parent: str  # model folder or repository
    parent_revision: str | None = None
    new_layers: PositiveInt
    specialist_base_head: Literal["final", "last_expert"] | None = None  # None: what suits the parent
    conversations: list[Conversations] = Field(min_length=1)
    limit: PositiveInt | None = None  # conversations to train on, a subsample by seed
    held_out: PositiveInt = 512
    greetings: Fraction = 0.0  # share of conversations opening with a greeting that get a re-cased copy
    reference_greetings: bool = False  # match prefixes, as the cards' counts do, not whole words
    warm_init: bool = True
    init_lr_frac: Fraction = 0.2
    head_lr: Rate = 1e-4
    head_weight_decay: Rate = 0.1
    end_token_weight: Rate = 1.0
    label_smoothing: Fraction = 0.0
    recompute_windows: bool = False
    long_turns: Literal["error", "cut", "skip"] = "error"  # assistant turns that do not fit the context by themselves
