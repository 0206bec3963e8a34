"""Who chooses the batch of the ascent: the step's own, the last one, all examples, the momentum?

    python examples/claims/which_batch.py
    python examples/claims/which_batch.py --seeds 5

SAM climbs the gradient of the batch that it descends. AsyncSAM climbs a gradient that is one step
old, and so that of another batch. SAMPa's authors avoid two batches (SAM-db). Friendly SAM takes
the gradient of all examples out of the ascent. Momentum-SAM climbs against the average of past
gradients. Here all of them stand in one table, on the digits with 30% wrong labels and with clean
labels, at equal epochs:

    sam                 the step's batch, where the step begins
    older point         the step's batch, where the last step began
    previous batch      the last step's batch, where the step begins (SAM-db)
    async-sam           the last step's batch, where the last step began
    another batch       examples that neither step has
    last descent        the gradient that the last step descended; it costs nothing
    all examples        the exact gradient of the training set
    batch - all         the batch's gradient minus that
    friendly-sam        the batch's gradient minus an average of past ones
    momentum-sam        against the momentum; "against momentum" is its other sign

Every arm is tuned in the same way. Then each trains once more with SAM's learning rate and rho
(Momentum-SAM, its other sign and the base with those of Momentum-SAM): these differences do not
depend on the luck of a search. Along SAM's training, the cosines of the gradients are measured.
async_long.py trains longer, with smaller steps.

The script prints each claim with its number and the verdict, and writes results.json and
which_batch.png to --out. It takes about five minutes on two CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "which_batch"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40, help="of each training")
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", "epochs", "width")
    args.base, args.rho = "momentum", None
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.claims.arms import of, points, train_arms
from examples.claims.claim import Claim, Found, found_of, print_claims, save, shown
from examples.claims.climbing import ARMS
from examples.common import figures, files
from examples.common.digits_task import BATCH, STEPS_PER_EPOCH, TRAIN, rows_of, shuffled
from examples.common.intervals import Interval, mean_interval
from examples.common.output import choose_folder
from examples.common.registry import BASES, Setting, Variant
from examples.common.report import Report, aligned
from examples.common.training import (
    data_of,
    make_functions,
    make_trainer,
    map_runs,
    start_of,
    take_step,
    train_run,
)
from examples.common.tuning import Runs, runs_of

NOISY, CLEAN, SAME = "wrong labels", "clean labels", "wrong labels, same numbers"
NOISES = {NOISY: 0.3, CLEAN: 0.0}
TUNED = (NOISY, CLEAN)
EVERY = (*TUNED, SAME)
MOMENTUM = ("base", "momentum-sam", "against momentum")  # with Momentum-SAM's numbers in `SAME`
FAR = -10  # points; what is further behind SAM is written into the figure
MARGIN = 0.5  # points; less than that below SAM is level with it
COSINES = {
    "older point": "the batch's own, one step older",
    "previous batch": "the previous batch's",
    "async-sam": "the previous batch's, one step older",
    "all examples": "all examples'",
}
COLORS = {"older point": figures.GREEN, "previous batch": figures.BLUE, "async-sam": figures.RED}


class Said(NamedTuple):
    """What is said about the accuracy of two arms.

    Attributes:
        system: Name in `samx.catalog`.
        row: An arm.
        other: The arm that it is compared with.
        low: The claim holds above this difference, in points.
        high: And below this one.
        settings: In which of `EVERY`.
        text: The claim.
        source: Where it stands.
        why: What was found.
    """

    system: str
    row: str
    other: str
    low: float
    high: float
    settings: Sequence[str]
    text: str
    source: str
    why: str = ""


ANY = np.inf
SAID = {
    "full": Said(
        *("friendly_sam", "all examples", "sam", -ANY, 0.0, EVERY),
        "Climbing the gradient of all examples alone generalizes worse than SAM.",
        "abstract",
        "with wrong labels it loses a point, and half of that with a larger rho",
    ),
    "without-full": Said(
        *("friendly_sam", "batch - all", "sam", 0.0, ANY, EVERY),
        "Taking the gradient of all examples out of the ascent generalizes better than SAM.",
        "abstract",
        "level with SAM, within half a point",
    ),
    "noise": Said(
        *("friendly_sam", "batch - all", "all examples", 0.0, ANY, EVERY),
        "What is special to the batch plays the key role in the ascent.",
        "abstract",
        "seen with one rho; when both are tuned, the gradient of all examples takes a larger rho",
    ),
    "friendly": Said(
        *("friendly_sam", "friendly-sam", "sam", 0.0, ANY, EVERY),
        "With an average of past gradients for that of all examples, better than SAM.",
        "abstract",
        "level with SAM, within half a point",
    ),
    "sam-db": Said(
        *("sampa", "previous batch", "sam", -ANY, 0.0, EVERY),
        "SAM with two batches, one to climb and one to descend, is worse than SAM.",
        "secondary source: caption of Table 10",
        "with SAM's rho it loses a point; tuned, it takes a larger rho and loses little",
    ),
    "sam-db-unrelated": Said(
        *("sampa", "another batch", "sam", -ANY, 0.0, EVERY),
        "The same, with a batch of the ascent that was not descended in the step before.",
        "secondary source: caption of Table 10",
    ),
    "async": Said(
        *("async_sam", "async-sam", "sam", -MARGIN, ANY, EVERY),
        "SAM's accuracy, with an ascent gradient of the step before.",
        "abstract",
        "with wrong labels the other batch costs it, not the older gradient: see the arms between",
    ),
    "async-older": Said(
        *("async_sam", "older point", "sam", -MARGIN, ANY, EVERY),
        "An ascent gradient that is one step old does what a fresh one does.",
        "secondary source",
        "with clean labels it was tuned to another learning rate than SAM's, and SAM gains nothing",
    ),
    "momentum": Said(
        *("momentum_sam", "momentum-sam", "base", 0.0, ANY, EVERY),
        "Better than the base optimizer, at its cost.",
        "abstract and Table 1",
    ),
    "momentum-sign": Said(
        *("momentum_sam", "against momentum", "base", -ANY, 0.0, (SAME,)),
        "The other sign of the perturbation hurts.",
        "text",
        "at the rho that is best for the right sign, the other sign learns nothing",
    ),
}
MEASURED = {
    NOISY: "both tuned; digits, 30% wrong labels, 40 epochs",
    CLEAN: "both tuned; digits, clean labels, 40 epochs",
    SAME: "both with one learning rate and rho; digits, 30% wrong labels, 40 epochs",
}


def claims() -> dict[str, Claim]:
    """Return all claims: `SAID` in its settings, then cosines."""
    found = {
        f"{name}, {setting}": Claim(
            (said.system,),
            said.text,
            said.source,
            f"test accuracy of '{said.row}' over '{said.other}', points; {MEASURED[setting]}",
            said.low,
            said.high,
            why=said.why,
        )
        for name, said in SAID.items()
        for setting in said.settings
    }
    return found | COSINE_CLAIMS


SIMILAR = 0.5
COSINE_CLAIMS = {
    f"cosine, {name}": Claim(
        ("async_sam",),
        "Successive gradients are similar, so that an old one can be climbed.",
        "secondary source",
        f"cosine of the batch's gradient with {COSINES[name]}, mean over SAM's training; digits, "
        "30% wrong labels, 40 epochs; similar: above 0.5",
        low=SIMILAR,
        why="the gradients of one batch in two steps are alike, those of two batches are not",
    )
    for name in ("async-sam", "older point", "previous batch")
}
CLAIMS = claims()

Numbers = tuple[float, float]  # learning rate and rho


def accuracies(arm: Variant, args: argparse.Namespace, numbers: Numbers) -> list[float]:
    """Train an arm with wrong labels; return test accuracies in percent, one for each seed."""
    trainer = make_trainer(arm, args.base, args.width, args.epochs)

    def of_run(run: Runs) -> Any:
        images, _, test = data_of(int(run.seed), NOISES[NOISY])
        params = start_of(int(run.seed), args.width)
        return trainer.accuracy(train_run(trainer, params, run, images, args.epochs).params, test)

    runs = Runs(*runs_of(range(args.seeds), [numbers]))
    found = map_runs(of_run, runs, advance=lambda count: None)
    return (100 * np.asarray(found, float)).tolist()


def cosines(args: argparse.Namespace, numbers: Numbers) -> dict[str, list[list[float]]]:
    """Return for each of `COSINES` the means over each epoch of SAM's training, [seeds, epochs]."""
    watch = watcher(args.base, args.width, args.epochs)

    def of_run(run: Runs) -> Any:
        images = data_of(int(run.seed), NOISES[NOISY])[0]
        return watch(run, start_of(int(run.seed), args.width), images)

    runs = Runs(*runs_of(range(args.seeds), [numbers]))
    found = map_runs(of_run, runs, advance=lambda count: None)
    return {name: values.tolist() for name, values in found.items()}


