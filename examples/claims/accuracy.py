"""Claims on accuracy: better than SAM, level with SAM, or better than the base optimizer.

    python examples/claims/accuracy.py

Nothing is trained. Papers compare at equal epochs, so their claims are compared with the committed
results of digits.py: every method trains for 40 epochs, tuned in the same way, with 20 paired
seeds. Beside that stand the results of compare.py at equal gradients: they say whether a claim is
worth its cost, and do not count for the verdict.

"Better" holds if the whole interval of the difference is above 0, "level" if all of it is above
-0.5 points, a third of what SAM gains on the digits with wrong labels. Where SAM gains nothing
itself, as with clean labels, every method is about level.

The script prints each claim with its number and the verdict, and writes results.json and
accuracy.png to --out. It takes ten seconds.
"""

import argparse

from examples.common import arguments

NAME = "accuracy"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    arguments.add_out(parser, NAME)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.claims.claim import Claim, Found, as_rows, found_of, print_claims
from examples.common import figures, files
from examples.common.output import choose_folder
from examples.common.report import Report
from examples.compare.options import RESULTS

DIGITS = RESULTS.parent / "digits.json"
LABELS = {0.3: "30% wrong labels", 0.0: "clean labels"}
MARGIN = 0.5  # points; less than that below SAM is level with it
KINDS = {"better": ("sam", 0.0), "level": ("sam", -MARGIN), "over the base": ("base", 0.0)}


class Said(NamedTuple):
    """What a paper says of accuracy.

    Attributes:
        row: The method in the tables of the digits.
        kind: One of `KINDS`.
        text: The claim.
        source: Where it stands.
        why: What it takes to see it, as far as it is known.
    """

    row: str
    kind: str
    text: str
    source: str
    why: str = ""


SAID = (
    Said("sam", "over the base", "better than SGD, wrong labels included", "Tables 1 and 4"),
    Said("asam", "better", "better than SAM", "abstract"),
    Said("friendly-sam", "better", "better than SAM", "abstract", "small, noisy batches"),
    Said("fisher-sam", "better", "better than SAM on several benchmarks", "abstract"),
    Said("msam", "better", "smaller groups of examples generalize better", "abstract"),
    Said("gcsam", "better", "better than SAM and Adam", "abstract"),
    Said("zsharp", "better", "better than SAM, ASAM and Friendly SAM", "abstract", "deep networks"),
    Said("le-sam", "better", "better than SAM and its variants", "abstract"),
    Said("eigen-sam", "better", "better than SAM", "abstract"),
    Said("xsam", "better", "better than SAM", "abstract"),
    Said("lookbehind-sam", "better", "better than SAM with one and with more steps", "abstract"),
    Said("tsam", "better", "better than SAM and SGD", "abstract"),
    Said("gnp", "better", "better than SAM, which is its special case", "abstract"),
    Said("cr-sam", "better", "better than SAM", "abstract"),
    Said("x-sam", "better", "better than SAM", "abstract"),
    Said("gam", "better", "with SAM better than SAM", "abstract"),
    Said("gsam", "better", "better than SAM", "abstract", "most in vision transformers"),
    Said("bisam", "better", "better than SAM", "abstract"),
    Said("sagm", "better", "better than SAM", "abstract", "on domains that were not trained"),
    Said("sampa", "better", "better than SAM", "abstract"),
    Said("saf", "better", "better than SAM on ImageNet, at the base's cost", "abstract"),
    Said(
        "g-rst", "better", "better than SAM in most cases, for half of the extra cost", "abstract"
    ),
    Said("wsam", "level", "level with SAM or better", "secondary source"),
    Said("stable-sam", "level", "level with SAM or better", "abstract"),
    Said("rwp", "level", "competitive with SAM in half of its time", "abstract"),
    Said("arwp", "level", "reaches SAM at half of its cost", "abstract"),
    Said("marwp", "level", "reaches SAM at half of its cost", "abstract"),
    Said("looksam", "level", "SAM's accuracy for few more gradients than SGD's", "abstract"),
    Said("rst", "level", "SAM's performance for fewer gradients", "abstract"),
    Said("ae-sam", "level", "SAM's accuracy for about half of its extra cost", "abstract"),
    Said("vsam", "level", "SAM's accuracy, 40% faster", "abstract", "hundreds of its windows"),
    Said(
        "arsam", "level", "SAM's accuracy, about 40% faster", "abstract", "hundreds of its windows"
    ),
    Said("ausam", "level", "SAM's accuracy, 70% faster", "abstract"),
    Said("esam", "level", "SAM's accuracy for less of its extra cost", "abstract"),
    Said("async-sam", "level", "SAM's accuracy in SGD's time", "abstract", "long trainings"),
    Said("fisher-sparse-sam", "level", "half of the weights keep SAM's accuracy", "abstract"),
    Said("dynamic-sparse-sam", "level", "half of the weights keep SAM's accuracy", "abstract"),
    Said("sam-polyak", "level", "as good as a tuned SAM", "abstract", "a loss that can reach 0"),
    Said("momentum-sam", "over the base", "better than the base at its cost", "abstract"),
    Said("ksam", "over the base", "better than SGD at little cost", "abstract", "right labels"),
    Said("mesa", "over the base", "better than the base at little more memory", "abstract"),
    Said("sassha", "over the base", "better than first-order methods", "abstract", "normalization"),
)


def claims() -> dict[str, Claim]:
    """Return the claims, one for each method and kind of labels."""
    found = {}
    for said in SAID:
        other, low = KINDS[said.kind]
        for labels in LABELS.values():
            found[f"{said.row}, {labels}"] = Claim(
                (system_of(said.row),),
                said.text,
                said.source,
                f"test accuracy over {other}'s at equal epochs, points; digits, {labels}",
                low=low,
                why=said.why,
            )
    return found


def system_of(row: str) -> str:
    """Return the name in the catalog of a row of the digits' table."""
    return row.replace("-", "_")


def values() -> dict[str, list[float]]:
    """Return the differences of each claim, one for each seed."""
    rows = {(row["row"], row["noise"]): row for row in files.read_json(DIGITS)["rows"]}
    found = {}
    for said in SAID:
        other, _ = KINDS[said.kind]
        for noise, labels in LABELS.items():
            mine, theirs = (rows[name, noise]["test_accuracy"] for name in (said.row, other))
            found[f"{said.row}, {labels}"] = (100 * np.subtract(mine, theirs)).tolist()
    return found


def draw(found: list[Found], path: Path) -> None:
    """Draw the differences, the largest at the top: one panel for each kind of labels."""
    figure = figures.make_figure(len(LABELS), [figures.height_of(len(SAID))])
    (panels,) = figure.subplots(1, len(LABELS), squeeze=False)
    for axes, labels in zip(panels, LABELS.values(), strict=True):
        mine = [one for one in found if one.name.endswith(labels)]
        for position, one in enumerate(sorted(mine, key=lambda one: -one.number.value)):
            draw_one(axes, position, one)
        holds = sum(one.verdict == HOLDS for one in mine)
        axes.set_title(f"{labels}: {holds} of {len(mine)} hold")
    figures.save(figure, path, "Claims on accuracy at equal epochs, digits; 95% intervals")
