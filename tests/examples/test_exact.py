"""Claims that are mathematics: each number is the one that the claim fixes."""

import math

import pytest

from examples.claims import claim, exact
from examples.claims.claim import FAILS, HOLDS
from examples.common.intervals import Interval

# What the committed numbers say. A method that changes must change this too, knowingly.
FALSE = {"asam-invariance-by-default", "monge-invariance", "bisam-tanh", "bisam-log", "gsam-moving"}


def test_a_tiny_run(in_empty_folder, capsys):
    found = exact.main(["--seeds", "1", "--out", "results"])
    assert {one.name for one in found if one.verdict == FAILS} == FALSE
    assert {one.name for one in found if one.verdict == HOLDS} == exact.CLAIMS.keys() - FALSE
    text = capsys.readouterr().out
    assert "8 holds here, 5 does not hold here" in text
    assert (in_empty_folder / "results" / "exact.png").stat().st_size > 10_000


def test_verdicts_come_from_the_committed_numbers():
    found = claim.committed("exact", exact.CLAIMS)
    assert {one.name for one in found if one.verdict == FAILS} == FALSE
    assert all(len(each) == 10 for each in claim.read("exact").values())


@pytest.mark.parametrize(
    ("number", "verdict"),
    [
        (Interval(1.0, 0.1, 2.0), claim.HOLDS),
        (Interval(1.0, -0.1, 2.0), claim.OPEN),
        (Interval(-1.0, -2.0, -0.1), claim.FAILS),
        (Interval(4.0, 2.9, 5.0), claim.OPEN),
        (Interval(4.0, 3.1, 5.0), claim.FAILS),
        (Interval(1.0, math.nan, math.nan), claim.HOLDS),
        (Interval(-1.0, math.nan, math.nan), claim.FAILS),
        (Interval(math.nan, math.nan, math.nan), claim.UNTESTED),
    ],
)
def test_a_verdict_comes_from_the_whole_interval(number, verdict):
    wanted = claim.Claim(("sam",), "", "", "", low=0.0, high=3.0)
    assert wanted.verdict(number) == verdict


def test_a_claim_without_numbers_is_not_testable():
    wanted = {"speed": claim.Claim(("sampa",), "Half the time.", "abstract", "", why="two GPUs")}
    [one] = claim.found_of(wanted, {})
    assert one.verdict == claim.UNTESTED
    assert claim.shown(one.number) == ""
