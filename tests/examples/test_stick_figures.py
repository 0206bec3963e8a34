"""The stick figures: what is drawn, what is exchanged, and the claims that come of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.claims import stick_figures
from examples.claims.grid import Outcome


def trained(arm, task, steps):
    """Take the place of a training: more sharp steps are better, by distance alone."""
    del task, steps
    share = arm.share if arm.kind == "random" else 0.5

    def of_run(run):
        joints = 60 + 0.1 * int(run.seed)
        more = {"distance": 0.2 - 0.1 * share, "shown": np.full((4, 9, 2), 0.5)}
        return Outcome(joints, joints, share, more)

    return of_run


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch):
    monkeypatch.setattr(stick_figures, "trainer", trained)
    found = stick_figures.main(["--seeds", "3", "--out", "results"])
    report = read_report(in_empty_folder / "results")
    assert (in_empty_folder / "results" / "stick_figures.png").stat().st_size > 10_000
    assert (in_empty_folder / "results" / "stick_figures.json").exists()
    assert report["values"].keys() == stick_figures.CLAIMS.keys()
    numbers = {one.name: one.number.value for one in found}
    verdicts = {one.name: one.verdict for one in found}
    assert (numbers["sam-joints"], numbers["sam-distance"]) == pytest.approx((0, 100))
    assert verdicts["arsam-joints"] == "not testable here"  # SAM finds no more joints
    assert numbers["ausam-distance"] == pytest.approx(100 * (0.1 / 0.15 - 1))
    assert verdicts["ausam-distance"] == "does not hold here"
    assert "joints found over the base's" in capsys.readouterr().out


def test_nothing_else_is_trained_where_sam_gains_nothing():
    rows = [{"row": name, "test": [1.0, 2.0], "distance": [0.1, 0.2]} for name in ("base", "sam")]
    assert not stick_figures.has_gained(rows)
    assert stick_figures.values_of(rows)["vsam-joints"] == []
    assert stick_figures.has_gained([rows[0], rows[1] | {"test": [2.0, 3.0]}])


def test_lines_are_where_the_joints_are():
    data = jax.device_get(
        jax.jit(lambda key: stick_figures.figures_of(key, 20, 0.2))(jax.random.key(0))
    )
    true = data["y"].copy()
    true[:4] = true[:4, stick_figures.EXCHANGED]
    assert (true[:, 3, 0] < true[:, 6, 0]).all()  # the left elbow is left of the right one
    assert (data["y"][:4, 3, 0] > data["y"][:4, 6, 0]).all()  # exchanged in the first fifth
    pictures = data["x"].reshape(20, 16, 16)
    place = np.clip((16 * true).astype(int), 0, 15)
    at_joints = pictures[np.arange(20)[:, None], place[..., 1], place[..., 0]]
    assert at_joints.mean() > 0.6 > 0.3 > pictures.mean()


def test_a_joint_is_found_within_a_tenth_of_the_width(monkeypatch):
    true = jnp.full((2, 9, 2), 0.5)
    found = true.at[0, :3, 0].add(0.11).at[1, :2, 1].add(0.09)
    monkeypatch.setattr(stick_figures, "predicted", lambda params, x: found[: len(x)])
    score, more = stick_figures.score(None, {"x": jnp.zeros((2, 256)), "y": true})
    assert float(score) == pytest.approx(100 * 15 / 18)
    assert float(more["distance"]) == pytest.approx((3 * 0.11 + 2 * 0.09) / 18, rel=1e-4)
