"""Training data: everything a training run and an evaluation ask of a mixture, behind one function.

Design choices:
- `open_training_data` reads prepared shards, or encodes a small corpus once and keeps the tokens under `cache_dir`,
  named after content and tokenizer; both then are the same shards.
- Validation documents are chosen by the hash of (seed, key): per source, never from a `train_only` one. Sources of
  `validation_sources` are held out whole and reported under their names.
- Validation rows are pieces drawn across all held-out documents at the target shares, the same rows on every call.
- The manifest says what the data is; the report says what has been read of it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .augmentation import CaseAugmentation
from .mixture import Mixture, PieceOrder
from .packing import BUFFER_PIECES, BatchStream, RowPacker, padded_rows
from .prepare import encoded, read_json, target_shares
from .shards import Shard, token_dtype, write_shard, write_text_atomically
from .sources import SourceSpec, read_source
from .splitting import content_hex, content_sum, document_sum, validation_masks
from .token_identity import tokenizer_hash


@dataclass(frozen=True)
class ValidationDocument:
    """A held-out document: its source, a key for reports, token ids (n,) without bos, bytes of text."""

    source: str
    key: str
    ids: np.ndarray
    bytes: int
    tokenizer: Any = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """The document's text."""
        return self.tokenizer.decode_bytes(self.ids.tolist()).decode("utf-8", "replace")


@dataclass
class TokenSource:
    """One source as tokens: shards, its description, and per shard the mask (N,) of held-out documents."""

    spec: SourceSpec
    shards: list[Shard]
    facts: dict
    held_out: list[np.ndarray] = field(default_factory=list)

    def counts(self, held_out: bool) -> dict[str, int]:
        """Documents, tokens and bytes on one side of the split."""
        counts = {"documents": 0, "tokens": 0, "bytes": 0}
        for shard, mask in zip(self.shards, self.held_out, strict=True):
            side = shard.documents[mask if held_out else ~mask]
            counts["documents"] += len(side)
            counts["tokens"] += int(side["tokens"].sum())
            counts["bytes"] += int(side["bytes"].sum())
        return counts


