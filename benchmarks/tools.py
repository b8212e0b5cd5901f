"""Function calling: held-out embedded functions and leaderboard files, with and without constrained decoding.

    python benchmarks/tools.py runs/quickstart-tools/model --bfcl path/to/bfcl --save

Prints a table for each set of cases and, as its last line, one JSON object. Greedy decoding; the free side and the
constrained side answer the same cases in one run.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from stagewise.data.embedded_functions import functions_manifest
from stagewise.evaluation.provenance import hardware, provenance, write_json
from stagewise.modeling import load, load_tokenizer
from stagewise.specialist.tool_evaluation import answer_cases, bfcl_cases, embedded_cases, rates, rates_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository of a tool-calling specialist")
    parser.add_argument("--bfcl", type=Path, help="folder with BFCL_*.jsonl files and their answers")
    parser.add_argument("--cases", type=int, default=200, help="embedded cases (default 200)")
    parser.add_argument("--limit", type=int, default=None, help="cases of each leaderboard file (default all)")
    parser.add_argument("--mode", default="full", help="decoding mode, as in `stagewise generate`")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="also write the JSON under benchmarks/results/")
    options = parser.parse_args()

    model = load(options.model, dtype=options.dtype, device="cuda" if torch.cuda.is_available() else None)
    tokenizer = load_tokenizer(options.model)
    sets = {"embedded, held out": embedded_cases(options.cases, options.seed)}
    if options.bfcl is not None:
        sets |= bfcl_cases(options.bfcl, options.limit)
    found: dict[str, Any] = {}
    for name, cases in sets.items():
        columns = {}
        for constrained in (False, True):
            begun = time.perf_counter()
            answers = answer_cases(
                model, tokenizer, cases, constrained=constrained, strategy=options.mode, batch=options.batch,
                max_new_tokens=options.max_new_tokens, limits={"max_string": 48, "max_items": 8},
            )  # fmt: skip
            title = "constrained" if constrained else "free"
            columns[title] = {**rates(answers), "too_long": sum(not a.text for a in answers)}
            columns[title]["seconds"] = round(time.perf_counter() - begun, 1)
        found[name] = columns
        print(f"\n{name} ({len(cases)} cases)\n{rates_table(columns)}")
    settings = {key: value for key, value in vars(options).items() if key not in ("bfcl", "save")}
    settings |= {"model": Path(options.model).parent.name, "training": model.config.stage_training}
    result = {"benchmark": "tools", "settings": settings, "functions": functions_manifest(), "rates": found}
    result |= {"provenance": provenance()}
    if options.save:
        machine = str(hardware().get("processor", "machine")).lower().replace(" ", "-")[:40]
        write_json(Path(__file__).parent / "results" / f"{date.today()}-{machine}-tools.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
