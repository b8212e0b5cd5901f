"""Commands of the evaluation room: `evaluate`, `probe`, `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16"]


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
    tasks: list[str] | None = None,
    task_folder: Path | None = None,
    mode: str = "full",
    depth: int | None = None,
    limit: int | None = None,
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
    tasks
        Tasks of lm-evaluation-harness to run instead of measuring text; core stands for nanochat's CORE list.
    task_folder
        Folder of local task files: only these are known, nothing is fetched.
    mode
        Mode the tasks run in: full, final, prefix, stage, wand, wand-verified or speculative.
    depth
        Number of stages of a prefix, or index of a single stage.
    limit
        Examples a task, for a trial.

    Example: stagewise evaluate runs/lab/model runs/baseline/model --tokens 500000 --json compared.json
    """
    from stagewise.evaluation.provenance import write_json
    from stagewise.evaluation.suite import evaluate_models
    from stagewise.evaluation.tables import show_difference, show_evaluation

    if tasks:
        result = evaluate_on_tasks(list(models), tasks, task_folder, mode, depth, limit, seed, dtype, device)
        if json is not None:
            write_json(json, result)
        return
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
        write_json(json, result)


def evaluate_on_tasks(
    models: list[str],
    tasks: list[str],
    task_folder: Path | None = None,
    mode: str = "full",
    depth: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Run lm-eval tasks on models in one mode, print their tables: what `stagewise evaluate --tasks` writes."""
    from stagewise.evaluation.harness import CORE_TASKS, evaluate_tasks, lm_class
    from stagewise.evaluation.provenance import provenance
    from stagewise.evaluation.tables import show

    if "core" in tasks:
        absent = [name for name, task, _ in CORE_TASKS if task is None]
        print(f"not in lm-eval, so not run: {', '.join(absent)}")
    reports = []
    for path in models:
        lm = lm_class()(pretrained=path, mode=mode, depth=depth, dtype=dtype, device=device)
        found = evaluate_tasks(lm, tasks, task_folder=task_folder, limit=limit, seed=seed)
        reports.append({"model": path, "mode": mode, "depth": depth, **found})
        rows = [
            (task, name.partition(",")[0], value, values.get(f"{name.partition(',')[0]}_stderr,none"))
            for task, values in found["results"].items()
            for name, value in values.items()
            if isinstance(value, float) and "stderr" not in name
        ]
        show(f"{path}, mode {mode}{'' if depth is None else f' {depth}'}", ("task", "metric", "value", "stderr"), rows)
    setting = {"tasks": tasks, "limit": limit, "mode": mode, "depth": depth}
    return {"kind": "tasks", "models": reports, "setting": setting, **provenance(seed)}


def probe(
    *models: str,
    prompts: Path | None = None,
    modes: list[str] | None = None,
    max_new_tokens: int = 60,
    draft_stage: int = 0,
    json: Path | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
) -> None:
    """Run a set of prompts through every mode of a model, or through several checkpoints side by side.

    Parameters
    ----------
    models
        Model folders or repositories; more than one gives a grid of texts by checkpoint.
    prompts
        File of prompts: lines of text, an optional target after a tab, or .jsonl with prompt and target; default: the
        seven prompts of the 3B card.
    modes
        Mode in short form, such as full, prefix:2, stage:0, wand, wand-verified, speculative:4; may be repeated;
        default: all the model has.
    max_new_tokens
        Tokens a text has at most.
    draft_stage
        Stage that drafts in speculative modes.
    json
        File for the texts, ranks and rates.
    dtype
        Weight type to load; default: as stored.
    device
        Where to run; default: the accelerator where there is one.

    Example: stagewise probe runs/lab/model --modes full --modes prefix:1 --max-new-tokens 40
    """
    from stagewise.evaluation.loading import load_pair
    from stagewise.evaluation.probes import SEVEN_PROMPTS, read_probes, run_probes
    from stagewise.evaluation.provenance import provenance, write_json
    from stagewise.evaluation.tables import show_probe_grid, show_probes

    if not models:
        raise ValueError("name at least one model")
    probes = SEVEN_PROMPTS if prompts is None else read_probes(prompts)
    reports = []
    for path in models:
        model, tokenizer = load_pair(path, dtype, device)
        found = run_probes(
            model, tokenizer, probes, modes=modes, max_new_tokens=max_new_tokens, draft_stage=draft_stage
        )
        reports.append({"model": path, **found})
        show_probes(reports[-1])
    if len(reports) > 1:
        show_probe_grid(reports)
    if json is not None:
        write_json(json, {"kind": "probes", "models": reports, **provenance()})


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
    from stagewise.evaluation.loading import load_pair
    from stagewise.evaluation.provenance import provenance, write_json
    from stagewise.evaluation.tables import show_beta_sweep, show_costs, show_heads, show_lambdas

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
        show_lambdas(result["lambdas"])
        if "heads" in result:
            show_heads(result["heads"])
        if "beta_sweep" in result:
            show_beta_sweep(result["beta_sweep"])
    if json is not None:
        write_json(json, {"kind": "inspection", "model": model, **result, **provenance()})


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
