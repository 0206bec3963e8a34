"""The edge-of-stability example: what it writes, and what it says about the law."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from examples.measure import edge_of_stability, edge_training
from examples.measure.edge_training import Case

START = (20.6297, 0.95585, 2.41026)  # eigenvalue, loss and norm of the gradient


def test_a_tiny_run(in_empty_folder, capsys, read_report):
    arguments = "--cases sam usam-large cross-entropy --radii 0.05 --steps 299 --out results"
    results = edge_of_stability.main(arguments.split())
    assert read_report(in_empty_folder / "results")["results"] == results
    assert (in_empty_folder / "results" / "edge_of_stability.png").stat().st_size > 10_000
    sam, usam, cross_entropy = results
    assert [result["case"] for result in results] == ["sam 0.05", "usam-large", "cross-entropy"]

    for result in (sam, usam):
        found = [result[name][0] for name in ("eigenvalue", "loss", "grad_norm")]
        np.testing.assert_allclose(found, START, rtol=1e-4)
    assert sam["step"] == cross_entropy["step"] == [0, 100, 200]
    np.testing.assert_allclose(
        sam["edge"], samx.sharpness.edge(0.2, radius=0.05 / np.array(sam["grad_norm"])), rtol=1e-5
    )
    ratio = np.divide(sam["eigenvalue"], sam["edge"])[1:]
    np.testing.assert_allclose(sam["ratio"], [ratio.mean(), ratio.min(), ratio.max()])
    assert sam["ratio"][0] == pytest.approx(1.05, abs=0.1)  # it is at the edge already
    assert sam["loss"][-1] < 0.2

    assert usam["step"] == [0]
    assert usam["diverged_at"] == 100
    assert usam["edge"] == [pytest.approx(5.4858, rel=1e-4)]
    assert cross_entropy["loss"][0] > np.log(10)  # each loss has its own start
    printed = capsys.readouterr().out
    for text in ("device:", "λ / edge", "diverges before step 100", "In 1 of 3 cases", "Plot:"):
        assert text in printed


@pytest.mark.parametrize(
    ("case", "make"),
    [
        (Case("gradient descent"), lambda base: optax.with_extra_args_support(base)),
        (Case("SAM", 0.3), lambda base: optax.chain(samx.sam(0.3), base)),
        (Case("USAM", 0.3, False), lambda base: optax.chain(samx.usam(0.3), base)),
        (
            Case("mixture", 0.3, weight=0.2, momentum=0.5),
            lambda base: optax.chain(samx.coupled_wsam(0.3, gamma=1 / 6), base),
        ),
    ],
    ids=lambda x: x.title if isinstance(x, Case) else "",
)
def test_a_case_is_its_optimizer(case, make):
    w = jnp.array([1.0, -2.0])

    def two_steps(tx):
        state, updates = tx.init(w), w
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
        return updates

    def loss(w):
        return jnp.sum(jnp.cosh(w))

    wanted = two_steps(make(optax.sgd(0.1, momentum=case.momentum)))
    np.testing.assert_allclose(two_steps(case.optimizer(0.1)), wanted, rtol=1e-6)


def test_the_edge_of_a_case():
    grad_norm = np.array([0.5, 2.0])
    mixture = Case("", 0.1, weight=0.3, momentum=0.5)
    wanted = samx.sharpness.edge(0.2, radius=0.1 / grad_norm, weight=0.3, momentum=0.5)
    np.testing.assert_allclose(mixture.edge(0.2, grad_norm), wanted, rtol=1e-6)
    wanted = samx.sharpness.edge(0.2, radius=0.1)
    np.testing.assert_allclose(Case("", 0.1, False).edge(0.2, grad_norm), wanted)


@pytest.mark.parametrize(
    ("case", "ratio", "diverged_at", "words"),
    [
        (Case("SAM", 0.1), 1.05, None, []),
        (Case("SAM", 0.1), 1.2, None, ["above the edge", "too coarse"]),
        (Case("SAM", 0.1), 0.8, None, ["below the edge", "more steps"]),
        (Case("SAM", 0.1, loss_name="cross_entropy"), 0.8, None, ["below the edge", "upper bound"]),
        (Case("SAM", 0.1), None, 300, ["diverges before step 300", "λ is 9.0, and the edge 3.0"]),
    ],
)
def test_what_it_says_of_the_law(case, ratio, diverged_at, words):
    result = {**case._asdict(), "eigenvalue": [9.0], "edge": [3.0], "diverged_at": diverged_at}
    result["ratio"] = ratio and [ratio] * 3
    count, *others = edge_of_stability.limits([result]).split("\n")
    assert count == f"In {0 if words else 1} of 1 cases the eigenvalue is at the edge, within 10%."
    assert len(others) == bool(words)
    assert all(word in others[0] for word in words)


def test_ratios_are_those_of_some_steps():
    run = {"step": [0, 100, 200, 300], "eigenvalue": [9.0, 2.0, 3.0, 8.0], "edge": [1, 2, 2, 2]}
    np.testing.assert_allclose(edge_training.ratios(run, 100, 200), [1, 1.5])
    np.testing.assert_allclose(edge_training.ratios(run, 200), [1.5, 4])
    assert [edge_of_stability.first_of(steps) for steps in (100, 2000, 3000)] == [50, 1000, 1300]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 99", "--steps must be at least 100, got 99"),
        ("--radii 0.1 nan", "--radii must be finite and at least 0, got nan"),
        ("--learning-rate 0", "--learning-rate must be finite and above 0, got 0.0"),
        ("--cases gd sgd", "sgd.*choose from.*mixture"),
        ("--loss hinge", "hinge.*choose from.*cross_entropy"),
        ("--out taken", "taken.*not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert re.search(message, refusal(edge_of_stability.main, arguments))
