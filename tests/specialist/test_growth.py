from __future__ import annotations

import logging

import pytest
import torch

from stagewise.modeling import PoEConfig, load
from stagewise.specialist.growth import (
    WARM_TEXTS,
    frozen_hash,
    grow,
    grow_on_meta,
    open_parent,
    trainable_names,
    warm_rows,
)
from stagewise.specialist.objective import SpecialistObjective, boundary_state


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 150), generator=torch.Generator().manual_seed(5))


def parent_path_logits(model, ids, kind):
    """What the parent itself predicts on the path the specialist continues."""
    if kind == "staged":
        return model.forward_stage(ids, stage=1)
    return model(ids, output_mode="final").logits


@torch.no_grad()
@pytest.mark.parametrize("kind", ["staged", "shared", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_specialist_predicts_exactly_what_its_parents_path_does(base_folder, tokenizer, ids, kind, dtype):
    folder = base_folder(kind)
    model = grow(open_parent(folder), 2, tokenizer=tokenizer, dtype=dtype)
    expected = parent_path_logits(load(folder, dtype=dtype), ids, kind)
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_a_fresh_specialist_on_a_specialist_predicts_exactly_what_the_latter_does(
    base_folder, tokenizer, tmp_path, ids
):
    from stagewise.specialist.delta import write_delta

    parent = open_parent(base_folder("staged"))
    first = grow(parent, 2, tokenizer=tokenizer)
    with torch.no_grad():
        for name in trainable_names(first):
            first.get_parameter(name).add_(0.05)
    folder = write_delta(tmp_path / "first", first, tokenizer, parent)
    second = grow(open_parent(folder), 1, tokenizer=tokenizer)
    chat = torch.cat((ids, torch.arange(256, 265).expand(2, 9)), dim=1)
    assert torch.equal(second(chat).logits, load(folder)(chat).logits)
    assert second.config.specialist_layers == [2, 1]
    assert torch.equal(second.overlay.wte_rows, first.overlay.wte_rows)  # rows are warmed once, on the root base


@pytest.mark.parametrize(
    ("layers", "trainable", "total"), [(2, 106_954_804, 1_491_076_878), (4, 163_577_912, 1_547_699_986)]
)
def test_trainable_counts_of_the_released_shapes(layers, trainable, total):
    model = grow_on_meta(PoEConfig.preset("poe-1.3b"), layers)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_gradients_reach_exactly_the_new_tensors_and_the_new_lambda_entries(base_folder, tokenizer):
    model = grow(open_parent(base_folder("staged")), 2, tokenizer=tokenizer)
    with torch.no_grad():  # zero projections would hide where gradients flow
        for block in model.transformer["h"][4:]:
            block.attn.c_proj.weight.normal_(0, 0.1)
            block.mlp.c_proj.weight.normal_(0, 0.1)
    ids = torch.randint(0, 265, (2, 40))
    SpecialistObjective().forward_backward(model, ids, ids.roll(-1, 1))
    touched = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert touched == set(trainable_names(model))
    for name in ("resid_lambdas", "x0_lambdas"):
        gradient = getattr(model, name).grad
        assert not gradient[:4].any() and gradient[4:].all()


def test_the_trained_path_is_the_path_that_answers(base_folder, tokenizer):
    for kind in ("staged", "shared"):
        model = grow(open_parent(base_folder(kind)), 1, tokenizer=tokenizer)
        with torch.no_grad():
            for name in trainable_names(model):
                model.get_parameter(name).add_(0.1)
        ids = torch.randint(0, 265, (2, 30))
        state = boundary_state(model, ids)
        logits = sum(head(state) for head in model.path_heads("specialist"))
        logits = 15 * torch.tanh(logits[..., :265] / 15)
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_warm_rows_are_rows_of_the_base_and_touch_no_base_path(base_folder, tokenizer, ids):
    folder = base_folder("staged")
    base = load(folder)
    wte = base.transformer["wte"].weight
    where, rows = warm_rows(wte, tokenizer)
    assert where.tolist() == [tokenizer.special_ids[name] for name in WARM_TEXTS]
    assert torch.equal(rows[0], wte[ord("U")]) and torch.equal(rows[1], wte[ord("\n")])
    model = grow(open_parent(folder), 1, tokenizer=tokenizer)
    chat = torch.cat((ids, torch.arange(256, 265).expand(2, 9)), dim=1)
    assert torch.equal(model.forward_aggregated(chat), base.forward_aggregated(chat))
    cold = grow(open_parent(folder), 1)
    assert not torch.equal(model(chat).logits, cold(chat).logits)


def test_the_frozen_hash_sees_any_frozen_change_and_no_trained_one(base_folder):
    model = grow(open_parent(base_folder("staged")), 1)
    before = frozen_hash(model)
    with torch.no_grad():
        for name in trainable_names(model):
            parameter = model.get_parameter(name)
            parameter[4 if name.endswith("lambdas") else 0 :].add_(1.0)
    assert frozen_hash(model) == before
    with torch.no_grad():
        model.x0_lambdas[0] += 1e-6
    assert frozen_hash(model) != before


def test_new_layers_continue_the_window_pattern_and_end_long():
    base = PoEConfig.preset("poe-1.3b")
    config = grow_on_meta(base, 4).config
    assert config.layer_windows[:24] == base.layer_windows
    assert config.layer_windows[24:] == [512, 512, 512, 2048]
    assert grow_on_meta(base, 1).config.layer_windows[24:] == [2048]


def test_paths_that_a_parent_does_not_have_are_refused_and_losses_are_said(base_folder, tmp_path, caplog):
    from stagewise.specialist.delta import write_delta

    with pytest.raises(ValueError, match="needs a staged base"):
        grow(open_parent(base_folder("plain")), 1, base_head="last_expert")
    with caplog.at_level(logging.WARNING, logger="stagewise"):
        grow(open_parent(base_folder("plain")), 1)
        grow(open_parent(base_folder("staged")), 1, base_head="final")
    assert "plain top layers" in caplog.text and "never trained" in caplog.text
    parent = open_parent(base_folder("staged"))
    folder = write_delta(tmp_path / "d", grow(parent, 1), None, parent)
    with pytest.raises(ValueError, match="a chain keeps one path"):
        grow(open_parent(folder), 1, base_head="final")


@pytest.mark.parametrize("options", [{"end_token_weight": 3.0, "end_token": 260}, {"label_smoothing": 0.1}])
def test_weights_and_smoothing_change_the_loss_as_cross_entropy_says(base_folder, tokenizer, options):
    import torch.nn.functional as F

    model = grow(open_parent(base_folder("staged")), 1, tokenizer=tokenizer)
    ids = torch.randint(0, 265, (2, 40), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1).masked_fill(torch.arange(40) % 3 == 0, -1)
    found = SpecialistObjective(**options).forward_backward(model, ids, targets)
    gradient = model.lm_head_stage.weight.grad.clone()
    logits = model(ids).logits[targets >= 0]
    goal = targets[targets >= 0]
    weight = torch.where(goal == 260, options.get("end_token_weight", 1.0), 1.0)
    loss = F.cross_entropy(logits, goal, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    expected = (loss * weight).sum() / len(goal)
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(found.total, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, model.lm_head_stage.weight.grad, atol=1e-6, rtol=1e-4)
    plain = SpecialistObjective().forward_backward(model, ids, targets)
    torch.testing.assert_close(plain.stage.float(), found.stage.float(), atol=1e-5, rtol=1e-5)
