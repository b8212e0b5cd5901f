"""The chunked head loss against plain autograd over whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stagewise.training.head_loss import HeadSettings, chunked_head_loss

V, VPAD, D, N, CAP = 50, 64, 16, 37, 15.0


def problem(experts: int = 1, heads: int = 2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    states = [make(N, D) for _ in range(experts)]
    weights = [[make(VPAD, D) for _ in range(heads)] for _ in range(experts)]
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::5] = -1
    return states, weights, targets


def whole_logits(hidden, weights):
    return CAP * torch.tanh(sum(hidden @ w[:V].T for w in weights) / CAP)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 16])
@pytest.mark.parametrize("heads", [1, 2])
def test_loss_and_gradients_equal_autograd_on_whole_logits(chunk_tokens, heads):
    [hidden], [weights], targets = problem(1, heads)
    leaves = [hidden.requires_grad_(), *(w.requires_grad_() for w in weights)]
    expected = F.cross_entropy(whole_logits(hidden, weights), targets, ignore_index=-1)
    expected_grads = torch.autograd.grad(expected, leaves)
    settings = HeadSettings(V, CAP, normaliser=float((targets >= 0).sum()), chunk_tokens=chunk_tokens)
    loss, plain, _ = chunked_head_loss(hidden, weights, targets, settings)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(plain / settings.normaliser, expected.detach())
    for got, want in zip(torch.autograd.grad(loss * 3.0, leaves), expected_grads, strict=True):
        torch.testing.assert_close(got, want * 3.0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_residual_loss_equals_the_product_of_log_probabilities(share):
    states, weights, targets = problem(3)
    hidden, own = states[-1].requires_grad_(), [w.requires_grad_() for w in weights[-1]]
    logp = [whole_logits(h, w).log_softmax(-1) for h, w in zip(states, weights, strict=True)]
    combined = ((logp[0] + logp[1]).detach() + logp[2]) / 3
    plain_ce = F.cross_entropy(logp[2], targets, ignore_index=-1)
    combined_ce = F.cross_entropy(combined, targets, ignore_index=-1)
    expected = (1 - share) * plain_ce + share * combined_ce
    valid = float((targets >= 0).sum())
    settings = HeadSettings(V, CAP, normaliser=valid, residual_weight=share, chunk_tokens=8)
    earlier = [(h, w[0] + w[1]) for h, w in zip(states[:2], weights[:2], strict=True)]
    loss, plain, pooled = chunked_head_loss(hidden, own, targets, settings, earlier)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.stack([plain, pooled]) / valid, torch.stack([plain_ce, combined_ce]).detach())
    leaves = [hidden, *own]
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_padded_vocabulary_rows_get_no_gradient():
    [hidden], [weights], targets = problem(1, 1)
    weight = weights[0].requires_grad_()
    chunked_head_loss(hidden, [weight], targets, HeadSettings(V, CAP))[0].backward()
    assert weight.grad[V:].abs().max() == 0 and weight.grad[:V].abs().min() > 0


def test_a_frozen_head_gets_no_gradient_while_the_added_one_does():
    [hidden], [[frozen, added]], targets = problem(1, 2)
    added.requires_grad_()
    chunked_head_loss(hidden, [frozen, added], targets, HeadSettings(V, CAP))[0].backward()
    assert frozen.grad is None and added.grad is not None


def test_bfloat16_gradients_stay_close_to_fp32():
    [hidden], [weights], targets = problem(1, 1, torch.float32)
    settings = HeadSettings(V, CAP, normaliser=10.0, chunk_tokens=8)
    exact = hidden.clone().requires_grad_()
    chunked_head_loss(exact, weights, targets, settings)[0].backward()
    rough = hidden.bfloat16().requires_grad_()
    loss = chunked_head_loss(rough, [w.bfloat16() for w in weights], targets, settings)[0]
    assert loss.dtype == torch.float32
    loss.backward()
    assert (rough.grad.float() - exact.grad).norm() < 0.02 * exact.grad.norm()
