"""Claims that results which are committed already answer: accuracy, flatness, fine-tuning.

    python examples/claims/committed.py

Nothing is trained. Papers compare at equal epochs, so what they say of accuracy is compared with
the committed results of digits.py: every method trains for 40 epochs, tuned in the same way, with
20 paired seeds. "Better" holds if the whole interval of the difference is above 0. "Level" holds if
all of it is above -0.5 points, a third of what SAM gains on the digits with 30% wrong labels. With
clean labels SAM gains nothing there, so a method that is level with it says nothing.

Whether a claim is worth its cost is another question. compare.py answers it at equal gradients. Its
differences stand beside these ones in a table, and do not count for a verdict.

Other claims are compared with the results of compare.py, late_sam.py, fine_tune.py and
preference.py, as each claim says.

The script prints each claim with its number and the verdict, and writes results.json and
committed.png to --out. It takes ten seconds.
"""

import argparse

from examples.common import arguments

NAME = "committed"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    arguments.add_out(parser, NAME)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from examples.claims.claim import (
    COLORS,
    HOLDS,
    RESULTS,
    Claim,
    Found,
    found_of,
    print_claims,
    shown,
)
from examples.common import figures, files
from examples.common.intervals import LEVEL, Interval, mean_interval
from examples.common.output import choose_folder
from examples.common.report import Report, aligned
from examples.compare import cells, options

DIGITS = options.RESULTS.parent / "digits.json"
LABELS = {0.3: "30% wrong labels", 0.0: "clean labels"}
TASKS = {0.3: "digits-noisy", 0.0: "digits-clean"}  # the same networks and images in compare.py
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
    Said(
        "friendly-sam",
        "better",
        "better than SAM",
        "abstract",
        "it may take small, noisy batches; these have 100 images",
    ),
    Said("fisher-sam", "better", "better than SAM on several benchmarks", "abstract"),
    Said("msam", "better", "smaller groups of examples generalize better", "abstract"),
    Said("gcsam", "better", "better than SAM and Adam", "abstract"),
    Said(
        "zsharp",
        "better",
        "better than SAM, ASAM and Friendly SAM",
        "abstract",
        "it may take deep networks; this one has three layers",
    ),
    Said("le-sam", "better", "better than SAM and its variants", "abstract"),
    Said("eigen-sam", "better", "better than SAM", "abstract"),
    Said("xsam", "better", "better than SAM", "abstract"),
    Said("lookbehind-sam", "better", "better than SAM with one and with more steps", "abstract"),
    Said("tsam", "better", "better than SAM and SGD", "abstract"),
    Said("gnp", "better", "better than SAM, which is its special case", "abstract"),
    Said("cr-sam", "better", "better than SAM", "abstract"),
    Said("x-sam", "better", "better than SAM", "abstract"),
    Said("gam", "better", "with SAM better than SAM", "abstract"),
    Said(
        "gsam",
        "better",
        "better than SAM",
        "abstract",
        "the paper gains most in vision transformers",
    ),
    Said("bisam", "better", "better than SAM", "abstract"),
    Said(
        "sagm",
        "better",
        "better than SAM",
        "abstract",
        "the paper tests on domains that were not trained, this test does not",
    ),
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
    Said(
        "vsam",
        "level",
        "SAM's accuracy, 40% faster",
        "abstract",
        "its controller takes few sharp steps here, see second_order.py",
    ),
    Said(
        "arsam",
        "level",
        "SAM's accuracy, about 40% faster",
        "abstract",
        "its controller takes few sharp steps here, see second_order.py",
    ),
    Said("ausam", "level", "SAM's accuracy, 70% faster", "abstract"),
    Said("esam", "level", "SAM's accuracy for less of its extra cost", "abstract"),
    Said(
        "async-sam",
        "level",
        "SAM's accuracy in SGD's time",
        "abstract",
        "see which_batch.py: the ascent has another batch",
    ),
    Said("fisher-sparse-sam", "level", "half of the weights keep SAM's accuracy", "abstract"),
    Said("dynamic-sparse-sam", "level", "half of the weights keep SAM's accuracy", "abstract"),
    Said(
        "sam-polyak",
        "level",
        "as good as a tuned SAM",
        "abstract",
        "its step needs the least loss, which wrong labels raise",
    ),
    Said("momentum-sam", "over the base", "better than the base at its cost", "abstract"),
    Said(
        "ksam",
        "over the base",
        "better than SGD at little cost",
        "abstract",
        "with wrong labels it takes the examples of the highest loss: the wrong ones",
    ),
    Said("mesa", "over the base", "better than the base at little more memory", "abstract"),
    Said(
        "sassha",
        "over the base",
        "better than first-order methods",
        "abstract",
        "see normalization.py: this network has no normalization layers",
    ),
)

