"""Byte-level BPE vocabularies in their three forms: tiktoken Encoding, `tokenizers` backend, and the pickle of a
release.

Design choices:
- Conversions keep ids: the special tokens are the last nine, every byte has a token, and anything else is refused
  with the reason.
- A pickle is data from a stranger. Reading one here can build nothing but the four plain fields of an encoding; a
  name it asks for beyond that ends the load before it is looked up, so nothing is imported and nothing runs.
- This file travels with exported models: it imports nothing of the package.
"""

import json
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import tiktoken
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

BOS = "<|bos|>"
USER_START, USER_END = "<|user_start|>", "<|user_end|>"
ASSISTANT_START, ASSISTANT_END = "<|assistant_start|>", "<|assistant_end|>"
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
OUTPUT_START, OUTPUT_END = "<|output_start|>", "<|output_end|>"
SPECIAL_TOKENS = (
    BOS,
    USER_START,
    USER_END,
    ASSISTANT_START,
    ASSISTANT_END,
    PYTHON_START,
    PYTHON_END,
    OUTPUT_START,
    OUTPUT_END,
)  # the last nine ids of a vocabulary, in this order


LONG_BLANKS = 100_000
_LONG_RUN = re.compile(rf"\s{{{LONG_BLANKS}}}")


class _RanksConverter(TikTokenConverter):
    """transformers' converter fed with ranks in memory instead of the path of a rank file."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: dict[bytes, int]) -> dict[bytes, int]:  # type: ignore[override]
        return tiktoken_url


def convert_encoding(encoding: tiktoken.Encoding) -> Tokenizer:
    """The `tokenizers` backend of a tiktoken encoding, special tokens included: equal ids for every text."""
    _check_encoding(encoding._mergeable_ranks, encoding._special_tokens)
    special = sorted(encoding._special_tokens, key=encoding._special_tokens.__getitem__)
    ranks = dict(sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1]))
    return _RanksConverter(ranks, pattern=encoding._pat_str, extra_special_tokens=special).converted()


def rebuild_encoding(backend: Tokenizer, name: str = "stagewise") -> tiktoken.Encoding:
    """The tiktoken encoding of a byte-level BPE backend. Raises ValueError when it is something else."""
    steps = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer is not None else {}
    steps = steps.get("pretokenizers", [steps])
    splits = [step["pattern"] for step in steps if step.get("type") == "Split"]
    patterns = [pattern["Regex"] for pattern in splits if "Regex" in pattern]
    if type(backend.model).__name__ != "BPE" or len(patterns) != 1 or backend.normalizer is not None:
        raise ValueError("tokenizer.json is not a byte-level BPE with one split pattern and no normalizer")
    to_byte = {char: byte for byte, char in bytes_to_unicode().items()}
    special = {token.content: rank for rank, token in sorted(backend.get_added_tokens_decoder().items())}
    vocabulary = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    try:
        ranks = {bytes(to_byte[char] for char in token): rank for token, rank in vocabulary if token not in special}
    except KeyError as error:
        raise ValueError(f"tokenizer.json is not byte-level: {error.args[0]!r} stands for no byte") from None
    _check_encoding(ranks, special)
    return tiktoken.Encoding(name, pat_str=patterns[0], mergeable_ranks=ranks, special_tokens=special)


class _EncodingFields:
    """What an unpickled encoding becomes here: its plain state, and no behaviour."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    """Resolves the one name a pickled encoding uses to an inert stand-in; any other ends the load, not looked up."""

    def find_class(self, module: str, name: str) -> type[_EncodingFields]:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no encoding needs")
        return _EncodingFields


def read_encoding(path: str | os.PathLike) -> tiktoken.Encoding:
    """The tiktoken encoding pickled in `path`, read without executing anything the file says.

    Raises ValueError when the pickle names anything but an encoding, or holds no complete one.
    """
    try:
        with open(path, "rb") as file:
            fields = _EncodingUnpickler(file).load()
    except Exception as error:  # a hostile or damaged pickle can fail in any way; none of it was executed
        raise ValueError(f"{path}: refused, not a plain pickled tiktoken Encoding: {error}") from None
    state = fields.state if isinstance(fields, _EncodingFields) else None
    kinds = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
    if (
        not isinstance(state, dict)
        or set(state) != set(kinds)
        or any(not isinstance(state[k], t) for k, t in kinds.items())
    ):
        raise ValueError(f"{path}: refused, the pickled Encoding does not hold {', '.join(kinds)}")
    try:
        _check_encoding(state["mergeable_ranks"], state["special_tokens"])
        return tiktoken.Encoding(**state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_encoding(ranks: Mapping[Any, Any], special: Mapping[Any, Any]) -> None:
    if not all(type(token) is bytes and type(rank) is int for token, rank in ranks.items()):
        raise ValueError("mergeable_ranks must map bytes to integers")
    if not all(type(token) is str and type(rank) is int for token, rank in special.items()):
        raise ValueError("special_tokens must map text to integers")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the vocabulary has no token for {len(missing)} of the 256 bytes, first 0x{missing[0]:02x}")
    size = len(ranks) + len(special)
    if sorted([*ranks.values(), *special.values()]) != list(range(size)):
        raise ValueError(f"token ids are not 0 to {size - 1}, each once")
    first = size - len(SPECIAL_TOKENS)
    wrong = {token: special.get(token) for i, token in enumerate(SPECIAL_TOKENS) if special.get(token) != first + i}
    if wrong or len(special) != len(SPECIAL_TOKENS):
        raise ValueError(
            f"the special tokens must be the last nine ids, {first} to {size - 1}, in the family's order; "
            f"got {dict(special)}"
        )


def token_bytes_of(encoding: tiktoken.Encoding) -> list[bytes]:
    """Raw bytes of every token, by id; of a special token the bytes of its name."""
    by_id = {rank: token for token, rank in encoding._mergeable_ranks.items()}
    by_id.update({rank: token.encode() for token, rank in encoding._special_tokens.items()})
    return [by_id[i] for i in range(len(by_id))]


def cut_long_blanks(text: str) -> list[str]:
    """`text` in pieces, cut inside runs of blanks longer than LONG_BLANKS characters; nearly always one piece.

    The split pattern looks ahead behind blanks, and tiktoken's regex engine aborts when a run is about a million long.
    """
    if len(text) <= LONG_BLANKS:
        return [text]
    cuts = [match.end() for match in _LONG_RUN.finditer(text)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if a < b]


def read_backend(path: str) -> Tokenizer:
    """The backend stored in a tokenizer.json. Raises ValueError naming the file when it cannot be read."""
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the Rust side raises a bare Exception
        raise ValueError(f"{path}: not a readable tokenizer.json: {error}") from None
