"""PoETokenizer: byte-level BPE with one bos and a rendering of conversations that cannot be forged.

Design choices:
- One truth, two engines. The vocabulary lives in tokenizer.json; the Rust `tokenizers` backend serves ``tok(text)``
  with all its options, a tiktoken Encoding rebuilt from the same vocabulary serves the fast and the special-free
  paths. Every other release file is derived from them when saving.
- ``tok(text)`` parses special tokens, as users of transformers expect. Rendering encodes every content with special
  tokens off and places the special ids itself, so no text of a user, a tool or a document can open or close a turn.
- ``add_bos_token`` belongs to the release. Where it is on, exactly one bos comes first: text that already begins with
  it gets no second.
- Self-contained: this file and the two it imports travel with every exported model.
"""

import io
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tiktoken
import torch
from tokenizers import Tokenizer, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.utils import logging

from .byte_encoding import (
    ASSISTANT_END,
    ASSISTANT_START,
    BOS,
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    SPECIAL_TOKENS,
    USER_END,
    USER_START,
    convert_encoding,
    cut_long_blanks,
    read_backend,
    read_encoding,
    rebuild_encoding,
    token_bytes_of,
)
from .chat_turns import Message, Part, Tool, fold_turns

logger = logging.get_logger(__name__)

NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
PART_DELIMITERS = {"text": None, "python": (PYTHON_START, PYTHON_END), "python_output": (OUTPUT_START, OUTPUT_END)}
LOADING_LEFTOVERS = ("backend", "is_local", "local_files_only")  # facts about one load, not about the tokenizer


