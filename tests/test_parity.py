"""Numbers of the reference implementation, reproduced through `stagewise.load`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from stagewise.modeling.cascade import load
from stagewise.modeling.pooling import normalise, pool

NAMES = ["mha-4x64", "gqa-6x64"]


@pytest.fixture(params=NAMES)
def reference(request, fixture_dir):
    folder = fixture_dir / request.param
    facts = json.loads((folder / "fixture.json").read_text())
    return folder, load(folder), load_file(folder / "expected.safetensors"), facts


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@torch.no_grad()
def test_layer_facts_hidden_states_logits_and_scores_match(reference):
    folder, model, expected, facts = reference
    config = model.config
    assert config.layer_windows == facts["window_sizes"]
    assert config.value_embed_layers == facts["value_embed_layers"]
    assert config.backout_layer == facts["backout_layer"]
    assert config.padded_vocab_size == facts["padded_vocab_size"]
    at = expected["positions"]
    states, tap = model.run_path(model.stage_inputs(expected["input_ids"]))
    per_stage, shared = [], []
    for k, state in enumerate(states):
        close(state[:, at], expected[f"boundary_hidden.{k}"])
        per_stage.append(model.stage_logits(k, state)[:, at])
        close(per_stage[k], expected[f"stage_head_logits.{k}"])
        model.config.per_stage_head = False
        shared.append(model.stage_logits(k, state)[:, at])
        model.config.per_stage_head = True
        close(shared[k], expected[f"shared_head_logits.{k}"])
    logp = [normalise(x) for x in per_stage]
    close(pool(logp), expected["aggregate_score"])
    close(normalise(pool(per_stage)), expected["aggregate_logprob"])
    close(normalise(pool(shared)), expected["aggregate_shared_logprob"])
    close(model.final_logits(states[-1], tap)[:, at], expected["bp_logits"])
    close(model.forward_aggregated(expected["input_ids"])[:, at], expected["aggregate_logprob"])
    close(model.forward_stage(expected["input_ids"], stage=1)[:, at], expected["stage_head_logits.1"])


def labels_of(expected):
    """Targets (already shifted, -1 ignored) as labels that the model shifts itself, and ids one longer to fit them."""
    targets = expected["targets"].clone()
    targets[targets < 0] = -100
    return targets


def losses(model, expected, mode, heads, alpha):
    """Per-stage losses of the whole graph; `hier` keeps the graph across boundaries."""
    inputs = model.stage_inputs(expected["input_ids"])
    hidden, out = inputs.x0, []
    targets = labels_of(expected).flatten()
    for k in range(model.config.num_stages):
        start = hidden.detach() if mode == "flat" and k else hidden
        hidden = model.run_stage(k, start, inputs).hidden
        logits = model.stage_logits(k, hidden).flatten(0, 1)
        out.append(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100))
    return out, torch.stack(out).sum() / len(out) ** (1 - alpha)


@pytest.mark.parametrize("mode", ["flat", "hier"])
@pytest.mark.parametrize("heads", ["shared", "per_stage"])
def test_losses_and_gradient_norms_match(reference, mode, heads):
    _, model, expected, facts = reference
    model.config.per_stage_head = heads == "per_stage"
    for alpha in (0.0, 0.5, 1.0):
        stages, total = losses(model, expected, mode, heads, alpha)
        close(total, expected[f"loss.{mode}.{heads}.alpha{alpha}"], 1e-5)
        for k, loss in enumerate(stages):
            close(loss, expected[f"loss.{mode}.{heads}.stage{k}"], 1e-5)
    model.zero_grad()
    losses(model, expected, mode, heads, 0.0)[1].backward()
    check_gradients(model, facts["grad_norms"][f"{mode}.{heads}"])


def test_end_to_end_loss_and_gradient_norms_match(reference):
    _, model, expected, facts = reference
    states, tap = model.run_path(model.stage_inputs(expected["input_ids"]))
    logits = model.final_logits(states[-1], tap).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels_of(expected).flatten(), ignore_index=-100)
    close(loss, expected["bp_loss"], 1e-5)
    loss.backward()
    check_gradients(model, facts["grad_norms"]["none"])


def check_gradients(model, norms):
    for name, p in model.named_parameters():
        wanted = norms.get(name)
        actual = 0.0 if p.grad is None else p.grad.norm().item()
        assert actual == pytest.approx(wanted or 0.0, rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_match(reference, use_cache):
    _, model, expected, _ = reference
    for key, mode in (("greedy_poe", "aggregate"), ("greedy_bp", "final")):
        tokens = expected[key][None]
        out = model.generate(
            tokens[:, :20], max_new_tokens=24, do_sample=False, use_cache=use_cache, output_mode=mode, eos_token_id=None
        )
        assert out.tolist() == tokens.tolist()


@torch.no_grad()
def test_specialist_overlay_and_chain_match_through_the_cascade(reference):
    folder, _, expected, facts = reference
    at = expected["positions"]
    model = load(folder / "specialist")
    assert model.config.layer_windows == facts["specialist"]["window_sizes"]
    for mode, key in (("dual", "dual_logits"), ("base", "head_base_logits"), ("spec", "head_spec_logits")):
        close(model(expected["input_ids"], head_mode=mode).logits[:, at], expected[f"specialist.{key}"])

    cascade = load_file(folder / "expected_cascade.safetensors")
    ids, at = cascade["input_ids"], cascade["positions"]
    overlay = load(folder / "overlay")
    close(overlay(ids).logits[:, at], cascade["dual_logits"])
    for k in range(overlay.config.num_stages):
        close(overlay.forward_stage(ids, stage=k)[:, at], cascade[f"base_stage_head_logits.{k}"])
    chain = load(folder / "chain")
    assert chain.config.specialist_layers == [2, 1]
    close(chain(ids).logits[:, at], cascade["chain_dual_logits"])
