"""lm-evaluation-harness on staged models: the model class `stagewise`, with mode and depth as model_args.

Design choices:
- Scoring reads the same token scores as `stagewise evaluate`, so bits_per_byte here and BPB there are one number.
- `mode` decides which distribution is scored and how text is generated: full (the model's default output), final,
  prefix and stage (with `depth`), wand (each position by the product at its exit), speculative and wand-verified
  (scored as full, whose text they produce).
- Every text starts with exactly one bos; a document longer than the context is cut as in `rows.windows`.
- lm_eval is imported when the class is first asked for: it is an extra.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

MODES = ("full", "final", "prefix", "stage", "wand", "wand-verified", "speculative")

# nanochat's CORE: name there, task here (None: lm-eval has no such task), few-shot examples
CORE_TASKS: tuple[tuple[str, str | None, int], ...] = (
    ("hellaswag_zeroshot", "hellaswag", 0),
    ("jeopardy", None, 10),
    ("bigbench_qa_wikidata", "bigbench_qa_wikidata_generate_until", 10),
    ("arc_easy", "arc_easy", 10),
    ("arc_challenge", "arc_challenge", 10),
    ("copa", "copa", 0),
    ("commonsense_qa", "commonsense_qa", 10),
    ("piqa", "piqa", 10),
    ("openbook_qa", "openbookqa", 0),
    ("lambada_openai", "lambada_openai", 0),
    ("hellaswag", "hellaswag", 10),
    ("winograd", "wsc273", 0),
    ("winogrande", "winogrande", 0),
    ("bigbench_dyck_languages", "bigbench_dyck_languages_generate_until", 10),
    ("agi_eval_lsat_ar", "agieval_lsat_ar", 3),
    ("bigbench_cs_algorithms", "bigbench_cs_algorithms_generate_until", 10),
    ("bigbench_operators", "bigbench_operators_generate_until", 10),
    ("bigbench_repeat_copy_logic", "bigbench_repeat_copy_logic_generate_until", 10),
    ("squad", "squad_completion", 10),
    ("coqa", "coqa", 0),
    ("boolq", "boolq", 10),
    ("bigbench_language_identification", "bigbench_language_identification_multiple_choice", 10),
)


class Scorer:
    """Log-likelihoods of token rows under one mode of a model."""

    def __init__(self, model: Any, mode: str = "full", depth: int | None = None, safety: float = 1.0) -> None:
        from stagewise.evaluation.bpb import default_output, expert_count

        if mode not in MODES:
            raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")
        if (mode in ("prefix", "stage")) != (depth is not None):
            raise ValueError(f"depth={depth} with mode={mode!r}: prefix and stage need a depth, the others take none")
        self.model, self.mode, self.thresholds = model, mode, None
        experts = expert_count(model)
        if mode not in ("full", "final"):
            model.require_stages()
        self.stages: int | None = experts or None
        self.name = "final_path"
        if mode == "prefix":
            if not 1 <= depth <= experts:  # type: ignore[operator]
                raise ValueError(f"depth={depth} is out of range: prefixes of this model have 1 to {experts} stages")
            self.name, self.stages = f"prefix_{depth}", depth
        elif mode == "stage":
            model.check_stage(depth, "depth")
            self.name, self.stages = f"stage_{depth}", depth + 1  # type: ignore[operator]
        elif mode == "wand":
            from stagewise.modeling.strategy import Strategy, exit_thresholds

            self.thresholds = exit_thresholds(model.config, Strategy("wand", safety=safety))
        elif mode != "final" and default_output(model) == "product":
            self.name = f"prefix_{experts}"
        self.every = torch.ones(int(model.config.vocab_size), dtype=torch.long)  # score special tokens too

    def score(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities (B, T) of the targets in nats, 0 where ignored (-1), and whether each is the greedy
        choice.
        """
        from stagewise.evaluation.bpb import score_tokens

        final, exits = self.name == "final_path" and self.thresholds is None, self.thresholds is not None
        scores = score_tokens(
            self.model, inputs, targets, self.every, final=final, exits=exits, stages=0 if final else self.stages
        )
        hit = scores.top1 == scores.targets
        if self.thresholds is None:
            row = scores.row(self.name)
            nll, greedy = scores.nll[row], hit[row]
        else:
            assert scores.margin is not None and self.stages is not None
            limits = torch.tensor(self.thresholds, device=scores.margin.device)[:, None]
            leaves = torch.cat([scores.margin[:-1] > limits, torch.ones_like(scores.margin[:1], dtype=torch.bool)])
            depth = leaves.int().argmax(0)[None]  # (1, N)
            first = scores.row("prefix_1")
            nll = scores.nll[first : first + self.stages].gather(0, depth)[0]
            greedy = hit[first : first + self.stages].gather(0, depth)[0]
        return -nll.view(inputs.shape).cpu(), greedy.view(inputs.shape).cpu()


