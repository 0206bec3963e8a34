"""The late SAM example: what it writes, and which steps of its schedules of use are sharp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decisions import decide

from examples.claims import late_sam
from examples.common import tuning


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch):
    """Three schedules of use; their programs count the gradients that they spend."""
    rows = ("sgd", "sam", "every 5, then always")
    monkeypatch.setattr(late_sam, "USES", {row: late_sam.USES[row] for row in rows})
    monkeypatch.setattr(late_sam, "SEARCH_SEEDS", range(1000, 1002))
    monkeypatch.setattr(late_sam, "around", lambda *of: tuning.fixed([0.1]))
    arguments = "--seeds 2 --epochs 1 --width 8 --noise 0 --out results"
    results = late_sam.main(arguments.split())
    report = read_report(in_empty_folder / "results")
    assert report["results"] == results
    assert [r["row"] for r in results] == [*rows]
    assert [r["steps"] for r in results] == [20, 10, 14]
    assert [r["gradients"] for r in results] == [20, 20, 20]
    assert all(len(set(r["accuracy"])) == 2 for r in results)
    assert len({tuple(r["accuracy"]) for r in results}) > 1
    assert (in_empty_folder / "results" / "late_sam.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("clean labels, 2 seeds", "over sgd", "every 5, then always"):
        assert text in printed


@pytest.mark.parametrize("name", late_sam.USES)
def test_schedules_of_use_spend_equal_gradients(name):
    use = late_sam.USES[name]
    steps = use.steps(800)
    assert 799 <= use.gradients(steps) <= 800 < use.gradients(steps + 1)
    assert use.start(steps) == pytest.approx((1 - use.share) * steps, abs=0.5)
    assert [late_sam.USES[row].steps(800) for row in ("sgd", "sam")] == [800, 400]


def test_the_policy_takes_the_gradients_that_are_counted():
    use = late_sam.USES["every 5, then always"]
    is_sharp, _ = decide(use.policy(571), np.ones(571))
    assert 571 + is_sharp.sum() == use.gradients(571) == 800
    np.testing.assert_array_equal(is_sharp[:428].nonzero()[0], np.arange(0, 428, 5))
    assert is_sharp[428:].all()


def test_the_radius_rises_where_the_late_steps_begin():
    """A loss whose sharp gradient is the radius; without momentum the step shows it."""
    tx = late_sam.optimizer(late_sam.USES["last 50%"], 20, learning_rate=1.0, rho=0.8)
    w = jnp.zeros(())

    def step(state, _):
        updates, state = tx.update(1.0 + w, state, w, value_fn=lambda w: w + w**2 / 2)
        return state, updates

    _, found = jax.jit(lambda state: jax.lax.scan(step, state, length=20))(tx.init(w))
    velocity, expected = 0.0, []
    for t in range(20):
        rho = 0.8 * min(max(t - 10, 0) / 2, 1)
        velocity = 0.9 * velocity + 1.0 + rho
        expected.append(-min(1.0, (20 - t) / 5) * velocity)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_leads_are_paired():
    a, b = {"accuracy": [90.0, 80.0, 70.0]}, {"accuracy": [89.0, 79.5, 69.0]}
    mean, error = late_sam.lead_of(a, b)
    assert mean == pytest.approx(2.5 / 3)
    assert error == pytest.approx(np.std([1.0, 0.5, 1.0], ddof=1) / np.sqrt(3))
