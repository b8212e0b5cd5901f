"""`stagewise report` on a real small model: the sample is true to the model, and an existing report is kept."""

import re

import pytest
import torch

from stagewise.cli import main
from stagewise.modeling import load, load_tokenizer
from stagewise.report.sample import SETTLED_RULE, WAND_RULE, trace_sample


@pytest.fixture(scope="module")
def model_folder(write_checkpoint, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("report") / "model")


def test_report_of_a_model_shows_its_sample_and_is_not_overwritten(model_folder, capsys):
    page = model_folder / "report.html"
    assert main(["report", str(model_folder), "--prompt", "the sea", "--tokens", "6"]) == 0
    text = page.read_text(encoding="utf-8")
    assert 1 <= len(re.findall(r'class="token"', text)) <= 6 and "the sea" in text  # fewer where bos ends it
    assert main(["report", str(model_folder)]) == 2
    assert "--force" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == text
    assert main(["report", str(model_folder), "--no-sample", "--force"]) == 0
    assert 'class="token"' not in page.read_text(encoding="utf-8")


def test_sample_tokens_and_candidates_are_the_models_own(model_folder):
    model, tokenizer = load(model_folder), load_tokenizer(model_folder)
    sample = trace_sample(model, tokenizer, "the sea", max_new_tokens=8)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode_ordinary("the sea")]])
    out = model.generate_prefix(ids, max_stages=3, max_new_tokens=8)
    assert "".join(t.text for t in sample.tokens).rstrip("\ufffd") in tokenizer.decode(out[0, ids.size(1) :])
    assert sample.rule == SETTLED_RULE
    with torch.no_grad():
        product = model.forward_aggregated(out).exp()[0]
        last = model.forward_stage(out, stage=2).softmax(-1)[0]
    for i, token in enumerate(sample.tokens):
        assert [len(column) for column in token.top] == [5] * 4
        place = ids.size(1) - 1 + i
        assert [p for _, p in token.top[3]] == pytest.approx(product[place].topk(5).values.tolist(), abs=1e-5)
        assert [p for _, p in token.top[2]] == pytest.approx(last[place].topk(5).values.tolist(), abs=1e-5)


def test_settled_stage_is_the_first_from_which_every_deeper_product_agrees(model_folder):
    model, tokenizer = load(model_folder), load_tokenizer(model_folder)
    sample = trace_sample(model, tokenizer, "the stars", max_new_tokens=12)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode_ordinary("the stars")]])
    out = model.generate_prefix(ids, max_stages=3, max_new_tokens=12)
    best = [model.forward_aggregated(out, max_stages=k)[0].argmax(-1) for k in (1, 2, 3)]
    for i, token in enumerate(sample.tokens):
        place = ids.size(1) - 1 + i
        agrees = [int(best[k][place]) == int(out[0, place + 1]) for k in range(3)]
        assert agrees[2] and all(agrees[token.stage :])
        assert token.stage == 0 or not agrees[token.stage - 1]


def test_with_bounds_the_sample_is_wands_own(write_checkpoint, tmp_path):
    folder = write_checkpoint(tmp_path / "model", poe_wand_p99_bounds_per_stage_head=[0.5, 0.5])
    model, tokenizer = load(folder), load_tokenizer(folder)
    sample = trace_sample(model, tokenizer, "the sea", max_new_tokens=10)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode_ordinary("the sea")]])
    _, used = model.generate_wand(ids, max_new_tokens=10, return_stages_used=True)
    used = used.tolist() if hasattr(used, "tolist") else list(used)
    assert [t.stage for t in sample.tokens] == (used[0] if isinstance(used[0], list) else used)
    assert sample.rule == WAND_RULE


def test_models_without_experts_and_prompts_past_the_context_are_errors(write_checkpoint, model_folder, tmp_path):
    folder = write_checkpoint(tmp_path / "bp", poe_mode="none", per_stage_head=False)
    with pytest.raises(ValueError, match="no experts to trace"):
        trace_sample(load(folder), load_tokenizer(folder), "the sea")
    with pytest.raises(ValueError, match="the context is 256"):
        trace_sample(load(model_folder), load_tokenizer(model_folder), "the sea " * 300)
