"""The claims of LETS: which images are seen, what moves the radius, and the numbers of a claim."""

import jax
import numpy as np
import pytest

from examples.claims import lets
from examples.common import digits_task
from examples.common.digits_task import load_digits
from examples.common.training import start_of

WRONG = ", 30% wrong labels"


def test_every_image_has_one_part():
    images, labels = load_digits()
    images = [image.tobytes() for image in np.float32(images / 16)]
    label_of = dict(zip(images, labels, strict=True))
    for seed in range(2):
        train, held_out, clean, *others = lets.data_of(seed, 0.3)
        np.testing.assert_array_equal(held_out["x"], clean["x"])
        own = [train, held_out, *others]
        assert [len(part["x"]) for part in own] == [900, 100, 297, 500]
        parts = [[image.tobytes() for image in part["x"]] for part in own]
        assert sorted(image for part in parts for image in part) == sorted(images)
        true = [np.array([label_of[image] for image in part]) for part in parts]
        wrong = [np.sum(labels != part["y"]) for labels, part in zip(true, own, strict=True)]
        assert wrong == [270, 30, 0, 0]
        np.testing.assert_array_equal(clean["y"], true[1])


def test_batches_are_whole_epochs_and_fresh_draws():
    batches = jax.jit(lets.batches)
    first, second = (jax.tree.map(np.asarray, batches(0, epoch)) for epoch in (0, 1))
    assert first.batch.shape == (9, 100)
    assert first.held_out.shape == (9, 50)
    np.testing.assert_array_equal(np.sort(first.batch, axis=None), np.arange(900))
    np.testing.assert_array_equal(first.following[:-1], first.batch[1:])
    np.testing.assert_array_equal(first.following[-1], first.batch[0])
    assert (first.batch != second.batch).any()
    draws = {tuple(sorted(rows)) for rows in (*first.held_out, *second.held_out)}
    assert len(draws) == 18
    assert all(len(set(rows)) == 50 and max(rows) < 100 for rows in draws)


def test_the_hypergradient_is_the_difference_of_one_step(monkeypatch):
    """With L on the whole training set it is the slope of F. With one batch it is another one."""
    monkeypatch.setattr(lets, "HORIZONS", (1, 2))
    monkeypatch.setattr(lets, "POINTS", 3)
    monkeypatch.setattr(lets, "WIDTH", 1e-6)
    run = lets.Run(0, 0.1, 0.2, 0.0)
    along = lets.signs_along.__wrapped__(1, 4)  # not that of another test
    signs = along(run, start_of(0, 4), lets.data_of(0, 0.3))
    np.testing.assert_allclose(signs.one_step["whole"], signs.differences["1"], rtol=1e-4)
    for form in ("own", "next"):
        ratio = signs.one_step[form] / signs.differences["1"]
        assert (abs(ratio - 1) > 1e-3).all()
    assert (abs(signs.differences["2"] / signs.differences["1"] - 1) > 1e-3).all()
    assert (abs(signs.diagonal) < abs(signs.one_step["next"])).all()


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    monkeypatch.setattr(lets, "TUNING_SEEDS", range(1000, 1001))
    monkeypatch.setattr(lets, "LEARNING_RATES", (0.1,))
    monkeypatch.setattr(lets, "RADII", (0.1,))
    monkeypatch.setattr(lets, "RATES", (300.0,))
    monkeypatch.setattr(lets, "top_eigenvalue", lambda width: lambda params, images: 2.0)
    fake = signs_of([[1.0, -1.0]] * 2)
    monkeypatch.setattr(lets.Trainings, "signs", lambda trained, candidate: fake)
    found = lets.main(["--seeds", "2", "--epochs", "2", "--width", "8", "--out", "results"])
    assert [one.name for one in found] == list(lets.CLAIMS)
    report = read_report(in_empty_folder / "results")
    assert (in_empty_folder / "results" / "lets.png").stat().st_size > 20_000
    assert "of our reconstruction" in capsys.readouterr().out
    [wrong, _] = report["trainings"]
    assert (wrong["noise"], wrong["sam"]["rho"]) == (0.3, 0.1)
    ends = np.array([wrong["lets"][form]["ends"]["rho"] for form in lets.TRAINED])
    starts = 0.1 * np.array(lets.FACTORS)[:, None]
    moved = np.abs(np.log(ends[..., -1] / starts))  # [forms, starts, seeds]
    assert (moved[:, 1:] > 1e-3).all()
    assert (ends[0, 1] != ends[1, 1]).all()
    accuracy = np.array(wrong["lets"]["next"]["ends"]["test"][1])
    lead = 100 * (accuracy - wrong["grid"]["test"][0])
    np.testing.assert_allclose(report["values"][f"better-next{WRONG}"], lead, atol=1e-5)
    assert report["values"][f"flatter-next{WRONG}"] == [0, 0]


