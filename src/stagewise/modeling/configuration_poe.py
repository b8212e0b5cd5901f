"""Configuration of a stage-partitioned language model.

Design choices:
- Layer behaviour (attention window, value embeddings, the backout tap) is stored per layer. It is derived once, from
  the root base's depth, and never again: appending layers moves nothing below them.
- Every convention that differs between revisions of the reference implementation is a field with a default.
- One class describes bases and specialists; `specialist_layers` lists the layers each chained specialist appended.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

POE_MODES = ("none", "flat", "hier", "residual_logop")

_RELEASE_1B = {
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 32768,
    "poe_stage_layers": [6, 6, 6, 6],
}
_SPECIALIST_1B = {**_RELEASE_1B, "poe_mode": "flat", "dual_head": True, "frozen_layers": 24}

PRESETS: dict[str, dict] = {
    "bp-1.3b": {**_RELEASE_1B, "poe_mode": "none"},
    "poe-1.3b": {**_RELEASE_1B, "poe_mode": "flat"},
    "poe-1.5b": {
        **_RELEASE_1B,
        "num_key_value_heads": 6,
        "vocab_size": 48000,
        "poe_stage_layers": [12, 5, 4, 3],
        "per_stage_head": True,
        "poe_mode": "residual_logop",
        "add_bos_token": True,
    },
    "poe-3b": {
        "hidden_size": 2048,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12800,
        "vocab_size": 32768,
        "poe_stage_layers": [16, 6, 5, 5],
        "per_stage_head": True,
        "poe_mode": "flat",
    },
    "stage-chat": {**_SPECIALIST_1B, "num_hidden_layers": 26, "new_layers": 2},
    "stage-tool": {**_SPECIALIST_1B, "num_hidden_layers": 28, "new_layers": 4},
}


def short_window(context: int) -> int:
    """Reach of a short-window layer in positions: a quarter of the context, rounded up to a multiple of 128."""
    quarter = -(-context // 4)
    return -(-quarter // 128) * 128


class PoEConfig(PreTrainedConfig):
    """Shape and conventions of a Product-of-Experts language model.

    Sizes: L `num_hidden_layers` (appended ones included), D `hidden_size`, H `num_attention_heads`, G
    `num_key_value_heads`, d `head_dim`, K base stages. `poe_stage_layers` sums to `base_layers`, the layers of the
    root base. Raises ValueError naming the field when the numbers do not fit together.
    """

    model_type = "cognica_poe"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32768
    hidden_size: int = 256
    intermediate_size: int = None  # type: ignore[assignment]  # derived when not given
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = None  # type: ignore[assignment]  # derived when not given
    head_dim: int = None  # type: ignore[assignment]  # derived when not given
    max_position_embeddings: int = 2048
    hidden_act: str = "relu_squared"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100000.0
    window_pattern: str = "SSSL"
    tie_word_embeddings: bool = False
    use_cache: bool = True

    # conventions that differ between revisions of the reference
    logit_softcap: float = 15.0
    qk_scale: float = 1.2
    ve_gate_channels: int = 12
    ve_gate_scale: float = 3.0
    smear_channels: int = 24  # 0: no smear
    use_backout: bool = True
    fp32_attention: bool = False  # run attention in fp32: cached equals uncached for longer in bf16

    # stages and objective
    poe_mode: str = "none"
    poe_alpha: float = 0.0
    residual_weight: float = 0.5
    poe_every: int | None = None
    poe_stage_layers: list[int] = None  # type: ignore[assignment]  # derived when not given
    per_stage_head: bool = False
    poe_head_count: int | None = None
    poe_router: bool = False
    poe_wand_p99_bounds_per_stage_head: list[float] | None = None

    # facts stored per layer, about the root base's layers first
    base_layers: int = None  # type: ignore[assignment]  # derived when not given
    layer_windows: list[int] = None  # type: ignore[assignment]  # derived when not given
    value_embed_layers: list[int] = None  # type: ignore[assignment]  # derived when not given
    backout_layer: int = None  # type: ignore[assignment]  # derived when not given

    # specialists
    specialist_layers: list[int] = None  # type: ignore[assignment]  # derived when not given
    specialist_base_head: str = "final"  # or "last_expert"
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_hash: str | None = None
    new_layers: int | None = None
    frozen_layers: int | None = None
    dual_head: bool = False
    recompute_windows: bool = False
    overlay_rows: int = 0  # changed `wte` rows on the specialist path; > 0 or `overlay_lambdas` adds overlay tensors
    overlay_lambdas: bool = False
    stage_training: dict | None = None

    add_bos_token: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    stagewise_version: str | None = None  # set on folders written by stagewise; those are read strictly

    def __post_init__(self, **kwargs):
        if kwargs.pop("use_router", False) or kwargs.pop("router_enabled", False) or self.poe_router:
            raise ValueError("poe_router: a learned router between stages is not supported; only routerless models run")
        self._derive_sizes()
        self._derive_stages()
        self._derive_layers()
        self._validate()
        super().__post_init__(**kwargs)

    def _derive_sizes(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        bos = self.vocab_size - 9  # the nine special tokens are the last of the vocabulary, <|bos|> first
        self.bos_token_id = bos if self.bos_token_id is None else self.bos_token_id
        self.pad_token_id = bos if self.pad_token_id is None else self.pad_token_id
        if self.eos_token_id is None:
            self.eos_token_id = [bos + 4, bos] if (self.specialist_layers or self.new_layers) else bos

    def _derive_stages(self) -> None:
        total = self.num_hidden_layers
        if self.specialist_layers is None:
            base = self.base_layers
            if base is None:
                base = sum(self.poe_stage_layers) if self.poe_stage_layers else total - (self.new_layers or 0)
            frozen = self.frozen_layers if self.frozen_layers is not None else base
            chained = [frozen - base, self.new_layers] if self.new_layers else []
            self.specialist_layers = [n for n in chained if n]
        appended = sum(self.specialist_layers)
        if self.base_layers is None:
            self.base_layers = total - appended
        if self.poe_stage_layers is None:
            every = self.poe_every or self.base_layers
            if self.base_layers % every:
                raise ValueError(f"poe_every={every} does not divide the base's {self.base_layers} layers")
            self.poe_stage_layers = [every] * (self.base_layers // every)
        self.poe_stage_layers = list(self.poe_stage_layers)
        if sum(self.poe_stage_layers) != self.base_layers or min(self.poe_stage_layers) < 1:
            raise ValueError(
                f"poe_stage_layers={self.poe_stage_layers} must be positive and sum to the base's "
                f"{self.base_layers} layers, not {sum(self.poe_stage_layers)}"
            )
        if self.base_layers + appended != total:
            raise ValueError(
                f"num_hidden_layers={total} is not base_layers={self.base_layers} plus "
                f"specialist_layers={self.specialist_layers}"
            )
        heads = len(self.poe_stage_layers) if self.per_stage_head else 0
        if self.poe_head_count not in (None, 0, 1, heads):
            raise ValueError(f"poe_head_count={self.poe_head_count} but {heads} stages carry their own head")

    def _derive_layers(self) -> None:
        base, total = self.base_layers, self.num_hidden_layers
        if self.value_embed_layers is None:  # alternating, always including the base's last layer
            self.value_embed_layers = [i for i in range(base) if (base - 1 - i) % 2 == 0]
        if self.backout_layer is None:
            self.backout_layer = base // 2
        if self.layer_windows is None:
            pattern = self.window_pattern.upper()
            if not pattern or set(pattern) - {"S", "L"}:
                raise ValueError(f"window_pattern={self.window_pattern!r} must be made of the letters S and L")
            reach = {"S": short_window(self.max_position_embeddings), "L": self.max_position_embeddings}
            self.layer_windows = [reach[pattern[i % len(pattern)]] for i in range(total)]
            ends = [] if self.recompute_windows else [base]
            for n in [] if self.recompute_windows else self.specialist_layers:
                ends.append(ends[-1] + n)
            for end in ends or [total]:
                self.layer_windows[end - 1] = reach["L"]

    def _validate(self) -> None:
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(message)

        check(self.poe_mode in POE_MODES, f"poe_mode={self.poe_mode!r} must be one of {', '.join(POE_MODES)}")
        check(self.hidden_act in ("relu_squared", "relu2"), f"hidden_act={self.hidden_act!r} must be relu_squared")
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_key_value_heads={self.num_key_value_heads} does not divide "
            f"num_attention_heads={self.num_attention_heads}",
        )
        check(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary embeddings")
        check(
            len(self.layer_windows) == self.num_hidden_layers,
            f"layer_windows has {len(self.layer_windows)} entries for {self.num_hidden_layers} layers",
        )
        check(
            all(0 <= i < self.num_hidden_layers for i in self.value_embed_layers),
            f"value_embed_layers={self.value_embed_layers} names a layer outside the model",
        )
        check(
            max(self.ve_gate_channels, self.smear_channels) <= self.hidden_size,
            f"ve_gate_channels={self.ve_gate_channels} and smear_channels={self.smear_channels} must not exceed "
            f"hidden_size={self.hidden_size}",
        )
        check(
            self.specialist_base_head in ("final", "last_expert"),
            f"specialist_base_head={self.specialist_base_head!r} must be final or last_expert",
        )
        check(0 <= self.residual_weight <= 1, f"residual_weight={self.residual_weight} must lie in [0, 1]")
        bounds = self.poe_wand_p99_bounds_per_stage_head
        check(
            bounds is None or len(bounds) == self.num_stages - 1,
            f"poe_wand_p99_bounds_per_stage_head has {len(bounds or [])} bounds; {self.num_stages} stages have "
            f"{self.num_stages - 1} boundaries between them",
        )

    @classmethod
    def preset(cls, name: str, **overrides) -> PoEConfig:
        """Configuration of a released shape: bp-1.3b, poe-1.3b, poe-1.5b, poe-3b, stage-chat or stage-tool."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @property
    def num_stages(self) -> int:
        """K, the number of experts of the base."""
        return len(self.poe_stage_layers)

    @property
    def is_specialist(self) -> bool:
        return bool(self.specialist_layers)

    @property
    def stage_ranges(self) -> list[tuple[int, int]]:
        """[first, last) layers of every stage: the K base stages, then one per chained specialist."""
        ranges, start = [], 0
        for n in [*self.poe_stage_layers, *self.specialist_layers]:
            ranges.append((start, start + n))
            start += n
        return ranges

    @property
    def stage_boundaries(self) -> list[int]:
        """Index of the last layer of each base stage."""
        return [last - 1 for _, last in self.stage_ranges[: self.num_stages]]

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and head matrices: the vocabulary rounded up to a multiple of 64."""
        return -(-self.vocab_size // 64) * 64

    @property
    def default_output_mode(self) -> str:
        """The final path for end-to-end models and specialists, the product ("aggregate") for staged bases."""
        return "final" if self.poe_mode == "none" or self.is_specialist else "aggregate"


PoEConfig.register_for_auto_class()
