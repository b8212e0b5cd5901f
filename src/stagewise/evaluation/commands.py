"""Commands of the evaluation room: `evaluate`, `probe`, `inspect`."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16"]


def load_pair(path: str, dtype: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer, ready to evaluate; on the accelerator where there is one."""
    import torch

    from stagewise.modeling import load, load_tokenizer

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(path, dtype=dtype, device=place).eval()
    return model, load_tokenizer(path)


@contextmanager
def progress_bar(title: str, total: int | None):
    """A rich progress bar; yields a function that takes the number done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def write_result(path: Path, result: dict[str, Any]) -> None:
    """A result as JSON, under a temporary name first."""
    from stagewise.evaluation.provenance import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


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
    from stagewise.evaluation.provenance import provenance
    from stagewise.evaluation.rows import manifest, take_documents
    from stagewise.evaluation.sources import evaluation_texts
    from stagewise.evaluation.suite import difference, measure

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
        result["difference"] = difference(*measurements, resamples, seed)
    result["data"] = manifest(source.name, texts)
    result["setting"] = {"resamples": resamples, "confidence": 0.95, "tokens_asked": tokens, "unit": "document"}
    return {**result, **provenance(seed)}


def evaluate(
    *models: str,
    data: list[str] | None = None,
    tokens: int = 262_144,
    json: Path | None = None,
    seed: int = 0,
    resamples: int = 1000,
    context: int | None = None,
    batch_tokens: int = 8192,
    dtype: Dtype | None = None,
    device: str | None = None,
) -> None:
    """Measure bits per byte and accuracy of every stage, prefix product and the final path; two models are compared.

    Parameters
    ----------
    models
        Model folders or repositories.
    data
        The word embedded, or files of text, .jsonl or .parquet; default: what the model's own run held out, else
        embedded.
    tokens
        Tokens to measure, the last document whole.
    json
        File for the result with versions, commit, manifest and seed.
    seed
        Seed of the bootstrap.
    resamples
        Bootstrap resamples of documents.
    context
        Longest row in tokens; default: the model's context.
    batch_tokens
        Tokens a batch, padding included.
    dtype
        Weight type to load; default: as stored.
    device
        Where to run; default: the accelerator where there is one.

    Example: stagewise evaluate runs/lab/model runs/baseline/model --tokens 500000 --json compared.json
    """
    from stagewise.evaluation.tables import show_difference, show_evaluation

    result = evaluate_models(
        list(models),
        data,
        tokens,
        seed=seed,
        resamples=resamples,
        context=context,
        batch_tokens=batch_tokens,
        dtype=dtype,
        device=device,
    )
    for report in result["models"]:
        setting = f"{report['tokens']:,} tokens, {report['documents']:,} documents of {result['data']['source']}"
        show_evaluation(report, f"{setting}, {report['dtype']}, 95% intervals over documents")
    if "difference" in result:
        show_difference(result["difference"], *models)
    if json is not None:
        write_result(json, result)


def inspect(
    model: str,
    *,
    context: int | None = None,
    batch: int = 1,
    dtype: Dtype | None = None,
    heads: bool = True,
    beta_sweep: int = 0,
    data: list[str] | None = None,
    json: Path | None = None,
) -> None:
    """Show parameters, FLOPs, bytes read and KV bytes per stage, prefix and mode; memory; what the heads have in
    common.

    Parameters
    ----------
    model
        A model folder or repository, or the name of a preset or recipe (its shape is enough).
    context
        Tokens of context the costs are for; default: the longest.
    batch
        Rows whose keys and values must fit in memory.
    dtype
        Weight type of the costs; default: the stored one, bfloat16 for a preset.
    heads
        Analyse the stage heads of a model that has them.
    beta_sweep
        Tokens on which to measure what dropping and scaling heads costs; 0 for none.
    data
        Text for the beta sweep, as in evaluate.
    json
        File for the result.

    Example: stagewise inspect poe-3b --context 2048
    """
    from stagewise.evaluation.inspection import inspect_config, preset_config
    from stagewise.evaluation.provenance import provenance
    from stagewise.evaluation.tables import show_beta_sweep, show_costs, show_heads

    config = None if Path(model).exists() else preset_config(model)
    if config is not None:
        result = inspect_config(config, dtype=dtype or "bfloat16", context=context, batch=batch)
        show_costs(result, model)
    else:
        loaded, tokenizer = load_pair(model, dtype)
        stored = str(loaded.dtype).removeprefix("torch.")
        result = inspect_config(loaded.config, dtype=stored, context=context, batch=batch)
        show_costs(result, model)
        result |= inspect_weights(loaded, tokenizer, model, heads, beta_sweep, data)
        if "heads" in result:
            show_heads(result["heads"])
        if "beta_sweep" in result:
            show_beta_sweep(result["beta_sweep"])
    if json is not None:
        write_result(json, {"kind": "inspection", "model": model, **result, **provenance()})


def inspect_weights(
    model: Any, tokenizer: Any, path: str, heads: bool, sweep_tokens: int, data: list[str] | None
) -> dict[str, Any]:
    """Lambdas by layer, the head analysis and the beta sweep of a loaded model, as JSON types."""
    from stagewise.evaluation.bpb import evaluate_bpb
    from stagewise.evaluation.heads import beta_sweep, head_report, lambdas_by_layer
    from stagewise.evaluation.rows import document_batches, manifest, take_documents
    from stagewise.evaluation.sources import evaluation_texts

    result: dict[str, Any] = {"lambdas": lambdas_by_layer(model)}
    if heads and model.config.per_stage_head:
        result["heads"] = head_report(model, lambda i: tokenizer.decode([i]))
    if sweep_tokens:
        source = evaluation_texts(data, path)
        texts, documents = take_documents(source.documents, tokenizer.encode_ordinary, sweep_tokens)
        context = model.config.max_position_embeddings
        batches = list(document_batches(documents, tokenizer.bos_token_id, context))
        rows = [(batch.inputs, batch.targets) for batch in batches]
        lengths = tokenizer.token_byte_lengths
        sweep = beta_sweep(model, lambda: evaluate_bpb(model, rows, lengths, final=False)["product_bpb"])
        result["beta_sweep"] = {**sweep, "tokens": sum(map(len, documents)), "data": manifest(source.name, texts)}
    return result
