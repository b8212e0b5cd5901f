from __future__ import annotations

import os

import pytest
import torch

from stagewise.modeling import load
from stagewise.modeling.decoding import decode
from stagewise.modeling.frontier import FrontierCache
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy
from stagewise.specialist.delta import write_delta
from stagewise.specialist.growth import grow, open_parent, trainable_names

IDS = torch.cat(
    (torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(5)), torch.arange(256, 265).expand(2, 9)),
    dim=1,
)


@pytest.fixture(scope="module")
def family(base_folder, tokenizer, tmp_path_factory):
    """A base and three specialists: chat and tool share their warm rows, cold has none; chain stands on chat."""
    root = tmp_path_factory.mktemp("family")
    base = base_folder("staged")

    def make(name, parent, seed, warm=True):
        opened = open_parent(parent)
        model = grow(opened, 1 + seed % 2, tokenizer=tokenizer if warm else None, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        first = opened.config.num_hidden_layers
        with torch.no_grad():
            for tensor in trainable_names(model):
                parameter = model.get_parameter(tensor)
                part = parameter[first:] if tensor.endswith("lambdas") else parameter
                part.add_(0.1 * torch.randn(part.shape, generator=generator))
        return write_delta(root / name, model, tokenizer, opened)

    folders = {"base": base, "chat": make("chat", base, 1), "tool": make("tool", base, 2)}
    folders["cold"] = make("cold", base, 3, warm=False)
    folders["chain"] = make("chain", folders["chat"], 4)
    return folders


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_attached_specialists_answer_as_when_loaded_alone(family):
    model = load(family["base"])
    for name in ("chat", "tool", "cold", "chain"):
        model.attach(name, family[name])
    for name in ("chat", "tool", "cold", "chain"):
        alone = load(family[name])
        same(model(IDS, path=name).logits, alone(IDS).logits)
        for head_mode in ("base", "spec"):
            same(model(IDS, path=name, head_mode=head_mode).logits, alone(IDS, head_mode=head_mode).logits)


def test_base_modes_are_bit_identical_before_while_and_after(family):
    model = load(family["base"])
    prompts = [row.tolist() for row in IDS]

    def everything():
        out = [model.forward_aggregated(IDS), model.forward_stage(IDS, 0), model(IDS, output_mode="final").logits]
        for mode in ("full", "speculative:2", "stage:0"):
            out.append(decode(model, prompts, Strategy.parse(mode), SamplingParams(max_new_tokens=12)).tokens)
        return out

    def equal(one, two):
        return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True))

    before = everything()
    model.attach("chat", family["chat"])
    model(IDS, path="chat")
    assert equal(everything(), before)
    model.detach("chat")
    assert equal(everything(), before)
    assert list(model.paths) == ["base"]


def test_attaching_costs_the_deltas_memory_and_leaves_saving_alone(family, tmp_path):
    model = load(family["base"])
    parameters = sum(p.numel() for p in model.parameters())
    branch = model.attach("chat", family["chat"])
    file = os.path.getsize(family["chat"] / "delta.safetensors")
    assert abs(branch.nbytes - file) < 4096  # the file's header and padding
    assert sum(p.numel() for p in model.parameters()) == parameters
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").forward_aggregated(IDS), load(family["base"]).forward_aggregated(IDS))
    model.double()
    assert model(IDS, path="chat").logits.dtype == torch.float64


def test_equal_overlays_share_the_bases_keys_and_values_and_unequal_ones_do_not(family, monkeypatch):
    model = load(family["base"])
    for name in ("chat", "tool", "cold"):
        model.attach(name, family[name])
    assert model.path("chat").overlay_key() == model.path("tool").overlay_key() != model.path("base").overlay_key()
    assert model.path("cold").overlay_key() == model.path("base").overlay_key()  # nothing of the base was changed
    runs = []
    plain = type(model).run_stage
    monkeypatch.setattr(
        type(model),
        "run_stage",
        lambda self, stage, h, i, cache=None: (runs.append(stage), plain(self, stage, h, i, cache))[1],
    )
    cache = FrontierCache(model, 2, paths=("chat", "tool"))
    cache.extend(IDS.tolist())
    ends = {}
    for path in ("chat", "tool"):
        for stage in model.path_stages(path):
            output, _, _ = cache.advance(stage, path=path)
            if output is not None:
                ends[path] = output
    assert sorted(runs) == [0, 1, 2, 2]  # two base stages once, each specialist's own stage once
    for path, output in ends.items():
        same(model.final_logits(output.hidden, output.tap, path=path), load(family[path])(IDS).logits)
    runs.clear()
    cache = FrontierCache(model, 2, paths=("base", "chat", "cold"))
    cache.extend(IDS.tolist())
    for path in ("base", "chat", "cold"):
        for stage in model.path_stages(path):
            cache.advance(stage, path=path)
    assert sorted(runs) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("mode", ["full", "speculative:3", "wand-verified"])
