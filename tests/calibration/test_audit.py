"""The audit passes honest decoders in every dtype, calls ties ties, and exits with 1 on injected bugs."""

from __future__ import annotations

import json

import pytest
import torch

from stagewise.calibration.audit import Audited, Oracle, audit_command, audit_model, judge, lossless_strategies
from stagewise.modeling.decoding import Decoder
from stagewise.modeling.frontier import CachedAttention
from stagewise.modeling.strategy import Strategy

PROMPTS = [[87, 5, 9, 33, 12, 60, 2], [87], [87, 7, 7, 8, 20, 1, 3, 9]]
FULL = {"full": Strategy()}
FEW = {
    "full": Strategy(),
    "speculative": Strategy("speculative", k_draft=3),
    "wand": Strategy("wand", verified=True, thresholds=(0.2, 0.2)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_honest_modes_pass_in_every_dtype_layout_and_batch(tiny_model, dtype):
    strategies = None if dtype == torch.float32 else FEW
    result = audit_model(tiny_model(dtype=dtype), PROMPTS, max_new_tokens=5, strategies=strategies)
    assert result["verdict"] in (("equal", "tie") if dtype == torch.bfloat16 else ("equal",))
    assert {run["layout"] for run in result["runs"]} == {"plain", "packed", "folded"}
    assert {run["batch"] for run in result["runs"]} == {1, 3}
    assert all(run["tokens"] == 3 * 5 for run in result["runs"])
    assert all(0 < run["bound"] < 1 for run in result["runs"])
    assert any(0 < run["acceptance"] < 1 for run in result["runs"])


def test_the_bound_follows_the_precision_of_the_dtype(tiny_model):
    def bound(dtype):
        result = audit_model(tiny_model(dtype=dtype), PROMPTS[:1], max_new_tokens=4, strategies=FULL, layouts=["plain"])
        return result["bounds"]["plain"]

    assert bound(torch.float64) < 1e-10 < bound(torch.float32) < 1e-3 < bound(torch.bfloat16) < 1


def test_end_to_end_models_and_specialists_are_audited_in_the_modes_they_have(tiny_model):
    plain = tiny_model(poe_mode="none", per_stage_head=False)
    assert list(lossless_strategies(plain.config)) == ["full"]
    assert audit_model(plain, PROMPTS, max_new_tokens=4)["verdict"] == "equal"
    specialist = tiny_model(num_hidden_layers=6, specialist_layers=[1], specialist_base_head="last_expert")
    result = audit_model(specialist, PROMPTS[:1], max_new_tokens=6, layouts=["folded"])
    assert result["verdict"] == "equal" and any("prefix 3" in run["mode"] for run in result["runs"])


def test_a_proven_tie_in_bf16_is_a_tie_and_the_oracle_goes_on_from_the_emitted_text(tiny_model):
    """Two tokens whose heads agree up to the rounding of a folded head: layouts choose differently between them."""
    model = tiny_model(dtype=torch.bfloat16)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight[7] *= 3  # a frequent token, and its twin
        model.lm_head.weight[8] = model.lm_head.weight[7]
        for head in model.lm_head_stages:
            head.weight[8] = head.weight[7] + 0.01 * torch.randn(32, generator=noise).to(torch.bfloat16)
    result = audit_model(model, PROMPTS, max_new_tokens=16, strategies=FULL)
    assert result["verdict"] == "tie"
    ties = [d for run in result["runs"] for d in run["divergences"]]
    assert ties and all(d["emitted_gap"] <= d["bound"] for d in ties)
    assert any({d["oracle_token"], d["emitted_token"]} == {7, 8} for d in ties)
    assert all(run["tokens"] == 3 * 16 for run in result["runs"])


def test_a_single_wrong_token_is_a_bug_and_the_positions_after_it_are_judged_again(tiny_model):
    model = tiny_model()
    oracle = Oracle(model)
    text = oracle.text(PROMPTS[0], 4)
    wrong = oracle.at([*PROMPTS[0], *text])[0][5]
    rest = oracle.text([*PROMPTS[0], *text, wrong], 6)

    def logp(ids, token):
        return oracle.score_of(ids, token) - oracle.at(ids)[2]

    whole = [*text, wrong, *rest]
    logprobs = [logp([*PROMPTS[0], *whole[:i]], t) for i, t in enumerate(whole)]
    record = judge(oracle, PROMPTS[:1], [whole], [logprobs], 1e-4, Audited("full", "plain", 1))
    assert (record.bugs, record.ties, record.drifts, record.tokens) == (1, 0, 0, 11)
    assert (record.divergences[0].position, record.divergences[0].emitted_token) == (4, wrong)
    gap = record.divergences[0].emitted_gap
    assert judge(oracle, PROMPTS[:1], [whole], [logprobs], gap, Audited("full", "plain", 1)).verdict == "tie"


def damaged_values(monkeypatch):
    right = CachedAttention.__call__

    def wrong(self, layer, q, k, v):
        return right(self, layer, q, k, v * 1.3 if self.starts[0] > 12 and layer == 2 else v)

    monkeypatch.setattr(CachedAttention, "__call__", wrong)


def slightly_damaged_values(monkeypatch):
    """Too little to change a token soon: only the drift of log-probabilities shows it."""
    right = CachedAttention.__call__

    def wrong(self, layer, q, k, v):
        return right(self, layer, q, k, v * 1.002 if self.starts[0] > 12 and layer == 2 else v)

    monkeypatch.setattr(CachedAttention, "__call__", wrong)


def credulous_verifier(monkeypatch):
    right = Decoder.processed

    def wrong(self, scores, prefixes):
        scores = right(self, scores, prefixes)
        if scores.size(0) > len(self.rows) and self.drafts[0]:
            scores = scores.clone()
            scores[0, self.drafts[0][0]] = 100.0  # the first draft is always believed
        return scores

    monkeypatch.setattr(Decoder, "processed", wrong)


@pytest.mark.parametrize("inject", [damaged_values, slightly_damaged_values, credulous_verifier])
def test_an_injected_bug_is_found(tiny_model, monkeypatch, inject):
    model = tiny_model()
    inject(monkeypatch)
    result = audit_model(model, PROMPTS[:1], max_new_tokens=16, strategies=FEW, layouts=["plain"])
    assert result["verdict"] == "bug"
    assert all(run["verdict"] == "equal" for run in result["runs"] if run["mode"] == "full") == (
        inject is credulous_verifier
    )


def test_the_command_writes_json_and_exits_with_1_on_a_bug_only(small_model_folder, tmp_path, monkeypatch, capsys):
    folder = small_model_folder(tmp_path / "model")
    monkeypatch.setattr("stagewise.calibration.audit.lossless_strategies", lambda config: FEW)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The expert of\n<|bos|>def pool(\n", encoding="utf-8")
    out = tmp_path / "audit.json"
    assert audit_command(str(folder), prompts=prompts, max_new_tokens=8, json=out) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["verdict"] == "equal" and result["prompts"] == 2 and result["versions"]["torch"]
    assert "speculative" in capsys.readouterr().out
    damaged_values(monkeypatch)
    assert audit_command(str(folder), prompts=prompts, max_new_tokens=16, dtype="float64") == 1
    assert "lost something" in capsys.readouterr().out


def test_prompts_that_exceed_the_context_are_refused_before_any_work(tiny_model):
    with pytest.raises(ValueError, match="prompt 1: .* exceed 256"):
        audit_model(tiny_model(), [[87], [87] * 250], max_new_tokens=16)