# What cells of compare.py answer: the task, the row and its opponent, and the measure. Where the
# two rows spend other numbers of gradients, the claim says so.


class Measured(NamedTuple):
    """Where the number of a claim comes from: a measure of two cells, paired by seed.

    Attributes:
        task: The task.
        row: The method.
        other: Its opponent.
        measure: The measure; "" for the main result, higher is better.
        is_ratio: Whether the number is the ratio's logarithm (in powers of ten), not a difference.
        factor: On a difference.
    """

    task: str
    row: str
    other: str
    measure: str = ""
    is_ratio: bool = False
    factor: float = 100.0


STEPS = "as many steps"
CELLS: dict[str, tuple[Claim, Measured]] = {
    **{
        f"sam-top-eigenvalue, {labels}": (
            Claim(
                ("sam",),
                "SAM ends in flatter minima: the top eigenvalue of the Hessian is lower.",
                "Figure 3",
                f"powers of ten between the top eigenvalues of SAM and the base, {STEPS}; {labels}",
                high=0.0,
                published="24.2 and 1.0, WideResNet on CIFAR-10 without augmentation or BatchNorm",
            ),
            Measured(TASKS[noise], "sam", "base", "top_eigenvalue", is_ratio=True),
        )
        for noise, labels in LABELS.items()
    },
    "momentum-sam-flatter": (
        Claim(
            ("momentum_sam",),
            "It ends in flatter minima than its base optimizer.",
            "tables",
            f"powers of ten between the top eigenvalues, {STEPS}; 30% wrong labels",
            high=0.0,
            published="5.2 and 15.2, WideResNet on CIFAR-100",
        ),
        Measured("digits-noisy", "momentum-sam", "base2x", "top_eigenvalue", is_ratio=True),
    ),
    **{
        f"momentum-sam, {task}": (
            Claim(
                ("momentum_sam",),
                "Better than the base optimizer at the base optimizer's cost.",
                "abstract",
                f"score over the base's at equal gradients; {title}",
                low=0.0,
            ),
            Measured(task, "momentum-sam", "base2x"),
        )
        for task, title in {
            "tabular": "tabular data, points",
            "mnist-noisy": "MNIST with 40% wrong labels, points",
        }.items()
    },
    "asam-flatter": (
        Claim(
            ("asam",),
            "Its adaptive sharpness fits generalization better, and it lowers it.",
            "abstract",
            "powers of ten between its adaptive worst-case sharpness and SAM's; 30% wrong labels",
            high=0.0,
        ),
        Measured("digits-noisy", "asam", "sam", "adaptive_worst_case", is_ratio=True),
    ),
    "msam-m-sharpness": (
        Claim(
            ("msam",),
            "It ends flatter than SAM.",
            "secondary source",
            "powers of ten between the m-sharpness of both; 30% wrong labels",
            high=0.0,
        ),
        Measured("digits-noisy", "msam", "sam", "m_sharpness", is_ratio=True),
    ),
    "bsam-likelihood": (
        Claim(
            ("bsam",),
            "Better estimates of uncertainty than SAM's.",
            "abstract",
            "negative log-likelihood minus SAM's, 100 to 1 images per class",
            high=0.0,
        ),
        Measured("digits-long-tail", "bsam", "sam", "test_loss", factor=1.0),
    ),
    "bsam-calibration": (
        Claim(
            ("bsam",),
            "Better estimates of uncertainty than SAM's.",
            "abstract",
            "calibration error minus SAM's, points; 100 to 1 images per class",
            high=0.0,
        ),
        Measured("digits-long-tail", "bsam", "sam", "calibration_error"),
    ),
    "saf-flat": (
        Claim(
            ("saf",),
            "It ends in minima as flat as SAM's.",
            "abstract",
            "powers of ten between SAF's and SAM's top eigenvalue, equal gradients; clean labels",
            high=0.1,
        ),
        Measured("digits-clean", "saf", "sam", "top_eigenvalue", is_ratio=True),
    ),
}