@pytest.mark.parametrize("name", ["chat", "chain"])
def test_lossless_modes_on_an_attached_path_equal_its_own_uncached_greedy_text(family, mode, name):
    model = load(family["base"], dtype=torch.float64)
    model.attach(name, family[name])
    prompts = [IDS[0, :20].tolist(), IDS[1].tolist()]
    settings = {"path": name}
    if mode == "wand-verified":
        settings["p99_bounds"] = (0.5,)
    strategy = Strategy.parse(mode, **settings)
    found = decode(model, prompts, strategy, SamplingParams(max_new_tokens=10, stop_tokens=[]))
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        ids = list(prompt)
        for _ in range(10):
            ids.append(int(model(torch.tensor([ids]), path=name).logits[0, -1].argmax()))
        assert tokens == ids[len(prompt) :]


def test_a_specialist_can_be_attached_beside_a_loaded_one(family):
    model = load(family["chat"])
    model.attach("tool", family["tool"])
    same(model(IDS).logits, load(family["chat"])(IDS).logits)
    same(model(IDS, path="tool").logits, load(family["tool"])(IDS).logits)


def test_what_cannot_be_attached_is_refused_and_changes_nothing(family, base_folder):
    model = load(family["base"])
    model.attach("chat", family["chat"])
    for name, source, words in (
        ("chat", family["tool"], "cannot name an attached specialist"),
        ("base", family["tool"], "cannot name"),
        ("tool", family["base"], "is no specialist"),
        ("tool", "./missing", "no model folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            model.attach(name, source)
    other = load(base_folder("staged", 1))
    with pytest.raises(ValueError, match="grew on another base") as error:
        other.attach("chat", family["chat"])
    assert str(family["chat"]) in str(error.value) and str(base_folder("staged", 1)) in str(error.value)
    assert list(other.paths) == ["base"]
    with pytest.raises(ValueError, match="no attached specialist 'tool'; attached: chat"):
        model.detach("tool")
    with pytest.raises(ValueError, match="unknown path 'tool'"):
        model(IDS, path="tool")


@pytest.mark.parametrize("name", ["mha-4x64", "gqa-6x64"])
def test_attached_reference_specialists_match_the_reference(fixture_dir, name):
    from safetensors.torch import load_file

    folder = fixture_dir / name
    expected, cascade = load_file(folder / "expected.safetensors"), load_file(folder / "expected_cascade.safetensors")
    model = load(folder)
    for path, specialist in (("dual_head", "specialist"), ("overlay", "overlay"), ("chain", "chain")):
        model.attach(path, folder / specialist)

    def close(found, wanted, positions):
        torch.testing.assert_close(found[:, positions].detach(), wanted, atol=1e-4, rtol=1e-4)

    ids, positions = expected["input_ids"], expected["positions"]
    for mode in ("dual", "base", "spec"):
        wanted = expected["specialist.dual_logits" if mode == "dual" else f"specialist.head_{mode}_logits"]
        close(model(ids, path="dual_head", head_mode=mode).logits, wanted, positions)
    ids, positions = cascade["input_ids"], cascade["positions"]
    close(model(ids, path="overlay").logits, cascade["dual_logits"], positions)
    close(model(ids, path="chain").logits, cascade["chain_dual_logits"], positions)
    for k in range(model.config.num_stages):
        close(model.forward_stage(ids, k), cascade[f"base_stage_head_logits.{k}"], positions)
