"""The example on longer trainings of AsyncSAM: how rho is chosen, and what is reported."""

import numpy as np
import pytest

from examples.claims import async_long, claim, climbing
from examples.common.registry import VARIANTS


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    """Two rows are SAM, which is compiled once, and so do "previous batch" and AsyncSAM."""
    both = climbing.arm(climbing.both, 2)
    arms = dict.fromkeys(("sam", "older point"), VARIANTS["sam"])
    monkeypatch.setattr(
        async_long, "ARMS", arms | dict.fromkeys(("previous batch", "async-sam"), both)
    )
    monkeypatch.setattr(async_long, "LONGER", (1, 2))
    monkeypatch.setattr(async_long, "RADII", (0.5,))
    monkeypatch.setattr(async_long, "SEARCH_SEEDS", range(1000, 1001))
    arguments = "--seeds 2 --epochs 1 --width 8 --out results"
    found = async_long.main(arguments.split())
    assert {one.name for one in found} == set(async_long.CLAIMS)
    report = read_report(in_empty_folder / "results")
    values, points = report["values"], report["points"]
    assert set(values) == set(async_long.CLAIMS)
    assert set(report["radii"].values()) == {0.5}
    for how in async_long.HOW:
        behind = [
            np.subtract(points[f"async-sam, {k}, {how}"], points[f"sam, {k}, {how}"])
            for k in (1, 2)
        ]
        np.testing.assert_allclose(values[f"async, {how}"], behind[1], atol=1e-4)
        np.testing.assert_allclose(values[f"trend, {how}"], behind[1] - behind[0], atol=1e-3)
        assert values[f"older point, {how}"] == values[f"limit, {how}"] == [0, 0]
        assert np.any(values[f"async, {how}"])
    assert points["sam, 2, SAM's rho"] != points["sam, 2, rho chosen"]
    assert points["sam, 2, rho chosen"] != points["sam, 1, rho chosen"]
    assert (in_empty_folder / "results" / "async_long.json").exists()
    assert (in_empty_folder / "results" / "async_long.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    for text in ("points over sam", "2 epochs", "async-sam, its rho", "smaller steps"):
        assert text in printed


def test_rho_is_chosen_on_the_validation_split(monkeypatch):
    """On the validation split 0.1 is the best rho, and on the test split 0.5."""
    seen = []

    def accuracies(row, args, longer, rho, seeds, split):
        del args, longer
        seen.append((row, len(seeds), split))
        best = 0.5 if split == 2 else 0.1
        return [90 - abs(rho - best)] * len(seeds)

    monkeypatch.setattr(async_long, "accuracies", accuracies)
    monkeypatch.setattr(async_long, "ROWS", ("sam",))
    monkeypatch.setattr(async_long, "LONGER", (4,))
    args = async_long.parse(["--seeds", "3"])
    points, radii = async_long.measure(args)
    assert radii == {("sam", 4): 0.1}
    assert points["sam", 4, async_long.GIVEN] == pytest.approx([89.7] * 3)
    assert points["sam", 4, async_long.CHOSEN] == pytest.approx([89.6] * 3)
    tuning = ("sam", len(async_long.SEARCH_SEEDS), 1)
    assert seen == [tuning] * len(async_long.RADII) + [("sam", 3, 2)] * 2


def test_bad_arguments(refusal):
    assert "--epochs must be at least 1" in refusal(async_long.main, "--epochs 0")


def test_committed_numbers_are_those_of_the_claims():
    assert set(claim.read(async_long.NAME)) == set(async_long.CLAIMS)
