"""Every objective against whole-graph autograd, its isolation of stages, its memory, and the reference's numbers."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stagewise.training.objectives import Objective


def batch(model, rows=2, length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (rows, length + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :3] = -1
    return ids[:, :-1], targets


def whole_graph_loss(model, mode, alpha, weight, ids, targets):
    """The objective's formula written out on whole logits, as one graph."""

    def cross_entropy(logits):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    inputs = model.stage_inputs(ids)
    if mode == "none":
        states, tap = model.run_path(inputs)
        return cross_entropy(model.final_logits(states[-1], tap))
    hidden, logp, losses = inputs.x0, [], []
    for k in range(model.config.num_stages):
        start = hidden.detach() if k and mode != "hier" else hidden
        hidden = model.run_stage(k, start, inputs).hidden
        logp.append(model.stage_logits(k, hidden).log_softmax(-1))
        loss = cross_entropy(logp[k])
        if mode == "residual_logop" and k:
            product = (sum(logp[:k]).detach() + logp[k]) / (k + 1)
            loss = (1 - weight) * loss + weight * cross_entropy(product)
        losses.append(loss)
    return sum(losses) / len(losses) ** (1 - alpha)


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("per_stage_head", [True, False])
@pytest.mark.parametrize(
    ("mode", "alpha", "weight"),
    [
        ("none", 0.0, 0.5),
        ("flat", 0.0, 0.5),
        ("flat", 0.5, 0.5),
        ("flat", 1.0, 0.5),
        ("hier", 0.0, 0.5),
        ("residual_logop", 0.0, 0.3),
        ("residual_logop", 0.5, 1.0),
    ],
)
def test_loss_and_gradients_equal_the_whole_graph(tiny_model, mode, alpha, weight, per_stage_head):
    model = tiny_model(dtype=torch.float64, poe_mode=mode, per_stage_head=per_stage_head)
    ids, targets = batch(model)
    expected_loss = whole_graph_loss(model, mode, alpha, weight, ids, targets)
    (expected_loss * 2.0).backward()
    expected = gradients(model)
    objective = Objective(mode, alpha=alpha, residual_weight=weight, chunk_tokens=7)
    losses = objective.forward_backward(model, ids, targets, grad_scale=2.0)
    got = gradients(model)
    torch.testing.assert_close(losses.total, expected_loss.detach())
    assert {n for n, g in expected.items() if g.any()} == {n for n, g in got.items() if g.any()}
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_two_micro_batches_accumulate_to_the_gradient_of_one_batch(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, targets = batch(model, rows=4)
    valid = float((targets >= 0).sum())
    objective = Objective.from_config(model.config)
    whole = objective.forward_backward(model, ids, targets)
    expected = gradients(model)
    halves = [objective.forward_backward(model, ids[i], targets[i], normaliser=valid) for i in ([0, 1], [2, 3])]
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
    torch.testing.assert_close(halves[0].total + halves[1].total, whole.total)
    torch.testing.assert_close(halves[0].stage + halves[1].stage, whole.stage)


@pytest.mark.parametrize("mode", ["flat", "residual_logop"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_stages_loss_has_no_gradient_below_its_stage(tiny_model, mode, stage):
    """Whatever the later experts compute, the gradients of the blocks below stay what they were, to the bit."""
    model = tiny_model(poe_mode=mode)
    ids, targets = batch(model)
    Objective(mode).forward_backward(model, ids, targets)
    first_layer = model.config.stage_ranges[stage][0]
    before = {name: g for name, g in gradients(model).items() if layer_of(name) in range(first_layer)}
    change_from(model, stage)
    Objective(mode).forward_backward(model, ids, targets)
    after = gradients(model)
    assert before and all(torch.equal(after[name], gradient) for name, gradient in before.items())


def layer_of(name):
    parts = name.split(".")
    return int(parts[2]) if name.startswith("transformer.h.") else int(parts[1]) if "value_embeds" in name else -1


def change_from(model, stage):
    """Change everything the experts from `stage` on compute: their blocks and heads."""
    with torch.no_grad():
        for k in range(stage, model.config.num_stages):
            model.lm_head_stages[k].weight.mul_(-3)
            for layer in range(*model.config.stage_ranges[k]):
                model.transformer["h"][layer].mlp.c_proj.weight.mul_(5)


@pytest.mark.parametrize("mode", ["none", "flat", "hier", "residual_logop"])
def test_no_tensor_of_all_logits_is_made_or_saved(tiny_model, mode):
    model = tiny_model(poe_mode=mode, vocab_size=200)
    ids, targets = batch(model, rows=2, length=40)
    logits_size = ids.numel() * model.config.vocab_size
    saved: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple | list) else (result,):
                if isinstance(item, torch.Tensor):
                    self.largest = max(self.largest, item.numel())
            return result

    def note(tensor):
        saved.append(tensor.numel())
        return tensor

    with Watch() as watch, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        Objective(mode, chunk_tokens=10).forward_backward(model, ids, targets)
    biggest_weight = max(p.numel() for p in model.parameters())
    assert max(saved) <= max(biggest_weight, ids.numel() * model.config.intermediate_size) < logits_size
    assert watch.largest < logits_size


def test_only_one_stage_of_activations_is_alive_in_detached_training(tiny_model):
    """Saved bytes alive at once: flat keeps about one stage, hier all of them."""
    model = tiny_model(num_hidden_layers=6, poe_stage_layers=[1] * 6)
    ids, targets = batch(model, rows=2, length=64)

    def peak(mode):
        alive, most = 0, 0

        class Held:
            def __init__(self, tensor):
                self.tensor, self.size = tensor, tensor.numel()

            def __del__(self):
                nonlocal alive
                alive -= self.size

        def pack(tensor):
            nonlocal alive, most
            alive += tensor.numel()
            most = max(most, alive)
            return Held(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            Objective(mode, chunk_tokens=16).forward_backward(model, ids, targets)
        return most

    assert peak("flat") < 0.4 * peak("hier")


@pytest.mark.parametrize("name", ["mha-4x64", "gqa-6x64"])
@pytest.mark.parametrize("case", ["none", "flat.shared", "flat.per_stage", "hier.shared", "hier.per_stage"])
def test_losses_and_gradient_norms_equal_the_reference(fixture_dir, name, case):
    from stagewise.modeling import PoEConfig, PoEForCausalLM

    folder = fixture_dir / name
    mode, _, heads = case.partition(".")
    settings = json.loads((folder / "config.json").read_text())
    known = {key: value for key, value in settings.items() if key not in ("model_type", "architectures")}
    known |= {"poe_mode": mode, "per_stage_head": heads == "per_stage", "poe_head_count": None}
    model = PoEForCausalLM(PoEConfig(**known))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({k: v for k, v in weights.items() if heads == "per_stage" or "lm_head_stages" not in k})
    expected = load_file(folder / "expected.safetensors")
    losses = Objective(mode).forward_backward(model, expected["input_ids"], expected["targets"])
    if mode == "none":
        torch.testing.assert_close(losses.total.float(), expected["bp_loss"].squeeze(), atol=1e-5, rtol=1e-6)
    else:
        for k, stage in enumerate(losses.stage):
            torch.testing.assert_close(stage.float(), expected[f"loss.{case}.stage{k}"], atol=1e-5, rtol=1e-6)
        for alpha in (0.0, 0.5, 1.0):
            total = losses.stage.sum() / len(losses.stage) ** (1 - alpha)
            torch.testing.assert_close(total.float(), expected[f"loss.{case}.alpha{alpha}"], atol=3e-5, rtol=1e-6)
    norms = json.loads((folder / "fixture.json").read_text())["grad_norms"][case]
    for parameter_name, parameter in model.named_parameters():
        norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert norm == pytest.approx(norms.get(parameter_name) or 0.0, rel=1e-3, abs=1e-9), parameter_name


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="poe_mode must be one of"):
        Objective("flatt")
