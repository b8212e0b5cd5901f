"""How well a model calls functions: shares of parseable, valid and correct calls and of correct refusals.

Design choices:
- A case is a request with tools and the accepted answers; cases without any ask for a refusal.
- Each share says of how many cases it is. Nothing is averaged across kinds of cases.
- With a constraint the grammar is the trained format (mode auto for refusals: a call or plain text), so validity is
  certain and only correctness is measured.
- Answers follow the leaderboard's convention: each argument has a list of accepted values, "" meaning it may be absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagewise.data.embedded_tools import tool_records
from stagewise.data.tool_format import standard_tool
from stagewise.modeling.decoding import decode
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy
from stagewise.specialist.constrain import CallConstraint
from stagewise.specialist.tool_calls import ToolCall, ToolCallParser, check_call


@dataclass(frozen=True)
class ToolCase:
    """One request. `accepted` maps a function's name to its arguments' accepted values; empty: refuse."""

    query: str
    tools: list[dict[str, Any]]
    accepted: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    @property
    def refusal(self) -> bool:
        return not self.accepted


@dataclass(frozen=True)
class ToolAnswer:
    """What the model wrote for a case and what it amounts to. `right_function` and `correct` are None for refusals."""

    case: ToolCase
    text: str
    call: ToolCall | None
    attempted: bool
    valid: bool
    right_function: bool
    correct: bool
    problems: list[str]


def embedded_cases(count: int, seed: int = 7, split: str = "held_out") -> list[ToolCase]:
    """Requests to the standard library's functions, by default those no training set shows."""
    cases = []
    for record in tool_records(count, seed, split):
        expected = record["expected"]
        accepted = {}
        if expected is not None:
            accepted = {expected["name"]: {key: [value] for key, value in expected["arguments"].items()}}
        cases.append(ToolCase(record["query"], record["tools"], accepted))
    return cases


def bfcl_cases(folder: Path, limit: int | None = None) -> dict[str, list[ToolCase]]:
    """Cases of every leaderboard file (``BFCL_*.jsonl`` with ``.answers.jsonl`` beside it) in `folder`, by file name.

    Names may hold dots or not; they are shown as they are. Files named irrelevance ask for refusals.
    """
    found: dict[str, list[ToolCase]] = {}
    files = [file for file in sorted(folder.glob("BFCL_*.jsonl")) if not file.name.endswith(".answers.jsonl")]
    if not files:
        raise FileNotFoundError(f"no BFCL_*.jsonl in {folder}")
    for file in files:
        answers_file = file.with_name(file.name.replace(".jsonl", ".answers.jsonl"))
        answers: dict[str, Any] = {}
        if answers_file.is_file():
            answers = {row["id"]: row["ground_truth"] for row in _rows(answers_file)}
        elif "irrelevance" not in file.name:
            raise FileNotFoundError(f"{file} needs its answers in {answers_file.name}")
        cases = []
        for row in _rows(file):
            truth = answers.get(row["id"], [])
            query = "\n".join(message["content"] for message in row["question"][0])
            tools = [standard_tool(tool) for tool in row["function"]]
            cases.append(ToolCase(query, tools, {name: args for one in truth for name, args in one.items()}))
        found[file.stem.removeprefix("BFCL_v4_")] = cases[:limit]
    return found


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, encoding="utf-8") as stream:
        for line in stream:
            if line.strip():
                yield json.loads(line)


def judge(case: ToolCase, text: str) -> ToolAnswer:
    """What a text amounts to as the answer to a case: the first complete call in it counts, or that there is none."""
    parser = ToolCallParser()
    parser.feed(text)
    call = parser.close()
    attempted = call is not None or bool(parser.rejected)
    if call is None:
        correct = case.refusal and not attempted and bool(text.strip())
        return ToolAnswer(case, text, None, attempted, False, False, correct, list(parser.rejected))
    report = check_call(call, case.tools)
    problems = [
        *report.errors,
        *(f"invented {name}" for name in report.invented),
        *(f"missing {name}" for name in report.missing),
    ]
    wanted = case.accepted.get(call.name)
    right = wanted is not None
    correct = wanted is not None and report.valid and arguments_accepted(call.arguments, wanted)
    return ToolAnswer(case, text, call, True, report.valid, right, correct, problems)


