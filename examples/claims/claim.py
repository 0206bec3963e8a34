"""A claim of a paper, and what is measured here: the form that the scripts of claims share.

A script has a table of claims, `CLAIMS`. For each of them it measures a number for each seed, or a
single one where nothing is random. The verdict comes from the interval of their mean alone. So
pages are made from the committed numbers in claims/results/, and nothing is trained for them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import figures, files
from examples.common.intervals import Interval, mean_interval
from examples.common.report import Report, as_summary

RESULTS = Path(__file__).parent / "results"

HOLDS, FAILS = "holds here", "does not hold here"
OPEN, UNTESTED = "open here", "not testable here"
WORDS = (HOLDS, FAILS, OPEN, UNTESTED)
COLORS = {HOLDS: figures.BLUE, FAILS: figures.RED, OPEN: figures.GREY}
ANY = math.inf


class Claim(NamedTuple):
    """What a paper says, and which numbers would agree with it.

    Attributes:
        systems: Names in `samx.catalog`.
        text: The claim.
        source: Where the paper says it, or who says that it does.
        measured: What is measured here, with its unit.
        low: The claim holds if the whole interval is above; default: no bound.
        high: And below; default: no bound.
        published: Numbers of the paper, with their setting; they are no bar.
        why: What it takes to see it, or why it cannot be seen here.

    A claim without a number cannot be tested here, and `why` says why.
    """

    systems: tuple[str, ...]
    text: str
    source: str
    measured: str
    low: float = -ANY
    high: float = ANY
    published: str = ""
    why: str = ""

    def verdict(self, number: Interval) -> str:
        """Compare an interval with the wanted range; a single number is its own interval."""
        value, low, high = number
        if math.isnan(value):
            return UNTESTED
        if math.isnan(low):
            low = high = value
        if self.low < low and high < self.high:
            return HOLDS
        return FAILS if high < self.low or low > self.high else OPEN


class Found(NamedTuple):
    """A claim with the number that was measured."""

    name: str
    claim: Claim
    number: Interval

    @property
    def verdict(self) -> str:
        """Return the verdict."""
        return self.claim.verdict(self.number)


Values = Mapping[str, Sequence[float]]  # for each claim, one number for each seed


def found_of(claims: Mapping[str, Claim], values: Values) -> list[Found]:
    """Return every claim with the mean of its numbers; without numbers it is not testable."""
    return [
        Found(name, claim, mean_interval(values.get(name, []))) for name, claim in claims.items()
    ]


def shown(number: Interval) -> str:
    """Format a number with its interval; nothing where there is no number."""
    if math.isnan(number.value):
        return ""
    text = f"{number.value:.3g}"
    return text if math.isnan(number.low) else f"{text} [{number.low:.3g}, {number.high:.3g}]"


def print_claims(found: Sequence[Found]) -> None:
    """Print a paragraph for each claim: what is said, what is measured, and the verdict."""
    for one in found:
        print(f"\n{', '.join(one.claim.systems)}: {one.claim.text} ({one.claim.source})")
        if one.claim.published:
            print(f"  published: {one.claim.published}")
        print(f"  {one.claim.measured}: {shown(one.number) or 'none'}")
        print(f"  {one.verdict}" + (f": {one.claim.why}" if one.claim.why else ""))
    counts = [(word, sum(one.verdict == word for one in found)) for word in WORDS]
    print("\n" + ", ".join(f"{count} {word}" for word, count in counts if count))


def save(report: Report, name: str, found: Sequence[Found], values: Values, **more: Any) -> None:
    """Write results.json, and NAME.json with what pages are made of: the numbers of each claim.

    Args:
        report: The report of the run.
        name: Name of the script.
        found: The claims with their numbers.
        values: The numbers of each claim.
        more: What else results.json gets, such as the trainings behind the numbers.
    """
    report.save(
        claims=[{"name": one.name, "number": one.number, "verdict": one.verdict} for one in found],
        values=values,
        **more,
    )
    rows = [{"claim": name, "values": list(map(rounded, each))} for name, each in values.items()]
    text = as_summary(f"examples/claims/{name}.py", report.settings, rows)
    files.write(report.folder / f"{name}.json", text)


def rounded(value: float) -> float:
    """Return a number with six digits."""
    return float(f"{value:.6g}")


def read(name: str) -> dict[str, list[float]]:
    """Return the committed numbers of each claim of a script; what was not finite is NaN."""
    return {
        row["claim"]: [math.nan if value is None else value for value in row["values"]]
        for row in files.read_json(RESULTS / f"{name}.json")["rows"]
    }


def committed(name: str, claims: Mapping[str, Claim]) -> list[Found]:
    """Return the claims of a script with the committed numbers."""
    return found_of(claims, read(name))
