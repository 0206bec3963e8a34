"""The averages example: what it writes, which iterates it averages, and that it chooses alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.claims import averages
from examples.common.digits_task import STEPS_PER_EPOCH


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch):
    monkeypatch.setattr(averages, "RATES", ("falling",))
    around = averages.around
    monkeypatch.setattr(averages, "around", lambda *of: around(*of)._replace(reach=0))
    arguments = "--seeds 2 --epochs 1 --width 8 --noise 0 --out results"
    results = averages.main(arguments.split())
    report = read_report(in_empty_folder / "results")
    assert report["results"] == results
    assert [(r["optimizer"], r["average"]) for r in results] == [
        (name, average) for name in averages.OPTIMIZERS for average in averages.AVERAGES
    ]
    assert {r["gradients"] for r in results} == {20}
    assert all(len(r["accuracy"]) == 2 for r in results)
    assert len({tuple(r["accuracy"]) for r in results}) > 1
    assert (in_empty_folder / "results" / "averages.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for text in ("clean labels, 2 seeds", "sam + swa, falling", "over its optimizer"):
        assert text in printed


def test_the_last_quarter_is_averaged():
    """Of 8 epochs the last two: their iterates, those at their ends, and a mean as old."""
    tx = averages.optimizer("sgd", "constant", 1.0, 0.0, epochs=8)
    steps = 8 * STEPS_PER_EPOCH

    def step(state, t):  # always from zero, so the iterate is the velocity
        return tx.update(-t, state, jnp.zeros(()))[1], None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps, dtype=float)))(
        tx.init(jnp.zeros(()))
    )
    velocities, v = [], 0.0
    for t in range(steps):
        v = 0.9 * v + t
        velocities.append(v)
    found = averages.averaged(state, jnp.zeros(()))
    window = velocities[-2 * STEPS_PER_EPOCH :]
    ends = velocities[STEPS_PER_EPOCH - 1 :: STEPS_PER_EPOCH][-2:]
    decay = 1 - 1 / STEPS_PER_EPOCH
    weights = decay ** np.arange(steps)[::-1]
    assert float(found["swa"]) == pytest.approx(np.mean(window), rel=1e-4)
    assert float(found["latest"]) == pytest.approx(np.mean(ends), rel=1e-4)
    assert float(found["ema"]) == pytest.approx(np.average(velocities, weights=weights), rel=1e-4)
    assert int(state.base.base.num_stored) == 8


def test_leads_are_paired():
    a, b = {"accuracy": [90.0, 80.0, 70.0]}, {"accuracy": [89.0, 79.5, 69.0]}
    mean, error = averages.lead_of(a, b)
    assert mean == pytest.approx(2.5 / 3)
    assert error == pytest.approx(np.std([1.0, 0.5, 1.0], ddof=1) / np.sqrt(3))
