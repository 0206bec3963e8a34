"""Normalization layers: is SAM on them alone enough, and do other methods need them?

    python examples/claims/normalization.py

The task is that of digits.py with 30% of the training labels wrong. The network has two hidden
layers of 64 units too, and a LayerNorm after each of them: 256 of its 9,226 parameters. Each method
trains for 40 epochs of 10 steps. Learning rate and rho are chosen on validation images, with seeds
that are not reported, in the same way for every method; the base is SGD with momentum. Four papers:

    SAM-ON    perturbs the normalization layers alone; "-off" is its control, all other layers
    ASAM      scales the perturbation of each weight by its size, so that rescaled layers do not
              change it, as a normalization layer allows
    SASSHA    divides SAM's gradient by a curvature; with rho = 0 it is close to AdaHessian
    AdaSAM    divides SAM's gradient as AMSGrad does

SAM, SAM-ON and the control also train with every radius of a grid, at the learning rate that was
chosen for them. Networks without normalization are those of the committed results of digits.py.

SASSHA's own eps is 1e-4. It is also tried with 0.01, and with a curvature on every step.

The script prints a table, and each claim with its number and the verdict. It writes results.json
and normalization.png to --out. It takes about five minutes on two CPU cores.
"""

import argparse
import functools

from examples.common import arguments

NAME = "normalization"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", "epochs", "width")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import samx
from examples.claims.arms import of, points, train_arms
from examples.claims.claim import Claim, Found, found_of, print_claims, save
from examples.common import figures, files
from examples.common.digits_task import Network
from examples.common.intervals import mean_interval
from examples.common.output import choose_folder
from examples.common.registry import ADAM_RATE, RADIUS, VARIANTS, Variant
from examples.common.registry import of as variant_of
from examples.common.report import MARK, Report, aligned, marked
from examples.common.training import data_of, make_trainer, map_runs, start_of, train_run
from examples.common.tuning import Runs, runs_of
from examples.compare.options import RESULTS
from samx.perturbations import is_normalization, magnitude, metric_ball

NOISE = 0.3
RADII = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
EPS = 0.01  # of SASSHA, whose default is 1e-4
LOWEST = -8.0  # points; what is below is drawn here
ON_GRID = ("sam", "sam-on", "sam-off")
DIGITS = RESULTS.parent / "digits.json"


