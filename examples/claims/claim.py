"""A claim of a paper, and what is measured here: the form that the scripts of claims share.

A script has a table of claims. For each of them it measures a number for each seed, or a single one
where nothing is random. The verdict comes from the interval of their mean alone, so tables and
pages are made again from results.json.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from examples.common.intervals import Interval, mean_interval
from examples.common.report import aligned

HOLDS, FAILS = "holds here", "does not hold here"
OPEN, UNTESTED = "open here", "not testable here"


class Claim(NamedTuple):
    """What a paper says, and which numbers would agree with it.

    Attributes:
        systems: Names in `samx.catalog`.
        text: The claim.
        source: Where the paper says it, or who says that it does.
        measured: What is measured here, with its unit.
        low: The claim holds if the whole interval is above; default: no bound.
        high: And below; default: no bound.
        why: What it takes to see it, or why it cannot be seen here.
    """

    systems: tuple[str, ...]
    text: str
    source: str
    measured: str
    low: float = -math.inf
    high: float = math.inf
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


def table_of(found: Sequence[Found]) -> list[list[str]]:
    """Return the claims as a table, the head first."""
    head = ["systems", "claim", "source", "measured", "number", "verdict"]
    return [
        head,
        *(
            [
                ", ".join(one.claim.systems),
                one.claim.text,
                one.claim.source,
                one.claim.measured,
                shown(one.number),
                one.verdict + (f": {one.claim.why}" if one.claim.why else ""),
            ]
            for one in found
        ),
    ]


def print_claims(found: Sequence[Found]) -> None:
    """Print a paragraph for each claim: what is said, what is measured, and the verdict."""
    for one in found:
        print(f"\n{', '.join(one.claim.systems)}: {one.claim.text} ({one.claim.source})")
        print(f"  {one.claim.measured}: {shown(one.number) or 'none'}")
        print(f"  {one.verdict}" + (f": {one.claim.why}" if one.claim.why else ""))
    counts = [(word, sum(one.verdict == word for one in found)) for word in WORDS]
    print("\n" + ", ".join(f"{count} {word}" for word, count in counts if count))


def as_rows(found: Sequence[Found]) -> list[dict[str, Any]]:
    """Return what results.json says of each claim."""
    return [
        {
            "name": one.name,
            "systems": one.claim.systems,
            "number": one.number,
            "verdict": one.verdict,
        }
        for one in found
    ]


WORDS = (HOLDS, FAILS, OPEN, UNTESTED)
