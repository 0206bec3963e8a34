"""The second-order part of SAM's gradient: does it grow, and is a sample of it enough?

    python examples/claims/second_order.py

SAM's gradient is g + h: the gradient at the parameters, and a second-order part h = g_s - g. vSAM
and ARSAM compute h on some steps only, and reuse it on the others. Their abstracts say that h
matters more and more during training, and that this keeps SAM's accuracy at a speed-up of about
40%. We read this as SAM's time / its time = 1.4. A step that samples h costs two gradients, another
one costs one. So at most 43% of the steps may sample: 2 / (1 + 0.43) = 1.4.

The task is that of digits.py: 1000 images, 30% wrong labels, batches of 100. All methods train for
equal epochs, with SGD and momentum. Learning rate and rho are chosen from the same few pairs for
all, by the validation split, with seeds that are not reported. Four questions:

growth       h after each tenth of trainings with SAM and with SGD: the slope of a fitted line
share        every step draws whether it samples; h then decays as in ARSAM, is dropped, or is kept
controller   the published rule, which samples more where h varies more, in 400 to 20,000 steps; and
             the best of other settings of it, with at most 43% of the steps
rounding     weights of 4 bits in every step, as both abstracts name quantization

Times are seconds of the processor, of trainings that take turns, with layers of 256 units.
stick_figures.py has the third task of the abstracts, poses.

The script prints each claim with its number and the verdict, and writes results.json,
second_order.json and second_order.png to --out. It takes six minutes on two CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "second_order"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="half of them from 4000 steps")
    parser.add_argument("--noise", type=float, default=0.3, help="share of wrong labels")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", "width")
    arguments.check_share(parser, args, "noise")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm import tqdm

from examples.claims.claim import Claim, Found, found_of, print_claims, save
from examples.claims.grid import (
    SEARCH_SEEDS,
    Grid,
    Run,
    as_row,
    choose,
    only_if_gained,
    print_rows,
    train_seeds,
)
from examples.claims.reuse import PARTS, Arm, digits, trainer
from examples.common import figures, files
from examples.common.digits_task import describe
from examples.common.intervals import mean_interval
from examples.common.output import choose_folder
from examples.common.report import Report
from examples.common.tuning import runs_of

SHORT, LONG, LONGEST = 400, 4000, 20_000  # steps
# Learning rates and rhos to choose from; the short ones were chosen for SAM, RST and vSAM by the
# search of digits.py. The base has no rho: h is measured with that of SAM.
PAIRS = {
    SHORT: [(0.1, 0.2), (0.1, 0.5), (0.05, 0.2)],
    LONG: [(0.02, 0.2), (0.02, 0.5), (0.005, 0.5)],
    LONGEST: [(0.02, 0.5), (0.005, 0.5), (0.002, 0.5)],
}
BASE_PAIRS = {
    SHORT: [(0.02, 0.2), (0.05, 0.2), (0.1, 0.2)],
    LONG: [(0.001, 0.5), (0.002, 0.5), (0.005, 0.5)],
    LONGEST: [(0.0002, 0.5), (0.0005, 0.5), (0.001, 0.5)],
}
SEARCHED = {SHORT: 4, LONG: 4, LONGEST: 2}  # seeds of a search
CLEAN = [(0.1, 0.2)]  # not tuned: only the growth is measured
LOWEST = -2.5  # points that the figure shows
MARGIN = 0.5  # points; less than that below SAM keeps its accuracy
SPEED = 1.35  # what rounds to 1.4
SHARES = (0.05, 0.1, 0.2, 0.43, 0.7)
ENOUGH = 0.43  # the share of steps with a speed-up of 1.4
MIXINGS = {"decaying": 0.7, "none": 0.0, "constant": 1.0}
LONGER = {LONG: ("decaying", "none"), LONGEST: ("decaying",)}  # what is reused in long trainings
CONTROLLERS = ("vsam", "arsam")
SETTINGS = [
    Arm("arsam", window=window, blocks=blocks, gain=gain, max_fraction=0.4, warmup=window)
    for window, blocks in ((10, 5), (20, 5))
    for gain in (0.13, 1.0, 4.0)
]
BITS = 4  # with 2, SAM gains nothing
TIMED_WIDTH, TIMED_SEEDS, TIMED_STEPS = 256, 10, 200
SAM, BASE = Arm(share=1.0), Arm(share=0.0)
SAMPLED = "vsam", "arsam"

GROWS = "The second-order part of SAM's gradient matters more and more during training."
KEEPS = "A sampled, reused and mixed second-order part keeps SAM's accuracy."
ROUNDED = "The same in training with quantized weights."


# The trainings along which the growth is measured.
GROWTHS = (SHORT, "noisy"), (LONG, "noisy"), (LONGEST, "noisy"), (LONG, "clean")
GROWTH_WHY = {
    ("ratio", "sam", "noisy"): "it grows with clean labels, which let the gradient become small",
    ("length", "sam", "clean"): "the gradient falls faster: ‖h‖ / ‖g‖ grows",
}
SHARE_WHY = {
    (ENOUGH, "none", SHORT): "with rho 0.5, which is chosen in place of 0.2 if nothing is reused"
}
RULE_WHY = {
    SHORT: "all but 6 of the 56 sampled steps are the rule's warm-up: it has 7 windows",
    LONGEST: "the rule samples 23% of the steps; a random 43% lose less",
}


def growth_claims() -> dict[str, Claim]:
    """Return the claims on the second-order part, over lengths and labels."""
    found = {}
    for steps, labels in GROWTHS:
        for row in ("sam", "base"):
            for what, name in (("‖h‖ / ‖g‖", "ratio"), ("‖h‖", "length")):
                training = "SAM" if row == "sam" else "SGD with momentum"
                found[f"{name}-{row}-{steps}-{labels}"] = Claim(
                    SAMPLED,
                    GROWS,
                    "abstract",
                    f"growth of {what} over a training of {steps:,} steps with {training}, "
                    f"{labels} labels: a line fitted to its logarithm, percent",
                    low=0,
                    why=GROWTH_WHY.get((name, row, labels), ""),
                )
    return found


def share_claims() -> dict[str, Claim]:
    """Return the claims on a random share of sharp steps."""
    arms = [(share, "decaying") for share in SHARES]
    arms += [(ENOUGH, mixing) for mixing in MIXINGS if mixing != "decaying"]
    told = {
        "decaying": "reused with a factor of 0.7 for each step, as ARSAM does",
        "none": "not reused",
        "constant": "reused at full weight",
    }
    places = [(share, mixing, SHORT) for share, mixing in arms]
    places += [(ENOUGH, mixing, steps) for steps, names in LONGER.items() for mixing in names]
    return {
        share_name(share, mixing, steps): Claim(
            SAMPLED,
            KEEPS,
            "abstract",
            f"test accuracy over SAM's, points; {share:.0%} of the steps sample, at random; "
            f"{told[mixing]}; {steps:,} steps",
            low=-MARGIN,
            why=SHARE_WHY.get((share, mixing, steps), ""),
        )
        for share, mixing, steps in places
    }


def share_name(share: float, mixing: str, steps: int) -> str:
    """Return the name of a claim on a share of sharp steps."""
    return f"share-{share}-{mixing}-{steps}"


def controller_claims() -> dict[str, Claim]:
    """Return the claims on the rule that chooses the steps."""
    found = {}
    for name in CONTROLLERS:
        for steps in (SHORT, LONG, LONGEST):
            setting = f"published rule, {steps:,} steps"
            why = RULE_WHY.get(steps, "")
            found[f"{name}-accuracy-{steps}"] = accuracy_claim(name, setting, why)
            found[f"{name}-speed-{steps}"] = speed_claim(name, setting)
        setting = f"best of {len(SETTINGS)} other settings of the rule, {SHORT} steps"
        found[f"{name}-accuracy-other"] = accuracy_claim(name, setting)
        found[f"{name}-speed-other"] = speed_claim(name, setting)
    return found


def accuracy_claim(name: str, setting: str, why: str = "") -> Claim:
    measured = f"test accuracy over SAM's, points; {setting}"
    return Claim((name,), "SAM's accuracy.", "abstract", measured, low=-MARGIN, why=why)


def speed_claim(name: str, setting: str) -> Claim:
    measured = f"SAM's gradients over its own; {setting}"
    return Claim((name,), "About 40% faster than SAM.", "abstract", measured, low=SPEED)


def gain_claim(setting: str) -> Claim:
    measured = f"test accuracy over the base's, points; {setting}"
    text = "SAM gains: without that, keeping its accuracy means nothing."
    return Claim(("sam",), text, "our condition", measured, low=0)


CLAIMS = {
    **growth_claims(),
    **{f"sam-gain-{steps}": gain_claim(f"{steps:,} steps") for steps in (SHORT, LONG, LONGEST)},
    **share_claims(),
    **controller_claims(),
    "time": Claim(
        SAMPLED,
        "About 40% faster than SAM.",
        "abstract",
        f"SAM's time over its own, in seconds of the processor; {ENOUGH:.0%} of the steps sample, "
        f"layers of {TIMED_WIDTH} units",
        low=SPEED,
    ),
    "sam-gain-rounded": gain_claim(f"weights of {BITS} bits"),
    **{
        f"{name}-rounded": Claim(
            (name,),
            ROUNDED,
            "abstract",
            f"test accuracy over SAM's, points; weights of {BITS} bits, {SHORT} steps",
            low=-MARGIN,
        )
        for name in (*CONTROLLERS, "ausam")
    },
}


class Plan(NamedTuple):
    """A row: an arm on a task."""

    name: str
    arm: Arm
    steps: int
    noise: float
    bits: int = 0

    def label(self) -> str:
        """Return the name of the row in the results."""
        return f"{self.name}, {self.steps} steps, noise {self.noise:g}, bits {self.bits}"


def grid_for(plan: Plan) -> Grid:
    """Return the pairs that are tried."""
    if not plan.noise:
        return CLEAN
    return (BASE_PAIRS if plan.arm == BASE else PAIRS)[plan.steps]


def name_of_share(mixing: str, share: float = ENOUGH) -> str:
    """Return the name of an arm whose steps draw whether they sample."""
    return f"share {share:g} {mixing}"


def plans(noise: float, best: Arm) -> list[Plan]:
    """Return all rows, for the best other setting of the controller."""
    ends = {"sam": SAM, "base": BASE}
    published = {name: Arm(name) for name in CONTROLLERS}
    shares = {
        name_of_share(mixing, share): Arm(share=share, decay=decay)
        for mixing, decay in MIXINGS.items()
        for share in SHARES
    }
    longer = {
        steps: {name: arm for name, arm in shares.items() if name in map(name_of_share, names)}
        for steps, names in LONGER.items()
    }
    other = {name: best._replace(kind=name) for name in CONTROLLERS}
    others = {f"{name} other": arm for name, arm in other.items()}
    rows: list[tuple[dict[str, Arm], int, float, int]] = [
        (ends | shares | published | others, SHORT, noise, 0),
        (ends | published | longer[LONG], LONG, noise, 0),
        (ends, LONG, 0.0, 0),
        (ends | other | {"ausam": Arm("ausam")}, SHORT, noise, BITS),
        (ends | published | longer[LONGEST], LONGEST, noise, 0),
    ]
    return [
        Plan(name, arm, steps, share, bits)
        for arms, steps, share, bits in rows
        for name, arm in arms.items()
    ]


def best_setting(args: argparse.Namespace, advance: Any) -> Arm:
    """Return the setting of ARSAM's controller with the best validation accuracy.

    Learning rate and rho are those that are chosen for SAM.
    """
    task = digits(args.noise, args.width)
    seeds = SEARCH_SEEDS[: SEARCHED[SHORT]]
    found = choose(trainer(SAM, task, SHORT), PAIRS[SHORT], advance, seeds)
    pair = found["learning_rate"], found["rho"]
    scores = [
        train_seeds(trainer(arm, task, SHORT), pair, seeds, advance).validation.mean()
        for arm in SETTINGS
    ]
    return SETTINGS[int(np.argmax(scores))]


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Arm]:
    """Train all rows."""
    rows = []
    with tqdm(unit=" trainings", disable=None) as bar:
        best = best_setting(args, bar.update)
        for plan in plans(args.noise, best):
            bar.set_description(plan.label())
            train = trainer(plan.arm, digits(plan.noise, args.width, plan.bits), plan.steps)
            seeds = SEARCH_SEEDS[: SEARCHED[plan.steps]]
            found = choose(train, grid_for(plan), bar.update, seeds)
            seeds = range(args.seeds if plan.steps == SHORT else -(-args.seeds // 2))
            pair = found["learning_rate"], found["rho"]
            rows.append(as_row(plan.label(), found, train_seeds(train, pair, seeds, bar.update)))
    return rows, best


def times(seeds: int, noise: float) -> list[float]:
    """Return SAM's time over that of a share of sharp steps, for each seed; they take turns."""
    task = digits(noise, TIMED_WIDTH)
    arms = SAM, SAM._replace(share=ENOUGH)
    trains = [trainer(arm, task, TIMED_STEPS, is_measured=False) for arm in arms]
    runs = Run(*runs_of(range(seeds), [(0.1, 0.2)]))
    ratios = []
    for index in range(-1, seeds):  # once more to compile
        run, seconds = Run(*(each[max(index, 0)] for each in runs)), []
        for train in trains:
            start = time.process_time()
            jax.block_until_ready(train(run))
            seconds.append(time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
    return ratios[1:]


def growth(curve: Sequence[float] | np.ndarray) -> float:
    """Return the growth in percent of a line that is fitted to the logarithm of a curve."""
    place = np.linspace(0, 1, len(curve))
    slope, _ = np.polyfit(place, np.log(np.maximum(curve, 1e-30)), 1)
    return float(100 * np.expm1(slope))


def values_of(rows: Sequence[dict[str, Any]], noise: float) -> dict[str, list[float]]:
    """Return the numbers of each claim that follow from the rows."""
    by_row = {row["row"]: row for row in rows}

    def of(name: str, steps: int, share: float = noise, bits: int = 0) -> dict[str, Any]:
        return by_row[Plan(name, SAM, steps, share, bits).label()]

    def lead(name: str, steps: int, other: str = "sam", bits: int = 0) -> list[float]:
        mine, theirs = (of(each, steps, bits=bits)["test"] for each in (name, other))
        return np.subtract(mine, theirs).tolist()

    def speed(name: str, steps: int) -> list[float]:
        return (2 / (1 + np.asarray(of(name, steps)["share"]))).tolist()

    found: dict[str, list[float]] = {}
    for steps, labels in GROWTHS:
        for row in ("sam", "base"):
            for what in ("ratio", "length"):
                curves = of(row, steps, noise if labels == "noisy" else 0.0)[what]
                found[f"{what}-{row}-{steps}-{labels}"] = [growth(curve) for curve in curves]
    gains = {steps: lead("sam", steps, "base") for steps in (SHORT, LONG, LONGEST)}
    found |= {f"sam-gain-{steps}": gain for steps, gain in gains.items()}
    for share, mixing, steps in itertools.product(SHARES, MIXINGS, gains):
        name = share_name(share, mixing, steps)
        if name in CLAIMS:
            arm = name_of_share(mixing, share)
            found[name] = only_if_gained(gains[steps], lead(arm, steps))
    for name in CONTROLLERS:
        for steps, gain in gains.items():
            found[f"{name}-accuracy-{steps}"] = only_if_gained(gain, lead(name, steps))
            found[f"{name}-speed-{steps}"] = speed(name, steps)
        other = f"{name} other"
        found[f"{name}-accuracy-other"] = only_if_gained(gains[SHORT], lead(other, SHORT))
        found[f"{name}-speed-other"] = speed(other, SHORT)
    gain = found["sam-gain-rounded"] = lead("sam", SHORT, "base", BITS)
    for name in (*CONTROLLERS, "ausam"):
        found[f"{name}-rounded"] = only_if_gained(gain, lead(name, SHORT, bits=BITS))
    return found


def smallest(leads: Sequence[Sequence[float]]) -> float:
    """Return the smallest share that keeps SAM's accuracy; 1 if only SAM itself does.

    It is kept if the whole interval of the lead over SAM is above the margin.
    """
    pairs = zip(SHARES, leads, strict=True)
    return min((share for share, lead in pairs if mean_interval(lead).low > -MARGIN), default=1.0)


def leads_of(rows: Sequence[dict[str, Any]], noise: float) -> dict[str, list[list[float]]]:
    """Return the lead over SAM of each way to reuse, over the shares and the seeds."""
    by_row = {row["row"]: np.asarray(row["test"]) for row in rows}

    def of(name: str) -> np.ndarray:
        return by_row[Plan(name, SAM, SHORT, noise).label()]

    return {
        mixing: [(of(name_of_share(mixing, share)) - of("sam")).tolist() for share in SHARES]
        for mixing in MIXINGS
    }


def draw(rows: Sequence[dict[str, Any]], noise: float, path: Path, title: str) -> None:
    """Draw the accuracy over the share, the growth, and where the controller ends."""
    figure = figures.make_figure(3)
    panels = figure.subplots(1, 3)
    draw_shares(panels[0], rows, noise)
    draw_growth(panels[1], rows, noise)
    draw_controllers(panels[2], rows, noise)
    for axes in panels:
        axes.grid(alpha=0.3, axis="y")
    figures.label_ends(panels[0])
    figures.label_ends(panels[1])
    figures.save(figure, path, title)


def draw_margin(axes: Any) -> None:
    """Draw lines at the margin, and at the share that is fast enough."""
    axes.axhline(-MARGIN, color=figures.GREY, linewidth=1, linestyle="--")
    axes.axvline(ENOUGH, color=figures.GREY, linewidth=1, linestyle=":")


def draw_shares(axes: Any, rows: Sequence[dict[str, Any]], noise: float) -> None:
    """Draw the lead over SAM over the share of the steps that sample."""
    draw_margin(axes)
    for mixing, leads in leads_of(rows, noise).items():
        means = [mean_interval(lead) for lead in leads]
        ends = [[one.value - one.low for one in means], [one.high - one.value for one in means]]
        values = [one.value for one in means]
        line = axes.errorbar(SHARES, values, yerr=ends, fmt="o-", markersize=4, capsize=2)
        line[0].set_label(f"{mixing}: {smallest(leads):.0%}")
    axes.set(xlabel="share of the steps that sample h", ylabel="accuracy over SAM's, points")
    axes.set(title="Smallest share that keeps SAM's accuracy, by weight of what is reused")
    axes.set_ylim(LOWEST, 0.8)


def draw_growth(axes: Any, rows: Sequence[dict[str, Any]], noise: float) -> None:
    """Draw the second-order part over the trainings."""
    by_row = {row["row"]: row for row in rows}
    place = (1 + np.arange(PARTS)) / PARTS
    for color, (name, arm) in zip(figures.COLORS, {"sam": SAM, "base": BASE}.items(), strict=False):
        for style, steps in zip(("-", "--", ":"), (SHORT, LONG, LONGEST), strict=True):
            curves = np.asarray(by_row[Plan(name, arm, steps, noise).label()]["ratio"])
            label = f"{'SGD' if name == 'base' else 'SAM'}, {steps:,}"
            axes.plot(place, np.median(curves, axis=0), style, color=color, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(title="‖h‖ / ‖g‖ along the training, median", xlabel="share of the training")


def draw_controllers(axes: Any, rows: Sequence[dict[str, Any]], noise: float) -> None:
    """Draw the lead over SAM of the controllers over the share that they reach."""
    by_row = {row["row"]: row for row in rows}
    draw_margin(axes)
    points = []
    places = [(str(steps), "", steps) for steps in (SHORT, LONG, LONGEST)]
    for color, name in zip(figures.COLORS, CONTROLLERS, strict=False):
        for label, suffix, steps in [*places, ("other", " other", SHORT)]:
            row = by_row[Plan(name + suffix, SAM, steps, noise).label()]
            sam = by_row[Plan("sam", SAM, steps, noise).label()]
            x, y = np.mean(row["share"]), np.mean(np.subtract(row["test"], sam["test"]))
            axes.plot([x], [y], "o", color=color)
            if name == CONTROLLERS[-1]:  # the two are close to each other
                points.append((x, y, label, figures.INK))
    axes.set(xlabel="share of the steps that sample h", ylabel="accuracy over SAM's, points")
    axes.set(title="Where vSAM (blue) and ARSAM (red) end, by steps")
    axes.margins(0.2)
    figures.label_points(axes, points)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    rows, best = measure(args)
    seconds = times(min(args.seeds, TIMED_SEEDS), args.noise)
    values = values_of(rows, args.noise) | {"time": seconds}
    found = found_of(CLAIMS, values)
    print_rows(rows)
    print(f"best other setting: {best}")
    print_claims(found)
    save(report, NAME, found, values, rows=rows, best=best._asdict())
    title = f"Digits, {describe(args.noise)}: the second-order part of SAM's gradient"
    draw(rows, args.noise, args.folder / f"{NAME}.png", title)
    report.end(f"{NAME}.png")
    return found


if __name__ == "__main__":
    main()
