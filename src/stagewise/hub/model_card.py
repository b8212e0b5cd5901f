"""A model's README.md, written from what was measured and from nothing else.

- Every number comes from config.json, the weight files' headers, the run's recipe and metrics, or eval/*.json; a part
  nobody measured is left out, and without any evaluation there is no card.
- Limitations are consequences of the numbers: each is a rule in `limitations` with the figures that triggered it.
- The usage snippets are complete programs for transformers alone; tests run them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stagewise.hub.checkpoints import read_json, require_model, step_of
from stagewise.hub.measurements import (
    Measurements,
    count_parameters,
    duration,
    finite,
    plain_name,
    read_measurements,
    read_recipe,
    run_of,
)

OBJECTIVES = {
    "none": "next-token cross-entropy, end to end",
    "flat": "each stage's own cross-entropy, no gradient across stage boundaries",
    "hier": "each stage's cross-entropy with gradients through all stages",
    "residual_logop": "residual Log-OP: each stage fits what the product of the earlier ones leaves",
}


def write_card(model: Path, *, name: str | None = None, license: str = "apache-2.0", force: bool = False) -> Path:
    """Write README.md into a model folder and return its path.

    Raises `ValueError` when the model was never evaluated and `FileExistsError` when there is a README.md already and
    `force` is not set.
    """
    folder = require_model(model)
    target = folder / "README.md"
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already: give --force to replace it")
    text = model_card(folder, name=name, license=license)
    temporary = target.with_name(f".README.md.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def model_card(folder: Path, *, name: str | None = None, license: str = "apache-2.0") -> str:
    """The card's text; `name` is the repository (owner/name) its snippets load, the folder when None."""
    config = read_json(folder / "config.json")
    measured = read_measurements(folder)
    if not measured.figures:
        raise ValueError(
            f"{folder} has no measurements in eval/, and a card tells only what was measured: run "
            f"`stagewise evaluate {folder} --json {folder / 'eval' / 'evaluation.json'}` first"
        )
    run = run_of(folder)
    recipe = read_recipe(folder / "recipe.yaml") or (read_recipe(run / "recipe.yaml") if run else {})
    title = (name or str(recipe.get("name") or folder.resolve().name)).rpartition("/")[2]
    parts = [
        _metadata(config, measured, title, license),
        f"# {title}\n\n{_introduction(config, measured, recipe)}",
        _section("Architecture", _architecture(folder, config)),
        _section("Training", _training(config, recipe, run, folder)),
        _section("Evaluation", _evaluation(config, measured)),
        _section("Calibration", _calibration(measured)),
        _section("Usage", _usage(config, measured, name or folder.resolve().name)),
        _section("Limitations", "\n".join(f"- {line}" for line in limitations(config, measured))),
        _section("Files", _files(folder, measured)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _staged(config: dict[str, Any]) -> bool:
    return config.get("poe_mode", "none") != "none"


def _specialist(config: dict[str, Any]) -> bool:
    return bool(config.get("specialist_layers") or config.get("new_layers"))


def _metadata(config: dict[str, Any], m: Measurements, title: str, license: str) -> str:
    import yaml

    tags = ["stagewise", "causal-lm"] + (["product-of-experts", "early-exit"] if _staged(config) else [])
    facts: dict[str, Any] = {"license": license, "library_name": "transformers", "pipeline_tag": "text-generation"}
    parent = str(config.get("base_model_name_or_path") or "")
    if parent.count("/") == 1 and not parent.startswith((".", "/")):
        facts["base_model"] = parent
    facts["tags"] = tags
    names = {"product_bpb": "bits per byte, product of all experts", "final_path_bpb": "bits per byte, final path"}
    names |= {"product_accuracy": "next-token accuracy, product"}
    results = [
        {"type": key, "name": text, "value": round(m.figures[key], 6)}
        for key, text in names.items()
        if finite(m.figures.get(key))
    ]
    text = m.setting.get("validation text", "held-out text")
    entry = {"task": {"type": "text-generation"}, "dataset": {"name": text, "type": "text"}, "metrics": results}
    facts["model-index"] = [{"name": title, "results": [entry]}]
    return "---\n" + yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).strip() + "\n---"


def _introduction(config: dict[str, Any], m: Measurements, recipe: dict[str, Any]) -> str:
    stages = config.get("poe_stage_layers") or []
    lines = [str(recipe["description"]).strip()] if recipe.get("description") else []
    if _specialist(config):
        lines.append("A specialist: blocks and a head trained on top of a frozen base, which they leave unchanged.")
    if _staged(config) and len(stages) > 1:
        lines.append(
            f"A decoder-only language model cut into {len(stages)} stages. Every stage ends in a complete next-token "
            "predictor, an expert; by default the model answers with the experts' product, a renormalised geometric "
            "mean. The same weights also run as any prefix of stages, with early exit, or as their own draft model."
        )
    else:
        lines.append("A decoder-only language model trained end to end; its intermediate layers predict nothing.")
    key = "product_bpb" if finite(m.figures.get("product_bpb")) else "final_path_bpb"
    if finite(m.figures.get(key)):
        what = "the product of all experts" if key == "product_bpb" else "the final path"
        lines.append(f"Measured: **{m.figures[key]:.4f} bits per byte** ({what}){_on_text(m)}.")
    return "\n\n".join(lines)


def _on_text(m: Measurements) -> str:
    words = []
    if finite(m.figures.get("tokens")):
        words.append(f"{int(m.figures['tokens']):,} tokens")
    if "validation text" in m.setting:
        words.append(m.setting["validation text"])
    return f" on {' of '.join(words)}" if words else ""


def _architecture(folder: Path, config: dict[str, Any]) -> str:
    rows = []
    parameters = count_parameters(folder)
    if parameters:
        own = " (of the delta; its parent's come on top)" if (folder / "delta.safetensors").is_file() else ""
        rows.append(["parameters", f"{parameters:,}{own}"])
    heads = {k: config.get(k) for k in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    for key, text in (
        ("num_hidden_layers", "layers"),
        ("hidden_size", "hidden size"),
        ("intermediate_size", "MLP width"),
        ("vocab_size", "vocabulary"),
        ("max_position_embeddings", "context, tokens"),
        ("window_pattern", "attention windows (S short, L full)"),
    ):
        if config.get(key) is not None:
            rows.append([text, str(config[key])])
    if all(heads.values()):
        value = "{num_attention_heads} query, {num_key_value_heads} key/value, width {head_dim}".format(**heads)
        rows.append(["attention heads", value])
    if config.get("base_model_name_or_path"):
        rows.append(["built on", f"`{config['base_model_name_or_path']}`"])
    if _specialist(config):
        rows.append(["appended layers", str(config.get("new_layers") or sum(config.get("specialist_layers") or []))])
    body = _table(["", ""], rows)
    stages, first, lines = config.get("poe_stage_layers") or [], 0, []
    if _staged(config) and len(stages) > 1:
        base = sum(stages)
        for k, layers in enumerate(stages):
            last = first + layers - 1
            lines.append([f"{k}", f"{first}-{last}", f"{last + 1} of {base}", f"{100 * (last + 1) / base:.1f}%"])
            first = last + 1
        body += "\n\n" + _table(["stage", "layers", "evaluated so far", "share of the trunk"], lines)
        own = "its own additive head on top of the shared one" if config.get("per_stage_head") else "the shared head"
        body += f"\n\nEvery stage predicts with {own}."
    return body


def _training(config: dict[str, Any], recipe: dict[str, Any], run: Path | None, folder: Path) -> str:
    rows = []
    if config.get("poe_mode") in OBJECTIVES and not _specialist(config):
        rows.append(["objective", f"`{config['poe_mode']}`: {OBJECTIVES[config['poe_mode']]}"])
    step = step_of(folder.name)
    last = _last_training_row(run, step) if run else {}
    for key, text in (("step", "steps"), ("tokens", "tokens")):
        if finite(last.get(key)):
            rows.append([text, f"{int(last[key]):,}"])
    if finite(last.get("seconds")):
        rows.append(["time", duration(last["seconds"])])
    training = recipe.get("training") or {}
    for key, text in (
        ("batch_tokens", "tokens a step"),
        ("sequence_length", "sequence length"),
        ("dtype", "compute dtype"),
    ):
        if training.get(key) is not None:
            rows.append([text, f"{training[key]:,}" if isinstance(training[key], int) else str(training[key])])
    optimizer = recipe.get("optimizer") or {}
    for key in ("matrix_lr", "embedding_lr", "unembedding_lr", "weight_decay"):
        if optimizer.get(key) is not None:
            rows.append([key.replace("_", " "), f"{optimizer[key]:g}"])
    if recipe.get("seed") is not None:
        rows.append(["seed", str(recipe["seed"])])
    body = _table(["", ""], rows)
    sources = (recipe.get("data") or {}).get("sources") or []
    total = sum(float(s.get("share", 1.0)) for s in sources) or 1.0
    mix = [[str(s.get("name")), f"{100 * float(s.get('share', 1.0)) / total:.1f}%"] for s in sources]
    if mix:
        body += "\n\n" * bool(body) + _table(["data", "target share"], mix)
    stage_training = config.get("stage_training")
    if isinstance(stage_training, dict) and stage_training:
        facts = [[str(k), f"{v:g}" if finite(v) else str(v)] for k, v in stage_training.items()]
        body += "\n\n" * bool(body) + _table(["specialist training", ""], facts)
    return body


def _last_training_row(run: Path, step: int | None) -> dict[str, Any]:
    row: dict[str, Any] = {}
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            break
        if "loss" in found and finite(found.get("step")) and (step is None or found["step"] <= step):
            row = found
    return row


def _interval(figures: dict[str, Any], key: str, k: int | None = None) -> str:
    pair = (figures.get("intervals") or {}).get(key)
    if isinstance(pair, list) and k is not None:
        pair = pair[k] if k < len(pair) else None
    if not isinstance(pair, list) or len(pair) != 2 or not all(map(finite, pair)):
        return ""
    return f" [{pair[0]:.4f}, {pair[1]:.4f}]"


def _evaluation(config: dict[str, Any], m: Measurements) -> str:
    f, body = m.figures, []
    setting = [f"Bits per byte of held-out text{_on_text(m)}; special tokens count for neither bits nor bytes."]
    if f.get("intervals"):
        setting.append("Brackets are 95% bootstrap intervals over documents.")
    if "hardware" in m.setting:
        setting.append(f"Measured on {m.setting['hardware']}.")
    body.append(" ".join(setting))
    stages = f.get("stage_bpb") or []
    rows = []
    for k, value in enumerate(stages):
        prefix, accuracy = f.get("prefix_bpb") or [], f.get("stage_accuracy") or []
        rows.append(
            [
                str(k),
                f"{value:.4f}{_interval(f, 'stage_bpb', k)}",
                f"{100 * accuracy[k]:.2f}%" if k < len(accuracy) else "",
                f"{prefix[k]:.4f}{_interval(f, 'prefix_bpb', k)}" if k < len(prefix) else "",
            ]
        )
    body.append(_table(["expert", "alone: bits per byte", "accuracy", "product up to it: bits per byte"], rows))
    named = []
    for key, text in (
        ("product", "product of all experts (default output)"),
        ("mean_stage", "mean of the experts' own figures"),
        ("entropy_weighted", "product weighted by the experts' entropies"),
        ("final_path", "final path (last layer, shared head)"),
    ):
        if finite(f.get(f"{key}_bpb")):
            accuracy = f.get(f"{key}_accuracy")
            share = f"{100 * accuracy:.2f}%" if finite(accuracy) else ""
            named.append([text, f"{f[f'{key}_bpb']:.4f}{_interval(f, f'{key}_bpb')}", share])
    body.append(_table(["output", "bits per byte", "accuracy"], named))
    if m.probes:
        modes = list(dict.fromkeys(mode for probe in m.probes for mode in probe["texts"]))
        lines = [[probe["prompt"]] + [probe["texts"].get(mode, "") for mode in modes] for probe in m.probes]
        body.append("Greedy continuations of fixed prompts:\n\n" + _table(["prompt", *modes], lines))
    return "\n\n".join(part for part in body if part)


def _calibration(m: Measurements) -> str:
    body = []
    if m.bounds:
        rows = [[f"{k} to {k + 1}", f"{bound:.4f}"] for k, bound in enumerate(m.bounds)]
        body.append(
            "WAND exit bounds, stored in config.json (99th percentile of how far one more expert moves the product, "
            "in nats):\n\n" + _table(["from expert", "bound"], rows)
        )
    if m.exits:
        rows = [
            [f"{part.get('safety', 1.0):g}", *(f"{100 * share:.1f}%" for share in part["exit_shares"])]
            + [f"{100 * part['disagreement']:.2f}%" if finite(part.get("disagreement")) else ""]
            for part in m.exits
        ]
        experts = [f"expert {k}" for k in range(len(m.exits[0]["exit_shares"]))]
        text = f" on {m.exit_tokens:,} tokens" if finite(m.exit_tokens) else ""
        body.append(
            f"Where tokens leave under WAND{text}, and how many of them differ from the full product's:\n\n"
            + _table(["safety", *experts, "differ"], rows)
        )
    if m.routing:
        rows = [
            [f"{r['cap']:g}", str(r.get("rate_over", "")), f"{100 * r['routed_share']:.2f}%"]
            + [f"{r['projected_speedup']:.3f}x" if finite(r.get("projected_speedup")) else ""]
            for r in m.routing
            if finite(r.get("cap"))
        ]
        head = ["regressions allowed", "as a share of", "positions expert 0 may answer alone", "projected speed-up"]
        body.append(_table(head, rows))
    if m.acceptance:
        rows = [
            [str(r["draft_stage"]), str(r["k_draft"]), f"{100 * r['acceptance']:.1f}%"]
            for r in m.acceptance
            if finite(r.get("acceptance"))
        ]
        body.append(
            f"Accepted drafts ({m.acceptance_text}):\n\n"
            + _table(["drafting expert", "draft length", "accepted"], rows)
        )
    if m.certificate:
        facts = [[str(k), f"{v:g}" if finite(v) else str(v)] for k, v in m.certificate.items()]
        body.append("Certificate for early exits:\n\n" + _table(["", ""], facts))
    return "\n\n".join(body)


def _usage(config: dict[str, Any], m: Measurements, repo: str) -> str:
    load = (
        "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'repo = "{repo}"\n'
        "tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)\n"
    )
    if _specialist(config):
        start = (
            'messages = [{"role": "user", "content": "Hello"}]\n'
            "ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="
            '"pt")["input_ids"]\n'
        )
    else:
        start = (
            'prompt = "The"\n'
            "ids = [tokenizer.bos_token_id] + tokenizer.encode(prompt, add_special_tokens=False)\n"
            "ids = torch.tensor([ids])\n"
        )
    end = "out = model.generate(ids, max_new_tokens=32, do_sample=False)\nprint(tokenizer.decode(out[0]))"
    rule = "Every prompt starts with exactly one `<|bos|>`."
    body = [f"{rule}\n\n```python\n{load}\n{start}{end}\n```"]
    if _staged(config) and not _specialist(config) and len(config.get("poe_stage_layers") or []) > 1:
        lines = [
            "one = model.generate_stage(ids, stage=0, max_new_tokens=32)  # the first expert alone",
            "two = model.generate_prefix(ids, max_stages=2, max_new_tokens=32)  # the product of the first two",
            "same, accepted = model.generate_speculative(  # expert 0 drafts, the product verifies: the same text",
            "    ids, draft_stage=0, k_draft=3, max_new_tokens=32, return_acceptance=True",
            ")",
        ]
        if m.bounds:
            lines += [
                "early, used = model.generate_wand(  # leaves at the first expert that is sure enough",
                "    ids, max_new_tokens=32, return_stages_used=True",
                ")",
            ]
        body.append("The same weights at other depths:\n\n```python\n" + "\n".join(lines) + "\n```")
    return "\n\n".join(body)


def limitations(config: dict[str, Any], m: Measurements) -> list[str]:
    """What the numbers say against the model, one sentence each."""
    f, lines = m.figures, []
    staged = _staged(config) and bool(f.get("stage_bpb"))
    if not _specialist(config):
        lines.append("A base model: it continues text. It was not trained to follow instructions or to be safe.")
    default = "product" if finite(f.get("product_bpb")) else "final_path"
    accuracy = f.get(f"{default}_accuracy")
    if finite(accuracy):
        lines.append(
            f"Its first guess for the next token is wrong {100 * (1 - accuracy):.1f}% of the time on the text measured."
        )
    if finite(f.get("tokens")):
        lines.append(
            f"All figures are from {int(f['tokens']):,} tokens"
            + (f" of {m.setting['validation text']}" if "validation text" in m.setting else "")
            + "; they say nothing about other text, other languages or downstream tasks."
        )
    if config.get("max_position_embeddings"):
        lines.append(f"The context ends at {config['max_position_embeddings']:,} tokens.")
    if staged:
        lines += _stage_limitations(config, m)
    elif not _staged(config):
        lines.append("No early exit, prefixes or self-speculation: intermediate layers were never trained to predict.")
    worst = max((f.get("expected_calibration_error") or {}).items(), key=lambda pair: pair[1], default=None)
    if worst and worst[1] > 0.05:
        lines.append(
            f"Its confidence is off by {100 * worst[1]:.1f} percentage points on average ({plain_name(worst[0])})."
        )
    return lines


def _stage_limitations(config: dict[str, Any], m: Measurements) -> list[str]:
    f, lines = m.figures, []
    stages, gap = f["stage_bpb"], f.get("crossover_gap")
    last = len(stages) - 1
    if finite(gap) and gap >= 0:
        lines.append(
            f"The product is no better than expert {last} alone: {f['product_bpb']:.4f} against "
            f"{stages[last]:.4f} bits per byte."
        )
    product = f.get("product_bpb")
    if finite(product) and len(stages) > 1:
        loss = 100 * (stages[0] - product) / product
        lines.append(f"Expert 0 alone costs {loss:+.2f}% bits per byte against the product.")
    if finite(product) and finite(f.get("final_path_bpb")) and f["final_path_bpb"] > 1.05 * product:
        lines.append(
            f"The final path (`output_mode='final'`) is not what training optimised: {f['final_path_bpb']:.4f} bits "
            f"per byte against the product's {product:.4f}. Use the default output."
        )
    agreement = f.get("agreement") or {}
    names, matrix = agreement.get("names") or [], agreement.get("matrix") or []
    if f"stage_{last}" in names and f"stage_{last - 1}" in names:
        share = matrix[names.index(f"stage_{last}")][names.index(f"stage_{last - 1}")]
        if share > 0.95:
            lines.append(f"The last two experts name the same token {100 * share:.1f}% of the time: nearly redundant.")
    if not m.bounds:
        lines.append("No exit bounds were calibrated: `generate_wand` needs `p99_bounds` (`stagewise calibrate`).")
    elif finite(m.usual_exits.get("disagreement")):
        lines.append(
            f"Plain WAND changes {100 * m.usual_exits['disagreement']:.2f}% of the tokens at its usual setting; "
            + ("the bounds come without a certificate." if not m.certificate else "see the certificate above.")
        )
    return lines


def _files(folder: Path, m: Measurements) -> str:
    rows = [[f"`{name}`", "raw measurements"] for name in m.files]
    for name, text in (
        ("config.json", "architecture, per-layer facts, exit bounds"),
        ("delta.safetensors", "what the specialist adds to its parent"),
        ("elastic.json", "decoding settings tuned on one machine"),
        ("generation_config.json", "defaults of `generate`"),
        ("tokenizer.json", "tokenizer"),
    ):
        if (folder / name).is_file():
            rows.append([f"`{name}`", text])
    return _table(["file", "holds"], rows)