class PoETokenizer(PreTrainedTokenizerFast):
    """Byte-level BPE tokenizer of the PoE family, with nine special tokens as the last ids of its vocabulary.

    Build it from tokenizer.json (`tokenizer_file`), from a release's tokenizer.pkl (`encoding_file`) or from a
    tiktoken `encoding`; usually ``from_pretrained`` does. `add_bos_token` None means: as the folder says. Raises
    ValueError when the vocabulary is not a byte-level BPE with the special tokens where the family keeps them.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "encoding_file": "tokenizer.pkl"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    _tokenizer: Any  # the Rust backend

    def __init__(
        self,
        tokenizer_file: str | None = None,
        encoding_file: str | None = None,
        encoding: tiktoken.Encoding | None = None,
        tokenizer_object: Tokenizer | None = None,
        add_bos_token: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer_object is not None:
            backend = tokenizer_object
        elif encoding is not None:
            backend = convert_encoding(encoding)
        elif tokenizer_file is not None:
            backend = read_backend(tokenizer_file)
            if add_bos_token is None:
                add_bos_token = _stated_add_bos_token(tokenizer_file)
        elif encoding_file is not None:
            encoding = read_encoding(encoding_file)
            backend = convert_encoding(encoding)
        else:
            raise ValueError(
                f"no tokenizer in {kwargs.get('name_or_path') or 'these arguments'}: expected tokenizer.json or "
                "tokenizer.pkl; point at a folder that has one of them, or train one with `stagewise tokenizer train`"
            )
        if encoding is None:
            encoding = rebuild_encoding(backend)
        if add_bos_token is None:
            post_processor = backend.post_processor
            add_bos_token = post_processor is not None and post_processor.num_special_tokens_to_add(False) > 0
        kwargs = _known_special_tokens(kwargs)
        super().__init__(tokenizer_object=backend, add_bos_token=bool(add_bos_token), **kwargs)
        self._encoding = encoding
        self._special_ids = {token: encoding.encode_single_token(token) for token in SPECIAL_TOKENS}
        self._token_bytes = token_bytes_of(encoding)
        self._token_byte_lengths = torch.tensor([len(raw) for raw in self._token_bytes], dtype=torch.int64)  # (V,)
        self._token_byte_lengths[list(self._special_ids.values())] = 0
        if len(self) != len(self._token_bytes):
            raise ValueError(f"the vocabulary has {len(self)} tokens where its encoding has {len(self._token_bytes)}")

    # ---- vocabulary -------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens V, the nine special ones included (ids run from 0 to V-1)."""
        return len(self)

    @property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken Encoding of the same vocabulary."""
        return self._encoding

    @property
    def special_ids(self) -> dict[str, int]:
        """Id of every special token by its text, in the order of the ids."""
        return dict(self._special_ids)

    @property
    def base_stop_ids(self) -> list[int]:
        """Ids that end the text of a base model: bos, which begins the next document."""
        return [self._special_ids[BOS]]

    @property
    def chat_stop_ids(self) -> list[int]:
        """Ids that end the turn of a specialist: assistant_end and bos."""
        return [self._special_ids[ASSISTANT_END], self._special_ids[BOS]]

    @property
    def token_bytes(self) -> list[bytes]:
        """Raw bytes of every token, by id; of a special token the bytes of its name."""
        return self._token_bytes

    @property
    def token_byte_lengths(self) -> torch.Tensor:
        """Bytes of text every token stands for, (V,) int64; 0 for special tokens. The denominator of bits per byte."""
        return self._token_byte_lengths.clone()

    # ---- text to ids ------------------------------------------------------------------------------------------------

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text` with special tokens off and no bos; lone surrogates become U+FFFD."""
        pieces = cut_long_blanks(text)
        if len(pieces) == 1:
            return self._encoding.encode_ordinary(text)
        return [i for piece in pieces for i in self._encoding.encode_ordinary(piece)]

    def encode_batch_ordinary(self, texts: Sequence[str], num_threads: int = 8) -> list[list[int]]:
        """`encode_ordinary` of every text, on `num_threads` threads."""
        pieces = [cut_long_blanks(text) for text in texts]
        flat = list(chain.from_iterable(pieces))
        encoded = self._encoding.encode_ordinary_batch(flat, num_threads=num_threads)
        if len(flat) == len(pieces):
            return encoded
        following = iter(encoded)
        return [list(chain.from_iterable(islice(following, len(of_text)))) for of_text in pieces]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids whose bytes are exactly `data`, which need not be valid UTF-8; special tokens are off."""
        ids: list[int] = []
        for piece in re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape")):
            if piece and "\udc80" <= piece[0] <= "\udcff":  # bytes that are no text: one token each
                ids += [
                    self._encoding.encode_single_token(bytes([byte]))
                    for byte in piece.encode("utf-8", "surrogateescape")
                ]
            elif piece:
                ids += self.encode_ordinary(piece)
        return ids

    def ensure_bos(self, ids: Iterable[int]) -> list[int]:
        """`ids` with a bos in front, unless one is there already."""
        ids = [int(i) for i in ids]
        bos = self._special_ids[BOS]
        return ids if ids and ids[0] == bos else [bos, *ids]

    def _encode_plus(
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, *args: Any, **kwargs: Any
    ) -> BatchEncoding:
        # The post-processor puts a bos before every text, so a text that begins with one gives its own up (offsets
        # count from after it).
        split = kwargs.get("split_special_tokens")
        split = self.split_special_tokens if split is None else split
        if self.add_bos_token and add_special_tokens and not split:
            text = _without_bos(text, words=kwargs.get("is_split_into_words", False))
        return super()._encode_plus(text, text_pair, add_special_tokens, *args, **kwargs)

    def update_post_processor(self) -> None:
        """Makes the backend put one bos first (for a pair of texts too) where `add_bos_token` is on, and nothing
        where it is off."""
        bos = f"{BOS}:0 " if self.add_bos_token else ""
        special = [(BOS, self._tokenizer.token_to_id(BOS))] if self.add_bos_token else []
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}$A:0", pair=f"{bos}$A:0 $B:1", special_tokens=special
        )

    # ---- ids to text ------------------------------------------------------------------------------------------------

    def decode_bytes(self, ids: Iterable[int] | torch.Tensor, skip_special_tokens: bool = False) -> bytes:
        """The exact bytes of `ids` (a list or a (T,) tensor). Raises ValueError for an id outside the vocabulary."""
        table, size = self._token_bytes, len(self._token_bytes)
        skip = set(self._special_ids.values()) if skip_special_tokens else set()
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < size:
                raise ValueError(f"token id {i} is outside the vocabulary of {size} tokens")
        return b"".join(table[i] for i in ids if i not in skip)

    # ---- conversations ----------------------------------------------------------------------------------------------

    def render_conversation(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of a conversation and, for each, 1 where it is trained (model card of stage-chat).

        bos, then user_start..user_end and assistant_start..assistant_end in turn; a system text goes in front of the
        first user turn, a blank line between. Trained are the assistant's texts, its python parts with their
        delimiters, and assistant_end; python outputs are not. Contents are encoded with special tokens off. Returns
        two lists of one length; ``mask[i]`` belongs to ``ids[i]`` as a target. Raises ValueError for roles out of
        order, empty contents, or no assistant turn.
        """
        turns = fold_turns(messages, tools)
        if all(role != "assistant" for role, _ in turns):
            raise ValueError(
                "messages: no assistant turn, so there is nothing to train on; add one or drop the conversation"
            )
        return self._render(turns)

    def render_for_completion(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """Token ids of a conversation up to and including assistant_start, ready to be answered.

        Raises ValueError as `render_conversation` does, and when the last message is the assistant's.
        """
        turns = fold_turns(messages, tools)
        if turns[-1][0] == "assistant":
            raise ValueError(
                f"messages[{len(messages) - 1}]: the conversation already ends with the assistant; leave that message "
                "out to have it answered anew, or call apply_chat_template with continue_final_message=True"
            )
        return self._render(turns)[0] + [self._special_ids[ASSISTANT_START]]

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tools: Sequence[Tool] | None = None,
        documents: None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders one conversation or a list of them as `render_conversation` does; arguments and results as in
        transformers 5.

        `tools` (dictionaries, or functions with type hints and docstrings) are shown in the format the tool
        specialists are trained on. Contents never yield special tokens, whatever `sanitize_control_tokens` says.
        ``tokenize=False`` returns text for reading: encoded again with ``tok(text)``, special tokens in its contents
        would be parsed. Only this rendering exists: Jinja templates, documents and unknown arguments are a
        ValueError.
        """
        refused = [*kwargs, *(["documents"] if documents else []), *(["chat_template"] if chat_template else [])]
        if refused:
            raise ValueError(
                f"apply_chat_template: {', '.join(refused)} not supported; the format is fixed by training"
            )
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other; pass one of them")
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        rows, masks = [], []
        several: list[Any] = list(conversation) if batched else [conversation]
        for messages in several:
            messages = getattr(messages, "messages", messages)  # transformers' pipelines wrap conversations
            turns = fold_turns(messages, tools)
            ids, mask = self._render(turns)
            if add_generation_prompt and turns[-1][0] != "assistant":
                ids, mask = [*ids, self._special_ids[ASSISTANT_START]], [*mask, 0]
            elif continue_final_message:
                if turns[-1][0] != "assistant":
                    raise ValueError("continue_final_message: the last message is not the assistant's")
                ids, mask = ids[:-1], mask[:-1]
            if truncation and max_length is not None and len(ids) > max_length:
                keep = slice(0, max_length) if self.truncation_side == "right" else slice(len(ids) - max_length, None)
                ids, mask = ids[keep], mask[keep]
            rows.append(ids)
            masks.append(mask)
        if not tokenize:
            texts = [self.decode_bytes(ids).decode("utf-8", "replace") for ids in rows]
            return texts if batched else texts[0]
        fields: dict[str, Any] = {"input_ids": rows}
        out = self.pad(
            fields, padding=padding, max_length=max_length, return_attention_mask=True, **(tokenizer_kwargs or {})
        )
        if return_assistant_tokens_mask:
            widths = [len(ids) for ids in out["input_ids"]]
            gaps = [[0] * (width - len(mask)) for width, mask in zip(widths, masks, strict=True)]
            left = self.padding_side == "left"
            out["assistant_masks"] = [g + m if left else m + g for g, m in zip(gaps, masks, strict=True)]
        if return_tensors is not None:
            out = out.convert_to_tensors(return_tensors)
        elif not batched:
            out = BatchEncoding({key: value[0] for key, value in out.items()})
        return out if return_dict else out["input_ids"]

    def _render(self, turns: Sequence[tuple[str, list[Part]]]) -> tuple[list[int], list[int]]:
        special, ids, mask = self._special_ids, [self._special_ids[BOS]], [0]

        def emit(new: list[int], trained: bool) -> None:
            ids.extend(new)
            mask.extend([int(trained)] * len(new))

        for role, parts in turns:
            answer = role == "assistant"
            emit([special[ASSISTANT_START if answer else USER_START]], False)
            for kind, text in parts:
                trained = answer and kind != "python_output"
                delimiters = PART_DELIMITERS[kind]
                content = self.encode_ordinary(text)
                emit([special[delimiters[0]], *content, special[delimiters[1]]] if delimiters else content, trained)
            emit([special[ASSISTANT_END if answer else USER_END]], answer)
        return ids, mask

    # ---- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The arguments as they are: `__init__` reads the files itself."""
        return kwargs

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        folder, prefix = Path(save_directory), f"{filename_prefix}-" if filename_prefix else ""
        config_file = folder / f"{prefix}tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config = {key: value for key, value in config.items() if key not in LOADING_LEFTOVERS}
        config["add_bos_token"] = self.add_bos_token
        named = {key: str(value) for key, value in self.special_tokens_map.items() if key in NAMED_TOKENS}
        rest = [token for token in SPECIAL_TOKENS if token not in named.values()]
        pickled, lengths = io.BytesIO(), io.BytesIO()
        pickle.dump(self._encoding, pickled)
        torch.save(self.token_byte_lengths.to(torch.int32), lengths)
        contents = {
            "tokenizer_config.json": _json_bytes(config),
            "special_tokens_map.json": _json_bytes({**named, "additional_special_tokens": rest}),
            "tokenizer.json": self._clean_backend().to_str(pretty=True).encode(),
            "tokenizer.pkl": pickled.getvalue(),
            "token_bytes.pt": lengths.getvalue(),
        }
        written = []
        for name, data in contents.items():
            target = folder / f"{prefix}{name}"
            temporary = target.with_name(f".{target.name}.tmp")
            temporary.write_bytes(data)
            os.replace(temporary, target)
            written.append(str(target))
        return tuple(dict.fromkeys([*file_names, *written]))

    def _clean_backend(self) -> Tokenizer:
        backend = Tokenizer.from_str(self._tokenizer.to_str())
        backend.no_padding()  # what the last call asked for is no property of the vocabulary
        backend.no_truncation()
        return backend


PoETokenizer.register_for_auto_class("AutoTokenizer")


def load_tokenizer(path_or_repo: str | os.PathLike, revision: str | None = None, **kwargs: Any) -> PoETokenizer:
    """The tokenizer of a model folder or hub repository, ours (tokenizer.json) or a foreign one (tokenizer.pkl).

    No remote code runs. Keyword arguments, `add_bos_token` for one, override what the folder says. Raises
    FileNotFoundError for a folder without tokenizer files, ValueError for files that hold no such tokenizer.
    """
    path = os.fspath(path_or_repo)
    if os.path.isdir(path):
        if not any(os.path.isfile(os.path.join(path, name)) for name in PoETokenizer.vocab_files_names.values()):
            raise FileNotFoundError(f"{path}: neither tokenizer.json nor tokenizer.pkl in this folder")
    elif os.path.isabs(path) or path.startswith(".") or path.count("/") > 1:
        raise FileNotFoundError(f"{path}: no such folder")
    return PoETokenizer.from_pretrained(path, revision=revision or "main", **kwargs)


def _stated_add_bos_token(tokenizer_file: str) -> bool | None:
    # transformers drops this field before it calls the class when a tokenizer.json exists, so it is read where it
    # stands.
    config_file = Path(tokenizer_file).with_name("tokenizer_config.json")
    if not config_file.is_file():
        return None
    return json.loads(config_file.read_text(encoding="utf-8")).get("add_bos_token")


def _known_special_tokens(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` whose special tokens are all in the vocabulary: a name that is not would otherwise be added behind
    it."""
    kwargs = dict(kwargs)
    for key in (
        "extra_special_tokens",
        "additional_special_tokens",
        "model_specific_special_tokens",
        "added_tokens_decoder",
    ):
        kwargs.pop(key, None)
    for key in NAMED_TOKENS:
        token = kwargs.get(key)
        if token is not None and str(token) not in SPECIAL_TOKENS:
            logger.warning(f"{key} {str(token)!r} is not in the vocabulary and is left out")
            kwargs.pop(key)
    kwargs.setdefault("bos_token", BOS)
    for key in ("eos_token", "pad_token"):
        kwargs.setdefault(key, BOS)
    kwargs["extra_special_tokens"] = list(SPECIAL_TOKENS)
    return kwargs


def _without_bos(text: Any, words: bool) -> Any:
    """`text` (one, a batch, pairs; strings or lists of words) with the bos every single one begins with cut off."""
    if isinstance(text, str):
        return text.removeprefix(BOS)
    if not isinstance(text, list | tuple) or not text:
        return text
    if words and isinstance(text[0], str):  # one text as words
        return [text[0].removeprefix(BOS), *text[1:]]
    return [
        (_without_bos(item[0], words), *item[1:]) if isinstance(item, tuple) and item else _without_bos(item, words)
        for item in text
    ]


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
