"""Everything a card reports about predictions, for one model or several on the same documents.

Design choices:
- One pass per model; per document the pass keeps only sums (nats and hits of each predictor, tokens, bytes).
- Every named figure has a bootstrap interval over documents. Resamples depend on the seed alone, so the interval of
  the difference between two models is paired.
- Models with different tokenizers are compared on the same texts: the first model's tokenizer counts `tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stagewise.evaluation.agreement import Agreement, Calibration
from stagewise.evaluation.bpb import (
    bits_per_byte,
    check_byte_lengths,
    default_output,
    expert_count,
    inference,
    name_figures,
    score_tokens,
)
from stagewise.evaluation.intervals import interval, resampled_ratios
from stagewise.evaluation.loading import load_pair, progress_bar
from stagewise.evaluation.provenance import provenance
from stagewise.evaluation.rows import document_batches, manifest, take_documents
from stagewise.evaluation.sources import evaluation_texts


@dataclass
class Measurement:
    """Sums per document (n of them) and predictor (M), and the streaming counts of a pass."""

    names: list[str]
    nats: np.ndarray  # (M, n)
    hits: np.ndarray  # (M, n)
    tokens: np.ndarray  # (n,)
    bytes: np.ndarray  # (n,)
    agreement: Agreement
    calibration: Calibration
    default_output: str

    def figures(self) -> dict[str, Any]:
        """The named figures over all documents."""
        bpb = bits_per_byte(self.nats.sum(1), self.bytes.sum()).tolist()
        accuracy = (self.hits.sum(1) / self.tokens.sum()).tolist()
        return name_figures(dict(zip(self.names, bpb, strict=True)), dict(zip(self.names, accuracy, strict=True)))

    def samples(self, resamples: int, seed: int) -> dict[str, Any]:
        """The same figures as arrays (resamples,) under resampling of documents."""
        bpb = bits_per_byte(resampled_ratios(self.nats, self.bytes, resamples=resamples, seed=seed), 1.0)
        accuracy = resampled_ratios(self.hits, self.tokens, resamples=resamples, seed=seed)
        return name_figures(dict(zip(self.names, bpb, strict=True)), dict(zip(self.names, accuracy, strict=True)))

    def report(self, resamples: int, seed: int, confidence: float = 0.95) -> dict[str, Any]:
        """Figures, their intervals, the agreement matrix and calibration errors, as JSON types."""
        result: dict[str, Any] = {"default_output": self.default_output, **self.figures()}
        result["intervals"] = each(lambda sample: list(interval(sample, confidence)), self.samples(resamples, seed))
        result["agreement"] = {"names": self.agreement.names, "matrix": self.agreement.matrix()}
        result["expected_calibration_error"] = self.calibration.error()
        counts = {"documents": len(self.tokens), "tokens": int(self.tokens.sum()), "bytes": int(self.bytes.sum())}
        return {**result, **counts}


def each(function: Callable[[Any], Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Apply a function to every figure, into lists."""
    return {
        name: [function(item) for item in value] if isinstance(value, list) else function(value)
        for name, value in figures.items()
    }