class NormalizedNetwork(Network):
    """The network of the digits with a LayerNorm after each hidden layer."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, rngs=rngs)
        self.first_norm = nnx.LayerNorm(width, rngs=rngs)
        self.second_norm = nnx.LayerNorm(width, rngs=rngs)

    def features(self, x: jax.Array) -> jax.Array:
        """Return what the output layer gets."""
        x = nnx.relu(self.first_norm(self.first(x)))
        return nnx.relu(self.second_norm(self.second(x)))


@functools.cache
def network(width: int) -> Callable[[nnx.Rngs], nnx.Module]:
    """Return what builds the network; the same function for the same width."""
    return lambda rngs: NormalizedNetwork(width, rngs=rngs)


def is_elsewhere(path: Any, leaf: Any) -> bool:
    """Return whether a leaf is in no normalization layer."""
    return not is_normalization(path, leaf)


def everywhere(path: Any, leaf: Any) -> bool:
    """Return that ASAM scales every leaf: also the biases of a normalization layer."""
    del path, leaf
    return True


def on(is_perturbed: Any, is_adaptive: bool = False) -> Any:
    """Return what makes SAM-ON, or ASAM-ON, on some of the leaves, in front of the base."""

    def make(rho, base, setting):
        del setting
        metric = magnitude(is_scaled=everywhere) if is_adaptive else None
        ball = metric_ball(rho, metric)
        return optax.chain(samx.sam_on(perturbation=ball, is_perturbed=is_perturbed), base)

    return make


def adahessian(**fixed: Any) -> Variant:
    """Return SASSHA without its perturbation: it divides the gradient by a curvature."""

    def make(rho, base, setting):
        del rho, base
        return samx.sassha(setting.learning_rate, rho=0.0, **fixed)

    return Variant(make, 0.0, 1.2, 0.0, learning_rate=0.1)


def sassha(gradients: float = 2.2, **fixed: Any) -> Variant:
    """Return SASSHA with some arguments fixed."""
    return Variant(variant_of("sassha", **fixed), RADIUS, gradients, 0.05, learning_rate=0.1)


ARMS = {
    "sgd": VARIANTS["base"],
    "sam": VARIANTS["sam"],
    "sam-on": Variant(on(is_normalization), 0.5, 2, 0.5),
    "sam-off": Variant(on(is_elsewhere), RADIUS, 2, 0.05),
    "asam": VARIANTS["asam"],
    "asam-on": Variant(on(is_normalization, True), 1.0, 2, 0.5),
    "asam-off": Variant(on(is_elsewhere, True), 1.0, 2, 0.5),
    "sassha": sassha(),
    "sassha, every=1": sassha(4, every=1),
    "sassha, eps=0.01": sassha(eps=EPS),
    "adahessian": adahessian(),
    "adahessian, eps=0.01": adahessian(eps=EPS),
    "adamw": Variant(
        lambda rho, base, setting: optax.adamw(setting.learning_rate),
        0.0,
        1,
        0.0,
        learning_rate=ADAM_RATE,
    ),
    "sam + adamw": Variant(
        lambda rho, base, setting: optax.chain(samx.sam(rho), optax.adamw(setting.learning_rate)),
        RADIUS,
        2,
        0.05,
        learning_rate=ADAM_RATE,
    ),
    "amsgrad": Variant(
        lambda rho, base, setting: optax.amsgrad(setting.learning_rate),
        0.0,
        1,
        0.0,
        learning_rate=ADAM_RATE,
    ),
    "adasam": VARIANTS["adasam"],
}

# The same in the network of digits.py, without normalization.
PLAIN = {"plain sgd": ARMS["sgd"], "plain sassha, eps=0.01": ARMS["sassha, eps=0.01"]}

POINTS = "test accuracy over {}'s, points; digits with wrong labels, network with LayerNorm"
FLATNESS = (
    "log10 of the top eigenvalue of the Hessian over {}'s, at the end, on all training images"
)


def over(other: str) -> str:
    return POINTS.format(other)


LAZY = f"with every=1, or with eps={EPS}, all trainings learn; with the default eps=1e-4 it may "
LAZY += "be divided by almost 0, where the last batch with a curvature showed none"
WITHOUT = f"with eps={EPS} it is"


def sassha_claims(name: str, which: str, why: str) -> dict[str, Claim]:
    """Return the claims on SASSHA, for one of its settings."""
    of_others = {"sgd": "SGD with momentum", "adamw": "AdamW", "sam": "SAM"}
    found = {
        f"{name}-{arm}": Claim(
            ("sassha",),
            f"SASSHA is better than first-order methods, such as {other}{which}.",
            "abstract" if arm != "sam" else "abstract, if SAM counts as one",
            over(other),
            low=0,
            why=why,
        )
        for arm, other in of_others.items()
    }
    return found | {
        f"{name}-adahessian": Claim(
            ("sassha",),
            f"SASSHA is better than other second-order methods{which}.",
            "abstract",
            over("AdaHessian") + "; AdaHessian is SASSHA with rho = 0",
            low=0,
        ),
        f"{name}-flatter": Claim(
            ("sassha",),
            f"SASSHA's minima are flatter than those of other second-order methods{which}.",
            "abstract",
            FLATNESS.format("AdaHessian"),
            high=0,
            why="some trainings of both do not end in numbers" if why else "",
        ),
        f"{name}-sharper": Claim(
            ("sassha",),
            f"Without its perturbation, second-order methods find sharper minima than SGD{which}.",
            "abstract",
            "log10 of AdaHessian's top eigenvalue over SGD's",
            low=0,
            why="many of its trainings do not learn" if why else "",
        ),
    }


# What the claims say, and which numbers agree with them: fixed before the runs. SASSHA with another
# eps and with every=1, and AdaHessian with this eps, were added after a first run, whose SASSHA did
# not learn with most seeds.
CLAIMS = {
    "sam-base": Claim(
        ("sam",),
        "SAM is better than its base optimizer, wrong labels included.",
        "Tables 1 and 4",
        over("SGD"),
        low=0,
        why="without this gain, nothing else here could be seen",
    ),
    "on-sam": Claim(
        ("sam_on",),
        "SAM on the normalization layers alone is better than SAM on all layers.",
        "abstract",
        over("SAM"),
        low=0,
    ),
    "on-base": Claim(
        ("sam_on",),
        "SAM on the normalization layers alone is better than the base optimizer.",
        "abstract",
        over("SGD"),
        low=0,
    ),
    "on-asam": Claim(
        ("sam_on", "asam"),
        "ASAM on the normalization layers alone is better than ASAM on all layers.",
        "authors' results",
        "test accuracy of ASAM-ON over ASAM's, points",
        low=0,
    ),
    "off-sam": Claim(
        ("sam_on",),
        "SAM on all layers but the normalization is about as good as SAM on all.",
        "authors' results",
        over("SAM"),
        low=-0.5,
    ),
    "off-asam": Claim(
        ("sam_on", "asam"),
        "ASAM on all layers but the normalization is worse than ASAM on all.",
        "authors' results",
        "test accuracy without the normalization layers over ASAM's, points",
        high=0,
    ),
    "on-sharper": Claim(
        ("sam_on",),
        "SAM on the normalization layers alone may find sharper minima than SAM.",
        "abstract",
        FLATNESS.format("SAM"),
        low=0,
    ),
    "on-sharper-base": Claim(
        ("sam_on",),
        "SAM on the normalization layers alone may find sharper minima than the base optimizer.",
        "abstract",
        FLATNESS.format("SGD"),
        low=0,
    ),
    "on-radius": Claim(
        ("sam_on",),
        "The best radius of SAM on the normalization layers alone is 2 to 10 times SAM's.",
        "authors' results",
        "best radius of the grid over SAM's, by test accuracy, as a power of ten",
        low=np.log10(2).item(),
        high=1.0,
    ),
    "asam-sam": Claim(("asam",), "ASAM is better than SAM.", "abstract", over("SAM"), low=0),
    **sassha_claims("sassha", "", LAZY),
    **sassha_claims("sassha-eps", f", with eps={EPS}", ""),
    "sassha-lazy": Claim(
        ("sassha",),
        "SASSHA is as good when the curvature is computed on every tenth step only.",
        "abstract: stable with lazy Hessians",
        over("SASSHA with every=1"),
        low=-0.5,
        why=LAZY,
    ),
    "sassha-eps-lazy": Claim(
        ("sassha",),
        f"SASSHA with eps={EPS} is as good when the curvature is computed on every tenth step "
        "only.",
        "abstract: stable with lazy Hessians",
        over("SASSHA with every=1 and eps=1e-4"),
        low=-0.5,
    ),
    "sassha-without": Claim(
        ("sassha",),
        "SASSHA is better than SGD with momentum, in a network without normalization.",
        "abstract, where networks have normalization",
        "test accuracy over SGD's, points; committed results of digits.py",
        low=0,
        why=WITHOUT,
    ),
    "sassha-eps-without": Claim(
        ("sassha",),
        f"SASSHA is better than SGD with momentum, in a network without normalization, with "
        f"eps={EPS}.",
        "abstract, where networks have normalization",
        "test accuracy over SGD's, points",
        low=0,
    ),
    "adasam-sam": Claim(("adasam",), "AdaSAM is better than SAM.", "abstract", over("SAM"), low=0),
    "adasam-amsgrad": Claim(
        ("adasam",), "AdaSAM is better than AMSGrad.", "abstract", over("AMSGrad"), low=0
    ),
    "adasam-sam-adamw": Claim(
        ("adasam",),
        "AdaSAM is better than SAM in front of AdamW.",
        "not said in what we read",
        over("SAM and AdamW"),
        low=0,
    ),
}
# Which two arms a claim compares; flatness of some.
ACCURACY = {
    "sam-base": ("sam", "sgd"),
    "on-sam": ("sam-on", "sam"),
    "on-base": ("sam-on", "sgd"),
    "on-asam": ("asam-on", "asam"),
    "off-sam": ("sam-off", "sam"),
    "off-asam": ("asam-off", "asam"),
    "asam-sam": ("asam", "sam"),
    "sassha-sgd": ("sassha", "sgd"),
    "sassha-adamw": ("sassha", "adamw"),
    "sassha-sam": ("sassha", "sam"),
    "sassha-adahessian": ("sassha", "adahessian"),
    "sassha-lazy": ("sassha", "sassha, every=1"),
    "sassha-eps-sgd": ("sassha, eps=0.01", "sgd"),
    "sassha-eps-adamw": ("sassha, eps=0.01", "adamw"),
    "sassha-eps-sam": ("sassha, eps=0.01", "sam"),
    "sassha-eps-adahessian": ("sassha, eps=0.01", "adahessian, eps=0.01"),
    "sassha-eps-lazy": ("sassha, eps=0.01", "sassha, every=1"),
    "sassha-eps-without": ("plain sassha, eps=0.01", "plain sgd"),
    "adasam-sam": ("adasam", "sam"),
    "adasam-amsgrad": ("adasam", "amsgrad"),
    "adasam-sam-adamw": ("adasam", "sam + adamw"),
}
SHARPNESS = {
    "on-sharper": ("sam-on", "sam"),
    "on-sharper-base": ("sam-on", "sgd"),
    "sassha-flatter": ("sassha", "adahessian"),
    "sassha-sharper": ("adahessian", "sgd"),
    "sassha-eps-flatter": ("sassha, eps=0.01", "adahessian, eps=0.01"),
    "sassha-eps-sharper": ("adahessian, eps=0.01", "sgd"),
}


def train_on_grid(args: argparse.Namespace, arm: str, learning_rate: float) -> np.ndarray:
    """Return the test accuracies in percent of an arm with every radius, [radii, seeds]."""
    trainer = make_trainer(ARMS[arm], args.base, args.width, args.epochs)

    def one(run):
        images, _, test = data_of(int(run.seed), NOISE)
        start = start_of(int(run.seed), args.width)
        return trainer.accuracy(train_run(trainer, start, run, images, args.epochs).params, test)

    candidates = [(learning_rate, rho) for rho in RADII]
    runs = Runs(*runs_of(range(args.seeds), candidates))
    found = map_runs(one, runs, advance=lambda runs: None)
    return 100 * np.reshape(np.asarray(found, float), (len(RADII), -1))


def best_radius(accuracies: np.ndarray) -> np.ndarray:
    """Return log10 of the best radius of each seed; of equal ones the mean."""
    is_best = accuracies == accuracies.max(axis=0)
    return (is_best * np.log10(RADII)[:, None]).sum(axis=0) / is_best.sum(axis=0)


def eigenvalues(results: Sequence[dict[str, Any]], row: str) -> np.ndarray:
    """Return the top eigenvalues of an arm at the end, one for each seed."""
    return np.asarray(of(results, row, NOISE)["monitored"]["top_eigenvalue"], float)[-1]


def without_normalization() -> np.ndarray:
    """Return SASSHA's accuracy over that of its base, from the committed results of digits.py."""
    rows = {row["row"]: row for row in files.read_json(DIGITS)["rows"] if row["noise"] == NOISE}
    return 100 * np.subtract(*(rows[name]["test_accuracy"] for name in ("sassha", "base")))