@functools.cache
def watcher(base: str, width: int, epochs: int) -> Any:
    """Return the compiled function that trains SAM and compares gradients in each step."""
    logits, losses_fn, parts, *_ = make_functions(width)
    steps = epochs * STEPS_PER_EPOCH

    @jax.grad
    def gradient(params, batch):
        return losses_fn(params, batch).mean()

    def of_run(run, params, images):
        schedule = optax.cosine_decay_schedule(run.learning_rate, steps)
        setting = Setting(None, BATCH, TRAIN, learning_rate=schedule)
        tx = ARMS["sam"].make(run.rho, BASES[base](schedule), setting)
        tx = optax.with_extra_args_support(tx)
        rows = jax.lax.map(functools.partial(shuffled, run.seed), jnp.arange(epochs))
        rows = rows.reshape(steps, BATCH)

        def step(carry, rows):
            params, state, (older, previous, climbed) = carry
            batch = rows_of(images, rows)
            g = gradient(params, batch)
            others = {
                "older point": gradient(older, batch),
                "previous batch": gradient(params, previous),
                "async-sam": climbed,
                "all examples": gradient(params, images),
            }
            seen = {name: cosine(g, other) for name, other in others.items()}
            moved, state = take_step(tx, logits, losses_fn, parts, params, state, batch)
            return (moved, state, (params, batch, g)), seen

        other = rows_of(images, rows[-1])  # the first step has none before it
        before = params, other, gradient(params, other)
        _, seen = jax.lax.scan(step, (params, tx.init(params), before), rows)
        return {name: each.reshape(epochs, -1).mean(axis=1) for name, each in seen.items()}

    return jax.jit(of_run)