def arguments_accepted(arguments: dict[str, Any], accepted: dict[str, list[Any]]) -> bool:
    """Whether every argument is one of its accepted values and none is missing that must be there."""
    if any(name not in accepted for name in arguments):
        return False
    for name, values in accepted.items():
        if name not in arguments:
            if "" not in values:
                return False
        elif not any(_equal(arguments[name], value) for value in values):
            return False
    return True


def _equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, bool) or isinstance(theirs, bool):
        return mine is theirs
    if isinstance(mine, str) and isinstance(theirs, str):
        return _plain(mine) == _plain(theirs)
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(_equal(a, b) for a, b in zip(mine, theirs, strict=True))
    if isinstance(mine, dict) and isinstance(theirs, dict):
        accepted = {key: value if isinstance(value, list) else [value] for key, value in theirs.items()}
        return arguments_accepted(mine, accepted)
    return bool(mine == theirs)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .,")


def answer_cases(
    model: Any,
    tokenizer: Any,
    cases: Sequence[ToolCase],
    *,
    constrained: bool = False,
    strategy: Strategy | str = "full",
    max_new_tokens: int = 128,
    batch: int = 16,
    limits: Mapping[str, int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[ToolAnswer]:
    """Let the model answer every case greedily. With `constrained`, calls follow the grammar of the case's tools.

    A constrained case that must be refused may also be answered in plain text; `limits` bound what the grammar leaves
    open (see `CallGrammar`). Cases too long for the context count as
    unanswered.
    """
    room = model.config.max_position_embeddings - max_new_tokens
    prompts = [
        tokenizer.render_for_completion([{"role": "user", "content": case.query}], tools=case.tools) for case in cases
    ]
    answers: list[ToolAnswer | None] = [None] * len(cases)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    order = sorted(fitting, key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        processors = []
        if constrained:
            tools = {tuple(prompts[i]): cases[i].tools for i in chosen}
            processors = [CallConstraint(tokenizer, tools, mode="auto", **(limits or {}))]
        params = SamplingParams(
            max_new_tokens=max_new_tokens, stop_tokens=tokenizer.chat_stop_ids, processors=processors
        )
        result = decode(model, [prompts[i] for i in chosen], strategy, params)
        for i, tokens in zip(chosen, result.tokens, strict=True):
            text = tokenizer.decode_bytes(tokens, skip_special_tokens=True).decode("utf-8", "replace")
            answers[i] = judge(cases[i], text)
        if progress is not None:
            progress(len(chosen))
    return [answer or judge(case, "") for case, answer in zip(cases, answers, strict=True)]


def rates(answers: Sequence[ToolAnswer]) -> dict[str, Any]:
    """Shares over the cases of each kind; None where there is no such case.

    attempted: began a call. parsed: a complete call. valid: it fits its schema. right_function, correct: of the cases
    that ask for a call. valid_of_calls: of the calls that parsed, whatever the case. refused: of the cases that no
    tool fits.
    """
    calls = [a for a in answers if not a.case.refusal]
    refusals = [a for a in answers if a.case.refusal]
    parsed = [a for a in answers if a.call is not None]

    def share(values: Sequence[bool]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "call_cases": len(calls),
        "refusal_cases": len(refusals),
        "attempted": share([a.attempted for a in calls]),
        "parsed": share([a.call is not None for a in calls]),
        "valid": share([a.valid for a in calls]),
        "right_function": share([a.right_function for a in calls]),
        "correct": share([a.correct for a in calls]),
        "valid_of_calls": share([a.valid for a in parsed]),
        "refused": share([a.correct for a in refusals]),
    }


def rates_table(columns: dict[str, dict[str, Any]]) -> str:
    """Several `rates` side by side, as plain text."""
    names = ["call_cases", "attempted", "parsed", "valid", "right_function", "correct", "valid_of_calls"]
    names += ["refusal_cases", "refused"]
    width = max(14, *(len(title) for title in columns))
    lines = [" " * 16 + "".join(f"{title:>{width + 2}}" for title in columns)]
    for name in names:
        cells = []
        for found in columns.values():
            value = found[name]
            shown = "-" if value is None else f"{value}" if isinstance(value, int) else f"{value:.1%}"
            cells.append(f"{shown:>{width + 2}}")
        lines.append(f"{name:<16}" + "".join(cells))
    return "\n".join(lines)
