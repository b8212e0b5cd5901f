"""One decoder for every mode: rounds of optional drafting followed by one pass of the deeper stages.

Design choices:
- A round is: the draft stages propose a few tokens per row, then the remaining stages run once over everything
  pending, and the target's scores decide. Without drafts this is ordinary decoding; with the margin test as the rule
  that ends drafting it is verified WAND. Plain WAND, which checks nothing, is the only other loop.
- What drafting computed (states and logits of the draft stages) enters the target's product; nothing runs twice.
- Greedy choices never normalise: the normaliser of a softmax cannot change which score is largest.
- Rows are independent: each has its own length, seed, stopping point and, if it must be, error.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .frontier import FrontierCache
from .pooling import normalise
from .readout import Experts, Final, tail
from .result import Event, Result, merge
from .sampling import Chooser, SamplingParams
from .strategy import Strategy, exit_thresholds


class Row:
    def __init__(self, index: int, limit: int):
        self.index, self.limit = index, limit  # place in the result, most new tokens
        self.tokens: list[int] = []
        self.stages: list[int] = []
        self.logprobs: list[float] = []
        self.finish = ""
        self.error: str | None = None


class Decoder:
    """Decodes rows of one cache with one strategy. Use `decode` unless you need the cache afterwards.

    Args:
        model: a PoEForCausalLM. prompts: ids per row, appended to what the cache holds.
        strategy, params: what to run and how to choose. tokenizer: needed for stop strings only.
        cache: a FrontierCache to go on from, whatever mode filled it; a new one when None.
    """

    def __init__(self, model, prompts, strategy: Strategy, params: SamplingParams, tokenizer=None, cache=None):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.strategy = strategy = strategy.resolve(model)
        self.path = strategy.path or model.default_path
        if strategy.mode in ("prefix", "stage", "composition") and strategy.path is None:
            self.path = "base"
        if strategy.mode != "full" and not (strategy.mode == "speculative" and self.path != "base"):
            model.require_stages()
        if params.stop_strings and tokenizer is None:
            raise ValueError("stop_strings need a tokenizer to compare text with")
        config, stages = model.config, model.config.num_stages
        last = model.path_stages(self.path)[-1]
        whole: Experts | Final = Experts(range(stages))
        if self.path != "base" or config.poe_mode == "none" or strategy.head_mode is not None:
            whole = Final(last, self.path, strategy.head_mode)
        self.target = whole
        self.draft: Experts | None = None
        self.thresholds: list[float] = []
        mode = strategy.mode
        if mode == "prefix":
            count = stages if strategy.max_stages is None else strategy.max_stages
            model.check_stage(count - 1, "max_stages - 1")
            self.target = Experts(range(count))
        elif mode == "stage":
            self.target = Experts([model.check_stage(stages - 1 if strategy.stage is None else strategy.stage)])
        elif mode == "composition":
            chosen = strategy.stages if strategy.stages is not None else tuple(range(stages))
            if not chosen or len(set(chosen)) != len(chosen):
                raise ValueError(f"stages={chosen} must name at least one stage, each once")
            for k in chosen:
                model.check_stage(k, "stages")
            if strategy.weights is not None and len(strategy.weights) != len(chosen):
                raise ValueError(f"stage_weights has {len(strategy.weights)} entries for {len(chosen)} stages")
            self.target = Experts(chosen, strategy.weights)
        elif mode == "speculative":
            model.check_stage(strategy.draft_stage, "draft_stage")
            first = 0 if strategy.draft_prefix else strategy.draft_stage
            self.draft = Experts(range(first, strategy.draft_stage + 1))
        elif mode == "wand":
            if self.path != "base" and not strategy.verified:
                raise ValueError("plain WAND compares base experts; on a specialist's path use verified=True")
            self.thresholds = exit_thresholds(config, strategy)
            if strategy.verified:
                self.draft = Experts([0])
        if self.draft is not None and self.draft.last >= self.target.last:
            self.draft = None  # the drafter is the whole model: there is nothing to gain or to check
        self.prompts = [list(p) for p in prompts]
        self.cache = cache
        self.rows: list[Row] = []
        self.stage_runs = [0] * (last + 1)
        self.drafted = self.accepted = self.rounds = 0
        eos = model.generation_config.eos_token_id if params.stop_tokens is None else params.stop_tokens
        self.stop_tokens = set(eos if isinstance(eos, (list, tuple, set)) else [] if eos is None else [eos])

    # -- rows

    def check(self, ids: list[int]) -> str | None:
        """What is wrong with a row's ids, if anything."""
        config = self.model.config
        if not ids:
            return "the prompt is empty; it needs at least <|bos|>"
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < config.vocab_size)
            return f"token id {wrong} is outside the vocabulary of {config.vocab_size}"
        if len(ids) > config.max_position_embeddings:
            return f"the prompt has {len(ids)} tokens, the context {config.max_position_embeddings}"
        if len(ids) + self.params.max_new_tokens > config.max_position_embeddings:
            return (
                f"{len(ids)} prompt tokens and max_new_tokens={self.params.max_new_tokens} exceed the context of "
                f"{config.max_position_embeddings}"
            )
        return None

    def start(self) -> None:
        """Check the rows, build or extend the cache, fork it for n samples."""
        n = self.params.n
        old = self.cache.ids if self.cache is not None else [[]] * len(self.prompts)
        if len(old) != len(self.prompts):
            raise ValueError(f"the cache has {len(old)} rows, {len(self.prompts)} prompts were given")
        errors = [self.check(past + new) for past, new in zip(old, self.prompts, strict=True)]
        self.compact = self.cache is None  # a cache of ours loses finished rows; a given one keeps its rows
        if self.cache is None:
            good = [r for r, e in enumerate(errors) if e is None]
            self.cache = FrontierCache(self.model, max(1, len(good)), paths=(self.path,))
            if good:
                self.cache.extend([self.prompts[r] for r in good])
        else:
            if any(errors):
                raise ValueError(next(f"row {r}: {e}" for r, e in enumerate(errors) if e))
            if self.path not in self.cache.nodes:
                raise ValueError(f"the cache was made for the paths {', '.join(self.cache.nodes)}, not {self.path!r}")
            good = list(range(len(self.prompts)))
            self.cache.extend(self.prompts)
            lengths = [
                min(len(x) - 1, f) for x, f in zip(self.cache.ids, self.cache.frontier(0, self.path), strict=True)
            ]
            if any(f == len(x) for x, f in zip(self.cache.ids, self.cache.frontier(0, self.path), strict=True)):
                tokens = [x[n:] for x, n in zip(self.cache.ids, lengths, strict=True)]
                self.cache.rollback(lengths)  # the last token runs again: its logits are what comes next
                self.cache.extend(tokens)
        self.all_rows = [Row(r * n + i, self.params.max_new_tokens) for r in range(len(errors)) for i in range(n)]
        for row in self.all_rows:
            if (error := errors[row.index // n]) is not None:
                row.finish, row.error = "error", error
        if n > 1 and good:
            first = self.draft.last + 1 if self.draft is not None else (1 if self.thresholds else self.target.last + 1)
            for k in range(first):
                self.advance(k, [x - 1 for x in self.cache.lengths()])
            self.cache.fork(n)
        self.rows = [row for row in self.all_rows if not row.finish]
        self.chooser = Chooser(self.params, len(self.all_rows), self.model.device)

    def advance(self, stage: int, stops: list[int] | None = None):
        """Run a stage over what is pending in the unfinished rows."""
        if stops is None and any(row.finish for row in self.rows):
            stops = [0 if row.finish else len(x) for row, x in zip(self.rows, self.cache.ids, strict=True)]
        output, _, counts = self.cache.advance(stage, stops, self.path)
        if output is not None:
            self.stage_runs[stage] += 1
        return output, counts

    # -- one round

    def draft_limit(self, row: Row) -> int:
        """Tokens a row may draft: one place is left for the token the target adds."""
        most = self.strategy.max_pending if self.strategy.mode == "wand" else self.strategy.k_draft
        return min(most, row.limit - len(row.tokens) - 1)

    def trusted(self, scores: Tensor) -> list[bool]:
        """Per row, whether the draft scores (B, V) are decisive enough to go on drafting."""
        if self.strategy.mode == "wand":
            top = scores.topk(2, dim=-1).values
            return (top[:, 0] - top[:, 1] > self.thresholds[0]).tolist()
        if self.strategy.draft_confidence > 0:
            return (torch.softmax(scores, -1).amax(-1) >= self.strategy.draft_confidence).tolist()
        return [True] * scores.size(0)

    def processed(self, scores: Tensor, prefixes: list[list[int]]) -> Tensor:
        if self.params.plain and self.params.greedy:
            return scores
        return self.chooser.process(scores if self.params.plain else normalise(scores), prefixes)

    def draft_tokens(self, draft: Experts) -> Iterator[Event]:
        """Let the draft stages propose tokens; leaves drafts, their scores, states and logits in self."""
        rows, cache = self.rows, self.cache
        self.drafts: list[list[int]] = [[] for _ in rows]
        self.draft_scores: list[list[Tensor]] = [[] for _ in rows]
        self.step_states: dict[int, list[Tensor]] = {k: [] for k in range(draft.last + 1)}
        self.step_logits: dict[int, list[Tensor]] = {k: [] for k in draft.stages}
        going = [not row.finish for row in rows]
        while True:
            states: dict[int, Tensor] = {}
            for k in range(draft.last + 1):
                output, counts = self.advance(k)
                states[k] = tail(output.hidden, [max(1, c) for c in counts], [1] * len(rows))
                self.step_states[k].append(states[k])
            known: dict[int, Tensor] = {}
            raw = draft.scores(self.model, states, None, known)[:, 0]
            for k, z in known.items():
                self.step_logits[k].append(z)
            trusted = self.trusted(raw)
            going = [
                g and t and len(d) < self.draft_limit(row) and not (d and d[-1] in self.stop_tokens)
                for g, t, d, row in zip(going, trusted, self.drafts, rows, strict=True)
            ]
            if not any(going):
                return
            scores = self.processed(raw, cache.ids)
            best = scores.argmax(-1).tolist() if self.params.greedy else None
            new: list[list[int]] = []
            for r, row in enumerate(rows):
                new.append([])
                if going[r]:
                    position = len(cache.ids[r])
                    token = best[r] if best is not None else self.chooser.choose(scores[r], row.index, position)
                    self.drafts[r].append(token)
                    self.draft_scores[r].append(scores[r])
                    new[r] = [token]
                    yield Event(row.index, [token], [draft.last], committed=False)
            cache.extend(new)

    def round(self) -> Iterator[Event]:
        """Draft, run the deeper stages once over everything pending, keep what the target agrees with."""
        cache, rows = self.cache, self.rows
        states: dict[int, Tensor] = {}
        known: dict[int, Tensor] = {}
        tap, first = None, 0
        self.drafts = [[] for _ in rows]
        if self.draft is not None:
            yield from self.draft_tokens(self.draft)
            states = {k: torch.cat(s, dim=1) for k, s in self.step_states.items()}
            known = {k: torch.cat(s, dim=1) for k, s in self.step_logits.items()}
            first = self.draft.last + 1
        wanted = [len(d) + 1 for d in self.drafts]
        for k in range(first, self.target.last + 1):
            output, counts = self.advance(k)
            if k in self.target.stages:
                states[k] = tail(output.hidden, counts, wanted)
            if k == self.target.last and output.tap is not None:
                tap = tail(output.tap, counts, wanted)
        raw = self.target.scores(self.model, states, tap, known)  # (B, M, V)
        self.rounds += 1
        prefixes = []
        if self.params.reads_prefix:
            for ids, d in zip(cache.ids, self.drafts, strict=True):
                prefixes += [ids[: len(ids) - len(d) + j] for j in range(len(d) + 1)]
        flat = torch.cat([raw[r, : len(d) + 1] for r, d in enumerate(self.drafts)]) if len(rows) > 1 else raw[0]
        top, best = self.processed(flat, prefixes).max(-1) if self.params.greedy else (flat.amax(-1), None)
        finite = (top == top).tolist()
        scores = None if self.params.greedy else self.processed(flat, prefixes)
        choices = best.tolist() if best is not None else []
        logp = normalise(flat) if self.params.logprobs else None
        base, lengths = 0, []
        new: list[list[int]] = []
        for r, row in enumerate(rows):
            if row.finish:
                base += 1
                lengths.append(len(cache.ids[r]))
                new.append([])
                continue
            drafts = self.drafts[r]
            position = len(cache.ids[r]) - len(drafts)
            kept: list[int] = []
            if not all(finite[base : base + len(drafts) + 1]):
                row.finish = "error"
                row.error = "the model produced NaN logits; its weights or inputs are damaged"
            else:
                for j in range(len(drafts) + 1):
                    draft = drafts[j] if j < len(drafts) else None
                    if scores is None:
                        token = choices[base + j]
                        agreed = token == draft
                    elif draft is not None:
                        agreed, token = self.chooser.verify(
                            draft, self.draft_scores[r][j], scores[base + j], row.index, position + j
                        )
                    else:
                        agreed, token = False, self.chooser.choose(scores[base + j], row.index, position + j)
                    kept.append(token)
                    row.stages.append(self.draft.last if agreed and self.draft else self.target.last)
                    if logp is not None:
                        row.logprobs.append(float(logp[base + j, token]))
                    self.accepted += agreed
                    if not agreed or token in self.stop_tokens:
                        break
                self.drafted += len(drafts)
            base += len(drafts) + 1
            before = len(row.tokens)
            yield from self.commit(row, kept)
            kept = row.tokens[before:]
            lengths.append(position + len(kept) - 1 if kept else position)
            new.append(kept[-1:])
        self.settle(lengths, new)

    def wand_step(self) -> Iterator[Event]:
        """One token per row from the shallowest stage whose margin clears its threshold; nothing is checked."""
        cache, rows = self.cache, self.rows
        stages = self.model.config.num_stages
        total: Tensor | None = None
        undecided = [r for r in range(len(rows)) if not rows[r].finish]
        tokens, used = [-1] * len(rows), [stages - 1] * len(rows)
        logp: dict[int, float] = {}
        lengths = cache.lengths()
        for k in range(stages):
            stops = [lengths[r] if r in undecided else 0 for r in range(len(rows))]
            output, counts = self.advance(k, stops)
            state = tail(output.hidden, [max(1, c) for c in counts], [1] * len(rows))
            pick = torch.tensor(undecided, device=state.device)
            state = state if len(undecided) == len(rows) else state.index_select(0, pick)
            logits = self.model.expert_logits([k], [state])[0][:, 0]
            if total is None:
                total = logits
            else:
                total = total + logits
            mean = total / (k + 1)
            scores = self.processed(mean, [cache.ids[r] for r in undecided])
            top = mean.topk(2, dim=-1).values
            margin = (top[:, 0] - top[:, 1]).tolist()
            leaving = [i for i in range(len(undecided)) if k == stages - 1 or not margin[i] <= self.thresholds[k]]
            for i in leaving:
                r = undecided[i]
                if margin[i] != margin[i]:
                    rows[r].finish = "error"
                    rows[r].error = "the model produced NaN logits; its weights are damaged"
                    continue
                tokens[r] = self.chooser.choose(scores[i], rows[r].index, lengths[r])
                used[r] = k
                if self.params.logprobs:
                    logp[r] = float(normalise(mean[i])[tokens[r]])
            stay = [i for i in range(len(undecided)) if i not in set(leaving)]
            if not stay:
                break
            if leaving:
                total = total.index_select(0, torch.tensor(stay, device=total.device))
                undecided = [undecided[i] for i in stay]
        self.rounds += 1
        new = []
        for r, row in enumerate(rows):
            kept = [tokens[r]] if tokens[r] >= 0 else []
            if kept:
                row.stages.append(used[r])
                if r in logp:
                    row.logprobs.append(logp[r])
            yield from self.commit(row, kept)
            new.append(kept)
        self.settle(lengths, new)

    # -- bookkeeping

    def commit(self, row: Row, kept: list[int]) -> Iterator[Event]:
        """Append tokens to a row and find out whether it is finished."""
        fresh = len(row.tokens)
        for token in kept:
            row.tokens.append(token)
            if token in self.stop_tokens or self.ends_with_stop_string(row):
                row.finish = "stop"
                break
            if len(row.tokens) >= row.limit:
                row.finish = "length"
                break
        del row.stages[len(row.tokens) :], row.logprobs[len(row.tokens) :]
        if kept:
            yield Event(row.index, row.tokens[fresh:], row.stages[fresh:], committed=True)

    def ends_with_stop_string(self, row: Row) -> bool:
        if not self.params.stop_strings:
            return False
        longest = max(len(s.encode()) for s in self.params.stop_strings)
        text = self.tokenizer.decode(row.tokens[-longest - 8 :])
        return any(s in text for s in self.params.stop_strings)

    def settle(self, lengths: list[int], new: list[list[int]]) -> None:
        """Undo what was not kept, append what was, let finished rows go."""
        if any(n < len(ids) for n, ids in zip(lengths, self.cache.ids, strict=True)):
            self.cache.rollback(lengths)
        self.cache.extend(new)
        self.cache.commit([len(x) - 1 for x in self.cache.ids])
        if self.compact and any(row.finish for row in self.rows):
            keep = [r for r, row in enumerate(self.rows) if not row.finish]
            self.rows = [self.rows[r] for r in keep]
            if keep:
                self.cache.select(keep)

    def run(self) -> Iterator[Event]:
        """Decode all rows, yielding events; the result is ready when the iterator ends."""
        began = time.perf_counter()
        self.first_commit: float | None = None
        with torch.no_grad():
            self.start()
        step = self.wand_step if self.thresholds and self.draft is None else self.round
        while any(not row.finish for row in self.rows):
            events = step()
            while True:
                with torch.no_grad():  # not around the yield: the caller's code is not ours to switch
                    event = next(events, None)
                if event is None:
                    break
                yield event
            if self.first_commit is None:
                self.first_commit = time.perf_counter() - began
        self.seconds = time.perf_counter() - began

    def result(self) -> Result:
        rows = self.all_rows
        return Result(
            tokens=[r.tokens for r in rows],
            stages_used=[r.stages for r in rows],
            finish=[r.finish for r in rows],
            errors=[r.error for r in rows],
            logprobs=[r.logprobs for r in rows] if self.params.logprobs else None,
            drafted=self.drafted,
            accepted=self.accepted,
            rounds=self.rounds,
            stage_runs=self.stage_runs,
            prefill_seconds=self.first_commit or 0.0,
            seconds=self.seconds,
        )


def decode(
    model,
    prompts: Sequence[Sequence[int]],
    strategy: Strategy | str = "full",
    params: SamplingParams | None = None,
    *,
    tokenizer=None,
    streamer=None,
    max_batch: int | None = None,
    raise_errors: bool = True,
) -> Result:
    """Decode prompts of any lengths together.

    Args:
        prompts: token ids per row; <|bos|> is the caller's (see PoETokenizer.ensure_bos).
        strategy: a Strategy or its short form ("prefix:2"). params: how to choose and stop; greedy by default.
        streamer: a transformers streamer for a single row. max_batch: rows decoded at a time (all when None).
        raise_errors: raise ValueError for the first bad row once the others are done; False records it in the result.
    """
    strategy = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    params = params or SamplingParams()
    if streamer is not None and (len(prompts) != 1 or params.n != 1):
        raise ValueError("a streamer shows one row; give one prompt and n=1")
    size = max_batch or max(1, len(prompts))
    seeds = params.row_seeds(len(prompts) * params.n) if params.seed is not None else None
    results = []
    for i in range(0, max(1, len(prompts)), size):
        part = prompts[i : i + size]
        chosen = params if seeds is None else replace(params, seed=seeds[i * params.n : (i + len(part)) * params.n])
        decoder = Decoder(model, part, strategy, chosen, tokenizer)
        if streamer is not None:
            streamer.put(torch.tensor([list(part[0])]))
        for event in decoder.run():
            if streamer is not None and event.committed:
                for token in event.tokens:
                    streamer.put(torch.tensor([token]))
        results.append(decoder.result())
    if streamer is not None:
        streamer.end()
    result = results[0] if len(results) == 1 else merge(results)
    if raise_errors:
        for r, error in enumerate(result.errors):
            if error is not None:
                raise ValueError(error if len(result.errors) == 1 else f"row {r}: {error}")
    return result
