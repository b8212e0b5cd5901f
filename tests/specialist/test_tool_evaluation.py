from __future__ import annotations

import json

import pytest

from stagewise.specialist.growth import grow, open_parent
from stagewise.specialist.tool_calls import render_call
from stagewise.specialist.tool_evaluation import (
    ToolCase,
    answer_cases,
    arguments_accepted,
    bfcl_cases,
    embedded_cases,
    judge,
    rates,
    rates_table,
)

ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number"}, "unit": {"type": "string"}},
        "required": ["a", "b"],
    },
}
CASE = ToolCase("add 1 and 2", [ADD], {"add": {"a": [1], "b": [2, 2.5], "unit": ["", "Metre"]}})
REFUSE = ToolCase("sing", [ADD])


@pytest.mark.parametrize(
    ("text", "parsed", "valid", "right", "correct"),
    [
        (render_call("add", {"a": 1, "b": 2.0}), True, True, True, True),
        (render_call("add", {"b": 2.5, "a": 1, "unit": "metre "}) + "]}]}", True, True, True, True),
        (render_call("add", {"a": 1, "b": 3}), True, True, True, False),
        (render_call("add", {"a": 1}), True, False, True, False),
        (render_call("add", {"a": "1", "b": 2}), True, False, True, False),
        (render_call("sub", {"a": 1, "b": 2}), True, False, False, False),
        ('<functioncall> {"name": "add", "arguments": \'{"a": 1', False, False, False, False),
        ("I cannot.", False, False, False, False),
    ],
)
def test_an_emission_is_judged_by_its_first_complete_call(text, parsed, valid, right, correct):
    answer = judge(CASE, text)
    assert (answer.call is not None, answer.valid, answer.right_function, answer.correct) == (
        parsed,
        valid,
        right,
        correct,
    )
    assert answer.attempted == text.startswith("<functioncall>")


def test_a_refusal_is_text_without_a_call():
    assert judge(REFUSE, "I'm sorry, I can only add.").correct
    assert not judge(REFUSE, render_call("add", {"a": 1, "b": 2})).correct
    assert not judge(REFUSE, '<functioncall> {"name').correct
    assert not judge(REFUSE, "  ").correct


def test_accepted_values_follow_the_leaderboards_convention():
    assert arguments_accepted({"a": [1, 2.0]}, {"a": [[1, 2]], "b": ["", 3]})
    assert not arguments_accepted({"a": [1]}, {"a": [[1, 2]]})
    assert not arguments_accepted({}, {"a": [1]})
    assert not arguments_accepted({"a": 1, "c": 2}, {"a": [1]})
    assert not arguments_accepted({"a": 1}, {"a": [True]})
    assert arguments_accepted({"a": {"x": 1}}, {"a": [{"x": [1, 2]}]})


def test_shares_say_of_how_many_cases_they_are():
    answers = [judge(CASE, render_call("add", {"a": 1, "b": 2})), judge(CASE, "no"), judge(REFUSE, "no")]
    found = rates(answers)
    assert found["call_cases"] == 2 and found["refusal_cases"] == 1
    assert found["parsed"] == found["valid"] == found["correct"] == 0.5
    assert found["valid_of_calls"] == 1.0 and found["refused"] == 1.0
    assert rates([judge(REFUSE, "no")])["correct"] is None
    assert "50.0%" in rates_table({"free": found, "constrained": found})


def test_embedded_cases_ask_for_held_out_functions_and_the_right_answer_is_right():
    cases = embedded_cases(40)
    assert any(case.refusal for case in cases) and sum(not case.refusal for case in cases) > 20
    for case in cases:
        if not case.refusal:
            ((name, accepted),) = case.accepted.items()
            assert judge(case, render_call(name, {key: values[0] for key, values in accepted.items()})).correct


def test_leaderboard_files_become_cases(tmp_path):
    row = {
        "id": "simple_0",
        "question": [[{"role": "user", "content": "area?"}]],
        "function": [{"name": "g.area", "parameters": {"type": "dict", "properties": {"r": {"type": "float"}}}}],
    }
    (tmp_path / "BFCL_v4_simple.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "BFCL_v4_irrelevance.jsonl").write_text(json.dumps({**row, "id": "irrelevance_0"}) + "\n")
    with pytest.raises(FileNotFoundError, match="needs its answers"):
        bfcl_cases(tmp_path)
    truth = {"id": "simple_0", "ground_truth": [{"g.area": {"r": [2]}}]}
    (tmp_path / "BFCL_v4_simple.answers.jsonl").write_text(json.dumps(truth) + "\n")
    found = bfcl_cases(tmp_path)
    assert judge(found["simple"][0], render_call("g.area", {"r": 2.0})).correct
    assert found["irrelevance"][0].refusal
    with pytest.raises(FileNotFoundError, match="no BFCL"):
        bfcl_cases(tmp_path / "empty")


def test_a_model_that_knows_nothing_still_calls_validly_under_the_constraint(base_folder, tokenizer, tmp_path):
    model = grow(open_parent(base_folder("staged")), 1, tokenizer=tokenizer)
    short = {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]},
    }
    cases = [ToolCase("q", [short], {"f": {"a": ["x"]}}), ToolCase("zzz", [short], {"f": {"a": ["y"]}})]
    model.config.max_position_embeddings = 1024
    model._rotary = None
    answers = answer_cases(model, tokenizer, cases, constrained=True, max_new_tokens=300, batch=2)
    assert all(a.valid or (a.call is None and not a.attempted) for a in answers)
    assert [a.case for a in answers] == cases
