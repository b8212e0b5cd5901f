"""Two sets of conversations everybody has: tool calls to the standard library's functions, and small talk about them.

Design choices:
- Record i of a set is a pure function of (seed, set, split, i): nothing is stored, nothing is downloaded.
- Requests say every argument they want used; wordings, the order of things and the number of tools vary. Some requests
  fit no tool and are answered with a refusal that says what the tool can do.
- The held-out split asks for functions that the train split never shows, neither as a tool nor in talk.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .conversation_shapes import Messages
from .embedded_functions import BOOLEAN, INTEGER, NUMBER, NUMBERS, STRINGS, Function, Parameter, functions
from .tool_format import render_call

DEFAULT_COUNT = {"train": 6000, "held_out": 400}
REFUSAL_SHARE = 0.2
SECOND_TOOL_SHARE = 0.2
OPTIONAL_SHARE = 0.4

REQUESTS = (
    "Please {task}. Use {arguments}.",
    "Can you {task}? I have {arguments}.",
    "With {arguments}, {task}.",
    "I want to {task}, given {arguments}.",
    "Could you please {task} for {arguments}?",
    "Use {name} with {arguments}.",
    "Call {name} for me: {arguments}.",
    "I need you to {task}. The arguments are {arguments}.",
    "{arguments}. Now {task}.",
    "Help me {task}; {arguments}.",
)
ARGUMENT_FORMS = (
    "{name} = {value}",
    "{name} set to {value}",
    "{name} being {value}",
    "{name} {value}",
    "{value} as {name}",
)
OFF_TOPIC = (
    "Book a table for {n} people tonight.",
    "What will the weather be like in {place} tomorrow?",
    "Send an e-mail to my sister about {thing}.",
    "Order {n} boxes of {thing} for the office.",
    "Play some music about {thing}.",
    "How do I get from {place} to the airport?",
    "Translate a poem about {thing} into French.",
    "Find me a cheap hotel in {place} for {n} nights.",
    "Set an alarm for {n} o'clock.",
    "Write a short story about {thing}.",
)
REFUSALS = (
    "I'm sorry, but I can't do that with the functions I have. I can {task}.",
    "I'm sorry, none of my functions can do that. What I can do is {task}.",
    "That is beyond the functions I have access to. I can only {task}.",
)
WORDS = (
    "apple", "river", "stone", "cloud", "paper", "green", "light", "music", "table", "window", "garden", "silver",
    "ocean", "letter", "orange", "winter", "summer", "coffee", "bridge", "planet", "forest", "mirror", "pencil",
    "rocket", "sugar", "tiger", "velvet", "yellow", "zebra", "hello", "world", "python", "north", "south", "morning",
    "evening", "report", "budget", "holiday", "invoice",
)  # fmt: skip
PLACES = ("Seoul", "Paris", "Lagos", "Lima", "Oslo", "Cairo", "Boston", "Kyoto", "Madrid", "Sydney")
FOLDERS = ("/users/ana", "/var/log", "/tmp", "/srv/data", "docs", "src/app", "/opt/tools", "notes")
SUFFIXES = (".txt", ".csv", ".py", ".md", ".json", ".log", ".html", "")
PATH_NAMES = {"path", "filename", "file", "src", "dst", "pathname", "f1", "f2", "p", "dir", "top", "root"}


class GeneratedRecords(Sequence[Mapping[str, Any]]):
    """`count` records, each made when it is asked for."""

    def __init__(self, make: Callable[[random.Random], Mapping[str, Any]], count: int, key: str) -> None:
        self.make, self.size, self.key = make, count, key

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        index = int(index)
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.make(random.Random(f"{self.key} {index}"))


def tool_records(count: int | None = None, seed: int = 42, split: str = "train") -> GeneratedRecords:
    """Records ``{"messages", "tools", "query", "expected"}``; `expected` is the right call or None for a refusal."""
    pool = functions(split)
    return GeneratedRecords(lambda rng: _tool_record(rng, pool), _count(count, split), f"{seed} tools {split}")


def chat_records(count: int | None = None, seed: int = 42, split: str = "train") -> GeneratedRecords:
    """Records ``{"messages"}``: questions about the functions of `split`, some opened by a greeting."""
    pool = functions(split)
    return GeneratedRecords(lambda rng: _chat_record(rng, pool), _count(count, split), f"{seed} chat {split}")


def _count(count: int | None, split: str) -> int:
    if count is not None and count < 1:
        raise ValueError(f"count={count}: an embedded set needs at least one conversation")
    return count or DEFAULT_COUNT.get(split, DEFAULT_COUNT["train"])


def argument_value(parameter: Parameter, rng: random.Random) -> Any:
    """A plausible value for `parameter`."""
    if parameter.kind == BOOLEAN:
        return rng.random() < 0.5
    if parameter.kind == INTEGER:
        ranges = {"year": (1900, 2100), "y1": (1900, 2000), "y2": (2001, 2100), "month": (1, 12), "day": (1, 28)}
        return rng.randint(*ranges.get(parameter.name, (1, 99)))
    if parameter.kind == NUMBER:
        return _number(rng)
    if parameter.kind == NUMBERS:
        return [_number(rng) for _ in range(rng.randint(2, 5))]
    if parameter.kind == STRINGS:
        return rng.sample(WORDS, rng.randint(2, 4))
    if parameter.name in PATH_NAMES:
        return f"{rng.choice(FOLDERS)}/{rng.choice(WORDS)}{rng.choice(SUFFIXES)}"
    if parameter.name in ("url", "base"):
        return f"https://{rng.choice(WORDS)}.example/{rng.choice(WORDS)}"
    if parameter.name in ("chr", "fillchar", "sep"):
        return rng.choice("abcxyz-*+_")
    return " ".join(rng.sample(WORDS, rng.choice((1, 1, 2, 3))))


def _number(rng: random.Random) -> int | float:
    return rng.randint(-20, 200) if rng.random() < 0.5 else round(rng.uniform(-10, 100), rng.choice((1, 2)))


def _request(function: Function, rng: random.Random) -> tuple[str, dict[str, Any]]:
    chosen = [p for p in function.parameters if p.required or rng.random() < OPTIONAL_SHARE]
    arguments = {p.name: argument_value(p, rng) for p in chosen}
    form = rng.choice(ARGUMENT_FORMS)
    said = [form.format(name=name, value=json.dumps(value)) for name, value in arguments.items()]
    listed = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    return rng.choice(REQUESTS).format(task=function.task, name=function.name, arguments=listed), arguments


def _off_topic(rng: random.Random) -> str:
    return rng.choice(OFF_TOPIC).format(n=rng.randint(2, 12), place=rng.choice(PLACES), thing=rng.choice(WORDS))


def _tool_record(rng: random.Random, pool: Sequence[Function]) -> dict[str, Any]:
    function = rng.choice(pool)
    tools = [function]
    if rng.random() < SECOND_TOOL_SHARE:
        other = rng.choice(pool)
        if other != function:
            tools.insert(rng.randint(0, 1), other)
    expected: dict[str, Any] | None = None
    if rng.random() < REFUSAL_SHARE:
        stranger = rng.choice(pool)
        query = _off_topic(rng) if rng.random() < 0.6 or stranger in tools else _request(stranger, rng)[0]
        answer = rng.choice(REFUSALS).format(task=" or ".join(tool.task for tool in tools))
    else:
        query, arguments = _request(function, rng)
        expected = {"name": function.name, "arguments": arguments}
        answer = render_call(function.name, arguments)
    messages: Messages = [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "tools": [tool.tool for tool in tools], "query": query, "expected": expected}


GREETINGS = ("Hi", "Hello", "Hey", "Good morning", "Hi there")
WELCOMES = (
    "Hello! Ask me about a function of Python's standard library.",
    "Hi! Which function would you like to know about?",
)
ABOUT = (
    "What does {name} do?",
    "Explain {name}.",
    "What is {name} for?",
    "Tell me about {name}.",
    "When would I use {name}?",
)
ARGUMENTS = ("What arguments does {name} take?", "Which parameters does {name} have?", "How do I call {name}?")
MODULE = ("Which module has {short}?", "Where do I find {short}?", "What do I import for {short}?")
WHICH = ("Which function can {task}?", "I want to {task}. What should I use?", "Is there something that can {task}?")
THANKS = ("Thanks!", "Thank you.", "Great, thanks.")


def _answer_about(function: Function) -> str:
    return f"You can use {function.name} to {function.task}."


def _answer_arguments(function: Function) -> str:
    needed = [f"{p.name} ({p.kind})" for p in function.parameters if p.required]
    optional = [f"{p.name} ({p.kind})" for p in function.parameters if not p.required]
    text = f"{function.name} needs {' and '.join(needed)}."
    return text + (f" Optional: {', '.join(optional)}." if optional else "")


def _chat_record(rng: random.Random, pool: Sequence[Function]) -> dict[str, Any]:
    function = rng.choice(pool)
    short = function.name.rpartition(".")[2]
    exchanges = {
        "about": (rng.choice(ABOUT).format(name=function.name), _answer_about(function)),
        "arguments": (rng.choice(ARGUMENTS).format(name=function.name), _answer_arguments(function)),
        "module": (rng.choice(MODULE).format(short=short), f"{short} belongs to {function.module}: {function.name}."),
        "which": (rng.choice(WHICH).format(task=function.task), f"Use {function.name}."),
    }
    chosen = rng.sample(list(exchanges), rng.choice((1, 1, 2, 3)))
    turns = [exchanges[key] for key in chosen]
    opening = rng.random()
    if opening < 0.1:
        turns.insert(0, (rng.choice(GREETINGS) + rng.choice(("!", ".", "")), rng.choice(WELCOMES)))
    elif opening < 0.3:
        turns[0] = (f"{rng.choice(GREETINGS)}, {turns[0][0][0].lower()}{turns[0][0][1:]}", turns[0][1])
    if rng.random() < 0.1:
        turns.append((rng.choice(THANKS), "You're welcome!"))
    messages: Messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}
