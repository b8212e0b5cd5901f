"""Where a figure comes from: versions, commit, machine, time. Every JSON result carries this and is written whole."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("stagewise", "torch", "transformers", "numpy", "lm_eval")


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter to a figure."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout this package runs from, with `+changes` when it is not clean; None elsewhere."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return (head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")) or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, accelerator."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"machine": platform.machine(), "processor": processor_name(), "cores": cores}
    facts["memory_bytes"] = total_memory()
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name(0)
    return facts


def processor_name() -> str:
    """The processor's model name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def total_memory() -> int:
    """Physical memory in bytes, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Versions, commit, hardware, time (UTC) and the seed."""
    facts: dict[str, Any] = {"versions": versions(), "commit": commit(), "hardware": hardware()}
    facts["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    if seed is not None:
        facts["seed"] = seed
    return facts


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name beside `path`, then rename: a killed process leaves the old file.

    Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
