"""`stagewise chat`: a conversation with a specialist, streamed, with the history that fits the context.

Design choices:
- Turns are rendered by the tokenizer, contents with special tokens off: nothing a user types opens or closes a turn.
- What does not fit loses its oldest exchanges; system text and tools stay. Keys and values are kept from turn to turn
  and rolled back to where the new prompt differs.
- A reply ends at assistant_end, or with the first complete function call when tools are shown. Calls are shown and
  checked against their schemas; nothing is ever executed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from stagewise.modeling.decoding import Decoder
from stagewise.modeling.frontier import FrontierCache
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy
from stagewise.serving.generate import Dtype, attach_specialist, load_for_inference
from stagewise.serving.screen import Screen
from stagewise.specialist.tool_calls import CallReport, ToolCall, ToolCallParser, check_call

HELP = "/reset forgets the conversation, /use NAME changes the specialist, /quit ends"


@dataclass
class Reply:
    """An answer: its text, the function call in it with what the check found, and the decoder's result."""

    text: str
    result: Any
    call: ToolCall | None = None
    report: CallReport | None = None
    forgotten: int = 0  # exchanges left out of the prompt to make it fit


@dataclass
class Conversation:
    """Turns with one model. `path` names a specialist; `ask` adds a user turn and the model's answer.

    `constrained` lets the model write nothing but valid calls and plain text while tools are shown.
    """

    model: Any
    tokenizer: Any
    path: str | None = None
    strategy: Strategy = field(default_factory=Strategy)
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=256))
    system: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    constrained: bool = False
    turns: list[dict[str, Any]] = field(default_factory=list)
    cache: FrontierCache | None = None

    def __post_init__(self) -> None:
        if (self.path or self.model.default_path) == "base":
            raise ValueError(
                "this model is a base: it continues text but was never taught turns. Give --specialist NAME=PATH, or "
                "use `stagewise generate`"
            )
        if self.constrained and not self.tools:
            raise ValueError("constrained needs tools")

    def reset(self) -> None:
        """Forget every turn."""
        self.turns, self.cache = [], None

    def use(self, path: str) -> None:
        """Let another specialist answer from now on; the turns stay."""
        self.model.path(path)
        self.path, self.cache = path, None

    def prompt(self) -> tuple[list[int], int]:
        """Ids of the turns up to the answer, and how many of the oldest exchanges had to go.

        Raises ValueError when the last question alone does not fit the context.
        """
        room = self.model.config.max_position_embeddings - self.params.max_new_tokens
        head = [{"role": "system", "content": self.system}] if self.system else []
        forgotten = 0
        while True:
            turns = self.turns[2 * forgotten :]
            ids = self.tokenizer.render_for_completion([*head, *turns], tools=list(self.tools) or None)
            if len(ids) <= room:
                return ids, forgotten
            if len(turns) <= 1:
                raise ValueError(
                    f"the question takes {len(ids)} tokens; {room} fit beside max_new_tokens="
                    f"{self.params.max_new_tokens} in the context of {self.model.config.max_position_embeddings}"
                )
            forgotten += 1

    def ask(self, text: str, on_tokens: Callable[[list[int], list[int]], None] | None = None) -> Reply:
        """Add `text` as the user's turn and answer it; `on_tokens(tokens, stages)` sees the answer as it comes.

        The turn is taken back when it cannot be answered (ValueError).
        """
        self.turns.append({"role": "user", "content": text})
        try:
            reply = self._answer(on_tokens)
        except BaseException:
            self.turns.pop()
            self.cache = None
            raise
        self.turns.append({"role": "assistant", "content": reply.text.strip() or "..."})
        return reply

    def _answer(self, on_tokens: Callable[[list[int], list[int]], None] | None) -> Reply:
        ids, forgotten = self.prompt()
        stops = self.tokenizer.chat_stop_ids
        params = replace(self.params, stop_tokens=stops)
        if self.constrained:
            from stagewise.specialist.constrain import CallConstraint

            constraint = CallConstraint(self.tokenizer, self.tools, mode="auto")
            params = replace(params, processors=[*params.processors, constraint])
        strategy = replace(self.strategy, path=self.path or self.model.default_path)
        new = self._continue_cache(ids, strategy.path or "")
        decoder = Decoder(self.model, [new], strategy, params, self.tokenizer, self.cache)
        parser = ToolCallParser() if self.tools else None
        tokens: list[int] = []
        for event in decoder.run():
            if not event.committed:
                continue
            if on_tokens is not None:
                on_tokens(event.tokens, event.stages)
            tokens += event.tokens
            if parser is not None:
                piece = self.tokenizer.decode_bytes(event.tokens, skip_special_tokens=True)
                if parser.feed(piece.decode("utf-8", "replace")) is not None:
                    break
        result = decoder.result()
        if result.errors[0] is not None:
            raise ValueError(result.errors[0])
        answer = self.tokenizer.decode_bytes(tokens, skip_special_tokens=True).decode("utf-8", "replace")
        call = parser.close() if parser is not None else None
        if call is None:
            return Reply(answer, result, forgotten=forgotten)
        answer = answer[: answer.index(call.source) + len(call.source)] if call.source in answer else call.source
        return Reply(answer, result, call, check_call(call, self.tools), forgotten)

    def _continue_cache(self, ids: list[int], path: str) -> list[int]:
        """Keep what the cache has in common with `ids`; returns the ids it lacks."""
        if self.cache is not None:
            held = self.cache.ids[0]
            common = 0
            while common < min(len(held), len(ids) - 1) and held[common] == ids[common]:
                common += 1
            try:
                self.cache.rollback([common])
                return ids[common:]
            except ValueError:  # a windowed layer has let go of what the new prompt would need
                pass
        self.cache = FrontierCache(self.model, 1, paths=(path,))
        return ids


