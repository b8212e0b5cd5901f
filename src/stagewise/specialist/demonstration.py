"""What `make specialist` ends with: calls to functions held out from training, with and without the constraint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stagewise.data.embedded_functions import functions_manifest
from stagewise.evaluation.provenance import write_json
from stagewise.modeling import load, load_tokenizer
from stagewise.specialist.tool_evaluation import ToolAnswer, answer_cases, embedded_cases, rates, rates_table

CASES = 60
EXAMPLES = 4
NEW_TOKENS = 224  # the bounds below let no call be longer
LIMITS = {"max_string": 40, "max_items": 6}


def show_calls(folder: Path, count: int = CASES, seed: int = 7) -> dict[str, Any]:
    """Print calls of the specialist in `folder` to held-out functions and their rates; keeps them in `eval/tools.json`.

    Returns the rates of both columns, free and constrained.
    """
    model, tokenizer = load(folder), load_tokenizer(folder)
    cases = embedded_cases(count, seed)
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "limits": LIMITS}
    free = answer_cases(model, tokenizer, cases, **settings)
    held = answer_cases(model, tokenizer, cases, constrained=True, **settings)
    functions = {tool["name"] for case in cases for tool in case.tools}
    print(f"\n{count} requests to {len(functions)} functions that training never showed\n")
    shown = [i for i, case in enumerate(cases) if not case.refusal][:EXAMPLES]
    for i in shown:
        print(f"> {cases[i].query}\n  free         {describe(free[i])}\n  constrained  {describe(held[i])}\n")
    found = {"free": rates(free), "constrained": rates(held)}
    print(rates_table(found))
    write_json(
        folder / "eval" / "tools.json",
        {"cases": count, "seed": seed, "split": "held_out", "functions": functions_manifest(), "rates": found},
    )
    return found


def describe(answer: ToolAnswer) -> str:
    """An answer in one line, and what is wrong with it."""
    text = answer.call.render() if answer.call is not None else answer.text
    text = " ".join(text.split())
    verdict = "correct" if answer.correct else "; ".join(answer.problems) if answer.problems else "another answer"
    return f"{text[:150]}{'...' if len(text) > 150 else ''}  [{verdict}]"