def cosine(one: Any, other: Any) -> Any:
    """Return the cosine of two trees; NaN if one of them is 0."""
    return optax.tree.vdot(one, other) / (optax.tree.norm(one) * optax.tree.norm(other))


class Measured(NamedTuple):
    """What is trained and measured.

    Attributes:
        results: Those of `training.measure`, for each arm and each of `NOISES`.
        points: For each arm and setting, the test accuracies, one for each seed, in percent.
        cosines: Those of `cosines`.
    """

    results: list[dict[str, Any]]
    points: dict[tuple[str, str], list[float]]
    cosines: dict[str, list[list[float]]]


def measure(args: argparse.Namespace) -> Measured:
    """Train everything."""
    found = Measured([], {}, {})
    numbers: dict[str, Numbers] = {}
    order = sorted(ARMS, key=lambda name: name not in ("sam", "momentum-sam"))  # they go first
    for name in order:
        arm = ARMS[name]
        found.results.extend(train_arms({name: arm}, args, [*NOISES.values()]))
        for setting, noise in NOISES.items():
            found.points[name, setting] = points(found.results, name, noise).tolist()
        mine = of(found.results, name, NOISES[NOISY])
        numbers[name] = mine["learning_rate"], mine["rho"]
        given = numbers["momentum-sam" if name in MOMENTUM else "sam"]
        found.points[name, SAME] = accuracies(arm, args, given)
    found.cosines.update(cosines(args, numbers["sam"]))
    return found


def values_of(found: Measured) -> dict[str, list[float]]:
    """Return the numbers of each claim, one for each seed."""
    values = {
        f"{name}, {setting}": over(found.points, (said.row, setting), (said.other, setting))
        for name, said in SAID.items()
        for setting in said.settings
    }
    for name in COSINE_CLAIMS:
        values[name] = np.mean(found.cosines[name.removeprefix("cosine, ")], axis=1).tolist()
    return values


def over(points: Mapping[Any, Sequence[float]], row: Any, other: Any) -> list[float]:
    """Return the differences of two rows, paired by seed."""
    return np.subtract(points[row], points[other]).round(4).tolist()  # float32 is not exact


def lead(points: Mapping[Any, Sequence[float]], row: Any, other: Any) -> Interval:
    """Return the mean of the paired differences, with its interval."""
    return mean_interval(over(points, row, other))


