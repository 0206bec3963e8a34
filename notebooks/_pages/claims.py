"""The tables of the papers' claims, from the committed numbers in examples/claims/results/."""

from collections import Counter
from collections.abc import Iterable
from types import ModuleType

from examples.claims import (
    async_cost,
    async_digits,
    async_long,
    bsam,
    claim,
    committed,
    convergence,
    exact,
    gradient_directions,
    lets,
    lightsam,
    long_tail,
    lsam,
    mup_transfer,
    normalization,
    second_order,
    share_of_sam,
    snippets,
    stick_figures,
    strength,
    two_views,
    which_batch,
    wrong_labels,
)
from examples.claims.claim import WORDS, Found

# The scripts in the order of the page. Each has CLAIMS, and its numbers in claims/results/.
SCRIPTS: tuple[ModuleType, ...] = (
    exact,
    wrong_labels,
    strength,
    share_of_sam,
    gradient_directions,
    which_batch,
    async_long,
    async_digits,
    async_cost,
    lsam,
    convergence,
    lightsam,
    mup_transfer,
    lets,
    second_order,
    stick_figures,
    normalization,
    snippets,
    two_views,
    bsam,
    long_tail,
)


def found_by_script() -> dict[ModuleType, list[Found]]:
    """Return the claims of each script with their committed numbers."""
    return {
        committed: committed.committed(),
        **{script: claim.committed(script.NAME, script.CLAIMS) for script in SCRIPTS},
    }


def claims_of_systems() -> dict[str, list[tuple[ModuleType, Found]]]:
    """Return the claims about each system, each with its script."""
    found: dict[str, list[tuple[ModuleType, Found]]] = {}
    for script, claims in found_by_script().items():
        for one in claims:
            for system in one.claim.systems:
                found.setdefault(system, []).append((script, one))
    return found


def parts() -> dict[str, str]:
    """Return the written parts of the page."""
    found = found_by_script()
    return {
        "summary": summary([one for claims in found.values() for one in claims]),
        "level": level(found[committed]),
        "side": as_table(committed.side_by_side()),
        "claims": "\n\n".join(section(script, claims) for script, claims in found.items()),
    }


def summary(found: Iterable[Found]) -> str:
    """Return how many claims there are, of how many systems, and how they end."""
    found = list(found)
    systems = {system for one in found for system in one.claim.systems}
    counts = Counter(one.verdict for one in found)
    head, ends = [*WORDS], [str(counts[word]) for word in WORDS]
    return f"{len(found)} claims and controls, {len(systems)} systems:\n\n" + as_table([head, ends])


def level(found: Iterable[Found]) -> str:
    """Return how many of the methods that claim more accuracy than SAM are level with it."""
    rows = committed.level_of(list(found))
    claiming = sum(said.kind == "better" for said in committed.SAID)
    return f"Of {claiming} methods that claim more, {len(rows)} are level: {', '.join(rows)}."


def section(script: ModuleType, claims: Iterable[Found]) -> str:
    """Return the claims of a script as a table under a heading, with the command."""
    title = str(script.__doc__).partition("\n")[0].removesuffix(".")
    path = script.__name__.replace(".", "/") + ".py"
    head = ["method", "claim", "measured here", "number", "verdict"]
    table = [head, *(cells_of(one) for one in claims)]
    return f"### {title}\n\n`python {path}`\n\n{as_table(table)}"


def cells_of(one: Found) -> list[str]:
    """Return the line of a claim."""
    told = f"{one.claim.text} ({one.claim.source}"
    told += f"; published: {one.claim.published})" if one.claim.published else ")"
    return [
        ", ".join(f"[{name}](methods.md#{name})" for name in one.claim.systems),
        told,
        one.claim.measured,
        claim.shown(one.number),
        with_reason(one),
    ]


def with_reason(one: Found) -> str:
    """Return the verdict, with what is known about it."""
    return f"**{one.verdict}**" + (f": {one.claim.why}" if one.claim.why else "")


def as_table(grid: list[list[str]]) -> str:
    """Return a table in Markdown, the head first."""
    head, *rows = [[cell.replace("|", "\\|") for cell in line] for line in grid]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


MOST = 8  # claims on a card


def on_card(found: Iterable[tuple[ModuleType, Found]]) -> list[str]:
    """Return the items of a card about the claims of a method; none if there is none.

    A claim that is measured several times is one item.
    """
    texts: dict[str, list[str]] = {}
    for _, one in found:
        texts.setdefault(one.claim.text, []).append(with_number(one))
    items = [f"  {text} {'; '.join(ends)}" for text, ends in texts.items()]
    if len(items) > MOST:
        items[MOST:] = [f"  {len(items) - MOST} more: [the page](claims.md#all-claims)"]
    return ["**Claims of the paper, and what we see** ([all](claims.md)):", *items] if items else []


def with_number(one: Found) -> str:
    """Return the verdict with the number and what it is."""
    number = claim.shown(one.number)
    return f"*{one.verdict}*" + (f": {number} ({one.claim.measured})" if number else "")
