"""Twelve steps of the reference optimizer, reproduced.

The gradients of the lambdas are pure rounding noise at the first step (every block starts as the identity), and AdamW
turns noise into steps of full size: only logits computed the reference's way keep to its trajectory. So the loss here
is torch's own on whole logits; that the chunked loss has the same gradients is tested elsewhere.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stagewise.modeling.configuration_poe import PoEConfig
from stagewise.modeling.modeling_poe import PoEForCausalLM
from stagewise.training.optimizer import MuonAdamW, Rates, parameter_groups


def test_losses_and_final_norms_follow_the_reference_optimizer(fixture_dir):
    folder = fixture_dir / "trajectory-4x64"
    facts = json.loads((folder / "trajectory.json").read_text())
    config = PoEConfig(
        vocab_size=facts["vocab_size"],
        hidden_size=facts["n_embd"],
        num_hidden_layers=facts["n_layer"],
        num_attention_heads=facts["n_head"],
        window_pattern=facts["window_pattern"],
        max_position_embeddings=facts["sequence_len"],
        rms_norm_eps=1.1920929e-07,
    )
    model = PoEForCausalLM(config)
    model.load_state_dict(load_file(folder / "init.safetensors"))
    rates = Rates(0.004, 0.04, 0.0008, 0.1, smear_lr=0.04, weight_decay=0.1)
    groups = parameter_groups(model.named_parameters(), config.hidden_size, rates)
    by_lr = sorted((g["kind"], round(g["lr"], 9), len(g["params"])) for g in groups)
    assert by_lr == sorted((g["kind"], round(g["lr"], 9), g["n"]) for g in facts["param_groups"])
    optimizer = MuonAdamW(groups, row_equilibration=True, renormalise=True, orthogonalise_dtype=torch.float32)
    [tokens] = load_file(folder / "tokens.safetensors").values()
    losses = []
    for rows in tokens:
        states, tap = model.run_path(model.stage_inputs(rows[:, :-1]))
        logits = model.final_logits(states[-1], tap)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(facts["losses"], abs=1e-3)
    norms = {name: parameter.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(facts["final_norms"], rel=5e-3)
