"""The script on the share of SAM's gradients: its arms, its controls, the smallest shares."""

import numpy as np
import pytest
from decisions import decide

from examples.claims import claim, share_of_sam
from examples.common import training
from examples.common.intervals import Interval
from samx import policies

SEEDS = 4
ALIKE = [f"{arm} as sam" for arm in share_of_sam.ALIKE]
CONTROLS = [f"{share_of_sam.CONTROL} {name}" for name in ("overall", "by epoch")]


def result_of(arm, accuracy=0.9, gradients=600.0):
    spread = np.linspace(0.0, 0.01, SEEDS)
    return {
        **{"row": arm, "noise": 0.3, "edges": [], "learning_rate": 0.1, "rho": 0.2},
        "gradients": gradients,
        "test_accuracy": (accuracy + spread).tolist(),
        "train_accuracy": [0.7] * SEEDS,
    }


def results_of(**changed):
    """Return results of all arms; those whose names are given differ."""
    arms = [*share_of_sam.arms_of(400), *CONTROLS, *ALIKE]
    ends = {"base": {"gradients": 400.0}, "sam": {"gradients": 800.0}}
    clean = [result_of(arm, accuracy) for arm, accuracy in (("base", 0.95), ("ksam 0.5", 0.96))]
    noisy = [result_of(arm, **{**ends.get(arm, {}), **changed.get(arm, {})}) for arm in arms]
    return noisy + [result | {"noise": 0.0} for result in clean]


def test_a_tiny_run(in_empty_folder, capsys, read_report, monkeypatch):
    """The ends of the curves and AE-SAM's are trained; other arms get the results of SAM."""

    def train_some(arms, args, noises, **others):
        chosen = {name: arm for name, arm in arms.items() if name in real}
        trained = train(chosen, args, noises, **others) or kept
        kept.extend(trained)
        return trained[: len(chosen)] + [
            trained[0] | {"row": name, "noise": noises[0]} for name in arms if name not in chosen
        ]

    real, kept, train = ["sam", "base", share_of_sam.PAPERS_THRESHOLD], [], share_of_sam.train_arms
    monkeypatch.setattr(share_of_sam, "train_arms", train_some)
    monkeypatch.setattr(training, "SEARCH_SEEDS", range(1000, 1001))
    arguments = "--seeds 2 --epochs 1 --width 8 --rho 0.1 --out results"
    found = share_of_sam.main(arguments.split())
    folder = in_empty_folder / "results"
    report = read_report(folder)
    assert [one.name for one in found] == [*share_of_sam.CLAIMS] == [*report["values"]]
    rows = {row["row"]: row for row in report["rows"]}
    assert set(rows) == {*share_of_sam.arms_of(10), *CONTROLS, *ALIKE}
    assert rows["base"]["gradients"] == 10
    assert rows["sam"]["gradients"] == 20
    sharp = 10 * report["values"]["ae-sam-half"][0]
    assert rows["ae-sam 1 to -1"]["gradients"] == pytest.approx(10 + sharp)
    assert 0 < sharp < 10
    assert (folder / "share_of_sam.png").stat().st_size > 10_000
    monkeypatch.setattr(claim, "RESULTS", folder)
    read = claim.found_of(share_of_sam.CLAIMS, claim.read("share_of_sam"))
    assert [one.verdict for one in read] == [one.verdict for one in found]
    assert "The smallest share" in capsys.readouterr().out


def test_every_arm_belongs_to_its_method():
    names = {arm: share_of_sam.method_of(arm) for arm in [*share_of_sam.arms_of(400), *CONTROLS]}
    assert names["vsam 10"] == "vsam"
    assert names["vsam, random 0.2"] == "vsam, random"
    assert names["ae-sam 1 to -1"] == "ae-sam"
    assert names["ae-sam, random by epoch"] == share_of_sam.CONTROL
    assert names["looksam-0.7 5"] == "looksam-0.7"
    assert names["saf"] == "saf"
    assert set(names.values()) == set(share_of_sam.METHODS)


def test_the_controls_take_as_many_sharp_steps_as_ae_sam():
    """AE-SAM takes no sharp step in the first of two epochs, and only such steps in the second."""
    shares = share_of_sam.sharp_shares([10.0, 30.0])
    np.testing.assert_allclose(shares, [0, 1])
    np.testing.assert_allclose(share_of_sam.sharp_shares([12.0, 31.0]), [0.2, 0.9])
    probabilities = share_of_sam.as_often(shares)
    assert probabilities["overall"] == 0.5
    is_sharp, _ = decide(policies.random(probabilities["by epoch"]), np.ones(20))
    assert is_sharp.tolist() == [False] * 10 + [True] * 10


def test_the_smallest_share_is_that_of_the_cheapest_arm_that_keeps_the_accuracy():
    def point(arm, share, low):
        return share_of_sam.Point(arm, arm.split()[0], share, Interval(low + 0.2, low, low + 0.4))

    curves = [
        point("rst 0.1", 0.55, -0.7),
        point("rst 0.5", 0.75, -0.4),
        point("rst 0.2", 0.6, -0.49),
        point("ksam 0.5", 0.67, -2.0),
    ]
    found = share_of_sam.smallest_shares(curves)
    assert found == {"rst": curves[2], "ksam": None}


def test_claims_compare_the_right_arms():
    changed = {
        "base": {"accuracy": 0.88},
        "looksam 5": {"accuracy": 0.93},
        "periodic 10": {"accuracy": 0.87},
        "rst 0.1": {"accuracy": 0.84},
        "ae-sam, random by epoch": {"accuracy": 0.89},
        "ae-sam 1 to -1": {"gradients": 560.0},
        "esam 0.5": {"gradients": 700.0},
        "vsam, random 0.2 as sam": {"accuracy": 0.94},
    }
    results = results_of(**changed)
    values = share_of_sam.values_of(results, 0.3)
    assert [*values] == [*share_of_sam.CLAIMS]
    expected = {
        "sam-base": 2.0,
        "looksam-share": 3.0,
        "looksam-alpha": -3.0,
        "looksam-periodic": 2.0,  # the mean of 0, 3 and 3
        "random-periodic": -1.0,  # the mean of 0, 0 and -3
        "ae-sam-policy": 0.0,
        "ae-sam-steps": 1.0,
        "ksam-base": 2.0,
        "ksam-clean-base": 1.0,
        "vsam-reuse-as-sam": 4.0,
    }
    for name, number in expected.items():
        assert values[name] == pytest.approx([number] * SEEDS, abs=1e-9), name
    assert values["ae-sam-half"] == pytest.approx([0.4])
    assert values["esam-cost"] == pytest.approx([75.0])
    shares = {point.arm: point.share for point in share_of_sam.points_of(results, 0.3)}
    assert set(shares) == {*share_of_sam.arms_of(400), *CONTROLS}  # no arm "as sam"
    assert shares["sam"] == 1
    assert shares["base"] == 0.5
    assert shares["ae-sam 1 to -1"] == pytest.approx(0.7)
