"""The claims on the second-order part: their numbers, and what is trained for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.claims import grid, reuse, second_order
from examples.claims.grid import Outcome, Run
from examples.claims.reuse import Arm
from examples.common.rounding import rounded

STEPS = (400, 4000, 20_000)


def trained(arm, task, steps, is_measured=True):
    """Take the place of a training: SAM is the best, and the controllers sample a fourth."""
    del task, is_measured
    share = arm.share if arm.kind == "random" else 0.25

    def of_run(run):
        accuracy = 90 + 4 * share + (run.learning_rate == 0.05) + 0.1 * int(run.seed)
        curve = (1 + share) ** np.linspace(0, 1, 10) * steps
        return Outcome(accuracy, accuracy, share, {"ratio": curve, "length": 1 / curve})

    return of_run


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch):
    """From trainings to verdicts, without the trainings."""
    monkeypatch.setattr(second_order, "trainer", trained)
    found = second_order.main(["--seeds", "3", "--noise", "0.3", "--out", "results"])
    report = read_report(in_empty_folder / "results")
    assert (in_empty_folder / "results" / "second_order.png").stat().st_size > 10_000
    assert (in_empty_folder / "results" / "second_order.json").exists()
    numbers = {one.name: one.number.value for one in found}
    assert report["values"].keys() == numbers.keys() == second_order.CLAIMS.keys()
    wanted = {"sam-gain-400": 4, "share-0.43-none-400": 4 * (0.43 - 1), "arsam-accuracy-20000": -3}
    wanted |= {"vsam-speed-4000": 1.6, "ratio-sam-4000-clean": 100, "length-sam-400-noisy": -50}
    wanted |= {"ausam-rounded": -3}
    assert {name: numbers[name] for name in wanted} == pytest.approx(wanted)
    verdicts = {one.name: one.verdict for one in found}
    assert verdicts["ratio-sam-4000-clean"] == verdicts["vsam-speed-400"] == "holds here"
    assert (
        verdicts["length-sam-400-noisy"] == verdicts["arsam-accuracy-400"] == "does not hold here"
    )
    sam = report["rows"][0]
    assert (sam["learning_rate"], sam["rho"]) == (0.05, 0.2)
    published = [row for row in report["rows"] if row["row"].startswith("arsam, ")]
    assert [len(row["test"]) for row in published] == [3, 2, 3, 2]
    assert "accuracy over SAM's, points; published rule, 20,000 steps" in capsys.readouterr().out


def test_no_claim_is_judged_where_sam_gains_nothing():
    assert grid.only_if_gained([1.0, 1.1, 0.9], [0.1, 0.2, 0.3]) == [0.1, 0.2, 0.3]
    assert grid.only_if_gained([1.0, -1.1, 0.9], [0.1, 0.2, 0.3]) == []


def test_growth_is_that_of_a_fitted_line():
    curve = 3 * 1.5 ** np.linspace(0, 1, 7)
    assert second_order.growth(curve) == pytest.approx(50)
    assert second_order.growth(curve[::-1]) == pytest.approx(100 * (1 / 1.5 - 1))


def test_the_smallest_share_is_one_whose_whole_interval_is_good(monkeypatch):
    monkeypatch.setattr(second_order, "SHARES", (0.1, 0.2, 0.4, 0.7))
    good, bad, open_ = [0.0, 0.1, -0.1], [-2.0, -2.1, -1.9], [-3.0, 3.0, 0.0]
    for leads, wanted in (
        ([open_, bad, good, good], 0.4),
        ([bad, bad, bad, open_], 1.0),
        ([good] * 4, 0.1),
    ):
        assert second_order.smallest(leads) == wanted


def test_a_share_of_all_steps_is_sam_and_one_of_none_is_the_base(monkeypatch):
    """One program for all shares and all weights of what is reused."""
    monkeypatch.setattr(reuse, "PARTS", 2)
    monkeypatch.setattr(reuse, "MEASURED", 1)
    run = Run(np.int32(0), np.float32(0.1), np.float32(0.2))

    def outcome(share, decay):
        train = reuse.trainer(Arm(share=share, decay=decay), reuse.digits(0.3, 4), 20)
        return jax.device_get(train(run))

    def ratio(*args):
        return outcome(*args).more["ratio"].tolist()

    reuse.program.cache_clear()
    shares = [float(outcome(share, 0.7).share) for share in (0.0, 0.5, 1.0)]
    assert shares[0] == 0 < shares[1] < shares[2] == 1
    assert ratio(1.0, 0.0) == ratio(1.0, 1.0) != ratio(0.0, 0.0) == ratio(0.0, 1.0)
    assert ratio(0.5, 0.0) != ratio(0.5, 1.0)
    with pytest.raises(ValueError, match="multiple of 20, got 30"):
        reuse.trainer(Arm(), reuse.digits(0.3, 4), 30)


def test_the_second_order_part_of_a_quadratic_is_known():
    """For L = wᵀ A w / 2 it is ρ A g / ‖g‖."""
    a, w = jnp.array([1.0, 4.0]), jnp.array([3.0, 1.0])
    length, ratio = reuse.second_order(0.5, w, lambda w: 0.5 * jnp.sum(a * w * w))
    g = a * w
    h = 0.5 * a * g / jnp.linalg.norm(g)
    assert float(length) == pytest.approx(float(jnp.linalg.norm(h)), rel=1e-5)
    assert float(ratio) == pytest.approx(float(length / jnp.linalg.norm(g)), rel=1e-5)


def test_rounding_passes_the_gradient_through():
    w = {"kernel": jnp.array([[0.11, -0.2], [0.4, 0.9]])}
    merge = reuse.straight_through(3)
    np.testing.assert_allclose(merge(w)["kernel"], rounded(w, 3)["kernel"], rtol=1e-6)
    g = jax.grad(lambda w: jnp.sum(merge(w)["kernel"] * jnp.arange(4.0).reshape(2, 2)))(w)
    np.testing.assert_array_equal(g["kernel"], [[0, 1], [2, 3]])
