from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from stagewise.calibration.exits import exit_statistics
from stagewise.calibration.wand_bounds import exit_report, store_bounds, wand_bounds


def test_bounds_are_numpys_exact_percentile_of_the_spread(random_stages):
    model = random_stages(vocab=13)
    ids = torch.randint(0, 13, (4, 501), generator=torch.Generator().manual_seed(0))
    groups = torch.zeros(4, dtype=torch.long)
    statistics = exit_statistics(model, [(ids[:, :-1], ids[:, 1:], groups)])
    logp = model.tables[:, ids[:, :-1].reshape(-1)].log_softmax(-1).numpy()
    means = [logp[: k + 1].mean(0) for k in range(3)]
    expected = [np.percentile(np.ptp(means[j + 1] - means[j], axis=-1), 99) for j in range(2)]
    assert wand_bounds(statistics, minimum=0) == pytest.approx(expected, abs=1e-6)
    exact = [np.quantile(row, 0.99) for row in statistics.spread.double().numpy()]
    assert wand_bounds(statistics, minimum=0) == exact


def test_too_few_tokens_say_how_many_are_needed(statistics_of):
    statistics = statistics_of(np.zeros((2, 1000)), np.zeros((2, 1000), int))
    with pytest.raises(ValueError, match="at least 131,072 tokens, the text holds 1,000"):
        wand_bounds(statistics)


def test_a_token_whose_margin_beats_every_spread_cannot_change():
    generator = torch.Generator().manual_seed(1)
    logp = torch.randn(3, 4000, 6, generator=generator).log_softmax(-1)
    means = torch.stack([logp[: k + 1].mean(0) for k in range(3)])
    change = means[1:] - means[:-1]
    spread = change.amax(-1) - change.amin(-1)
    top = means.topk(2).values
    safe = top[0, :, 0] - top[0, :, 1] > spread.sum(0)
    assert safe.any()
    assert torch.equal(means[0].argmax(-1)[safe], means[2].argmax(-1)[safe])


def test_exit_shares_and_disagreement_are_counted(statistics_of):
    statistics = statistics_of(
        [[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0], [0.0] * 4], [[1, 2, 0, 0]] + [[1, 1, 3, 0]] * 2
    )
    report = exit_report(statistics, [1.0, 1.0])
    assert report == {"safety": 1.0, "exit_shares": [0.5, 0.25, 0.25], "disagreement": 0.25}


def test_bounds_are_stored_without_touching_other_keys(tmp_path):
    config = {"model_type": "cognica_poe", "name": "é", "poe_stage_layers": [1, 1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    store_bounds(tmp_path, [1.25])
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == {**config, "poe_wand_p99_bounds_per_stage_head": [1.25]}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_failed_write_leaves_the_old_config(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"kept": true}')

    def refuse(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        store_bounds(tmp_path, [1.0])
    assert (tmp_path / "config.json").read_text() == '{"kept": true}'
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        store_bounds(tmp_path, [1.0])