@pytest.mark.slow
def test_without_a_rate_lets_is_sam():
    run = lets.Run(3, 0.3, 0.2, 0.0)
    params, data = digits_task.initialize(np.array([3]), 8), lets.data_of(3, 0.3)
    params = jax.tree.map(lambda x: x[0], params)
    sam, *others = (lets.trainer(form, 2, 8)(run, params, data) for form in ("sam", *lets.FORMS))
    for other in others:
        for one, its in zip(jax.tree.leaves(sam), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(one, its, rtol=1e-4, atol=1e-5)


def end_of(**fields):
    """Make measurements of [candidates, seeds]; what is not given is 1."""
    ones = np.ones_like(next(iter(fields.values())), float)
    numbers = {name: np.asarray(each, float) for name, each in fields.items()}
    wanted = {name: numbers.get(name, ones) for name in lets.End._fields}
    return lets.End(**wanted | {"params": None})


def signs_of(one_step, differences=((1.0, 1.0),) * 2):
    """Make derivatives of [seeds, points], the same for all forms."""
    one_step, differences = np.array(one_step), np.array(differences)
    return lets.Signs(
        dict.fromkeys(lets.FORMS, one_step),
        one_step,
        {str(horizon): differences for horizon in lets.HORIZONS},
    )


def found_by(grid, signs, ends, tuned=0.2):
    trained = {"rate": 1.0, "edges": [], "starts": [0.1 * tuned, tuned, 10 * tuned], "ends": ends}
    return {
        **{"noise": 0.3, "sam": {"rho": tuned}, "grid": grid, "signs": signs},
        "lets": dict.fromkeys(lets.TRAINED, trained),
    }


def test_the_numbers_of_the_claims(monkeypatch):
    """Two seeds; at the largest radius nothing is learned, and there is no gap."""
    monkeypatch.setattr(lets, "RADII", (0.1, 0.2, 0.5, 2.0))
    grid = end_of(
        test=[[0.90, 0.91], [0.95, 0.95], [0.93, 0.96], [0.1, 0.1]],
        train=[[1.0, 1.0], [0.8, 0.8], [0.7, 0.7], [0.1, 0.1]],
        gap=[[3.0, 3.0], [2.0, -2.0], [1.0, np.nan], [0.0, 0.0]],
        clean_gap=[[0.5, 0.2], [-1.0, 0.1], [-2.0, -0.2], [0.0, 0.0]],
        eigenvalue=[[1.0, 1.0], [4.0, 5.0], [1.0, 1.0], [1.0, 1.0]],
    )
    ends = end_of(
        test=[[0.92, 0.93], [0.95, 0.94], [0.1, 0.95]],
        eigenvalue=[[1.0, 1.0], [0.4, 50.0], [1.0, 1.0]],
    )._replace(rho=np.array([[[0.02, 0.02]] * 2, [[0.2, 0.1]] * 2, [[2.0, 2.0], [2.0, 0.2]]]))
    signs = signs_of([[1.0, -1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]], [[1.0, 1, 1, -1], [-1] * 4])
    values = lets.values_of(found_by(grid, signs, ends))
    for name, wanted in {
        "objective": [-85, -85],
        "objective-learned": [-2, 0],
        "objective-clean": [-5, 0],
        "better-own": [0, -1],
        "starts-low-next": [-3, -1],
        "starts-high-own": [-85, 1],
        "meet-own": [2, 1],
        "flatter-next": [-1, 1],
        "sign-own-20": [0.5, 0],
        "sign-whole-all": [0.25, np.nan],  # F falls from 0.1 to 0.5; the second one is no number
        "sign-diagonal": [1, 1],
    }.items():
        found = values[name + WRONG]
        if name == "sign-whole-all":
            found, wanted = found[:1], wanted[:1]
        np.testing.assert_allclose(found, wanted, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds must be at least 1"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--width -1", "--width must be at least 1"),
        ("--out taken", "--out: taken is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert message in refusal(lets.main, arguments)