@cache
def lm_class() -> type:
    """The model class `stagewise`, registered with lm-eval; `RuntimeError` naming the extra when lm-eval is missing."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise RuntimeError("lm-eval is not installed: pip install 'stagewise[eval]'") from error

    @register_model("stagewise")
    class StagewiseLM(TemplateLM):
        """lm-eval model. model_args: pretrained, mode, depth, safety, draft_stage, k_draft, dtype, device, max_length,
        batch_size (rows a batch), max_gen_toks."""

        backend = "causal"

        def __init__(
            self,
            pretrained: str | Any,
            tokenizer: Any = None,
            mode: str = "full",
            depth: int | None = None,
            safety: float = 1.0,
            draft_stage: int = 0,
            k_draft: int = 4,
            revision: str | None = None,
            dtype: str | None = None,
            device: str | None = None,
            batch_size: int | str = 8,
            max_batch_size: int | None = None,
            max_length: int | None = None,
            max_gen_toks: int | None = None,
        ) -> None:
            super().__init__()
            from stagewise.modeling import load, load_tokenizer
            from stagewise.modeling.strategy import Strategy

            if isinstance(pretrained, str | Path):
                place = device or ("cuda" if torch.cuda.is_available() else "cpu")
                self.model = load(pretrained, revision=revision, dtype=dtype, device=place).eval()
                self.tokenizer = tokenizer or load_tokenizer(pretrained, revision=revision)
            else:
                if tokenizer is None:
                    raise ValueError("tokenizer is needed beside a model that is loaded already")
                self.model, self.tokenizer = pretrained.eval(), tokenizer
            self.name = str(pretrained) if isinstance(pretrained, str | Path) else "stagewise"
            self.scorer = Scorer(self.model, mode, depth, safety)
            settings: dict[str, Any] = {"safety": safety, "draft_stage": draft_stage, "k_draft": k_draft}
            if mode == "prefix":
                settings["max_stages"] = depth
            elif mode == "stage":
                settings["stage"] = depth
            elif mode == "wand-verified":
                settings["verified"] = True
            elif mode == "final" and not self.model.config.is_specialist:
                settings["head_mode"] = "base"
            kind = {"wand-verified": "wand", "final": "full"}.get(mode, mode)
            self.strategy = Strategy(kind, **settings)
            automatic = isinstance(batch_size, str) and batch_size.startswith("auto")
            self.batch_size = max_batch_size or 8 if automatic else int(batch_size)
            limit = int(self.model.config.max_position_embeddings)
            self.max_length = limit if max_length is None else max_length
            if not 2 <= self.max_length <= limit:
                raise ValueError(f"max_length={max_length} must lie between 2 and the model's context of {limit}")
            self.max_gen_toks = min(256, self.max_length // 2) if max_gen_toks is None else max_gen_toks
            self._device = self.model.device

        @property
        def eot_token_id(self) -> int:
            return self.tokenizer.bos_token_id  # bos begins the next document

        @property
        def tokenizer_name(self) -> str:
            return self.name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            ids = self.tokenizer.encode(string, add_special_tokens=False)
            return ids if add_special_tokens is False else list(self.tokenizer.ensure_bos(ids))

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )

        def _scored(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], quiet: bool) -> list[tuple[float, bool]]:
            """Sum of log-probabilities and greediness per row of (inputs, targets), longest rows first."""
            from tqdm import tqdm

            from stagewise.evaluation.bpb import inference
            from stagewise.evaluation.rows import pad_rows

            order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
            results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
            with inference(self.model), tqdm(total=len(rows), desc="Scoring", disable=quiet) as bar:
                for start in range(0, len(order), self.batch_size):
                    picked = order[start : start + self.batch_size]
                    inputs, targets = pad_rows([rows[i] for i in picked], self.eot_token_id)
                    logp, greedy = self.scorer.score(inputs, targets)
                    ignored = targets == -1
                    for i, total, all_greedy in zip(
                        picked, logp.sum(1).tolist(), (greedy | ignored).all(1).tolist(), strict=True
                    ):
                        results[i] = (total, all_greedy)
                    bar.update(len(picked))
            return results

        def _loglikelihood_tokens(
            self,
            requests: list[tuple[tuple[str, str], list[int], list[int]]],
            disable_tqdm: bool = False,
            **kwargs: Any,
        ) -> list[tuple[float, bool]]:
            rows = []
            for _, context, continuation in requests:
                stream = (context + continuation)[-(self.max_length + 1) :]
                scored = min(len(continuation), len(stream) - 1)
                rows.append((stream[:-1], [-1] * (len(stream) - 1 - scored) + stream[len(stream) - scored :]))
            results = self._scored(rows, disable_tqdm)
            for (strings, _, _), result in zip(requests, results, strict=True):
                if strings is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, result)
            return results

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            from stagewise.evaluation.rows import windows

            rows, owner = [], []
            for number, request in enumerate(requests):
                for row in windows(self.tokenizer.encode_ordinary(request.args[0]), self.eot_token_id, self.max_length):
                    rows.append(row)
                    owner.append(number)
            totals = [0.0] * len(requests)
            for number, (total, _) in zip(owner, self._scored(rows, disable_tqdm), strict=True):
                totals[number] += total
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            from tqdm import tqdm

            from stagewise.modeling.decoding import decode

            groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
            for number, request in enumerate(requests):
                groups[self._generation(request.args[1])].append(number)
            texts = [""] * len(requests)
            with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
                for (until, most, temperature, top_p, top_k), members in groups.items():
                    params = self._sampling(until, most, temperature, top_p, top_k)
                    for start in range(0, len(members), self.batch_size):
                        picked = members[start : start + self.batch_size]
                        room = self.max_length - most
                        prompts = []
                        for i in picked:
                            ids = self.tok_encode(requests[i].args[0])
                            prompts.append(
                                ids if len(ids) <= room else [self.eot_token_id, *ids[len(ids) - room + 1 :]]
                            )
                        result = decode(self.model, prompts, self.strategy, params, tokenizer=self.tokenizer)
                        for i, ids in zip(picked, result.tokens, strict=True):
                            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
                            texts[i] = cut_at(text, until)
                            self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                        bar.update(len(picked))
            return texts

        def _generation(self, settings: dict[str, Any]) -> tuple[Any, ...]:
            """The settings of a request as a hashable key; `ValueError` for settings that would be ignored."""
            given = dict(settings)
            until = given.pop("until", [])
            until = (until,) if isinstance(until, str) else tuple(until or ())
            most = int(given.pop("max_gen_toks", given.pop("max_new_tokens", self.max_gen_toks)))
            if not 1 <= most < self.max_length:
                raise ValueError(f"max_gen_toks={most} leaves no room for a prompt in a context of {self.max_length}")
            sample = given.pop("do_sample", None)
            temperature = float(given.pop("temperature", 0.0) or 0.0)
            temperature = 0.0 if sample is False else temperature or (1.0 if sample else 0.0)
            top_p, top_k = float(given.pop("top_p", 1.0)), int(given.pop("top_k", 0))
            if given:
                raise ValueError(f"generation settings not understood: {', '.join(sorted(given))}")
            return until, most, temperature, top_p, top_k

        def _sampling(self, until: tuple[str, ...], most: int, temperature: float, top_p: float, top_k: int) -> Any:
            from stagewise.modeling.sampling import SamplingParams

            stops = [text for text in until if text]
            return SamplingParams(
                max_new_tokens=most, temperature=temperature, top_p=top_p, top_k=top_k, stop_strings=stops, seed=0
            )

        def get_model_info(self) -> dict[str, Any]:
            """What lm-eval stores beside its results."""
            return {
                "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
                "model_dtype": str(self.model.dtype),
                "mode": self.scorer.mode,
                "predictor": self.scorer.name if self.scorer.thresholds is None else "prefix at exit",
            }

    return StagewiseLM


def cut_at(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    places = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(places)] if places else text


def expand_tasks(names: Sequence[str]) -> list[tuple[str, int | None]]:
    """(task, few-shot examples or None for the task's own) of task names; `core` stands for nanochat's CORE list."""
    tasks: list[tuple[str, int | None]] = []
    for name in names:
        if name == "core":
            tasks += [(task, shots) for _, task, shots in CORE_TASKS if task is not None]
        else:
            tasks.append((name, None))
    return tasks


def evaluate_tasks(
    lm: Any,
    names: Sequence[str],
    *,
    task_folder: str | Path | None = None,
    limit: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Run lm-eval tasks on a model of class `stagewise`.

    With `task_folder` (local YAML files) only the tasks in it are known and nothing is fetched. Returns lm-eval's
    `results`, `configs`, `versions`, `n-samples` and `higher_is_better`, keyed `task` or `task@shots`.
    """
    lm_class()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = None if task_folder is None else str(task_folder)
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    tasks = expand_tasks(names)
    known = set(manager.all_tasks)
    missing = [task for task, _ in tasks if task not in known]
    if missing:
        where = f"in {folder}" if folder else "in lm-eval"
        raise ValueError(f"no task {', '.join(missing)} {where}")
    merged: dict[str, Any] = defaultdict(dict)
    for task, shots in tasks:
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=bootstrap,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
        )
        for section in ("results", "configs", "versions", "n-samples", "higher_is_better"):
            for name, value in found.get(section, {}).items():
                merged[section][name if shots is None else f"{name}@{shots}"] = value
    return dict(merged)


def main() -> None:
    """lm-eval's own command line with the model class `stagewise` known to it."""
    lm_class()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