def table(found: Measured) -> list[str]:
    """Return the lines of a table: accuracy over SAM in each setting, and the tuned numbers."""
    grid = [["points over sam", *EVERY, "learning rate, rho", "gradients a step"]]
    for name, arm in ARMS.items():
        leads = [shown(lead(found.points, (name, each), ("sam", each))) for each in EVERY]
        pairs = [of(found.results, name, noise) for noise in NOISES.values()]
        tuned = "; ".join(f"{pair['learning_rate']:g}, {pair['rho']:g}" for pair in pairs)
        grid.append([name, *leads, tuned, f"{arm.gradients:g}"])
    return aligned(grid)


def table_of_cosines(found: Measured) -> list[str]:
    """Return the lines of a table of the cosines: at the start, in the middle, at the end."""
    grid = [["cosine of the batch's gradient with", "all epochs", "first", "middle", "last"]]
    for name, what in COSINES.items():
        by_epoch = np.mean(found.cosines[name], axis=0)
        several = [by_epoch.mean(), *by_epoch[[0, len(by_epoch) // 2, -1]]]
        grid.append([what, *(f"{value:.2f}" for value in several)])
    return aligned(grid)


def draw(found: Measured, path: Path, title: str) -> None:
    """Draw what each arm is ahead of SAM, and the cosines."""
    figure = figures.make_figure(2, [figures.height_of(len(ARMS))] * 2)
    panels = figure.subplots(2, 2).ravel()
    shown_settings = NOISY, SAME, CLEAN
    for axes, setting in zip(panels, shown_settings, strict=False):
        draw_arms(axes, found, setting)
    panels[1].tick_params(labelleft=False)
    draw_cosines(panels[3], found)
    figures.save(figure, path, title)


def draw_arms(axes: Any, found: Measured, setting: str) -> None:
    """Draw the accuracy of each arm over SAM's, with intervals."""
    names = [name for name in ARMS if name != "sam"][::-1]
    for position, name in enumerate(names):
        value, low, high = lead(found.points, (name, setting), ("sam", setting))
        color = COLORS.get(name, figures.GREY)
        if value < FAR:
            where = {"xycoords": ("axes fraction", "data"), "va": "center"}
            axes.annotate(f"{value:.1f}", (0.02, position), color=color, **where)
            continue
        axes.plot(value, position, "o", color=color)
        axes.plot([low, high], [position, position], color=color)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.5, len(names) - 0.5)
    axes.axvline(0, color=figures.INK, linewidth=1)
    axes.set_xlabel("test accuracy over sam, points")
    ahead = [lead(found.points, (name, setting), ("sam", setting)).is_above for name in names]
    axes.set_title(f"{setting}: {sum(ahead)} of {len(names)} arms ahead of SAM")
    axes.grid(axis="x", alpha=0.3)


def draw_cosines(axes: Any, found: Measured) -> None:
    """Draw the cosines of gradients over the epochs."""
    for name in COSINES:
        by_epoch = np.mean(found.cosines[name], axis=0)
        color = COLORS.get(name, figures.GREY)
        axes.plot(np.arange(1, len(by_epoch) + 1), by_epoch, color=color, label=name)
    axes.set_ylim(min(0.0, np.mean([*found.cosines.values()], axis=1).min()), 1.02)
    axes.set_xlabel("epoch of SAM's training")
    axes.set_ylabel("cosine with the batch's gradient")
    mean = np.mean(found.cosines["async-sam"])
    axes.set_title(f"What AsyncSAM climbs has a cosine of {mean:.2f} with what SAM climbs")
    axes.grid(alpha=0.3)
    figures.label_ends(axes)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    measured = measure(args)
    for lines in (table(measured), table_of_cosines(measured)):
        print("\n" + "\n".join(lines))
    values = values_of(measured)
    found = found_of(CLAIMS, values)
    print_claims(found)
    named = {f"{row}, {each}": one for (row, each), one in measured.points.items()}
    more = {"trainings": measured.results, "cosines": measured.cosines, "points": named}
    save(report, NAME, found, values, **more)
    title = f"Digits: whose gradient SAM climbs, {args.seeds} seeds, 95% intervals"
    draw(measured, args.folder / f"{NAME}.png", title)
    report.end(f"{NAME}.png")
    return found


if __name__ == "__main__":
    main()
