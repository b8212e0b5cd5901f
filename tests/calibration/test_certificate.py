from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from stagewise.calibration.certificate import (
    SAFETY_WALK,
    binomial_cdf,
    certify,
    fixed_sequence,
    hoeffding_bentkus,
    prompt_losses,
    prompts_needed,
    store_certificate,
)
from stagewise.calibration.exits import ExitStatistics, exit_thresholds, wand_output
from stagewise.calibration.wand_bounds import wand_bounds


@pytest.mark.parametrize(("k", "n", "p"), [(0, 10, 0.05), (3, 200, 0.02), (50, 1000, 0.04), (7, 7, 0.5), (-1, 5, 0.5)])
def test_the_binomial_cdf_is_scipys(k, n, p):
    assert binomial_cdf(k, n, p) == pytest.approx(stats.binom.cdf(k, n, p), rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("n", [20, 150])
def test_p_values_are_valid_for_binary_losses(epsilon, n):
    """At an expected loss of exactly epsilon, P(p <= delta) <= delta: exactly, by summing the binomial."""
    k = np.arange(n + 1)
    weight = stats.binom.pmf(k, n, epsilon)
    p_values = np.array([hoeffding_bentkus(i / n, n, epsilon) for i in k])
    for delta in (0.01, 0.05, 0.2):
        assert weight[p_values <= delta].sum() <= delta


def test_no_failure_certifies_about_three_over_n():
    n = prompts_needed(0.01, 0.05)
    assert n == pytest.approx(3 / 0.01, rel=0.01)
    assert hoeffding_bentkus(0.0, n, 0.01) <= 0.05 < hoeffding_bentkus(0.0, n - 1, 0.01)
    assert hoeffding_bentkus(0.0, 10, 0.01) == pytest.approx(0.99**10)


def test_the_walk_stops_at_the_first_setting_that_fails():
    losses = np.zeros((4, 200))
    losses[1, :40] = 1  # fails; the settings after it are never tested
    last, p_values = fixed_sequence(losses, 0.05, 0.05)
    assert last == 0 and len(p_values) == 2
    assert fixed_sequence(np.zeros((3, 200)), 0.05, 0.05)[0] == 2
    assert fixed_sequence(np.ones((3, 200)), 0.05, 0.05)[0] == -1


def heavy_tailed_prompts(count: int, seed: int, tokens: int = 16) -> ExitStatistics:
    """Three experts over prompts: on fewer than one step in a hundred, so unseen by a 99th percentile, the next expert
    overturns the token whatever its margin; hard prompts have more such steps."""
    generator = np.random.default_rng(seed)
    n = count * tokens
    groups = np.repeat(np.arange(count), tokens)
    hardness = np.repeat(generator.choice([0.2, 1.0, 4.0], count, p=[0.6, 0.3, 0.1]), tokens)
    margin0 = generator.gamma(2.0, 1.5, n)
    wild = generator.random((2, n)) < 0.009 * hardness
    spread = np.abs(generator.normal(0, 0.4, (2, n))) + np.where(wild, 8.0, 0.0)
    overturned = np.cumsum(wild, 0) > 0
    prefix = np.concatenate([np.zeros((1, n), int), overturned.astype(int)])
    margin = np.stack([margin0, np.where(overturned[0], 1.0, margin0), np.zeros(n)])
    return ExitStatistics(
        torch.tensor(margin, dtype=torch.float32),
        torch.tensor(spread, dtype=torch.float32),
        torch.tensor(prefix),
        torch.tensor(prefix),
        torch.zeros(n, dtype=torch.long),
        torch.tensor(groups),
    )


def test_the_promise_holds_at_the_stated_rate_and_the_sum_of_percentiles_alone_does_not():
    epsilon, delta, trials = 0.10, 0.10, 150
    population = heavy_tailed_prompts(6000, seed=10_000)
    bounds = wand_bounds(heavy_tailed_prompts(2000, seed=9_999), minimum=0)  # from other prompts
    truth = prompt_losses(population, bounds, SAFETY_WALK)[0].mean(1)
    expected = dict(zip(SAFETY_WALK, truth, strict=True))
    # emitting where the margin exceeds the plain sum of 99th percentiles breaks what the certificate promises
    assert expected[1.0] > epsilon
    # ... and the walk has something to choose from
    assert expected[SAFETY_WALK[0]] < epsilon / 2
    broken = certified = 0
    for trial in range(trials):
        try:
            certificate = certify(heavy_tailed_prompts(150, seed=trial), bounds, epsilon=epsilon, delta=delta)
        except ValueError:
            continue  # nothing certified promises nothing
        certified += 1
        broken += expected[certificate["safety"]] > epsilon
    assert certified > trials * 0.8
    assert broken <= stats.binom.ppf(0.999, trials, delta)


@pytest.mark.parametrize("trial", range(3))
def test_conservative_settings_cost_depth(trial):
    statistics = heavy_tailed_prompts(300, seed=trial)
    bounds = wand_bounds(statistics, minimum=0)
    depths = prompt_losses(statistics, bounds, SAFETY_WALK)[1]
    assert (np.diff(depths) <= 0).all() and depths[0] > depths[-1] == 1.0


def test_losses_are_counted_per_prompt(statistics_of):
    statistics = statistics_of([[9.0] * 6, [0.0] * 6], [[1, 1, 0, 0, 0, 0], [0] * 6], groups=[7, 7, 7, 7, 8, 8])
    assert prompt_losses(statistics, [1.0], [1.0], "token")[0].tolist() == [[0.5, 0.0]]
    assert prompt_losses(statistics, [1.0], [1.0], "text")[0].tolist() == [[1.0, 0.0]]


def test_a_certificate_says_what_it_promises_and_its_thresholds_reproduce_it(tmp_path):
    statistics = heavy_tailed_prompts(400, seed=1)
    bounds = [1.5, 1.2]
    certificate = certify(statistics, bounds, epsilon=0.15, delta=0.05, loss="text")
    assert certificate["thresholds"] == exit_thresholds(bounds, certificate["safety"])
    tokens, _ = wand_output(statistics, certificate["thresholds"])
    wrong = np.bincount(statistics.groups.numpy(), (tokens != statistics.prefix_top1[-1]).numpy()) > 0
    assert certificate["disagreement"] == pytest.approx(wrong.mean())
    assert certificate["p_value"] <= 0.05 and certificate["n"] == 400
    path = store_certificate(tmp_path, certificate)
    assert json.loads(path.read_text()) == certificate and path.name == "certificate.json"


def test_too_few_prompts_say_how_many_it_takes(statistics_of):
    statistics = statistics_of(np.zeros((2, 30)), np.zeros((2, 30), int), groups=list(range(30)))
    with pytest.raises(ValueError, match=f"at least {math.ceil(math.log(20) / -math.log(0.98))} prompts"):
        certify(statistics, [1.0], epsilon=0.02, delta=0.05)


def test_bad_arguments_are_named(statistics_of):
    statistics = statistics_of(np.zeros((2, 30)), np.zeros((2, 30), int))
    with pytest.raises(ValueError, match="epsilon"):
        certify(statistics, [1.0], epsilon=0.0)
    with pytest.raises(ValueError, match="loss='words'"):
        certify(statistics, [1.0], loss="words")
    with pytest.raises(ValueError, match="conservative to aggressive"):
        certify(statistics, [1.0], safeties=[1.0, 2.0])
