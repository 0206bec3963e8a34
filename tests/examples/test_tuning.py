"""The search for learning rate and rho: it moves until the best is inside, and says where not."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tqdm import tqdm

from examples.common import training, tuning
from examples.common.registry import VARIANTS
from examples.common.training import HALVES, axes_of
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
    candidates = [*itertools.chain(*calls)]
    assert len(candidates) == len(set(candidates)) == len(tried)  # nothing is tried twice
    if top == (0.05, 0.2):
        assert len(tried) == 2 * tuning.TOGETHER


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
    assert len(tried) == 2 * tuning.TOGETHER


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
    seeds = [*itertools.chain(*HALVES)]
    assert len(seeds) == len(set(seeds)) == 8
    assert min(seeds) >= 1000


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

    def accuracies(runs, part):
        split = next(name for name, count in images.items() if part["x"].shape[1] == count)
        looked.append((split, runs))
        is_best = (runs.learning_rate == np.float32(0.1)) & (runs.rho == np.float32(0.5))
        # One seed is better elsewhere, but the mean over the seeds is not: it must not decide.
        is_lure = (runs.seed == 1001) & (runs.learning_rate == np.float32(0.2))
        return level[split] + 0.1 * is_best + 0.2 * is_lure

    def split(seeds, noise):
        return tuple({"x": np.zeros((len(seeds), count))} for count in images.values())

    fake = training.Trainer(
        init=lambda runs, params: {"gradients_spent": 0 * runs.rho},
        epoch=lambda params, state, runs, part, index: (
            runs,
            {"gradients_spent": state["gradients_spent"] + 20},
        ),
        step=None,
        accuracy=None,
        accuracies=accuracies,
        loss_increase=lambda params, part: np.zeros(len(params.seed)),
    )
    monkeypatch.setattr(training, "make_trainer", lambda *args: fake)
    monkeypatch.setattr(training, "split", split)
    monkeypatch.setattr(training, "initialize", lambda seeds, width: {"w": np.zeros(len(seeds))})
    monkeypatch.setattr(training, "seconds_per_step", lambda *args: 1.0)
    settings = SimpleNamespace(base="momentum", width=4, seeds=12)
    bar = tqdm(total=0, disable=True)
    sam = VARIANTS["sam"]
    axes = axes_of(sam, "momentum", None)
    [result] = training.measure("sam", sam, axes, settings, 3, [0.3], bar, lambda runs: runs)
    assert (result["learning_rate"], result["rho"], result["edges"]) == (0.1, 0.5, [])
    assert result["test_accuracy"] == pytest.approx([0.4] * 12)
    assert result["train_accuracy"] == pytest.approx([0.2] * 12)
    assert result["gradients_by_epoch"] == [20, 40, 60]
    for split, runs in looked:
        seeds = set(runs.seed.tolist())
        if split == "validation":
            assert seeds <= set(itertools.chain(*HALVES))
        else:
            assert seeds <= set(range(12))
            assert {*runs.learning_rate.tolist()} == {np.float32(0.1)}
            assert {*runs.rho.tolist()} == {np.float32(0.5)}