def measure(
    model: Any,
    documents: Sequence[Sequence[int]],
    token_byte_lengths: torch.Tensor,
    bos: int,
    *,
    context: int | None = None,
    batch_tokens: int = 8192,
    entropy_tau: float = 1.0,
    bins: int = 15,
    progress: Callable[[int], None] | None = None,
) -> Measurement:
    """Score documents (token ids without bos) with every predictor of the model.

    `context` is the longest row in tokens (the model's by default); `progress` hears the tokens scored so far. Raises
    `ValueError` when no token has bytes, or on logits that are not finite.
    """
    lengths = check_byte_lengths(model, token_byte_lengths)
    limit = int(model.config.max_position_embeddings)
    context = limit if context is None else context
    if not 1 <= context <= limit:
        raise ValueError(f"context={context} must lie between 1 and the model's {limit} (max_position_embeddings)")
    n, experts = len(documents), expert_count(model)
    counts = torch.zeros(2, n, dtype=torch.float64)  # tokens, bytes
    sums = torch.zeros(0)
    names: list[str] = []
    agreement, calibration = Agreement([]), Calibration(bins)
    done = 0
    with inference(model):
        for batch in document_batches(documents, bos, context, batch_tokens=batch_tokens):
            scores = score_tokens(model, batch.inputs, batch.targets, lengths, entropy_tau=entropy_tau)
            if not names:
                names = scores.names
                sums = torch.zeros(2, len(names), n, dtype=torch.float64)  # nats, hits
                product = [f"prefix_{experts}"] if experts else []
                agreement = Agreement([f"stage_{k}" for k in range(experts)] + product + ["final_path"])
            hits = ((scores.top1 == scores.targets) & scores.counted).double()
            shape = batch.inputs.shape
            sums[0].index_add_(1, batch.documents, scores.nll.view(-1, *shape).sum(2).cpu())
            sums[1].index_add_(1, batch.documents, hits.view(-1, *shape).sum(2).cpu())
            per_row = torch.stack([scores.counted, scores.token_bytes]).double().view(2, *shape).sum(2).cpu()
            counts.index_add_(1, batch.documents, per_row)
            agreement.add(scores)
            calibration.add(scores)
            done += int(scores.counted.sum())
            if progress is not None:
                progress(done)
    if not done:
        raise ValueError("the text holds no token with bytes (empty, or only special tokens): give more text")
    return Measurement(
        names,
        sums[0].numpy(),
        sums[1].numpy(),
        counts[0].numpy(),
        counts[1].numpy(),
        agreement,
        calibration,
        default_output(model),
    )


def difference(first: Measurement, second: Measurement, resamples: int, seed: int) -> dict[str, Any]:
    """`second - first` for every number both have, each as {"difference", "interval"}, paired by document."""
    if len(first.tokens) != len(second.tokens):
        raise ValueError(
            f"a paired difference needs the same documents: {len(first.tokens)} and {len(second.tokens)} were measured"
        )
    values = first.figures(), second.figures()
    samples = first.samples(resamples, seed), second.samples(resamples, seed)
    result = {}
    for name, value in values[0].items():
        other = values[1].get(name)
        if other is None or isinstance(value, list):
            continue
        paired = interval(samples[1][name] - samples[0][name])
        result[name] = {"difference": other - value, "interval": list(paired)}
    defaults = first.default_output, second.default_output
    for kind in ("bpb", "accuracy"):
        a, b = (f"{name}_{kind}" for name in defaults)
        paired = interval(samples[1][b] - samples[0][a])
        result[f"default_output_{kind}"] = {"difference": values[1][b] - values[0][a], "interval": list(paired)}
    return result


def evaluate_models(
    models: list[str],
    data: list[str] | None = None,
    tokens: int = 262_144,
    *,
    seed: int = 0,
    resamples: int = 1000,
    context: int | None = None,
    batch_tokens: int = 8192,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure models on the same documents: what `stagewise evaluate` writes as JSON.

    `tokens` are counted by the first model's tokenizer, the last document whole. Returns `models` (a report each),
    `difference` (of the second from the first, when there are two), `data` (manifest), `setting` and provenance.
    """
    if not models:
        raise ValueError("name at least one model")
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    source = evaluation_texts(data, models[0])
    texts: list[str] = []
    reports, measurements = [], []
    for number, path in enumerate(models):
        model, tokenizer = load_pair(path, dtype, device)
        if number == 0:
            texts, documents = take_documents(source.documents, tokenizer.encode_ordinary, tokens)
        else:
            documents = [tokenizer.encode_ordinary(text) for text in texts]
        total = sum(map(len, documents))
        with progress_bar(f"evaluating {path}", total) as progress:
            measurement = measure(
                model,
                documents,
                tokenizer.token_byte_lengths,
                tokenizer.bos_token_id,
                context=context,
                batch_tokens=batch_tokens,
                progress=progress,
            )
        measurements.append(measurement)
        reports.append({"model": path, **measurement.report(resamples, seed)})
        reports[-1]["context"] = context or model.config.max_position_embeddings
        reports[-1]["dtype"] = str(model.dtype).removeprefix("torch.")
        del model
    result: dict[str, Any] = {"kind": "evaluation", "models": reports}
    if len(models) == 2:
        result["difference"] = difference(measurements[0], measurements[1], resamples, seed)
    result["data"] = manifest(source.name, texts)
    result["setting"] = {"resamples": resamples, "confidence": 0.95, "tokens_asked": tokens, "unit": "document"}
    return {**result, **provenance(seed)}
