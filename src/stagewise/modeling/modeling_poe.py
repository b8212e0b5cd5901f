"""PoEForCausalLM: a decoder-only transformer cut into stages, each of them a complete expert.

Design choices:
- `run_stage` is the only forward pass. Training, transformers' `generate`, decoding and calibration all call it.
- Parameter names are those of the released checkpoints.
- A *path* is a walk through the stages: "base", the model's own "specialist", or an attached one. Paths share the
  base's tensors; what a specialist changed (embedding rows, lambdas) is its overlay and never touches the base.
- Every load goes through `cascade`, which refuses missing, unexpected and misshapen tensors.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_poe import PoEConfig
from .frontier import FrontierCache
from .generation import StageGeneration
from .heads import head_logits
from .loss import objective_loss
from .native import MOST_ROWS, Kernels, kernels
from .packed import PackedWeight, packing_supported, unpack
from .paths import Overlay, Path
from .pooling import normalise, pool
from .trunk import Block, CausalAttention, StageInputs, StageOutput, norm, rotary_tables, run_layers

FORMAT_VERSION = "1"  # of the folders written here; its presence in config.json makes loading strict


class PoEForCausalLM(PreTrainedModel, GenerationMixin, StageGeneration):
    """A language model whose every stage boundary carries a next-token head.

    Stages 0 .. K-1 belong to the base; each chained specialist adds one stage after them.
    """

    config_class = PoEConfig
    config: PoEConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    transformer: nn.ModuleDict
    value_embeds: nn.ModuleDict
    lm_head: nn.Linear
    lm_head_stages: nn.ModuleList
    lm_head_stage: nn.Linear
    lm_head_ancestors: nn.ModuleList
    smear_gate: nn.Linear
    resid_lambdas: nn.Parameter
    x0_lambdas: nn.Parameter
    smear_lambda: nn.Parameter
    backout_lambda: nn.Parameter

    def __init__(self, config: PoEConfig):
        super().__init__(config)
        size, padded = config.hidden_size, config.padded_vocab_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(padded, size),
                "h": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
            }
        )
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(padded, config.kv_size) for i in config.value_embed_layers}
        )
        self.lm_head = nn.Linear(size, padded, bias=False)
        if config.per_stage_head:
            self.lm_head_stages = nn.ModuleList(nn.Linear(size, padded, bias=False) for _ in range(config.num_stages))
        if config.is_specialist:
            self.lm_head_stage = nn.Linear(size, padded, bias=False)
            if len(config.specialist_layers) > 1:
                ancestors = len(config.specialist_layers) - 1
                self.lm_head_ancestors = nn.ModuleList(nn.Linear(size, padded, bias=False) for _ in range(ancestors))
            if config.overlay_rows or config.overlay_lambdas:
                self.overlay = Overlay(config)
        self.resid_lambdas = nn.Parameter(torch.ones(config.num_hidden_layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.num_hidden_layers))
        if config.smear_channels:
            self.smear_gate = nn.Linear(config.smear_channels, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.use_backout:
            self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        self.paths: dict[str, Path] = {"base": Path("base", config, self, (), ())}
        if config.is_specialist:
            heads = [*getattr(self, "lm_head_ancestors", ()), self.lm_head_stage]
            self.paths["specialist"] = Path("specialist", config, self, self.blocks[config.base_layers :], heads)
        self.branches: dict[str, nn.Module] = {}  # attached specialists, see `branches`; not part of this module
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.is_packed = False  # see `packed`
        self.folded_heads: dict[tuple, PackedWeight] = {}  # sums of heads, kept while the model is packed
        self.post_init()

    # -- structure

    @property
    def wte(self) -> nn.Embedding:
        """The token embedding, (Vpad, D)."""
        return cast(nn.Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> nn.ModuleList:
        """All layers, appended ones last."""
        return cast(nn.ModuleList, self.transformer["h"])

    @property
    def default_path(self) -> str:
        return "specialist" if self.config.is_specialist else "base"

    @property
    def attention_scale(self) -> float:
        return self.config.qk_scale**2 / math.sqrt(self.config.head_dim)

    def path(self, name: str) -> Path:
        if name not in self.paths:
            raise ValueError(f"unknown path {name!r}; this model has {', '.join(self.paths)}")
        return self.paths[name]

    def path_stages(self, path: str = "base") -> range:
        """Stages a path runs through."""
        config = self.path(path).config
        return range(config.num_stages if path == "base" else len(config.stage_ranges))

    def stage_range(self, stage: int, path: str = "base") -> tuple[int, int]:
        return self.path(path).config.stage_ranges[stage]

    def layer_window(self, layer: int, path: str = "base") -> int:
        return self.path(path).config.layer_windows[layer]

    def stage_key(self, stage: int, path: str) -> tuple:
        """Identifies the function of the ids that a stage computes; equal keys may share keys and values."""
        return (stage, self.path(path).overlay_key() if stage < self.config.num_stages else path)

    def require_stages(self) -> None:
        """ValueError for models trained end to end: their intermediate stages predict nothing."""
        if self.config.poe_mode == "none":
            raise ValueError(
                "poe_mode is 'none': this model was trained end to end, so it has no valid intermediate experts. "
                "Use generate() or output_mode='final'; stage modes need a model trained with a staged objective"
            )

    def check_stage(self, stage: int, name: str = "stage") -> int:
        self.require_stages()
        if not 0 <= stage < self.config.num_stages:
            raise ValueError(f"{name}={stage} is out of range; this model has stages 0 to {self.config.num_stages - 1}")
        return stage

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> PoEForCausalLM:
        """Draw fresh weights (from `seed` when given); nothing happens on the meta device."""
        if self.resid_lambdas.is_meta:
            return self
        generator = None
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(seed)
        bound = math.sqrt(3.0 / self.config.hidden_size)
        base = self.config.base_layers
        self.wte.weight.normal_(0.0, 0.8, generator=generator)
        self.lm_head.weight.normal_(0.0, 0.001, generator=generator)
        for block in cast(list[Block], self.blocks):
            attn, mlp = block.attn, block.mlp
            for w in (attn.c_q.weight, attn.c_k.weight, attn.c_v.weight):
                w.uniform_(-bound, bound, generator=generator)
            mlp.c_fc.weight.uniform_(-0.4 * bound, 0.4 * bound, generator=generator)
            attn.c_proj.weight.zero_()
            mlp.c_proj.weight.zero_()
            if hasattr(attn, "ve_gate"):
                attn.ve_gate.weight.uniform_(0.0, 0.02, generator=generator)
        for embed in cast(list[nn.Embedding], self.value_embeds.values()):
            embed.weight.uniform_(-bound, bound, generator=generator)
        for name in ("lm_head_stages", "lm_head_ancestors"):
            for module in getattr(self, name, ()):
                cast(nn.Linear, module).weight.zero_()
        if hasattr(self, "lm_head_stage"):
            self.lm_head_stage.weight.zero_()
        self.resid_lambdas[:base] = torch.linspace(1.15, 1.05, base)
        self.x0_lambdas[:base] = torch.linspace(0.20, 0.05, base)
        self.resid_lambdas[base:] = 1.0
        self.x0_lambdas[base:] = 0.0
        if self.config.smear_channels:
            self.smear_gate.weight.uniform_(0.0, 0.02, generator=generator)
            self.smear_lambda.zero_()
        if self.config.use_backout:
            self.backout_lambda.fill_(0.2)
        return self

    # -- the forward pass

    def rotary(self, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
        """cos and sin (1 or B, T, 1, d) for the positions starts .. starts + length - 1 of each row."""
        table = self._rotary
        if table is None or table[0].dtype != self.dtype or table[0].device != self.device:
            positions = torch.arange(self.config.max_position_embeddings, device=self.device)
            table = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, self.dtype)
            self._rotary = table
        if len(set(starts)) == 1:
            stop = starts[0] + length
            return table[0][None, starts[0] : stop], table[1][None, starts[0] : stop]
        index = torch.tensor(starts, device=self.device)[:, None] + torch.arange(length, device=self.device)
        index = index.clamp_max(self.config.max_position_embeddings - 1)
        return table[0][index], table[1][index]

    def stage_inputs(
        self,
        ids: Tensor,
        path: str = "base",
        starts: list[int] | None = None,
        counts: list[int] | None = None,
        before: list[int] | None = None,
    ) -> StageInputs:
        """Everything a stage needs besides its hidden input.

        Args:
            ids: (B, T). path: whose embeddings and lambdas to use.
            starts, counts: first position and number of valid ids per row (0 and T when None).
            before: per row the id preceding `starts`, -1 where there is none; the smear looks one token back.
        """
        if self.is_packed and torch.is_grad_enabled():
            unpack(self)  # gradients need the plain weights
        rows, length = ids.shape
        starts = starts or [0] * rows
        if max(starts) + length > self.config.max_position_embeddings and counts is None:
            raise ValueError(
                f"a sequence of {max(starts) + length} tokens exceeds the context of "
                f"{self.config.max_position_embeddings} (max_position_embeddings)"
            )
        walk = self.path(path)
        smear = self.config.smear_channels
        if before is not None and smear:
            first = torch.tensor(before, device=ids.device)[:, None]
            lookup = torch.cat((first.clamp_min(0), ids), dim=1)
        else:
            first, lookup = None, ids
        x = self.wte(lookup)
        if walk.overlay is not None:
            x = walk.overlay.embed(lookup, x)
        x = norm(x, self.config.rms_norm_eps)
        if smear:
            if first is None:
                previous = F.pad(x[:, :-1], (0, 0, 1, 0))  # (B, T, D)
            else:
                previous, x = x[:, :-1], x[:, 1:]
                if min(before or [0]) < 0:
                    has = torch.ones(rows, length, 1, dtype=x.dtype, device=x.device)
                    has[:, 0] = first >= 0
                    previous = previous * has
            gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[..., :smear]))  # (B, T, 1)
            x = x + gate * previous
        resid, x0 = walk.lambdas()
        if torch.is_grad_enabled() or resid.is_meta:
            lambdas = list(zip(resid.unbind(), x0.unbind(), strict=True))
        else:
            lambdas = list(zip(resid.tolist(), x0.tolist(), strict=True))
        cos, sin = self.rotary(starts, length)
        attend = CausalAttention(walk.config.layer_windows, self.attention_scale, self.config.fp32_attention)
        return StageInputs(
            ids, x, cos, sin, attend, lambdas, list(starts), list(counts or [length] * rows), path, self.kernels(ids, x)
        )

    def kernels(self, ids: Tensor, x: Tensor) -> Kernels | None:
        """The compiled kernels, where they apply: packed weights, few rows, on a CPU."""
        if not self.is_packed or ids.numel() > MOST_ROWS or not packing_supported(x.dtype, x.device):
            return None
        return kernels()

    def run_stage(
        self, stage: int, hidden: Tensor, inputs: StageInputs, cache: FrontierCache | None = None
    ) -> StageOutput:
        """Run one stage: the only forward pass there is.

        Args:
            stage: 0 .. K-1 for the base's stages, K and up for the specialists' on `inputs.path`.
            hidden: (B, T, D), `inputs.x0` for stage 0.
            cache: where keys and values are kept; None attends over the sequence at hand.
        Returns hidden (B, T, D), and the tap when this stage contains the backout layer.
        """
        walk = self.path(inputs.path)
        first, last = walk.config.stage_ranges[stage]
        base = self.config.base_layers
        blocks = self.blocks[first:last] if last <= base else walk.blocks[first - base : last - base]
        attend = inputs.attend if cache is None else cache.attention(stage, inputs)
        tap_layer = self.config.backout_layer if self.config.use_backout else None
        return run_layers(blocks, self.value_embeds, tap_layer, hidden, inputs, attend)

    def run_path(self, inputs: StageInputs, stages: int | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Run the first `stages` stages of the inputs' path (all when None), uncached.

        Returns the boundary states [(B, T, D)] and the tap, None while its layer has not run.
        """
        hidden, tap, states = inputs.x0, None, []
        for k in self.path_stages(inputs.path)[:stages]:
            out = self.run_stage(k, hidden, inputs)
            hidden, tap = out.hidden, out.tap if out.tap is not None else tap
            states.append(hidden)
        return states, tap

    # -- heads

    def stage_heads(self, stage: int) -> list[nn.Module]:
        """Heads whose sum is expert `stage`: the shared one and, where there is one, the stage's own."""
        return [self.lm_head, self.lm_head_stages[stage]] if self.config.per_stage_head else [self.lm_head]

    def head_groups(self) -> dict[tuple, list[nn.Module]]:
        """The heads that are added, by the place that adds them: what inference may keep folded into one matrix."""
        groups: dict[tuple, list[nn.Module]] = {
            ("stage", k): self.stage_heads(k) for k in range(self.config.num_stages)
        }
        groups.update({("path", name, "dual"): self.path_heads(name) for name in self.paths})
        return {key: heads for key, heads in groups.items() if len(heads) > 1}

    def _logits(self, x: Tensor, key: tuple, heads: list[nn.Module]) -> Tensor:
        folded = self.folded_heads.get(key)
        return head_logits(x, heads if folded is None else [folded], self.config.logit_softcap, self.config.vocab_size)

    def stage_logits(self, stage: int, hidden: Tensor) -> Tensor:
        """Softcapped logits (B, T, V) of expert `stage` on its boundary state (B, T, D), fp32 or wider."""
        x = norm(hidden, self.config.rms_norm_eps)
        return self._logits(x, ("stage", stage), self.stage_heads(stage))

    def expert_logits(self, stages: list[int], states: list[Tensor]) -> list[Tensor]:
        """Softcapped logits of several experts on states of equal shape (B, M, D); a shared head is read once."""
        if self.config.per_stage_head or len(stages) == 1:
            return [self.stage_logits(k, h) for k, h in zip(stages, states, strict=True)]
        return list(self.stage_logits(stages[0], torch.stack(states)).unbind())

    def path_heads(self, path: str, head_mode: str | None = None) -> list[nn.Module]:
        """Heads of a path's final output. head_mode: dual (all), base (without the newest), spec (only it)."""
        walk = self.path(path)
        if path == "base":
            if head_mode not in (None, "base"):
                raise ValueError(f"head_mode={head_mode!r} needs a specialist; a base has only its own head")
            return [self.lm_head]
        heads: list[nn.Module] = [self.lm_head]
        if walk.config.specialist_base_head == "last_expert" and self.config.per_stage_head:
            heads.append(self.lm_head_stages[self.config.num_stages - 1])
        heads += walk.heads
        chosen = {"dual": heads, "base": heads[:-1], "spec": heads[-1:]}
        if (head_mode or "dual") not in chosen:
            raise ValueError(f"head_mode={head_mode!r} must be dual, base or spec")
        return chosen[head_mode or "dual"]

    def final_state(self, hidden: Tensor, tap: Tensor | None, path: str = "base") -> Tensor:
        """Normed state (B, T, D) that the final path's heads read: backout applied where the path has it."""
        config = self.path(path).config
        if self.config.use_backout and (path == "base" or config.specialist_base_head == "final"):
            assert tap is not None, "the backout tap must travel with the hidden states"
            hidden = hidden - self.backout_lambda * tap
        return norm(hidden, config.rms_norm_eps)

    def final_logits(
        self, hidden: Tensor, tap: Tensor | None, head_mode: str | None = None, path: str | None = None
    ) -> Tensor:
        """Softcapped logits (B, T, V) of the final path, from the last stage's state and the backout tap."""
        path = path or self.default_path
        x = self.final_state(hidden, tap, path)
        return self._logits(x, ("path", path, head_mode or "dual"), self.path_heads(path, head_mode))

    # -- attached specialists (see `branches`)

    def attach(self, name: str, source, revision: str | None = None, **hub) -> nn.Module:
        """Attach the specialist at `source` (folder or repository) under `name`: from now on a path of its own.

        The base is shared, not copied, and its own modes stay as they are; `forward(path=name)`,
        `Strategy(path=name)` and `FrontierCache(paths=...)` choose the specialist. Raises ValueError for a taken name
        and for a specialist of another base.
        """
        from .branches import attach

        return attach(self, name, source, revision, **hub)

    def detach(self, name: str) -> None:
        """Forget the attached specialist `name`."""
        from .branches import detach

        detach(self, name)

    # -- packing (see `packed`)

    def train(self, mode: bool = True) -> PoEForCausalLM:
        """Training works on the plain weights: a packed model is unpacked first."""
        if mode and self.is_packed:
            unpack(self)
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        if self.is_packed:
            unpack(self)
        for branch in self.branches.values():
            branch._apply(fn, recurse)
        return super()._apply(fn, recurse)

    # -- what transformers and Trainer call

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FrontierCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_mode: str | None = None,
        head_mode: str | None = None,
        path: str | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of the model's default output, or of the one asked for.

        Args:
            input_ids: (B, T). attention_mask: (B, past + T), 0 marks padding on either side.
            past_key_values: a FrontierCache; input_ids are then the tokens after it.
            labels: (B, T), -100 ignored, shifted here; adds the loss of the model's own objective.
            output_mode: "aggregate" (renormalised log-probabilities of the product) or "final" (softcapped logits).
            head_mode: dual, base or spec, for specialists. path: a specialist's name, or "base".
            logits_to_keep: only the last so many columns; 0 for all.
        """
        if kwargs.get("inputs_embeds") is not None or input_ids is None:
            raise ValueError("input_ids are needed: value embeddings and the smear are looked up by id")
        path = path or ("base" if output_mode == "aggregate" else self.default_path)
        mode = output_mode or ("final" if path != "base" or self.config.poe_mode == "none" else "aggregate")
        if mode not in ("aggregate", "final"):
            raise ValueError(f"output_mode={output_mode!r} must be aggregate or final")
        if mode == "aggregate":
            self.require_stages()
        cache = past_key_values
        if cache is None and (use_cache if use_cache is not None else False):
            cache = FrontierCache(self, input_ids.size(0), paths=(path,))
        states, tap, restore = self._run_padded(input_ids, attention_mask, cache, path)
        if logits_to_keep and restore is None:
            states = [s[:, -logits_to_keep:] for s in states]
            tap = None if tap is None else tap[:, -logits_to_keep:]
        elif restore is not None:  # back to the padded layout
            restore = restore[:, -logits_to_keep:] if logits_to_keep else restore
            states = [s.take_along_dim(restore[..., None], dim=1) for s in states]
            tap = None if tap is None else tap.take_along_dim(restore[..., None], dim=1)
        if mode == "final":
            logits = self.final_logits(states[-1], tap, head_mode, path)
        else:
            logits = normalise(pool([self.stage_logits(k, s) for k, s in enumerate(states)], alpha=0.0))
        loss = None if labels is None else objective_loss(self, input_ids, labels, path)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _run_padded(self, ids: Tensor, mask: Tensor | None, cache: FrontierCache | None, path: str):
        """Run all stages on possibly padded rows. Returns (boundary states, tap, restore).

        Inside, every row is moved to the left; `restore` (B, T) gathers the padded layout back, None when there was
        nothing to move.
        """
        rows, length = ids.shape
        now = None if mask is None else mask[:, -length:].bool()
        counts, restore = [length] * rows, None
        if now is not None and not bool(now.all()):
            order = now.int().argsort(dim=1, descending=True, stable=True)  # valid ids first
            ids = ids.take_along_dim(order, dim=1)
            restore = order.argsort(dim=1)
            counts = now.sum(1).tolist()
            if min(counts) == 0 and cache is None:
                raise ValueError(f"row {counts.index(0)} of attention_mask is empty: a prompt needs at least one token")
        if cache is None:
            states, tap = self.run_path(self.stage_inputs(ids, path=path))
            return states, tap, restore
        cache.extend([row[:n] for row, n in zip(ids.tolist(), counts, strict=True)])
        cache.padded_length += length
        states, tap = [], None
        for k in self.path_stages(path):
            out, _, _ = cache.advance(k, path=path)
            states.append(out.hidden)
            tap = out.tap
        cache.commit([n - 64 for n in cache.lengths()])  # leaves room for transformers' assisted generation
        return states, tap, restore

    @torch.no_grad()
    def forward_stage(self, input_ids: Tensor, stage: int) -> Tensor:
        """Softcapped fp32 logits (B, T, V) of one expert on its own."""
        self.check_stage(stage)
        states, _ = self.run_path(self.stage_inputs(input_ids), stage + 1)
        return self.stage_logits(stage, states[-1])

    @torch.no_grad()
    def forward_aggregated(self, input_ids: Tensor, max_stages: int | None = None) -> Tensor:
        """Renormalised log-probabilities (B, T, V) of the product of the first `max_stages` experts (all when None)."""
        stages = self.config.num_stages if max_stages is None else max_stages
        self.check_stage(stages - 1, name="max_stages - 1")
        states, _ = self.run_path(self.stage_inputs(input_ids), stages)
        return normalise(pool([self.stage_logits(k, s) for k, s in enumerate(states)]))

    def _prepare_cache_for_generation(self, *args, **kwargs) -> None:  # type: ignore[override]
        """transformers' generate makes no cache of its own; the first forward with use_cache makes a FrontierCache."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a model folder or repository; deltas are assembled on their parents. See `cascade.load_model`."""
        from .cascade import load_model

        if model_args:
            raise ValueError("positional model arguments are not understood; pass keywords")
        return load_model(cls, pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """Write weights, configuration, generation defaults and the code that loads them without this package."""
        from .packed import unpacked

        self.config.stagewise_version = FORMAT_VERSION
        with unpacked(self):
            super().save_pretrained(save_directory, **kwargs)


PoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