class TrainingData:
    """The data of a run: `train` (a BatchStream), validation documents and rows, `manifest`, `report()`."""

    def __init__(
        self,
        sources: list[TokenSource],
        validation_sets: list[TokenSource],
        tokenizer: Any,
        sequence_length: int,
        seed: int,
        *,
        validation_fraction: float,
        case_augmentation: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        buffer_pieces: int = BUFFER_PIECES,
    ):
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.seed = seed
        self._sources = sources
        self._sets = {source.spec.name: source for source in validation_sets}
        for source in sources:
            fraction = 0.0 if source.spec.train_only else validation_fraction
            source.held_out = validation_masks([shard.documents["key"] for shard in source.shards], seed, fraction)
        for source in validation_sets:
            source.held_out = [np.ones(len(shard.documents), dtype=bool) for shard in source.shards]
        self._base = [source for source in sources if any(mask.any() for mask in source.held_out)]
        if validation_fraction > 0 and not self._base:
            raise ValueError(
                "the corpus cannot be split into training and validation documents: it needs two documents at least in "
                "a source that is not train_only, or validation_fraction 0"
            )
        counts = [source.counts(held_out=False) for source in sources]
        shares = target_shares(
            [{"share": source.spec.share, **count} for source, count in zip(sources, counts, strict=True)]
        )
        self._shares = dict(zip((source.spec.name for source in sources), shares, strict=True))
        self.manifest = self._manifest(counts, shares, validation_fraction, case_augmentation)
        orders = [
            PieceOrder(source.spec.name, source.shards, [~mask for mask in source.held_out], sequence_length, seed)
            for source in sources
        ]
        augmentation = CaseAugmentation(case_augmentation, seed, tokenizer)
        packer = RowPacker(orders, shares, sequence_length, tokenizer.bos_token_id, augmentation, buffer_pieces)
        fingerprint = {
            "seed": seed,
            "sequence_length": sequence_length,
            "tokenizer": self.manifest["tokenizer"],
            "validation_fraction": validation_fraction,
            "case_augmentation": case_augmentation,
            "buffer_pieces": buffer_pieces,
            "sources": [
                [source.spec.name, source.facts["content_sha256"], [shard.name for shard in source.shards], share]
                for source, share in zip(sources, shares, strict=True)
            ],
        }
        self.train = BatchStream(packer, rank, world_size, fingerprint)

    def _manifest(self, counts: list[dict], shares: list[float], fraction: float, case_augmentation: float) -> dict:
        manifest: dict[str, Any] = {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "tokenizer": tokenizer_hash(self.tokenizer),
            "vocab_size": int(self.tokenizer.vocab_size),
            "validation_fraction": fraction,
            "case_augmentation": case_augmentation,
            "sources": [],
            "validation_sets": [],
        }
        for source, train, share in zip(self._sources, counts, shares, strict=True):
            manifest["sources"].append({
                **source.facts,
                "target_share": share,
                "train_only": source.spec.train_only,
                "train": train,
                "validation": source.counts(held_out=True),
            })  # fmt: skip
        for source in self._sets.values():
            manifest["validation_sets"].append({**source.facts, "validation": source.counts(held_out=True)})
        for side in ("train", "validation"):
            manifest[side] = {
                key: sum(source[side][key] for source in manifest["sources"])
                for key in ("documents", "tokens", "bytes")
            }
        return manifest

    @property
    def validation_names(self) -> list[str]:
        """Names that `validation_documents` and `validation_rows` accept: held-out sources, then validation sets."""
        return [source.spec.name for source in self._base] + list(self._sets)

    def _held_out(self, name: str | None) -> list[TokenSource]:
        if name is None:
            if not self._base:
                raise ValueError("no documents are held out: validation_fraction is 0")
            return self._base
        found = [source for source in [*self._base, *self._sets.values()] if source.spec.name == name]
        if not found:
            raise ValueError(f"no validation source {name!r}; there are: {', '.join(self.validation_names) or 'none'}")
        return found

    def validation_documents(self, source: str | None = None) -> Iterator[ValidationDocument]:
        """Held-out documents in a fixed order: of all sources of the mixture, or of the one named `source`."""
        for each in self._held_out(source):
            for shard, mask in zip(each.shards, each.held_out, strict=True):
                for document in np.flatnonzero(mask).tolist():
                    record = shard.documents[document]
                    key = f"{int(record['key']):016x}"
                    yield ValidationDocument(
                        each.spec.name, key, shard.ids(document), int(record["bytes"]), self.tokenizer
                    )

    def validation_rows(self, tokens: int, source: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows with exactly `tokens` validation targets (fewer when less is held out): inputs (N, T), targets (N, T).

        Targets of -1 are padding or the bos between documents. The same call gives the same rows in every process.
        """
        if tokens < 1:
            raise ValueError(f"validation tokens must be at least 1, got {tokens}")
        chosen = self._held_out(source)
        orders = [
            PieceOrder(each.spec.name, each.shards, each.held_out, self.sequence_length, self.seed) for each in chosen
        ]
        mixture = Mixture([self._shares.get(each.spec.name, 1.0) for each in chosen])
        open_sources = set(range(len(orders)))
        pieces: list[np.ndarray] = []
        left = tokens
        while left > 0 and open_sources:
            number = min(open_sources, key=lambda one: (mixture.placed[one] / mixture.shares[one], one))
            order = orders[number]
            if order.finished(1):
                open_sources.discard(number)
                continue
            ids = order.ids(order.next())[:left]
            mixture.add(number, len(ids))
            left -= len(ids)
            pieces.append(np.asarray(ids))
        return padded_rows(pieces, self.sequence_length, self.tokenizer.bos_token_id)

    def report(self) -> dict:
        """What has been read: rows, epochs and shares per source against their targets, cropped, padded, recased."""
        packer = self.train.packer
        emitted, cropped = sum(packer.emitted), sum(packer.cropped)
        sources = []
        for number, source in enumerate(self._sources):
            train = self.manifest["sources"][number]["train"]["tokens"]
            sources.append({
                "name": source.spec.name,
                "tokens": packer.emitted[number],
                "epochs": packer.emitted[number] / train if train else 0.0,
                "share": packer.emitted[number] / emitted if emitted else 0.0,
                "target_share": self._shares[source.spec.name],
            })  # fmt: skip
        return {
            "rows": packer.rows,
            "tokens": emitted,
            "cropped_share": cropped / (emitted + cropped) if emitted else 0.0,
            "padded_share": 0.0,  # training rows are always full
            "recased_share": packer.recased / packer.drawn if packer.drawn else 0.0,
            "sources": sources,
        }


def _encoded_source(spec: SourceSpec, tokenizer: Any, cache_dir: str | Path | None, threads: int) -> TokenSource:
    """A source encoded in this process; with `cache_dir`, kept there and found again by content and tokenizer."""
    documents, total, size = [], 0, 0
    for document in read_source(spec):
        documents.append(document)
        total = content_sum(total, document_sum(document.key, document.text))
        size += len(document.text.encode("utf-8", "replace"))
    if not documents:
        raise ValueError(f"source {spec.name!r} is an empty corpus: it holds no documents with text")
    facts: dict[str, Any] = {
        "name": spec.name,
        "kind": spec.kind,
        "documents": len(documents),
        "bytes": size,
        "content_sha256": content_hex(total),
    }
    if spec.kind == "embedded":
        facts["python"] = platform.python_version()
    dtype = token_dtype(tokenizer.vocab_size)
    name = f"tokens-{facts['content_sha256'][:24]}-{tokenizer_hash(tokenizer)}"
    if cache_dir is None:
        shard = Shard.from_documents(name, encoded(iter(documents), tokenizer, threads), dtype)
    else:
        path = Path(cache_dir) / name
        mark = path.with_name(name + ".json")
        if not mark.exists():
            counts = write_shard(path, encoded(iter(documents), tokenizer, threads), dtype)
            write_text_atomically(mark, json.dumps(dict(zip(("documents", "tokens", "bytes"), counts, strict=True))))
        shard = Shard.open(path, dtype)
    facts["tokens"] = int(shard.documents["tokens"].sum())
    return TokenSource(spec, [shard], facts)


def _prepared_sources(
    folder: str | Path, specs: list[SourceSpec], held_out: list[SourceSpec], tokenizer: Any
) -> list[TokenSource]:
    """Sources of a folder written by `stagewise data prepare`: those of `specs`, at the shares given there, and the
    ones of `held_out` that were prepared too; without `specs` all there are."""
    folder = Path(folder)
    if not (folder / "manifest.json").exists():
        what = (
            "its preparation is not finished: run it again" if (folder / "plan.json").exists() else "no manifest.json"
        )
        raise FileNotFoundError(f"{folder} is not a folder of token shards ({what})")
    manifest = read_json(folder / "manifest.json")
    if manifest["tokenizer"] != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the shards in {folder} were made with another tokenizer "
            f"({manifest['tokenizer']}, this one is {tokenizer_hash(tokenizer)}); prepare them again"
        )
    stored = {source["name"]: source for source in manifest["sources"]}
    missing = [spec.name for spec in specs if spec.name not in stored]
    if missing:
        raise ValueError(f"{folder} has no source {', '.join(missing)}; it has: {', '.join(stored)}")
    sources = []
    names = (
        {spec.name: spec for spec in [*specs, *held_out] if spec.name in stored}
        if specs
        else {
            name: SourceSpec.of({key: source[key] for key in SourceSpec.__dataclass_fields__})
            for name, source in stored.items()
        }
    )
    for name, spec in names.items():
        source = stored[name]
        shards = [Shard.open(folder / shard, np.dtype(manifest["dtype"])) for shard in source["shards"]]
        facts = {
            key: source[key] for key in ("name", "kind", "documents", "tokens", "bytes", "duplicates", "content_sha256")
        }
        sources.append(TokenSource(spec, shards, facts))
    return sources


def open_training_data(
    data_recipe: Any,
    tokenizer: Any,
    sequence_length: int,
    seed: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    cache_dir: str | Path | None = None,
    threads: int | None = None,
    buffer_pieces: int = BUFFER_PIECES,
) -> TrainingData:
    """Open the data of a recipe's `data` section for training rows of `sequence_length` + 1 tokens.

    `data_recipe` has `sources` and, as it likes, `validation_sources`, `validation_fraction`, `case_augmentation` and
    `shards` (a prepared folder). Errors: ValueError or FileNotFoundError naming the source.
    """
    specs = [SourceSpec.of(source) for source in getattr(data_recipe, "sources", None) or []]
    held_out = [
        replace(SourceSpec.of(source), validation_only=True)
        for source in getattr(data_recipe, "validation_sources", None) or []
    ]
    shards = getattr(data_recipe, "shards", None)
    threads = threads or os.cpu_count() or 1
    prepared: list[TokenSource] = []
    if shards:
        prepared = _prepared_sources(shards, specs, held_out, tokenizer)
        sources = [source for source in prepared if not source.spec.validation_only]
    elif specs:
        sources = [_encoded_source(spec, tokenizer, cache_dir, threads) for spec in specs]
    else:
        raise ValueError("data.sources is empty: name at least one source, or a prepared folder in data.shards")
    sets = [source for source in prepared if source.spec.validation_only]
    known = {source.spec.name for source in sets}
    sets += [_encoded_source(spec, tokenizer, cache_dir, threads) for spec in held_out if spec.name not in known]
    return TrainingData(
        sources,
        sets,
        tokenizer,
        sequence_length,
        seed,
        validation_fraction=float(getattr(data_recipe, "validation_fraction", 0.02)),
        case_augmentation=float(getattr(data_recipe, "case_augmentation", 0.0)),
        rank=rank,
        world_size=world_size,
        buffer_pieces=buffer_pieces,
    )


def corpus_texts(data_recipe: Any, characters: int | None = None) -> Iterator[str]:
    """Texts of a recipe's sources for training a tokenizer: whole documents at the target shares, about `characters`.

    Reads local sources wholly when `characters` is None, else stops when enough was read.
    """
    specs = [SourceSpec.of(source) for source in data_recipe.sources]
    streams = [read_source(spec) for spec in specs]
    mixture = Mixture([spec.share or 1.0 for spec in specs])
    open_sources = set(range(len(specs)))
    read = 0
    while open_sources and (characters is None or read < characters):
        number = min(open_sources, key=lambda one: (mixture.placed[one] / mixture.shares[one], one))
        document = next(streams[number], None)
        if document is None:
            open_sources.discard(number)
            continue
        mixture.add(number, len(document.text))
        read += len(document.text)
        yield document.text
