"""Constrained decoding: a logits processor that lets a model write nothing but valid calls.

Design choices:
- The mask is a function of the ids alone (what follows the last assistant_start), so the same processor serves
  transformers' `generate` and every mode of ours; drafts and targets are masked alike, and lossless modes stay so.
- A matcher is kept per prompt and moved by the difference between prefixes: forward over new tokens, back over
  rejected drafts.
- A prefix outside the grammar (nothing this processor let pass) may only end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria

from stagewise.modeling import PoETokenizer
from stagewise.modeling.byte_encoding import ASSISTANT_END, ASSISTANT_START
from stagewise.specialist.call_grammar import CallGrammar
from stagewise.specialist.tool_calls import ToolCallParser

MATCHERS = 256  # prompts remembered at a time


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError("constrained decoding needs llguidance: pip install 'stagewise[tools]'") from None
    return llguidance


class _Vocabulary:
    """A PoETokenizer as llguidance wants to see one."""

    def __init__(self, tokenizer: PoETokenizer):
        self.tokenizer = tokenizer
        self.tokens = list(tokenizer.token_bytes)
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self.bos_token_id = tokenizer.special_ids["<|bos|>"]
        self.eos_token_id = tokenizer.special_ids[ASSISTANT_END]

    def __call__(self, text: str | bytes) -> list[int]:
        return self.tokenizer.encode_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))


def grammar_tokenizer(tokenizer: PoETokenizer) -> Any:
    """llguidance's view of `tokenizer`, made once and kept with it."""
    found = getattr(tokenizer, "_grammar_tokenizer", None)
    if found is None:
        library = _llguidance()
        found = library.LLTokenizer(library.TokenizerWrapper(_Vocabulary(tokenizer)))
        tokenizer._grammar_tokenizer = found
    return found


class Matcher:
    """Follows one text through a grammar: `allowed(ids)` says which tokens may come next, for any ids, in any order."""

    def __init__(self, tokenizer: PoETokenizer, grammar: str):
        library = _llguidance()
        self.vocabulary = len(tokenizer.token_bytes)
        self.end = tokenizer.special_ids[ASSISTANT_END]
        problem = library.LLMatcher.validate_grammar(library.LLMatcher.grammar_from_lark(grammar), None)
        if problem:
            raise ValueError(f"the tools' schemas make no usable grammar: {problem}")
        self.matcher = library.LLMatcher(
            grammar_tokenizer(tokenizer), library.LLMatcher.grammar_from_lark(grammar), log_level=0
        )
        self.seen: list[int] = []
        self.failed_at: int | None = None  # length of the prefix that left the grammar

    def allowed(self, ids: Sequence[int]) -> np.ndarray:
        """Tokens (V,) bool that may follow `ids`."""
        common = 0
        for mine, theirs in zip(self.seen, ids, strict=False):
            if mine != theirs:
                break
            common += 1
        if len(self.seen) > common:
            self.matcher.rollback(len(self.seen) - common)
            del self.seen[common:]
        for token in ids[common:]:
            if not self.matcher.try_consume_tokens([int(token)]):
                break
            self.seen.append(int(token))
        mask = np.zeros(self.vocabulary, dtype=bool)
        if len(self.seen) < len(ids) or self.matcher.is_stopped():
            mask[self.end] = True
            return mask
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        mask[:] = np.unpackbits(bits, bitorder="little")[: self.vocabulary].astype(bool)
        if not mask.any():
            mask[self.end] = True
        return mask


class CallConstraint:
    """A logits processor under which every emission is a valid call (mode call), or a valid call or plain text (auto).

    `tools` is one list of tools for every prompt, or a mapping from prompt ids (a tuple ending in assistant_start) to
    the tools of that prompt. Usable wherever transformers' processors are: ``processor(ids (B, T), scores (B, V))``.
    """

    def __init__(
        self,
        tokenizer: PoETokenizer,
        tools: Sequence[Mapping[str, Any]] | Mapping[tuple[int, ...], Sequence[Mapping[str, Any]]],
        mode: str = "call",
        **limits: Any,
    ):
        self.tokenizer = tokenizer
        self.start = tokenizer.special_ids[ASSISTANT_START]
        self.by_prompt: dict[tuple[int, ...], str] | None = None
        self.grammar = ""
        if isinstance(tools, Mapping):
            self.by_prompt = {p: CallGrammar(t, mode, **limits).lark() for p, t in tools.items()}
        else:
            self.grammar = CallGrammar(tools, mode, **limits).lark()
            Matcher(tokenizer, self.grammar)  # a bad schema is told now, not in the middle of a text
        self.matchers: dict[tuple[int, ...], Matcher] = {}

    def _matcher(self, prompt: tuple[int, ...]) -> Matcher:
        found = self.matchers.pop(prompt, None)
        if found is None:
            grammar = self.grammar
            if self.by_prompt is not None:
                known = prompt in self.by_prompt
                if not known:
                    raise ValueError("the constraint knows no tools for this prompt")
                grammar = self.by_prompt[prompt]
            found = Matcher(self.tokenizer, grammar)
            if len(self.matchers) >= MATCHERS:
                self.matchers.pop(next(iter(self.matchers)))
        self.matchers[prompt] = found
        return found

    def allowed(self, ids: Sequence[int]) -> np.ndarray:
        """Tokens (V,) bool that may follow the whole sequence `ids`, padding in front of it included."""
        ids = list(ids)
        if self.start not in ids:
            raise ValueError("a constrained prompt ends with <|assistant_start|>: render it with render_for_completion")
        cut = len(ids) - ids[::-1].index(self.start)
        first = 0
        bos = self.tokenizer.special_ids["<|bos|>"]
        while first + 1 < cut and ids[first + 1] == bos:  # left padding
            first += 1
        return self._matcher(tuple(ids[first:cut])).allowed(ids[cut:])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with every token the grammar forbids at -inf."""
        masks = np.stack([self.allowed(row) for row in input_ids.tolist()])
        allowed = torch.from_numpy(masks).to(scores.device)
        return scores.masked_fill(~allowed, float("-inf"))


class StopAtCall(StoppingCriteria):
    """Ends each row of `generate` once its text after assistant_start holds a complete call."""

    def __init__(self, tokenizer: PoETokenizer):
        self.tokenizer = tokenizer
        self.start = tokenizer.special_ids[ASSISTANT_START]

    def __call__(self, input_ids: Tensor, scores: Any = None, **_: Any) -> Tensor:  # type: ignore[override]
        done = []
        for row in input_ids.tolist():
            cut = len(row) - row[::-1].index(self.start) if self.start in row else 0
            parser = ToolCallParser()
            done.append(parser.feed(self.tokenizer.decode_bytes(row[cut:]).decode("utf-8", "replace")) is not None)
        return torch.tensor(done, device=input_ids.device)