# Late SAM: SAM in the last part of the training, at equal gradients.
LATE = {
    f"late-sam-{share}, {labels}": (
        Claim(
            ("sam", "periodic"),
            f"SAM in the last {share} of the training does what SAM in all of it does.",
            "Towards Understanding SAM, figure; Late SAM",
            f"test accuracy over that of SAM in all steps, equal gradients, points; {labels}",
            low=-MARGIN,
            why="the base optimizer has learned the wrong labels before"
            if noise and share == "10%"
            else "",
        ),
        (f"last {share}", noise),
    )
    for share in ("10%", "50%")
    for noise, labels in LABELS.items()
}

# Fine-tuning. The committed tables hold means and standard errors.
TUNED = {
    f"{row.split()[1]}-{task}": (
        Claim(
            (row.split()[1].replace("-", "_"),),
            text,
            source,
            f"{unit} over AdamW's, {where}, equal steps",
            low=0.0,
            why=why,
        ),
        (task, row),
    )
    for task, row, text, source, unit, where, why in (
        (
            *("images", "lora flat-lora", "Noise on the whole weights is better than plain LoRA."),
            *("abstract", "points of the new task's accuracy", "adapters on the digits"),
            "the validation images chose a radius of 0",
        ),
        (
            *("images", "lora bi-lora", "Better than plain LoRA, and than SAM on the adapters."),
            *("abstract", "points of the new task's accuracy", "adapters on the digits"),
            "",
        ),
        (
            *("language", "lora bi-lora", "Better than plain LoRA, and than SAM on the adapters."),
            *("abstract", "nats of the new text's loss, lower is better,", "adapters, small GPT"),
            "",
        ),
        (
            *("images", "whole sl-sam", "Level with the best in fine-tuning, for few layers."),
            *("abstract", "points of the new task's accuracy", "the whole network, digits"),
            "three tensors are few arms for its bandit; its rewards are reconstructed",
        ),
        (
            *("language", "whole functional-sam", "Better than AdamW and SAM in language models."),
            *("abstract", "nats of the new text's loss, lower is better,", "the whole small GPT"),
            "the validation text chose a radius of 0",
        ),
    )
}
PREFERENCE = {
    "logits-sam-preference": (
        Claim(
            ("logits_sam",),
            "In preference tuning (DPO), better than AdamW at about its time.",
            "abstract",
            "pairs in the right order over AdamW's, points, small GPT",
            low=0.0,
            why="the validation pairs chose a radius of 0",
        ),
        "logits-sam",
    ),
}


def system_of(row: str) -> str:
    """Return the name in the catalog of a row of the digits' table."""
    return row.replace("-", "_")


