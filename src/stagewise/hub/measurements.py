"""What was measured about a model, read from its `eval/*.json` and config.json.

- Files: `eval/*.json`, and `calibration.json` and `certificate.json` beside the weights. Measurements are found by what
  they hold (`stage_bpb`, `exit_shares`, `routed_share`, ...), wherever in a file they lie.
- When several files hold the same kind, the one written last counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from stagewise.hub.checkpoints import read_json

BOUNDS = "poe_wand_p99_bounds_per_stage_head"


@dataclass
class Measurements:
    """Figures of one model; empty where nothing was measured."""

    figures: dict[str, Any] = field(default_factory=dict)  # BPB, accuracy, intervals, agreement
    bounds: list[float] = field(default_factory=list)  # WAND, nats
    exits: list[dict[str, Any]] = field(default_factory=list)  # per safety: exit_shares, safety, disagreement
    exit_tokens: int | None = None
    routing: list[dict[str, Any]] = field(default_factory=list)  # one row per cap and reading of the rate
    acceptance: list[dict[str, Any]] = field(default_factory=list)  # draft_stage, k_draft, acceptance
    acceptance_text: str = ""
    certificate: dict[str, Any] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)  # prompt, texts by mode
    setting: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @property
    def usual_exits(self) -> dict[str, Any]:
        """The exit shares at the safety nearest to 1, the usual one; empty when nothing was measured."""
        return min(self.exits, key=lambda part: abs(part.get("safety", 1.0) - 1.0), default={})


def finite(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that can be shown."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary inside a JSON value, outer ones first."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def measurement_files(folder: Path) -> list[Path]:
    """The JSON files of a model's `eval/`, the oldest first."""
    paths = [path for path in (folder / "eval").glob("*.json") if not path.name.startswith(".")]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))


def read_measurements(folder: Path) -> Measurements:
    """All that was measured about the model in `folder`; damaged files are a `ValueError` that names them."""
    found = Measurements()
    if (folder / "config.json").is_file():
        found.bounds = read_json(folder / "config.json").get(BOUNDS) or []
    paths = measurement_files(folder)
    extra = [folder / name for name in ("calibration.json", "certificate.json") if (folder / name).is_file()]
    for path in [*extra, *paths]:
        value = read_json(path)
        found.files.append(path.relative_to(folder).as_posix())
        if isinstance(value, dict):
            _take(found, value)
    return found


def _take(found: Measurements, value: dict[str, Any]) -> None:
    figures = next((part for part in walk(value) if is_figures(part)), None)  # a comparison tells its own model first
    found.figures = figures or found.figures
    for part in walk(value):
        if "epsilon" in part and "delta" in part:
            found.certificate = {k: v for k, v in part.items() if finite(v) or isinstance(v, str)}
        rows = part.get("rows")
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and "k_draft" in rows[0]:
            found.acceptance = rows
            found.acceptance_text = ", ".join(
                [str(part.get("text") or "text")]
                + ([f"{part['tokens']:,} tokens"] if finite(part.get("tokens")) else [])
            )
    exits = [part for part in walk(value) if "exit_shares" in part]
    if exits:
        found.exits, found.exit_tokens = exits, value.get("tokens")
    found.routing = [part for part in walk(value) if "routed_share" in part] or found.routing
    found.probes = list(_probes(value)) or found.probes
    found.setting |= _setting(value)


def is_figures(part: dict[str, Any]) -> bool:
    """Whether a dictionary holds the figures of `evaluate_bpb`, rather than their intervals."""
    return finite(part.get("product_bpb", part.get("final_path_bpb")))


def _probes(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in walk(value):
        texts = next(
            (part[key] for key in ("texts", "greedy", "continuations") if isinstance(part.get(key), dict)), None
        )
        if "prompt" in part and texts:
            plain = {mode: text["text"] if isinstance(text, dict) else text for mode, text in texts.items()}
            yield {"prompt": str(part["prompt"]), "texts": {mode: str(text) for mode, text in plain.items()}}


def _setting(value: dict[str, Any]) -> dict[str, str]:
    facts: dict[str, str] = {}
    for part in walk(value):
        hardware = part.get("hardware")
        if isinstance(hardware, dict):
            names = [str(hardware[key]) for key in ("accelerator", "processor") if hardware.get(key)]
            facts["hardware"] = ", ".join(names + ([f"{hardware['cores']} cores"] if hardware.get("cores") else []))
        versions = part.get("versions")
        if isinstance(versions, dict):
            facts["versions"] = ", ".join(f"{k} {v}" for k, v in versions.items())
        if isinstance(part.get("commit"), str):
            facts["commit"] = part["commit"]
        if isinstance(part.get("created"), str):
            facts["measured"] = part["created"]
        for manifest in (part.get("manifest"), part.get("data"), part):
            if isinstance(manifest, dict) and manifest.get("sha256") and manifest.get("source"):
                facts["validation text"] = f"{manifest['source']} (sha256 {str(manifest['sha256'])[:16]})"
    return facts


def plain_name(name: str) -> str:
    """A predictor's name for readers: stage_0 -> expert 0, prefix_2 -> product of 2."""
    kind, _, rest = name.partition("_")
    return {"stage": f"expert {rest}", "prefix": f"product of {rest}"}.get(kind, name.replace("_", " "))


def count_parameters(folder: Path) -> int:
    """Number of parameters by the headers of the weight files (a delta's own only); 0 when there are none."""
    from safetensors import safe_open

    total = 0
    for path in [*sorted(folder.glob("model*.safetensors")), *folder.glob("delta.safetensors")]:
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def run_of(folder: Path) -> Path | None:
    """The run that a model folder lies in, RUN/model or RUN/checkpoints/step-N; the folder itself when it is a run."""
    place = folder.resolve()
    for candidate in (place, place.parent, place.parent.parent):
        if (candidate / "recipe.yaml").is_file() and (candidate / "metrics.jsonl").is_file():
            return candidate
    return None


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe as plain values; empty when there is none."""
    import yaml

    if not path.is_file():
        return {}
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def duration(seconds: float) -> str:
    """Seconds as people say them: 192.4 -> 3 min 12 s."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
