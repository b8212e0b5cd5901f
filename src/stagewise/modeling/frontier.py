"""FrontierCache: an exact key/value cache for rows whose stages have advanced to different depths.

Design choices:
- Every stage of every row has a *frontier*: the number of positions whose keys and values exist there. Frontiers fall
  with depth. What a stage has not consumed yet, the boundary hidden states of the stage below, waits in a queue.
- `advance` runs one stage over its pending positions as a causal mini-prefill. A token that left early is completed
  later, exactly, together with others; nothing is copied between stages and nothing is approximated.
- A row's key for position p lives in slot p - offset. Stale slots lie beyond the frontier, where causality hides them,
  so `rollback` is bookkeeping only. Short-window layers drop what no admissible query can see.
- Only advance, rollback, commit and their like move a frontier; attention inside a layer merely writes and reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from .trunk import StageInputs, attention, windowed_attention

BLOCK = 256  # slots by which storage grows


class LayerGroup:
    """Keys and values of a stage's layers that share one window; one offset per row serves them all."""

    def __init__(self, layers: list[int], window: int, shape: tuple[int, int, int], dtype, device, evicts: bool):
        rows, groups, dim = shape
        self.layers, self.window, self.evicts = layers, window, evicts
        self.keys = {i: torch.empty(rows, groups, 0, dim, dtype=dtype, device=device) for i in layers}
        self.values = {i: torch.empty(rows, groups, 0, dim, dtype=dtype, device=device) for i in layers}
        self.capacity = 0
        self.offsets = [0] * rows

    def reserve(self, starts: list[int], width: int, keep_from: list[int]) -> None:
        """Make room for positions starts .. starts + width - 1; positions from `keep_from` on must survive."""
        need = max(s + width - o for s, o in zip(starts, self.offsets, strict=True))
        if need <= self.capacity:
            return
        if self.evicts:
            target = [max(o, min(k, s)) for o, k, s in zip(self.offsets, keep_from, starts, strict=True)]
            need_after = max(s + width - o for s, o in zip(starts, target, strict=True))
            live = max(s - o for s, o in zip(starts, target, strict=True))
            if target != self.offsets:
                self.move([t - o for t, o in zip(target, self.offsets, strict=True)], live)
                self.offsets = target
            need = need_after
        if need > self.capacity:
            self.resize(-(-need // BLOCK) * BLOCK)

    def move(self, shifts: list[int], live: int) -> None:
        """Shift every row's slots down by its own amount, keeping `live` slots."""
        for store in (self.keys, self.values):
            for t in store.values():
                for r, shift in enumerate(shifts):
                    if shift and live:
                        stop = min(shift + live, self.capacity)
                        t[r, :, : stop - shift] = t[r, :, shift:stop].clone()

    def resize(self, capacity: int) -> None:
        keep = min(capacity, self.capacity)
        for store in (self.keys, self.values):
            for i, t in store.items():
                new = t.new_zeros(t.size(0), t.size(1), capacity, t.size(3))
                new[:, :, :keep] = t[:, :, :keep]
                store[i] = new
        self.capacity = capacity

    def select(self, rows: Tensor) -> None:
        for store in (self.keys, self.values):
            for i, t in store.items():
                store[i] = t.index_select(0, rows)
        self.offsets = [self.offsets[r] for r in rows.tolist()]

    def oversized(self) -> bool:
        return self.evicts and self.capacity > 2 * (self.window + BLOCK)

    def trim(self, keep_from: list[int], frontier: list[int]) -> None:
        """Give memory back once far more is allocated than the window needs (after a long prefill)."""
        target = [max(o, k) for o, k in zip(self.offsets, keep_from, strict=True)]
        live = max(f - t for f, t in zip(frontier, target, strict=True))
        if live + BLOCK <= self.capacity // 2:
            self.move([t - o for t, o in zip(target, self.offsets, strict=True)], live)
            self.offsets = target
            self.resize(-(-(live + 1) // BLOCK) * BLOCK)

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for s in (self.keys, self.values) for t in s.values())


class CachedAttention:
    """`attend` of one stage for one advance: writes the new keys and values, attends over everything visible.

    When all rows stand at the same position there is no index arithmetic: slices are written and read, and a single
    new token needs no mask.
    """

    def __init__(self, node: StageNode, inputs: StageInputs, scale: float, fp32: bool):
        self.node, self.scale, self.fp32 = node, scale, fp32
        self.starts, self.length = inputs.starts, inputs.ids.size(1)
        device = inputs.ids.device
        self.kernels = inputs.kernels
        if self.kernels is not None:
            self.first_slots = {}
            for g in node.groups:
                first = [s - o for s, o in zip(self.starts, g.offsets, strict=True)]
                assert min(first) >= 0 and max(first) + self.length <= g.capacity
                self.first_slots[id(g)] = torch.tensor(first)
            return
        uniform = len(set(self.starts)) == 1 and all(len(set(g.offsets)) == 1 for g in node.groups)
        self.uniform = uniform
        self.masks: dict[int, Tensor | None] = {}
        self.spans: dict[int, tuple[int, int]] = {}
        if not uniform:
            starts = torch.tensor(self.starts, device=device)
            self.rows = torch.arange(len(self.starts), device=device)[:, None]
            self.positions = starts[:, None] + torch.arange(self.length, device=device)  # (B, T)
            self.slots = {id(g): self.positions - torch.tensor(g.offsets, device=device)[:, None] for g in node.groups}
        for g in node.groups:
            self.spans[id(g)], self.masks[id(g)] = self.view(g, device)

    def view(self, g: LayerGroup, device) -> tuple[tuple[int, int], Tensor | None]:
        """The slots to read and which of them each query sees (None: all)."""
        if self.uniform:
            start, offset = self.starts[0], g.offsets[0]
            stop = start + self.length
            first = max(0, start - g.window)
            if self.length == 1:
                return (max(first, offset) - offset, stop - offset), None
            first = max(first, offset)
            queries = torch.arange(start, stop, device=device)[:, None]
            keys = torch.arange(first, stop, device=device)[None, :]
            mask = (keys <= queries) & (keys >= queries - g.window)
            return (first - offset, stop - offset), mask
        slots = self.slots[id(g)]
        low = max(0, min(s - g.window - o for s, o in zip(self.starts, g.offsets, strict=True)))
        high = max(s + self.length - o for s, o in zip(self.starts, g.offsets, strict=True))
        keys = torch.arange(low, high, device=device)
        mask = (keys <= slots[..., None]) & (keys >= slots[..., None] - g.window)  # (B, T, S)
        return (low, high), mask.unsqueeze(1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        g = self.node.group_of[layer]
        keys, values = g.keys[layer], g.values[layer]
        if self.kernels is not None:
            return self.kernels.attend(q, k, v, keys, values, self.first_slots[id(g)], g.window, self.scale)
        if self.uniform:
            slot = self.starts[0] - g.offsets[0]
            keys[:, :, slot : slot + self.length] = k
            values[:, :, slot : slot + self.length] = v
            if self.starts[0] == 0:
                return windowed_attention(q, k, v, g.window, self.scale, self.fp32)
        else:
            slots = self.slots[id(g)]
            keys[self.rows, :, slots] = k.transpose(1, 2)
            values[self.rows, :, slots] = v.transpose(1, 2)
        low, high = self.spans[id(g)]
        return attention(q, keys[:, :, low:high], values[:, :, low:high], self.scale, self.masks[id(g)], fp32=self.fp32)


class Chunk:
    """Boundary states of consecutive positions per row, waiting for the stage above."""

    def __init__(self, starts: list[int], counts: list[int], hidden: Tensor, tap: Tensor | None):
        self.starts, self.counts, self.hidden, self.tap = list(starts), list(counts), hidden, tap

    def select(self, rows: Tensor) -> Chunk:
        chosen = rows.tolist()
        tap = None if self.tap is None else self.tap.index_select(0, rows)
        return Chunk(
            [self.starts[r] for r in chosen],
            [self.counts[r] for r in chosen],
            self.hidden.index_select(0, rows),
            tap,
        )


class StageNode:
    """One stage on one path: its frontier, its keys and values, and the queue of what it has not consumed."""

    def __init__(self, model, stage: int, path: str, parent: StageNode | None, rows: int, dtype, device, retain_all):
        config = model.config
        self.stage, self.path, self.parent = stage, path, parent
        self.children: list[StageNode] = []
        self.frontier = [0] * rows
        self.queue: list[Chunk] = []
        by_window: dict[int, list[int]] = {}
        first, last = model.stage_range(stage, path)
        for i in range(first, last):
            by_window.setdefault(model.layer_window(i, path), []).append(i)
        shape = (rows, config.num_key_value_heads, config.head_dim)
        context = config.max_position_embeddings
        self.groups = [
            LayerGroup(layers, w, shape, dtype, device, evicts=w < context - 1 and not retain_all)
            for w, layers in by_window.items()
        ]
        self.group_of = {i: g for g in self.groups for i in g.layers}

    def take(self, stops: list[int]) -> tuple[Tensor, Tensor | None]:
        """Pending states (B, T, D) of positions frontier .. stops of every row, T the longest row's count."""
        counts = [max(0, s - f) for s, f in zip(stops, self.frontier, strict=True)]
        width = max(counts)
        hidden = [c.hidden for c in self.queue]
        taps = [c.tap for c in self.queue if c.tap is not None]  # a stage has taps for all chunks or for none
        expected, full = list(self.frontier), True
        for c in self.queue:
            full = full and c.starts == expected and set(c.counts) == {c.hidden.size(1)}
            expected = [e + c.hidden.size(1) for e in expected]
        if full:  # every chunk is complete and in order: concatenation is the whole answer
            h = hidden[0] if len(hidden) == 1 else torch.cat(hidden, dim=1)
            return h[:, :width], torch.cat(taps, dim=1)[:, :width] if taps else None
        index, base = [[0] * width for _ in counts], 0
        for c in self.queue:
            for r, n in enumerate(c.counts):
                place = c.starts[r] - self.frontier[r]
                first, last = max(0, place), min(place + n, counts[r])
                if first < last:
                    index[r][first:last] = range(base + first - place, base + last - place)
            base += c.hidden.size(1)
        where = torch.tensor(index, device=hidden[0].device)[..., None]  # (B, T, 1)
        gathered = torch.cat(hidden, dim=1).take_along_dim(where, dim=1)
        return gathered, torch.cat(taps, dim=1).take_along_dim(where, dim=1) if taps else None

    def drop_consumed(self) -> None:
        self.queue = [
            c
            for c in self.queue
            if any(n and s + n > f for s, n, f in zip(c.starts, c.counts, self.frontier, strict=True))
        ]

    def truncate(self, row: int, length: int) -> None:
        self.frontier[row] = min(self.frontier[row], length)
        for c in self.queue:
            c.counts[row] = max(0, min(c.counts[row], length - c.starts[row]))
        self.drop_consumed()


class FrontierCache(Cache):
    """Keys, values and pending states of B rows.

    Args:
        model: a PoEForCausalLM; dtype and device follow it.
        rows: B.
        paths: "base" and/or names of attached specialists; their stages share whatever their overlays allow.
        retain_all: keep every key of short-window layers, so that any rollback is possible.
    """

    is_compileable = False

    def __init__(self, model, rows: int, paths: Sequence[str] = ("base",), retain_all: bool = False):
        super().__init__(layers=[])
        self.model, self.rows, self.retain_all = model, rows, retain_all
        self.dtype, self.device = model.dtype, model.device
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.committed = [0] * rows
        self.padded_length = 0  # columns transformers' generate has shown so far
        self.nodes: dict[str, list[StageNode]] = {}
        self._inputs: dict[str, StageInputs] = {}
        self._prefix: dict[tuple, StageNode] = {}
        for path in paths:
            self.add_path(path)

    def add_path(self, path: str) -> None:
        """Add the stages of a path. Stages that compute the same function of the ids are shared, not repeated."""
        parent, nodes = None, []
        for stage in self.model.path_stages(path):
            key = self.model.stage_key(stage, path)
            node = self._prefix.get(key)
            if node is None:
                node = StageNode(self.model, stage, path, parent, self.rows, self.dtype, self.device, self.retain_all)
                if parent is not None:
                    if any(parent.frontier):
                        raise ValueError(f"path {path!r} must be added before its parent stages have advanced")
                    parent.children.append(node)
                self._prefix[key] = node
            nodes.append(node)
            parent = node
        self.nodes[path] = nodes

    # -- what the rows hold

    def lengths(self) -> list[int]:
        """Number of ids of every row, provisional ones included."""
        return [len(x) for x in self.ids]

    def frontier(self, stage: int, path: str = "base") -> list[int]:
        return list(self.nodes[path][stage].frontier)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append ids to every row (possibly none); the stages have yet to see them."""
        limit = self.model.config.max_position_embeddings
        for r, new in enumerate(tokens):
            if len(self.ids[r]) + len(new) > limit:
                raise ValueError(
                    f"row {r}: {len(self.ids[r]) + len(new)} tokens exceed the context of {limit} "
                    "(max_position_embeddings)"
                )
        for r, new in enumerate(tokens):
            self.ids[r].extend(new)

    def stage_inputs(self, starts: list[int], counts: list[int], path: str) -> StageInputs:
        """Inputs for the given positions; remembered, because the stages of a round mostly ask for the same ones."""
        last = self._inputs.get(path)
        if last is not None and last.starts == starts and last.counts == counts:
            return last
        width = max(counts)
        before, ids = [], []
        for r, (s, n) in enumerate(zip(starts, counts, strict=True)):
            row = self.ids[r]
            before.append(row[s - 1] if s else -1)
            ids.append(row[s : s + n] + [0] * (width - n))
        inputs = self.model.stage_inputs(
            torch.tensor(ids, device=self.device), path=path, starts=list(starts), counts=list(counts), before=before
        )
        self._inputs[path] = inputs
        return inputs

    # -- moving frontiers

    def advance(self, stage: int, stops: Sequence[int] | None = None, path: str = "base"):
        """Run `stage` over its pending positions, up to `stops` per row (all that the stage below has reached).

        Returns (output, starts, counts): hidden and tap (B, T, D) of positions starts .. starts + counts - 1 per row;
        None in place of the output when nothing was pending.
        """
        nodes = self.nodes[path]
        node = nodes[stage]
        reach = node.parent.frontier if node.parent is not None else self.lengths()
        ends = list(reach) if stops is None else [min(a, b) for a, b in zip(stops, reach, strict=True)]
        starts = list(node.frontier)
        counts = [max(0, e - s) for e, s in zip(ends, starts, strict=True)]
        width = max(counts)
        if width == 0:
            return None, starts, counts
        inputs = self.stage_inputs(starts, counts, node.path)
        if node.parent is None:
            hidden, tap = inputs.x0, None
        else:
            hidden, tap = node.take([s + n for s, n in zip(starts, counts, strict=True)])
        for g in node.groups:
            g.reserve(starts, width, self.needed_from(node, g))
        output = self.model.run_stage(node.stage, hidden, inputs, cache=self)
        if output.tap is None:
            output.tap = tap
        node.frontier = [s + n for s, n in zip(starts, counts, strict=True)]
        node.drop_consumed()
        for child in node.children:
            child.queue.append(Chunk(starts, counts, output.hidden, output.tap))
        return output, starts, counts

    def attention(self, stage: int, inputs: StageInputs) -> CachedAttention:
        """`attend` for run_stage: reads and writes this cache, moves nothing."""
        node = self.nodes[inputs.path][stage] if inputs.path in self.nodes else None
        if node is None:
            raise ValueError(f"the cache holds no path {inputs.path!r}")
        return CachedAttention(node, inputs, self.model.attention_scale, self.model.config.fp32_attention)

    def needed_from(self, node: StageNode, group: LayerGroup) -> list[int]:
        """First position whose keys a later query may see: a window before the earliest position it can return to."""
        return [max(0, min(c, f) - group.window) for c, f in zip(self.committed, node.frontier, strict=True)]

    def all_nodes(self) -> list[StageNode]:
        return list(self._prefix.values())

    def commit(self, lengths: Sequence[int]) -> None:
        """Declare the first `lengths` tokens of every row final: short-window layers may forget what they hide."""
        self.committed = [max(c, min(n, len(x))) for c, n, x in zip(self.committed, lengths, self.ids, strict=True)]
        for node in self.all_nodes():
            for g in node.groups:
                if g.oversized():
                    g.trim(self.needed_from(node, g), node.frontier)

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forget every position at or beyond `lengths` per row.

        Raises ValueError when a short-window layer has already dropped keys that a query there would need: roll back
        no further than the committed length, or build the cache with retain_all=True.
        """
        for node in self.all_nodes():
            for g in node.groups:
                for r, n in enumerate(lengths):
                    if n < node.frontier[r] and g.offsets[r] > max(0, n - g.window):
                        raise ValueError(
                            f"row {r}: cannot roll back to {n}; layers {g.layers} keep only a window of {g.window} "
                            f"before the committed length {self.committed[r]}. Build the cache with retain_all=True"
                        )
        for r, n in enumerate(lengths):
            del self.ids[r][n:]
            self.committed[r] = min(self.committed[r], n)
            for node in self.all_nodes():
                node.truncate(r, n)
        self._inputs.clear()

    def reset_row(self, row: int) -> None:
        """Empty one row for a new sequence; the others are untouched."""
        self.ids[row], self.committed[row] = [], 0
        for node in self.all_nodes():
            node.truncate(row, 0)
            for g in node.groups:
                g.offsets[row] = 0
        self._inputs.clear()

    def select(self, rows: Sequence[int] | Tensor) -> None:
        """Keep the given rows, in that order; a row may be repeated or left out."""
        index = torch.as_tensor(rows, device=self.device)
        chosen = index.tolist()
        self.ids = [list(self.ids[r]) for r in chosen]
        self.committed = [self.committed[r] for r in chosen]
        self.rows = len(chosen)
        for node in self.all_nodes():
            node.frontier = [node.frontier[r] for r in chosen]
            node.queue = [c.select(index) for c in node.queue]
            for g in node.groups:
                g.select(index)
        self._inputs.clear()

    def fork(self, copies: int) -> None:
        """Repeat every row `copies` times, copies of a row adjacent: n samples from one prefill."""
        self.select([r for r in range(self.rows) for _ in range(copies)])

    def bytes(self) -> int:
        """Bytes allocated for keys, values and pending states."""
        total, seen = 0, set()
        for node in self.all_nodes():
            total += sum(g.bytes() for g in node.groups)
            for c in node.queue:
                for t in (c.hidden, c.tap):
                    if t is not None and t.data_ptr() not in seen:
                        seen.add(t.data_ptr())
                        total += t.numel() * t.element_size()
        return total

    # -- what transformers' generate asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.padded_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.padded_length + query_length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.model.config.max_position_embeddings

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.fork(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def crop(self, tokens: int) -> None:
        """Remove the last `-tokens` positions of every row (transformers counts downwards from zero)."""
        if tokens > 0:
            raise ValueError(f"crop takes a non-positive number of tokens to remove, not {tokens}")
        self.rollback([max(0, n + tokens) for n in self.lengths()])
        self.padded_length = max(0, self.padded_length + tokens)

    def reset(self) -> None:
        for r in range(self.rows):
            self.reset_row(r)
        self.padded_length = 0