def said_claims() -> dict[str, Claim]:
    """Return the claims on accuracy, one for each method and kind of labels."""
    found = {}
    for said in SAID:
        other, low = KINDS[said.kind]
        for noise, labels in LABELS.items():
            if not noise and said.kind == "level":
                continue  # SAM itself gains nothing there
            found[f"{said.row}, {labels}"] = Claim(
                (system_of(said.row),),
                f"{said.text[:1].upper()}{said.text[1:]}.",
                said.source,
                f"test accuracy over {other}'s at equal epochs, points; digits, {labels}",
                low=low,
                why=said.why,
            )
    return found


CLAIMS = {
    **said_claims(),
    **{name: claim for name, (claim, _) in {**CELLS, **LATE, **TUNED, **PREFERENCE}.items()},
}


@functools.cache
def rows() -> dict[tuple[str, float], dict[str, Any]]:
    """Return the committed rows of digits.py, by method and share of wrong labels."""
    return {(row["row"], row["noise"]): row for row in files.read_json(DIGITS)["rows"]}


def difference(row: str, other: str, noise: float) -> list[float]:
    """Return how far a method is ahead of another one at equal epochs, in points, by seed."""
    mine, theirs = (rows()[name, noise]["test_accuracy"] for name in (row, other))
    return (100 * np.subtract(mine, theirs)).tolist()


@functools.cache
def compared() -> Mapping[str, cells.Cells]:
    """Return the committed cells of compare.py."""
    return cells.read_cells(options.RESULTS)


def of_cells(asked: Measured) -> list[float]:
    """Return the number of each seed that a claim asks for."""
    one, other = (compared()[asked.task][name] for name in (asked.row, asked.other))
    if not asked.measure:
        return (asked.factor * cells.difference(one, other)).tolist()
    mine, theirs = one.measure(asked.measure), other.measure(asked.measure)
    if asked.is_ratio:
        return np.log10(mine / theirs).tolist()
    return (asked.factor * (mine - theirs)).tolist()


def values() -> dict[str, list[float]]:
    """Return the numbers of each claim, one for each seed; those of fine-tuning have intervals."""
    found = {}
    for said in SAID:
        other, _ = KINDS[said.kind]
        for noise, labels in LABELS.items():
            found[f"{said.row}, {labels}"] = difference(said.row, other, noise)
    found |= {name: of_cells(asked) for name, (_, asked) in CELLS.items()}
    late = files.read_json(RESULTS / "late_sam.json")["results"]
    accuracy = {(each["row"], each["noise"]): np.array(each["accuracy"]) for each in late}
    for name, (_, (row, noise)) in LATE.items():
        found[name] = (accuracy[row, noise] - accuracy["sam", noise]).tolist()
    preference = files.read_json(RESULTS / "preference.json")["results"]
    accuracy = {each["method"]: np.array(each["accuracy"]) for each in preference}
    for name, (_, method) in PREFERENCE.items():
        found[name] = (accuracy[method] - accuracy["adamw"]).tolist()
    return {name: each for name, each in found.items() if name in CLAIMS}


def tuned() -> dict[str, Interval]:
    """Return the differences to AdamW in fine-tuning, higher is better."""
    found = {}
    for name, (_, (task, row)) in TUNED.items():
        results = files.read_json(RESULTS / f"fine_tune_{task}.json")
        [mine] = [each for each in results["rows"] if each["row"] == row]
        measure, factor = ("new_accuracy", 100) if task == "images" else ("new_loss", -1)
        if not mine["rho"]:  # then it is AdamW, and only the search of its rate differs
            measure += ", same rate"
        mean, error = (factor * number + 0.0 for number in mine["differences"][measure])
        wide = stats.t.ppf((1 + LEVEL) / 2, results["settings"]["seeds"] - 1) * abs(error)
        found[name] = Interval(mean, mean - wide, mean + wide)
    return found


def committed() -> list[Found]:
    """Return the claims with their numbers."""
    intervals = tuned()
    return [
        one._replace(number=intervals.get(one.name, one.number))
        for one in found_of(CLAIMS, values())
    ]


