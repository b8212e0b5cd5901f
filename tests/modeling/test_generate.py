"""transformers' generate on our model: cached equals uncached, padded equals unpadded, folders load elsewhere."""

from __future__ import annotations

import pytest
import torch

from stagewise.modeling import PoEForCausalLM

PROMPTS = [[87, 5, 9, 33, 12, 60, 2], [87, 40, 41], [87, 7, 7, 8, 20, 1, 3, 9, 30, 31, 32]]


def left_padded(prompts, pad=87):
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@pytest.mark.parametrize("output_mode", ["aggregate", "final"])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    ],
    ids=["greedy", "penalty", "beam", "sample"],
)
def test_cached_equals_uncached_across_windows_in_left_padded_batches(tiny_model, settings, output_mode):
    model = tiny_model(dtype=torch.float64, max_position_embeddings=512, scale=0.5)  # short window 128
    ids, mask = left_padded([p * 15 for p in PROMPTS])
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        outs.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=20,
                use_cache=use_cache,
                output_mode=output_mode,
                eos_token_id=None,
                **settings,
            )
        )
    assert outs[0].tolist() == outs[1].tolist()


def test_padded_rows_equal_the_same_rows_alone(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, mask = left_padded(PROMPTS)
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        one = torch.tensor([prompt])  # with its mask: transformers would take the leading <|bos|> for padding
        alone = model.generate(
            one, attention_mask=torch.ones_like(one), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert row[ids.size(1) :].tolist() == alone[0, len(prompt) :].tolist()


@torch.no_grad()
def test_padding_on_either_side_leaves_logits_unchanged(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, mask = left_padded(PROMPTS)
    left = model(ids, attention_mask=mask).logits
    right = model(ids.flip(1), attention_mask=mask.flip(1)).logits
    for r, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(left[r, -len(prompt) :], alone, atol=1e-10, rtol=0)
        backwards = model(torch.tensor([prompt[::-1]])).logits[0]
        torch.testing.assert_close(right[r, : len(prompt)], backwards, atol=1e-10, rtol=0)


def test_loss_from_labels_is_the_objective_and_trains(tiny_model):
    for mode in ("none", "flat", "hier", "residual_logop"):
        model: PoEForCausalLM = tiny_model(poe_mode=mode).train()
        ids = torch.randint(0, 87, (2, 20))
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert torch.isfinite(loss) and model.transformer["h"][0].attn.c_q.weight.grad.norm() > 0


def test_a_sequence_longer_than_the_context_is_refused(tiny_model):
    with pytest.raises(ValueError, match="exceeds the context of 256"):
        tiny_model()(torch.zeros(1, 300, dtype=torch.long))


def test_stage_modes_of_an_end_to_end_model_are_refused(tiny_model):
    model = tiny_model(poe_mode="none")
    with pytest.raises(ValueError, match="no valid intermediate experts"):
        model.forward_stage(torch.tensor([[1, 2]]), stage=0)