def values_of(
    results: Sequence[dict[str, Any]], grids: dict[str, np.ndarray]
) -> dict[str, list[float]]:
    """Return the numbers of every claim, one for each seed."""
    values = {
        name: points(results, one, NOISE) - points(results, other, NOISE)
        for name, (one, other) in ACCURACY.items()
    }
    for name, (one, other) in SHARPNESS.items():
        values[name] = np.log10(eigenvalues(results, one) / eigenvalues(results, other))
    values["on-radius"] = best_radius(grids["sam-on"]) - best_radius(grids["sam"])
    values["sassha-without"] = without_normalization()
    return {name: np.round(values[name], 6).tolist() for name in CLAIMS}


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """Print one line for each arm."""
    grid = [["method", "lr", "rho", "test acc. %", "training acc. %", "top eigenvalue"]]
    for result in results:
        means = [
            points(results, result["row"], NOISE).mean(),
            100 * np.mean(result["train_accuracy"]),
            np.exp(np.log(eigenvalues(results, result["row"])).mean()),
        ]
        tuned = [marked(result, name) for name in ("learning_rate", "rho")]
        grid.append([result["row"], *tuned, *(f"{mean:.4g}" for mean in means)])
    print("\n" + "\n".join(aligned(grid)))
    if any(result["edges"] for result in results):
        print(MARK)


