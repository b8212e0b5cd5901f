"""generate_prefix, generate_stage, generate_wand, ...: elastic generation under the names the model cards use.

All of them take ids (B, T), with an attention mask when rows are padded, decode with an exact cache and return ids
(B, T + new); rows that stop early are filled with the pad token. They sample when `do_sample=True`; further keywords
are those of SamplingParams (temperature, top_p, seed, ...).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .configuration_poe import PoEConfig
from .decoding import Result, decode
from .sampling import SamplingParams
from .strategy import Strategy


class StageGeneration:
    """Mixin: the elastic modes of a PoEForCausalLM."""

    config: PoEConfig

    def generate_elastic(
        self,
        input_ids: Tensor,
        strategy: Strategy | str = "full",
        max_new_tokens: int = 64,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        eos_token_id: int | Sequence[int] | None = None,
        streamer=None,
        tokenizer=None,
        **sampling,
    ) -> tuple[Tensor, Result]:
        """Decode with any strategy. Returns ids (B * n, T + new) and the full Result."""
        if do_sample:
            sampling.setdefault("temperature", 1.0)
        elif sampling.get("temperature"):
            raise ValueError("temperature needs do_sample=True")
        if eos_token_id is not None:
            sampling["stop_tokens"] = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must have shape (batch, length), not {tuple(input_ids.shape)}")
        prompts = input_ids.tolist()
        if attention_mask is not None:
            kept = attention_mask.tolist()
            prompts = [[i for i, m in zip(p, k, strict=True) if m] for p, k in zip(prompts, kept, strict=True)]
        result = decode(self, prompts, strategy, params, tokenizer=tokenizer, streamer=streamer)
        width = max(map(len, result.tokens))
        pad = self.config.pad_token_id
        new = torch.tensor([t + [pad] * (width - len(t)) for t in result.tokens], device=input_ids.device)
        return torch.cat((input_ids.repeat_interleave(params.n, dim=0), new), dim=1), result

    def generate_prefix(self, input_ids: Tensor, max_stages: int | None = None, max_new_tokens: int = 64, **kwargs):
        """Generate with the product of the first `max_stages` experts; deeper layers never run."""
        strategy = Strategy(mode="prefix", max_stages=max_stages)
        return self.generate_elastic(input_ids, strategy, max_new_tokens, **kwargs)[0]

    def generate_stage(self, input_ids: Tensor, stage: int, max_new_tokens: int = 64, **kwargs) -> Tensor:
        """Generate with one expert alone."""
        return self.generate_elastic(input_ids, Strategy(mode="stage", stage=stage), max_new_tokens, **kwargs)[0]

    def generate_parallel_composition(
        self,
        input_ids: Tensor,
        stages: Sequence[int],
        stage_weights: Sequence[float] | None = None,
        max_new_tokens: int = 64,
        **kwargs,
    ) -> Tensor:
        """Generate with the weighted product of any experts; weights are normalised to sum 1."""
        weights = None if stage_weights is None else tuple(float(w) for w in stage_weights)
        strategy = Strategy(mode="composition", stages=tuple(stages), weights=weights)
        return self.generate_elastic(input_ids, strategy, max_new_tokens, **kwargs)[0]

    def generate_wand(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 64,
        safety: float = 1.0,
        p99_bounds: Sequence[float] | None = None,
        certificate: dict | str | Path | None = None,
        verified: bool = False,
        max_pending: int = 8,
        return_stages_used: bool = False,
        **kwargs,
    ):
        """Generate only as deep as each token needs: leave at the first stage whose margin clears its bound.

        Args:
            safety, p99_bounds: factor on the bounds, and the bounds (the config's when None).
            certificate: margins certified by `stagewise calibrate`, a dict or its file; replaces safety and bounds.
            verified: check early tokens with the full model before they count; the text is then the full model's.
            return_stages_used: also return, per row, the index of the stage that emitted each new token (-1: padding).
        """
        thresholds = None if certificate is None else certified_thresholds(certificate)
        strategy = Strategy(
            mode="wand",
            safety=safety,
            p99_bounds=None if p99_bounds is None else tuple(p99_bounds),
            thresholds=thresholds,
            verified=verified,
            max_pending=max_pending,
        )
        ids, result = self.generate_elastic(input_ids, strategy, max_new_tokens, **kwargs)
        if not return_stages_used:
            return ids
        width = max(map(len, result.stages_used))
        return ids, torch.tensor([s + [-1] * (width - len(s)) for s in result.stages_used])

    def generate_speculative(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 64,
        draft_stage: int = 0,
        k_draft: int = 4,
        draft_prefix: bool = False,
        draft_confidence: float = 0.0,
        return_acceptance: bool = False,
        **kwargs,
    ):
        """Generate the full model's text faster: an early stage drafts, the whole verifies several tokens at once.

        Args:
            draft_stage: the drafter; with draft_prefix the product of stages 0 .. draft_stage drafts.
            k_draft: tokens drafted per round. draft_confidence: end a draft early below this top probability.
            return_acceptance: also return the share of drafted tokens that were kept.
        """
        strategy = Strategy(
            mode="speculative",
            draft_stage=draft_stage,
            draft_prefix=draft_prefix,
            k_draft=k_draft,
            draft_confidence=draft_confidence,
        )
        ids, result = self.generate_elastic(input_ids, strategy, max_new_tokens, **kwargs)
        return (ids, result.acceptance) if return_acceptance else ids


def certified_thresholds(certificate: dict | str | Path) -> tuple[float, ...]:
    """The per-stage margins of a certificate, in nats."""
    found = certificate
    if not isinstance(found, dict):
        file = Path(found)
        if not file.is_file():
            raise FileNotFoundError(f"no certificate at {file}; make one with `stagewise calibrate MODEL`")
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    if "thresholds" not in found:
        raise ValueError("the certificate has no 'thresholds'; make one with `stagewise calibrate MODEL`")
    return tuple(float(t) for t in found["thresholds"])
