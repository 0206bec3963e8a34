"""The search for learning rate and rho: it moves until the best is inside, and says where not."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tqdm import tqdm

from examples.common import training, tuning
from examples.common.registry import VARIANTS
from examples.common.training import SEARCH_SEEDS, axes_of
from examples.common.tuning import SIXTHS, THIRDS, around, best_of, edges, fixed, from_zero, search


def hill(*tops):
    """Return an `evaluate` whose score falls with the distance from the tops, in decades."""
    calls = []

    def evaluate(candidates):
        calls.append(list(candidates))
        return [
            -sum(abs(math.log10(x / top)) for x, top in zip(candidate, tops, strict=True) if x)
            for candidate in candidates
        ]

    return evaluate, calls


def is_near(axes, candidate, other):
    return all(
        abs(axis.values.index(x) - axis.values.index(y)) <= axis.reach
        for axis, x, y in zip(axes, candidate, other, strict=True)
    )


def test_an_axis_has_the_values_of_a_decade():
    axis = around(0.05)
    assert axis.values[axis.start] == 0.05
    around_it = axis.values[axis.start - 3 : axis.start + 4]
    assert around_it == (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    assert axis.values[0] <= 0.05 / 1000
    assert axis.values[-1] >= 0.05 * 1000
    fine = around(0.05, SIXTHS)
    assert fine.values[fine.start - 2 : fine.start + 3] == (0.02, 0.03, 0.05, 0.07, 0.1)
    assert (axis.reach, fine.reach) == (1, 2)  # the same factor on both
    assert set(THIRDS) < set(SIXTHS)


@pytest.mark.parametrize("top", [(0.05, 0.2), (1.0, 0.2), (0.002, 5.0), (0.1, 0.01)])
def test_the_search_moves_until_all_neighbours_are_worse(top):
    axes = [around(0.05), from_zero(around(0.2, decades=2))]
    evaluate, calls = hill(*top)
    tried = search(axes, evaluate)
    assert best_of(tried) == top
    assert edges(top, tried) == []
    rate, rho = (axis.values.index(value) for axis, value in zip(axes, top, strict=True))
    for i, j in itertools.product((-1, 0, 1), repeat=2):
        assert (axes[0].values[rate + i], axes[1].values[rho + j]) in tried
    assert all(len(call) <= tuning.TOGETHER for call in calls)
    for before, call in zip(itertools.accumulate(calls), calls[1:], strict=False):
        so_far = max(before, key=lambda candidate: tried[candidate])
        assert all(is_near(axes, candidate, so_far) for candidate in call)
    candidates = [*itertools.chain(*calls)]
    assert len(candidates) == len(set(candidates)) == len(tried)  # nothing is tried twice
    if top == (0.05, 0.2):
        assert len(tried) == 3 * 3


@pytest.mark.parametrize("side", [1, -1])
def test_a_second_peak_is_found_if_the_scores_rise_towards_it(side):
    """As on the way down to a small learning rate, past rates at which some seeds fail."""
    axis = around(0.05, SIXTHS)
    scores = dict.fromkeys(axis.values, 0.0)
    near = axis.values[axis.start :: side]
    scores |= zip(near, (0.5, 0.4, 0.3, 0.1, 0.2, 0.3, 0.7, 0.6), strict=False)

    def evaluate(candidates):
        return [scores[rate] for rate, _ in candidates]

    def search_from(least):
        return search([axis, fixed([0.0])], evaluate, least)

    assert best_of(search_from(9)) == (near[0], 0.0)  # two on the way up are not enough
    tried = search_from(11)
    assert best_of(tried) == (near[6], 0.0)
    assert edges((near[6], 0.0), tried) == []
    assert (near[9], 0.0) not in tried


def test_one_number_is_searched_on_the_finer_axis():
    tried = search([around(0.05, SIXTHS), fixed([0.0])], hill(0.015, 1.0)[0])
    assert best_of(tried) == (0.015, 0.0)
    assert {0.007, 0.01, 0.015, 0.02, 0.03} <= {rate for rate, _ in tried}
    assert edges(best_of(tried), tried) == []


def test_of_equal_candidates_the_first_one_stays():
    tried = search(
        [around(0.05), from_zero(around(0.2))], lambda candidates: [1.0] * len(candidates)
    )
    assert best_of(tried) == (0.05, 0.2)
    assert len(tried) == 3 * 3


def test_a_search_that_arrives_at_the_end_of_an_axis_is_marked_but_not_at_zero():
    axes = [around(0.05), from_zero(around(0.2, decades=1))]

    def evaluate(candidates):
        return [rate - rho for rate, rho in candidates]

    tried = search(axes, evaluate)
    assert best_of(tried) == (axes[0].values[-1], 0.0)
    assert edges(best_of(tried), tried) == ["learning_rate"]


def test_given_values_are_all_tried_and_their_ends_are_edges():
    axes = [around(0.05), fixed([0.5, 0.1, 0.1])]
    tried = search(axes, hill(0.05, 0.5)[0])
    assert {rho for _, rho in tried} == {0.1, 0.5}
    assert edges(best_of(tried), tried) == ["rho"]
    assert edges((0.3,), [(0.3,), (0.1,)], ["rate"]) == ["rate"]
    assert edges((0.3,), [(0.3,)], ["rate"]) == []  # a single value is not a grid
    # Values that were tried with another learning rate only say nothing.
    assert edges((0.1, 1.0), [(0.1, 1.0), (0.2, 2.0), (0.1, 0.5), (0.05, 1.0), (0.2, 1.0)]) == [
        "rho"
    ]


def test_no_seed_is_tuned_twice_or_reported():
    assert len(set(SEARCH_SEEDS)) == 8
    assert min(SEARCH_SEEDS) >= 1000


def test_every_variant_can_be_searched():
    for name, variant in VARIANTS.items():
        for base in ("sgd", "momentum", "adamw"):
            rates, radii = axes_of(variant, base, None)
            assert radii.values[radii.start] == variant.start
            assert 0.0 in radii.values
            assert rates.reach == (2 if name == "base" else 1)
    rates, radii = axes_of(VARIANTS["sam"], "momentum", [0.1])
    assert (radii.values, rates.reach) == ((0.1,), 2)  # one number is left to tune


def test_the_test_split_is_looked_at_with_the_chosen_values_only(monkeypatch):
    """With a fake training run, whose parameters are the numbers of its runs."""
    images, looked = {"train": 7, "validation": 5, "test": 3}, []
    level = {"train": 0.1, "validation": 0.2, "test": 0.3}

    def accuracy(run, part):
        split = next(name for name, count in images.items() if len(part["x"]) == count)
        looked.append((split, run))
        is_best = (run.learning_rate == np.float32(0.1)) & (run.rho == np.float32(0.5))
        # One seed is better elsewhere, but the mean over the seeds is not: it must not decide.
        is_lure = (run.seed == 1001) & (run.learning_rate == np.float32(0.2))
        return level[split] + 0.1 * is_best + 0.2 * is_lure

    def train_block(params, spent, run, part, batches, epochs):
        seen = training.Seen(run, spent + 20 * np.arange(1, 11))
        return training.Block(run, spent + 20 * epochs, seen)

    fake = training.Trainer(
        init=lambda run, params: 0,
        train_block=train_block,
        step=None,
        accuracy=accuracy,
        accuracies=lambda run, part: np.full(10, accuracy(run, part)),
        loss_increase=lambda run, part: 0.0,
        measures=None,
    )
    splits = tuple({"x": np.zeros(count)} for count in images.values())
    monkeypatch.setattr(training, "make_trainer", lambda *args: fake)
    monkeypatch.setattr(training, "data_of", lambda seed, noise: splits)
    monkeypatch.setattr(training, "start_of", lambda seed, width: {"w": 0.0})
    monkeypatch.setattr(training, "batches_of", lambda seed, first: None)
    monkeypatch.setattr(training, "seconds_per_step", lambda *args: 1.0)
    settings = SimpleNamespace(base="momentum", width=4, seeds=12)
    bar = tqdm(total=0, disable=True)
    sam = VARIANTS["sam"]
    axes = axes_of(sam, "momentum", None)
    [result] = training.measure("sam", sam, axes, settings, 13, [0.3], bar, lambda runs: runs)
    assert (result["learning_rate"], result["rho"], result["edges"]) == (0.1, 0.5, [])
    assert result["test_accuracy"] == pytest.approx([0.4] * 12)
    assert result["train_accuracy"] == pytest.approx([0.2] * 12)
    assert result["gradients_by_epoch"] == [20 * (1 + epoch) for epoch in range(13)]
    assert len(result["test_accuracy_by_epoch"]) == 13
    for split, run in looked:
        if split == "validation":
            assert run.seed in SEARCH_SEEDS
        else:
            assert run.seed in range(12)
            assert (run.learning_rate, run.rho) == (np.float32(0.1), np.float32(0.5))


def test_a_search_tries_at_least_so_many():
    """After the neighbours of the best candidate come those that are nearest to it."""
    tried = search([around(0.1)], lambda found: [-abs(x - 0.1) for (x,) in found], least=6)
    assert sorted(tried) == [(0.01,), (0.02,), (0.05,), (0.1,), (0.2,), (0.5,)]
    few = search([fixed([1.0, 2.0])], lambda found: [0.0] * len(found), least=6)
    assert sorted(few) == [(1.0,), (2.0,)]