def read_tools(file: Path) -> list[dict[str, Any]]:
    """Tools of a JSON file: a list, or one of them."""
    if not file.is_file():
        raise FileNotFoundError(f"tools: no file {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tools: {file} is not JSON: {error}") from None
    tools = content if isinstance(content, list) else [content]
    if not tools or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools: {file} must hold a function's description or a list of them")
    return tools


def answer_to_screen(talk: Conversation, text: str, stream: TextIO, show_stages: bool = False) -> Reply:
    """Ask, and write the answer as it comes; what is to be said about it goes to standard error."""

    def token_bytes(tokens: list[int]) -> bytes:
        return talk.tokenizer.decode_bytes(tokens, skip_special_tokens=True)

    screen = Screen(stream, token_bytes, stream.isatty(), show_stages)
    reply = talk.ask(text, screen.commit)
    screen.finish()
    if reply.forgotten:
        print(f"({reply.forgotten} oldest exchanges no longer fit the context)", file=sys.stderr)
    if reply.report is not None and reply.call is not None:
        found = reply.report
        problems = [*found.errors, *(f"invented {n}" for n in found.invented), *(f"missing {n}" for n in found.missing)]
        print(f"(call of {reply.call.name}: {'; '.join(problems) if problems else 'valid'})", file=sys.stderr)
    return reply


def chat(
    model: str,
    /,
    *,
    specialist: list[str] | None = None,
    prompt: list[str] | None = None,
    system: str | None = None,
    tools: Path | None = None,
    constrained: bool = False,
    mode: str = "full",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    show_stages: bool = False,
    dtype: Dtype | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> None:
    """Talk to a specialist.

    Parameters
    ----------
    model
        A specialist's folder or repository, or a base's with --specialist.
    specialist
        NAME=PATH of a specialist to attach; may be repeated, /use NAME changes between them.
    prompt
        Ask this and end; repeat it for several turns. Without it, turns are read from the terminal.
    system
        Text in front of the first turn.
    tools
        JSON file of functions that the model may call. Calls are shown and checked, never executed.
    constrained
        Let the model write only valid calls and plain text.
    mode
        full, speculative:4 or wand-verified.
    max_new_tokens
        Longest answer.
    temperature
        0 is greedy.
    top_p
        Sample among the most probable tokens with this probability together.
    repetition_penalty
        Penalty on tokens seen before; 1 is off, 1.15 breaks the loops of small models.
    seed
        Seed of sampling.
    show_stages
        Colour tokens by the stage that emitted them.
    dtype
        Weight type to load; default: as stored.
    device
        Where to run; default: the accelerator where there is one.
    threads
        Processor threads to use.

    Example:
        stagewise chat runs/quickstart-tools/model --prompt "What does math.sin do?"
    """
    shown = read_tools(tools) if tools is not None else []
    loaded, tokenizer = load_for_inference(model, dtype, device, threads)
    names = [attach_specialist(loaded, text) for text in specialist or []]
    talk = Conversation(
        loaded,
        tokenizer,
        path=names[0] if names else None,
        strategy=Strategy.parse(mode),
        params=SamplingParams(
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
        system=system,
        tools=shown,
        constrained=constrained,
    )
    if prompt:
        for text in prompt:
            answer_to_screen(talk, text, sys.stdout, show_stages)
        return
    if sys.stdin.isatty():
        print(f"{', '.join(names) or talk.model.default_path} listens; {HELP}", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            continue
        if text.startswith("/"):
            if not obey(talk, text):
                return
            continue
        try:
            answer_to_screen(talk, text, sys.stdout, show_stages)
        except (ValueError, KeyboardInterrupt) as error:
            print(f"({error or 'interrupted'})", file=sys.stderr)


def obey(talk: Conversation, text: str) -> bool:
    """Carry out a line that begins with a slash; False ends the chat."""
    command, _, argument = text.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        talk.reset()
    elif command == "/use":
        try:
            talk.use(argument.strip())
        except ValueError as error:
            print(f"({error})", file=sys.stderr)
    else:
        print(f"({HELP})", file=sys.stderr)
    return True