def side_by_side() -> list[list[str]]:
    """Return the differences at equal epochs beside those at equal gradients, the head first."""
    head = ["method", "claim"]
    for labels in LABELS.values():
        head += [f"equal epochs, {labels}", f"equal gradients, {labels}"]
    table = [head]
    for said in SAID:
        other, _ = KINDS[said.kind]
        line = [said.row, f"{said.kind} than {other}" if said.kind == "better" else said.kind]
        for noise, task in TASKS.items():
            rival = "base2x" if other == "base" else other
            spent = Measured(task, said.row, rival)
            line.append(shown(mean_interval(difference(said.row, other, noise))))
            line.append(shown(mean_interval(of_cells(spent))) if said.row != "sam" else "")
        table.append(line)
    return table


def level_of(found: Sequence[Found]) -> list[str]:
    """Return the methods that claim more than SAM, and are level with it within the margin."""
    better = {said.row for said in SAID if said.kind == "better"}
    level = {}
    for one in found:
        row, _, _ = one.name.partition(",")
        if row in better and one.name.endswith(tuple(LABELS.values())):
            is_level = one.number.low > -MARGIN and one.number.high < MARGIN
            level[row] = level.get(row, True) and is_level
    return [row for row, is_level in level.items() if is_level]


def draw(found: Sequence[Found], path: Path) -> None:
    """Draw the differences of accuracy: one panel for each kind of labels, the best at the top."""
    figure = figures.make_figure(len(LABELS), [figures.height_of(len(SAID))])
    (panels,) = figure.subplots(1, len(LABELS), squeeze=False)
    for axes, labels in zip(panels, LABELS.values(), strict=True):
        mine = [
            one for one in found if one.name.endswith(f", {labels}") and one.name[:5] != "late-"
        ]
        mine = [one for one in mine if one.name in said_claims()]
        mine.sort(key=lambda one: one.number.value)
        for position, one in enumerate(mine):
            draw_one(axes, position, one)
        axes.set_yticks(range(len(mine)), [one.name.partition(",")[0] for one in mine])
        axes.set_ylim(-0.7, len(mine) - 0.3)
        axes.axvline(0, color="0.7", linewidth=1, zorder=0)
        axes.set_xlabel("points over SAM or the base optimizer")
        axes.grid(axis="x", alpha=0.3)
        holds = sum(one.verdict == HOLDS for one in mine)
        axes.set_title(f"{labels}: {holds} of {len(mine)} hold")
    title = "Claims on accuracy at equal epochs, digits, 95% intervals. Blue: holds; grey: open; "
    title += "orange: does not hold. Tick: where the interval must begin"
    figures.save(figure, path, title)


def draw_one(axes: Any, position: int, one: Found) -> None:
    """Draw a difference with its interval and its bar; far below, it stays at the edge."""
    value, low, high = one.number
    color = COLORS[one.verdict]
    if value < -EDGE:
        axes.plot(-EDGE, position, "<", color=color)
        return
    axes.plot([max(low, -EDGE), high], [position, position], color=color, linewidth=1.5)
    axes.plot(value, position, "o", markersize=5, color=color)
    axes.plot(one.claim.low, position, "|", markersize=10, color="black")


EDGE = 2.6  # points; what is further below is drawn here


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    found = committed()
    print_claims(found)
    print("\nPoints of test accuracy; equal gradients: against base2x in place of base\n")
    print("\n".join(aligned(side_by_side())))
    level = level_of(found)
    print(f"\n{len(level)} that claim more than SAM are level with it, within {MARGIN} points")
    print(f"with wrong and with clean labels: {', '.join(level)}")
    report.save(
        claims=[{"name": one.name, "number": one.number, "verdict": one.verdict} for one in found]
    )
    draw(found, args.folder / "committed.png")
    report.end("committed.png")
    return found


if __name__ == "__main__":
    main()
