from __future__ import annotations

import numpy as np
import pytest
import torch

from stagewise.evaluation.bpb import evaluate_bpb
from stagewise.evaluation.heads import (
    beta_sweep,
    head_report,
    lambdas_by_layer,
    loading_tokens,
    scaled_heads,
    singular_report,
    stage_head_matrices,
    top_singular,
    unique_shares,
)


def random_heads(count=3, vocab=50, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(vocab, width, generator=generator) for _ in range(count)]


def test_singular_triples_are_numpys():
    for matrix in random_heads():
        u, s, v = top_singular(matrix, 3)
        left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
        assert s.numpy() == pytest.approx(values[:3], rel=1e-10)
        for i in range(3):
            assert abs(u[:, i].numpy() @ left[:, i]) == pytest.approx(1, abs=1e-9)
            assert abs(v[:, i].numpy() @ right[i]) == pytest.approx(1, abs=1e-9)
            assert u[:, i].numpy() @ matrix.double().numpy() @ v[:, i].numpy() == pytest.approx(values[i])
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_cosines_tell_equal_opposite_and_unrelated_heads_apart():
    head, other = random_heads(2)
    report = singular_report([head, 2 * head, -head, other])
    joint = np.array(report["joint_cosine"])
    assert joint[0, :3] == pytest.approx([1.0, 1.0, -1.0])  # u v' flips with its head, whatever sign u is given
    assert abs(joint[0, 3]) < 0.9
    values = np.linalg.svd(head.double().numpy(), compute_uv=False)
    assert report["energy"][0] == pytest.approx(values[0] ** 2 / (values**2).sum())


def test_unique_shares_are_those_of_a_qr_factorisation():
    heads = random_heads(4)
    shares = unique_shares(heads)
    flat = np.stack([head.double().numpy().ravel() for head in heads], axis=1)
    diagonal = np.abs(np.diag(np.linalg.qr(flat)[1])) / np.linalg.norm(flat, axis=0)
    assert shares["unique_norm"] == pytest.approx(diagonal)
    assert shares["unique"] == pytest.approx(diagonal**2)


def test_a_copied_head_has_nothing_of_its_own_and_an_empty_one_neither():
    head, other = random_heads(2)
    shares = unique_shares([head, 0.5 * head, other + head, torch.zeros_like(head), other])["unique"]
    assert shares[0] == 1.0 and shares[3] == 0.0
    assert shares[1] == pytest.approx(0.0, abs=1e-9) and shares[4] == pytest.approx(0.0, abs=1e-9)
    assert shares[2] > 0.1


def test_the_tokens_a_head_loads_on_are_the_largest_entries_of_its_direction():
    direction = torch.zeros(20)
    direction[[3, 7, 9]] = torch.tensor([5.0, -4.0, 3.0])
    head = torch.outer(direction, torch.tensor([1.0, 2.0, 0.0]))
    (sides,) = loading_tokens([head], lambda i: f"t{i}", 2)
    assert [entry["token"] for entry in sides["positive"]] == ["t3", "t9"]
    assert sides["negative"][0]["token"] == "t7"


def test_scaling_is_undone_bit_by_bit_even_after_an_error(tiny_model):
    model = tiny_model()
    before = [head.clone() for head in stage_head_matrices(model)]
    with pytest.raises(RuntimeError), scaled_heads(model, [2.0, 0.0, 1.0]):
        assert torch.equal(stage_head_matrices(model)[0], 2 * before[0])
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(before, stage_head_matrices(model), strict=True))


def test_a_sweep_measures_the_model_with_scaled_heads(tiny_model):
    model = tiny_model()
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(96, dtype=torch.long)

    def product_bpb():
        return evaluate_bpb(model, [(ids[:, :-1], ids[:, 1:])], ones, final=False)["product_bpb"]

    report = beta_sweep(model, product_bpb, (0.0, 1.0))
    assert report["all"][1] == {"beta": 1.0, "product_bpb": product_bpb(), "difference": 0.0}
    with torch.no_grad():
        model.lm_head_stages[1].weight.zero_()
        assert report["without"][1]["product_bpb"] == product_bpb()
        model.lm_head_stages[0].weight.zero_()
        model.lm_head_stages[2].weight.zero_()
    assert report["all"][0]["product_bpb"] == product_bpb()


def test_a_model_with_only_a_shared_head_is_refused(tiny_model):
    with pytest.raises(ValueError, match="per_stage_head is false"):
        head_report(tiny_model(per_stage_head=False))


def test_lambdas_are_listed_by_layer(tiny_model):
    model = tiny_model()
    listed = lambdas_by_layer(model)
    assert [entry["layer"] for entry in listed] == [0, 1, 2, 3, 4]
    assert listed[0]["resid"] == pytest.approx(1.15) and listed[4]["x0"] == pytest.approx(0.05)