def draw(results: Sequence[dict[str, Any]], grids: dict[str, np.ndarray], path: Path) -> None:
    """Draw the accuracy of every arm over SAM's, and that of SAM and SAM-ON over the radius."""
    figure = figures.make_figure(2, [figures.height_of(len(results))])
    left, right = figure.subplots(1, 2)
    shown = [result for result in results if result["row"] not in PLAIN]
    for position, result in enumerate(shown[::-1]):
        lead = points(results, result["row"], NOISE) - points(results, "sam", NOISE)
        value, *ends = mean_interval(lead)
        color = figures.GREY if result["row"] in ("sgd", "sam") else figures.BLUE
        left.plot(max(value, LOWEST), position, "o" if value > LOWEST else "<", color=color)
        left.plot(np.maximum(ends, LOWEST), [position] * 2, color=color)
    left.set_yticks(range(len(shown)), [result["row"] for result in shown[::-1]])
    left.axvline(0, color=figures.GREY, linewidth=1)
    left.set_xlabel(f"points over SAM, 95% intervals; <: below {LOWEST:g}")
    left.set_title("methods with LayerNorm")
    left.grid(axis="x", alpha=0.3)
    for (name, accuracies), color in zip(grids.items(), figures.COLORS, strict=False):
        right.plot(RADII, accuracies.mean(axis=1), "o-", color=color, label=name, markersize=4)
    sgd = points(results, "sgd", NOISE).mean()
    right.axhline(sgd, color=figures.GREY, linewidth=1)
    right.set(xscale="log", xlabel="rho (line: SGD)", ylabel="test accuracy, %")
    right.set_ylim(sgd + LOWEST / 2)
    best = {name: RADII[int(a.mean(axis=1).argmax())] for name, a in grids.items()}
    right.set_title("best: " + ", ".join(f"{name} {rho:g}" for name, rho in best.items()))
    right.grid(alpha=0.3)
    figures.label_ends(right)
    figures.save(figure, path, "Digits, 30% wrong labels: a network with normalization layers")


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    plain = argparse.Namespace(**{**vars(args), "base": "momentum", "rho": None})
    args = argparse.Namespace(**{**vars(plain), "width": network(args.width)})
    results = train_arms(ARMS, args, [NOISE], is_measured=True)
    results += train_arms(PLAIN, plain, [NOISE], is_measured=True)
    grids = {
        arm: train_on_grid(args, arm, of(results, arm, NOISE)["learning_rate"]) for arm in ON_GRID
    }
    values = values_of(results, grids)
    print_table(results)
    found = found_of(CLAIMS, values)
    print_claims(found)
    grid = {"rho": RADII, **{arm: accuracies.tolist() for arm, accuracies in grids.items()}}
    save(report, NAME, found, values, rows=results, grid=grid)
    draw(results, grids, args.folder / f"{NAME}.png")
    report.end(f"{NAME}.png")
    return found


if __name__ == "__main__":
    main()
