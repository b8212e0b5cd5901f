"""Paths through the stages: the base's, and those of specialists that stand on it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_poe import PoEConfig


class Overlay(nn.Module):
    """What a specialist changed in the frozen base: some embedding rows, perhaps the lambdas of frozen layers."""

    wte_ids: Tensor  # (n,)
    wte_rows: Tensor  # (n, D)
    resid_lambdas: Tensor  # (L,), only where the lambdas of frozen layers changed
    x0_lambdas: Tensor

    def __init__(self, config: PoEConfig):
        super().__init__()
        self.register_buffer("wte_ids", torch.zeros(config.overlay_rows, dtype=torch.long))
        self.register_buffer("wte_rows", torch.zeros(config.overlay_rows, config.hidden_size))
        if config.overlay_lambdas:
            self.register_buffer("resid_lambdas", torch.zeros(config.num_hidden_layers))
            self.register_buffer("x0_lambdas", torch.zeros(config.num_hidden_layers))

    def embed(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Replace the rows of `embedded` (..., D) whose id this overlay changed."""
        if self.wte_ids.numel() == 0:
            return embedded
        match = ids.unsqueeze(-1) == self.wte_ids  # (..., n)
        rows = self.wte_rows[match.int().argmax(-1)]
        return torch.where(match.any(-1, keepdim=True), rows.to(embedded.dtype), embedded)


class Path:
    """A walk through the stages that ends in an expert of its own: the base, or the base with a specialist on top.

    Args:
        name: "base", "specialist" or the name an attached specialist goes by.
        config: the configuration of the whole path (ranges, windows, where its head sits).
        owner: the module that holds `resid_lambdas`, `x0_lambdas` and, where there is one, `overlay`.
        blocks: the appended blocks, in order. heads: the specialists' heads, oldest first.
    """

    def __init__(self, name: str, config: PoEConfig, owner: Any, blocks, heads):
        self.name, self.config, self.owner = name, config, owner
        self.blocks, self.heads = list(blocks), list(heads)

    @property
    def overlay(self) -> Overlay | None:
        return None if self.name == "base" else getattr(self.owner, "overlay", None)

    def lambdas(self) -> tuple[Tensor, Tensor]:
        overlay = self.overlay
        source = overlay if overlay is not None and self.config.overlay_lambdas else self.owner
        return source.resid_lambdas, source.x0_lambdas

    def overlay_key(self) -> str:
        """Equal for two paths exactly when their frozen layers compute the same function: K/V may be shared then.

        What they compute follows from the base and from the overlay's content: changed embedding rows, changed lambdas
        of frozen layers, and the windows where those were recomputed.
        """
        overlay, layers = self.overlay, self.config.base_layers
        digest = hashlib.sha256(str(self.config.layer_windows[:layers]).encode())
        if overlay is not None:
            parts = [overlay.wte_ids, overlay.wte_rows]
            if self.config.overlay_lambdas:
                parts += [overlay.resid_lambdas[:layers], overlay.x0_lambdas[:layers]]
            for part in parts:
                if part.numel():
                    digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
