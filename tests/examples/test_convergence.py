"""The claims on convergence: what the script writes, its fits, and OptSAM's two readings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.claims import convergence, descent
from examples.claims.claim import read
from examples.claims.convergence_claims import CLAIMS


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch):
    """One part with one share λ: its claims get a number for each seed, and the others none."""
    monkeypatch.setattr(convergence, "SHARES", (1.0,))
    monkeypatch.setattr(convergence, "STEPS", 40)
    found = convergence.main(["--parts", "unified", "--seeds", "3", "--out", "results"])
    assert [one.name for one in found] == [name for name in CLAIMS if name.startswith("unified")]
    report = read_report(in_empty_folder / "results")
    assert len(set(report["values"]["unified-random"])) == 3
    assert (in_empty_folder / "results" / "convergence.json").exists()
    for value in report["values"]["unified-constant"]:
        assert 0 < value < 1
    printed = capsys.readouterr().out
    for text in ("unified_sam: It converges to a neighbourhood", "f at the start"):
        assert text in printed


def test_every_claim_has_committed_numbers():
    """`claims` of the table and of the committed run are the same, and those of all parts."""
    assert read("convergence").keys() == CLAIMS.keys()


def test_powers_are_fitted():
    steps = np.arange(1, 5001)
    assert descent.power([1, 3, 10], 5 * np.array([1.0, 3, 10]) ** -0.7) == pytest.approx(-0.7)
    seen = np.stack([2 * steps**-0.5, np.where(steps < 500, 1e6, 3.0 * steps**-1.5)])
    np.testing.assert_allclose(descent.late_power(seen), [-0.5, -1.5], atol=2e-3)
    arrived = np.where(steps < 4000, 1.0 / steps, 0.0)
    np.testing.assert_array_equal(convergence.fall_of(arrived[None]), [-np.inf])


def test_a_linear_rate_is_told_from_others():
    steps = np.arange(1, 402)
    losses = np.stack([0.9**steps, 1.0 / steps, 0.9**steps + 1e-3])
    linear, slow, stopped = convergence.second_half(losses)
    assert linear == pytest.approx(1)
    assert 0.1 < slow < 0.2
    assert stopped == pytest.approx(0, abs=1e-6)


def test_steps_are_counted_until_the_last_fifth_is_below():
    squares = np.array([[4.0] * 4 + [1.0] * 16, [4.0] * 20, [0.1] * 20])
    # Of the first n numbers, the last fifth begins at int(0.8 n): only ones from n = 5 on.
    assert descent_steps(squares, 1.5) == [50, np.inf, 10]
    assert descent_steps(squares, 0.5) == [np.inf, np.inf, 10]


def descent_steps(squares, limit):
    return convergence.steps_until(squares, limit, 10).tolist()


@pytest.mark.parametrize("on_this_batch", [False, True])
def test_optsam_takes_both_gradients_at_the_perturbed_point(on_this_batch):
    """Compare with the plain loop on |w - b|² / 2, another b in each step."""
    rho, rate = 0.3, 0.1
    tx = optax.chain(descent.opt_sam(rho, on_this_batch), optax.sgd(rate))
    targets = np.random.default_rng(0).normal(size=(4, 2))
    w = jnp.array([1.0, -2.0])
    state = tx.init(w)
    x = point = np.array([1.0, -2.0])
    climbed = np.zeros(2)
    for b in targets:

        def value_fn(w, b=b):
            return jnp.sum((w - b) ** 2) / 2

        updates, state = tx.update(jax.grad(value_fn)(w), state, w, value_fn=value_fn)
        w = optax.apply_updates(w, updates)
        climbed = point - b if on_this_batch else climbed
        point = x + rho * climbed / max(np.linalg.norm(climbed), 1e-9)
        climbed = point - b
        x = x - rate * climbed
        np.testing.assert_allclose(w, x, rtol=1e-5)


def test_randsam_climbs_a_random_direction_of_the_length_rho():
    tx, w = descent.rand_sam(0.3, seed=1), jnp.array([1.0, 2.0, 3.0])
    state, found = tx.init(w), []
    for _ in range(2):
        g_s, state = tx.update(w, state, w, value_fn=lambda w: w @ w / 2)
        found.append(np.asarray(g_s - w))
    assert [np.linalg.norm(eps) for eps in found] == pytest.approx([0.3, 0.3], rel=1e-5)
    assert abs(found[0] @ found[1]) < 0.08


def test_distances_are_those_of_plain_loops():
    """In two dimensions, at rate 0.1 and radius 0.3."""
    x = np.array([1.0, 0.5])
    for _ in range(1000):
        x = x - 0.2 * (x + 0.3 * x / np.linalg.norm(x))
    y, climbed = np.array([1.0, 0.5]), np.array([0.3, 1.0])
    for _ in range(1000):
        climbed = 2 * (y + 0.3 * climbed / np.linalg.norm(climbed))
        y = y - 0.1 * climbed
    found = convergence.exact_distances(np.array([0.1]), np.array([0.3]))
    assert np.linalg.norm(x) == pytest.approx(found["SAM"][0], rel=1e-9)
    assert np.linalg.norm(y) == pytest.approx(found["OptSAM"][0], rel=1e-9)


def test_limits_of_the_rate_are_those_of_the_top_eigenvalue(monkeypatch):
    """At radius 1 and eigenvalue 1, USAM's limit is half of SGD's, and Stable SAM's is SGD's."""
    monkeypatch.setattr(convergence, "STEPS", 400)
    args = convergence.parse(["--seeds", "2"])
    values, _ = convergence.stable(args, lambda: None)
    assert values["usam-limit"] == pytest.approx([0.5] * 2, rel=0.06)
    assert values["stable-limit"] == pytest.approx([2.0] * 2, rel=0.06)


@pytest.mark.slow
def test_a_descent_is_the_plain_loop():
    """Its measurements are those before the steps, also with batches."""
    problem = descent.logistic(3, size=4, examples=30)
    seen = descent.descend(optax.sgd(0.5), problem, 6, every=2, batch=5, seed=7)
    w, found = problem.start, []
    for t in range(6):
        if t % 2 == 0:
            found.append(jnp.linalg.norm(jax.grad(problem.whole)(w)))
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(7), t), (5,), 0, 30)
        w -= 0.5 * jax.grad(lambda w, rows=rows: problem.losses(w, problem.data[rows]).mean())(w)
    np.testing.assert_allclose(seen, found, rtol=1e-5)


@pytest.mark.slow
def test_sam_and_optsam_stay_at_their_distances(monkeypatch):
    """On |x|² at rate 0.1 and radius 0.1: 0.1 / 9, and √0.2 / 10."""
    monkeypatch.setattr(convergence, "RHOS", (0.1,))
    monkeypatch.setattr(convergence, "STEPS", 1000)
    with jax.enable_x64(True):
        for method, distance in (("SAM", 0.1 / 9), ("OptSAM", 0.2**0.5 / 10)):
            norms = convergence.norms(method, 2)["|x|², rate 0.1"]
            np.testing.assert_allclose(norms[:, 0, -1] / 2, distance, rtol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds must be 1 to 1000"),
        ("--parts all", "invalid choice: 'all'"),
        ("--out taken", "is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert message in refusal(convergence.main, arguments)
