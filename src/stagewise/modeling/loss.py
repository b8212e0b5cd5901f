"""The loss of `forward(labels=...)`: the model's own objective as one graph, for Trainer and its like.

stagewise's own training runs the same objectives stage by stage with less memory; this is the plain form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .heads import head_logits
from .pooling import normalise
from .trunk import norm


def objective_loss(model, ids: Tensor, labels: Tensor, path: str = "base") -> Tensor:
    """The model's own training loss as one graph; -100 in `labels` (B, T) is ignored and labels are shifted here.

    Logits are recomputed chunk by chunk in the backward pass, so no (B, T, V) tensor is kept.
    """
    config, mode = model.config, model.config.poe_mode
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    count = (targets != -100).sum().clamp_min(1)
    inputs = model.stage_inputs(ids, path=path)
    if path != "base" or mode == "none":
        states, tap = model.run_path(inputs)
        x = model.final_state(states[-1], tap, path).flatten(0, 1)
        heads = [model.path_heads(path)]
        return chunked_loss(model, [x], heads, targets, 0.0)[0] / count
    hidden, states = inputs.x0, []
    for k in range(config.num_stages):
        hidden = model.run_stage(k, hidden if mode == "hier" else hidden.detach() if k else hidden, inputs).hidden
        states.append(norm(hidden, config.rms_norm_eps).flatten(0, 1))
    heads = [model.stage_heads(k) for k in range(config.num_stages)]
    weight = config.residual_weight if mode == "residual_logop" else 0.0
    losses = chunked_loss(model, states, heads, targets, weight) / count
    return losses.sum() / config.num_stages ** (1.0 - config.poe_alpha)


def chunked_loss(model, states: list[Tensor], heads: list, targets: Tensor, weight: float, chunk: int = 1024):
    """Summed loss of every expert: (1 - w) CE(p_k) + w CE(c_k), c_k the product with the earlier experts, (K,)."""

    def losses(target: Tensor, *xs: Tensor) -> Tensor:
        total, out = xs[0].new_zeros(()), []
        for k, (x, hs) in enumerate(zip(xs, heads, strict=True)):
            lp = normalise(head_logits(x, hs, model.config.logit_softcap, model.config.vocab_size))
            own = F.nll_loss(lp, target, ignore_index=-100, reduction="sum")
            if weight and k:
                joint = normalise((total + lp) / (k + 1))
                own = (1 - weight) * own + weight * F.nll_loss(joint, target, ignore_index=-100, reduction="sum")
            if weight:
                total = total + lp.detach()
            out.append(own)
        return torch.stack(out)

    parts = [
        checkpoint(losses, targets[i : i + chunk], *(x[i : i + chunk] for x in states), use_reentrant=False)
        for i in range(0, targets.numel(), chunk)
    ]
    return torch.stack(parts).sum(0)
