"""What µP² keeps when a network becomes wider: the effect of the perturbation, and the best rho.

    python examples/claims/mup_transfer.py
    python examples/claims/mup_transfer.py --parts exponents --widths 128 256 512 1024 --seeds 5
    python examples/claims/mup_transfer.py --parts transfer --transfer-seeds 3

A network with two hidden layers is initialized in the maximal update parametrization (µP) and gets
its learning rates from `samx.mup.learning_rates`. It trains with `samx.mup_sam` (µP²) or with
`samx.sam`, on 200 of scikit-learn's digits; about 30% of them have a wrong label. The head starts
small, not at zero, so that all layers are perturbed from the first step on.

Exponents: after 1 and after 10 steps, how much does the next batch's perturbation change the
features of each layer (before its activation; for the head, the outputs)? The change is a root mean
square over units and examples. It grows like a power of the width. The exponent is fitted over the
widths for every seed. Under µP² the exponent is 0 in every layer. Under SAM the change falls with
the width in the first and second layer and grows in the outputs. The exponent is reported for the
perturbation of all layers at once, whose effects add up from layer to layer, and for the
perturbation of the layer alone. The default rho is smaller than the best rho of the grid, for this
reason: at rho 0.2, SAM has changed the training of the wide networks after 10 steps, and then the
exponent of the outputs describes that training more than the perturbation.

Transfer: the best learning rate and rho of a grid are found at the narrowest and at the widest of
the `--transfer-widths`. The best pair has the lowest loss on 797 other images, whose labels are
right. Under µP² the best pair should move by at most one step of the grid. At the base width, 64,
both methods are the same. The claims take the best pair of each seed.

The script prints tables and claims, and writes results.json and mup_transfer.png to --out. It takes
about 7 minutes on two CPU cores, a tenth of it for the exponents.
"""

import argparse
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments

NAME = "mup_transfer"
PARTS = ("exponents", "transfer")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: both")
    add("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048], help="for the exponents")
    add("--steps", type=int, nargs="+", default=[1, 10], help="steps at which exponents are fitted")
    add("--seeds", type=int, default=10, help="for the exponents")
    add("--learning-rate", type=float, default=0.08, help="for the exponents")
    add("--rho", type=float, default=0.05, help="for the exponents")
    add("--transfer-widths", type=int, nargs="+", default=[64, 1024])
    add("--transfer-steps", type=int, default=100)
    add("--transfer-seeds", type=int, default=10)
    add("--learning-rates", type=float, nargs="+", default=[0.02, 0.04, 0.08, 0.16, 0.32])
    add("--rhos", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4, 0.8])
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    args.steps = tuple(sorted(set(args.steps)))
    for name in ("widths", "transfer_widths", "learning_rates", "rhos"):
        setattr(args, name, sorted(set(getattr(args, name))))
    arguments.check_range(parser, args, "widths", "steps", "seeds")
    arguments.check_range(parser, args, "transfer_widths", "transfer_steps", "transfer_seeds")
    for name in ("widths", "transfer_widths"):
        if len(getattr(args, name)) < 2:
            parser.error(f"--{name.replace('_', '-')} must have at least two different widths")
    names = ("learning_rate", "rho", "learning_rates", "rhos")
    arguments.check_finite(parser, args, *names, above_zero=True)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import samx
from examples.claims.claim import Claim, found_of, print_claims, save
from examples.common import figures, files
from examples.common.choices import TRAIN
from examples.common.digits_task import rows_of, split
from examples.common.output import choose_folder
from examples.common.report import Report, mean_and_error, without_nans

BASE_WIDTH = 64  # where all scales and learning rates are 1
FEW, BATCH, NOISE, MOMENTUM = 200, 50, 0.3, 0.9
LAYERS = ("first", "second", "head")
PERTURBED = ("all", "own")  # layers perturbed when a layer's features are measured
TOLERANCE = 0.1  # for an exponent that should be 0
CRITERIA = {"loss": -1, "accuracy": 1}  # 1: larger is better; -1: smaller

CLAIMS = {
    "mup-exponents": Claim(
        ("mup_sam",),
        "The perturbation changes the features of every layer by an amount that does not depend on "
        "the width.",
        "title and captions",
        "largest |power of the width| with which the features change, over layers and steps; "
        "widths 256 to 2048",
        high=TOLERANCE,
    ),
    "sam-exponents": Claim(
        ("sam",),
        "In every layer SAM's perturbation loses or gains strength with the width.",
        "captions",
        "smallest |power of the width| of the same table, for SAM",
        low=TOLERANCE,
    ),
    "sam-last-layer": Claim(
        ("sam",),
        "In wide networks SAM perturbs the last layer only.",
        "captions",
        "power of the width of a hidden layer's own change, minus that of the head; the larger one "
        "of two layers, after one step",
        high=-TOLERANCE,
    ),
    "mup-best-pair": Claim(
        ("mup_sam",),
        "The best learning rate and rho of a narrow network are the best of a wide one.",
        "title and captions",
        "steps of the grid by which the best pair moves from the narrowest to the widest network, "
        "by the loss; factors of 2 in both, digits, 100 steps",
        high=1.0,
    ),
    "mup-keeps-more": Claim(
        ("mup_sam",),
        "Only layerwise scaling carries both over to a wider network: SAM's best pair moves.",
        "captions",
        "steps of the grid by which SAM's best pair moves, minus those of the pair of µP²",
        low=0.0,
        why="on this grid both pairs stay; what changes is how SAM does beyond, see the next line",
    ),
    "mup-range": Claim(
        ("mup_sam",),
        "A rho twice as large as the best does more harm to SAM in a wide network.",
        "found here",
        "loss of the widest network with the narrow one's best learning rate and twice its best "
        "rho: SAM's minus that of µP²",
        low=0.0,
    ),
    "mup-keeps-loss": Claim(
        ("mup_sam",),
        "Keeping the narrow network's pair costs SAM more than µP².",
        "captions",
        "loss of the wide network with the narrow one's best pair, minus that with its own best: "
        "SAM's minus that of µP²",
        low=0.0,
    ),
    "mup-accuracy": Claim(
        ("mup_sam",),
        "In a wide network µP² is more accurate than SAM.",
        "captions",
        "accuracy of the widest network with its best pair, minus that with SAM's, points; digits",
        low=0.0,
        published="width 4096",
    ),
}


class Method(NamedTuple):
    """A sharpness-aware method and its perturbation; both get rho and the scales of the layers."""

    label: str
    make: Callable[[Any, Any], optax.GradientTransformationExtraArgs]
    ball: Callable[[Any, Any], optax.GradientTransformationExtraArgs]


METHODS = {
    "mup_sam": Method(
        "µP²",
        lambda rho, scales: samx.mup_sam(rho, scales),
        lambda rho, scales: samx.perturbations.mup_ball(rho, scales),
    ),
    "sam": Method(
        "SAM",
        lambda rho, scales: samx.sam(rho),
        lambda rho, scales: samx.perturbations.metric_ball(rho),
    ),
}


class Network(nn.Module):
    """Two hidden layers in µP; it returns the features of all layers, before their activations."""

    width: int

    @nn.compact
    def __call__(self, x):  # noqa: D102
        # A Dense layer starts with lecun_normal, variance 1 / fan_in. µP's head starts smaller.
        head = nn.initializers.variance_scaling(
            BASE_WIDTH / self.width, "fan_in", "truncated_normal"
        )
        first = nn.Dense(self.width, name="first")(x)
        second = nn.Dense(self.width, name="second")(nn.relu(first))
        outputs = nn.Dense(10, kernel_init=head, name="head")(nn.relu(second))
        return dict(zip(LAYERS, (first, second, outputs), strict=True))


class Data(NamedTuple):
    """A seed's training batches, in the order of its steps, and its held-out images."""

    batches: dict[str, jax.Array]  # [steps, batch, ...]
    held_out: dict[str, jax.Array]


@partial(jax.jit, static_argnums=1)
def make_data(seed: jax.Array | int, steps: int) -> Data:
    """Return the seed's images; few training images, so that wrong labels are soon memorized."""
    train, *rest = jax.tree.map(lambda leaf: leaf[0], split(jnp.array([seed]), NOISE))
    key, epochs = jax.random.key(seed), math.ceil(steps * BATCH / FEW)
    few = jax.random.permutation(jax.random.fold_in(key, 1), TRAIN)[:FEW]
    keys = jax.random.split(jax.random.fold_in(key, 2), epochs)
    rows = jax.vmap(lambda key: jax.random.permutation(key, few))(keys)
    held_out = {name: jnp.concatenate([part[name] for part in rest]) for name in ("x", "y")}
    return Data(rows_of(train, rows.reshape(-1, BATCH)[:steps]), held_out)


@cache
def shapes(width: int) -> Any:
    """Return the shapes of the parameters; to trace their initialization takes 30 ms."""
    return jax.eval_shape(Network(width).init, jax.random.key(0), jnp.ones((1, 64)))["params"]


def initialize(seed: jax.Array, width: int) -> Any:
    """Return the seed's initial parameters."""
    return Network(width).init(jax.random.key(seed), jnp.ones((1, 64)))["params"]


def cross_entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean cross-entropy over the examples."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


def features(params: Any, x: jax.Array, width: int) -> Any:
    """Return the features of every layer by its name; the head's features are the outputs."""
    return Network(width).apply({"params": params}, x)


def loss(params: Any, batch: dict[str, jax.Array], width: int) -> jax.Array:
    """Return the loss of a batch."""
    return cross_entropy(features(params, batch["x"], width)["head"], batch["y"])


def make_optimizer(
    name: str, width: int, learning_rate: Any, rho: Any
) -> optax.GradientTransformationExtraArgs:
    """Return the method, then SGD with momentum; each layer has its learning rate of µP."""
    scales = samx.mup.layer_scales(shapes(width), shapes(BASE_WIDTH))
    rates = samx.mup.learning_rates(shapes(width), shapes(BASE_WIDTH), "sgd")
    return optax.chain(
        METHODS[name].make(rho, scales),
        optax.sgd(learning_rate, momentum=MOMENTUM),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, rates)),
    )


def train(tx: optax.GradientTransformationExtraArgs, params: Any, state: Any, batches, width: int):
    """Take one step on each batch; return the new parameters and state."""

    def step(carry, batch):
        params, state = carry

        def value_fn(params):
            return loss(params, batch, width)

        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), batches)
    return params, state


def effects(name: str, params: Any, batch: dict[str, jax.Array], rho: Any, width: int):
    """Measure how the perturbation changes each layer's features: root mean squares [2, layers]."""
    scales = samx.mup.layer_scales(shapes(width), shapes(BASE_WIDTH))
    ball = METHODS[name].ball(rho, scales)
    eps, _ = ball.update(jax.grad(loss)(params, batch, width), ball.init(params), params)
    perturbed = jax.tree.map(jnp.add, params, eps)

    def change(moved, layer):
        return jnp.sqrt(jnp.mean((moved[layer] - before[layer]) ** 2))

    before, after = (features(point, batch["x"], width) for point in (params, perturbed))
    of_all = [change(after, layer) for layer in LAYERS]
    alone = [features(params | {layer: perturbed[layer]}, batch["x"], width) for layer in LAYERS]
    of_own = [change(moved, layer) for moved, layer in zip(alone, LAYERS, strict=True)]
    return jnp.stack([jnp.stack(of_all), jnp.stack(of_own)])


def make_probe(name: str, width: int, steps: tuple[int, ...]) -> Callable[..., jax.Array]:
    """Return a compiled function that trains a seed and returns the effects [steps, 2, layers]."""

    @jax.jit
    def probe(seed, batches, learning_rate, rho):
        tx, params = make_optimizer(name, width, learning_rate, rho), initialize(seed, width)
        state, now, found = tx.init(params), 0, []
        for step in steps:
            part = jax.tree.map(lambda leaf, now=now, step=step: leaf[now:step], batches)
            params, state = train(tx, params, state, part, width)
            now = step
            batch = jax.tree.map(lambda leaf, step=step: leaf[step], batches)
            found.append(effects(name, params, batch, rho, width))
        return jnp.stack(found)

    return probe


def make_run(name: str, width: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return a compiled function that trains a seed and returns held-out loss and accuracy."""

    @jax.jit
    def run(seed, data, learning_rate, rho):
        tx, params = make_optimizer(name, width, learning_rate, rho), initialize(seed, width)
        params, _ = train(tx, params, tx.init(params), data.batches, width)
        outputs = features(params, data.held_out["x"], width)["head"]
        accuracy = jnp.mean(outputs.argmax(-1) == data.held_out["y"])
        return cross_entropy(outputs, data.held_out["y"]), accuracy

    return run


def flops(width: int, gradients: int) -> int:
    """Estimate the flops of `gradients` gradients of a batch; the progress bar counts them."""
    return 6 * BATCH * gradients * (64 * width + width**2 + 10 * width)


def measure_effects(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Measure the effects of every method: [widths, seeds, steps, 2, layers]."""
    last = args.steps[-1]
    data = [make_data(seed, last + 1).batches for seed in range(args.seeds)]
    work = {width: flops(width, 2 * last + 4) for width in args.widths}
    total = len(METHODS) * args.seeds * sum(work.values())
    found = {}
    with tqdm(total=total, desc="exponents", unit="flop", unit_scale=True, disable=None) as bar:
        for name in METHODS:
            rows = []
            for width in args.widths:
                probe = make_probe(name, width, args.steps)
                row = []
                for seed in range(args.seeds):
                    row.append(np.asarray(probe(seed, data[seed], args.learning_rate, args.rho)))
                    bar.update(work[width])
                rows.append(row)
            found[name] = np.array(rows, np.float64)
    return found


def slopes(widths: list[int], effects: np.ndarray) -> np.ndarray:
    """Fit the exponents: least squares of log(effect) over log(width); axis 0 is the width."""
    x = np.log(widths)
    x = x - x.mean()
    return np.tensordot(x, np.log(effects), axes=1) / np.sum(x**2)


def fit(widths: list[int], steps: tuple[int, ...], found: dict[str, np.ndarray]) -> list[dict]:
    """Fit an exponent for every method, number of steps, set of perturbed layers, and layer."""
    results = []
    for name, values in found.items():
        exponents, means = slopes(widths, values), np.exp(np.log(values).mean(axis=1))
        for index in np.ndindex(*exponents.shape[1:]):
            step, perturbed, layer = index
            exponent, error = mean_and_error(exponents[:, *index].tolist())
            results.append(
                {
                    "method": name,
                    "steps": steps[step],
                    "perturbed": PERTURBED[perturbed],
                    "layer": LAYERS[layer],
                    "exponent": exponent,
                    "error": error if math.isfinite(error) else None,  # None for a single seed
                    "exponent_by_seed": exponents[:, *index].tolist(),
                    "effect_by_width": means[:, *index].tolist(),  # geometric means over seeds
                }
            )
    return results


def signed(result: dict) -> str:
    """Format an exponent with its error."""
    error = "" if result["error"] is None else f" ± {result['error']:.3f}"
    return f"{result['exponent']:+.3f}{error}"


def exponent_table(results: list[dict]) -> str:
    """Format one line for each method, number of steps and set of perturbed layers."""
    head = f"{'method':<7} {'steps':>5} {'perturbed':>10}" + "".join(f"{x:>17}" for x in LAYERS)
    lines = [head, "-" * len(head)]
    for at in range(0, len(results), len(LAYERS)):
        first, *_ = row = results[at : at + len(LAYERS)]
        start = f"{METHODS[first['method']].label:<7} {first['steps']:>5} {first['perturbed']:>10}"
        lines.append(start + "".join(f"{signed(result):>17}" for result in row))
    return "\n".join(lines)


def exponent_verdict(results: list[dict]) -> str:
    """Say for each method how many of its exponents are close to 0."""
    lines = []
    for name, method in METHODS.items():
        sizes = [abs(result["exponent"]) for result in results if result["method"] == name]
        within = sum(size <= TOLERANCE for size in sizes)
        lines.append(
            f"{method.label}: {within} of {len(sizes)} exponents are within {TOLERANCE} of 0; the "
            f"largest is {max(sizes):.3f} away from it, the smallest {min(sizes):.3f}."
        )
    return "\n".join(lines)


def measure_grids(args: argparse.Namespace) -> list[dict]:
    """Measure loss and accuracy of every learning rate and rho, for each method and width."""
    data = [make_data(seed, args.transfer_steps) for seed in range(args.transfer_seeds)]
    pairs = [(name, width) for width in args.transfer_widths for name in METHODS]
    jobs = [pair for pair in pairs if pair[0] == "mup_sam" or pair[1] != BASE_WIDTH]
    shape = (2, args.transfer_seeds, len(args.learning_rates), len(args.rhos))
    work = {width: flops(width, 2 * args.transfer_steps) for width in args.transfer_widths}
    total = math.prod(shape[1:]) * sum(work[width] for _, width in jobs)
    found = {}
    with tqdm(total=total, desc="transfer", unit="flop", unit_scale=True, disable=None) as bar:
        for name, width in jobs:
            run, values = make_run(name, width), np.empty(shape)
            for seed, i, j in np.ndindex(*shape[1:]):
                values[:, seed, i, j] = run(seed, data[seed], args.learning_rates[i], args.rhos[j])
                bar.update(work[width])
            found[name, width] = values
    results = []
    for name, width in pairs:
        # At the base width all scales are 1, and both methods are the same.
        by_seed = found["mup_sam" if width == BASE_WIDTH else name, width]
        results.append({"method": name, "width": width, **grids_of(by_seed)})
    return results


def grids_of(by_seed: np.ndarray) -> dict[str, Any]:
    """Return the mean of each criterion, and the numbers of each seed: [criteria, seeds, ...]."""
    means = dict(zip(CRITERIA, by_seed.mean(axis=1).tolist(), strict=True))
    each = {f"{name}_by_seed": of.tolist() for name, of in zip(CRITERIA, by_seed, strict=True)}
    return without_nans(means | each)


def values_of(found: dict[str, Any]) -> dict[str, list[float]]:
    """Return the numbers of each claim of the parts that ran, one for each seed."""
    values = of_exponents(found["exponents"]) if "exponents" in found else {}
    return values | (of_transfer(found["grids"]) if "transfer" in found else {})


def of_exponents(results: list[dict]) -> dict[str, list[float]]:
    """Return the largest and smallest exponents of each seed."""

    def pick(**wanted):
        rows = [r for r in results if all(r[key] == value for key, value in wanted.items())]
        return np.array([row["exponent_by_seed"] for row in rows])

    first = min(result["steps"] for result in results)
    *hidden, head = pick(method="sam", steps=first, perturbed="own")
    return {
        "mup-exponents": np.abs(pick(method="mup_sam")).max(axis=0).tolist(),
        "sam-exponents": np.abs(pick(method="sam")).min(axis=0).tolist(),
        "sam-last-layer": (np.max(hidden, axis=0) - head).tolist(),
    }


def of_transfer(grids: list[dict]) -> dict[str, list[float]]:
    """Return how far the best pair of each seed moves, and what it costs to keep it."""
    moved, lost, beyond, accuracy = {}, {}, {}, {}
    for name in METHODS:
        narrow, *_, wide = [grid for grid in grids if grid["method"] == name]
        one, other = (np.array(grid["loss_by_seed"], float) for grid in (narrow, wide))
        pairs = [(best_place(-a), best_place(-b)) for a, b in zip(one, other, strict=True)]
        moved[name] = np.array([np.abs(np.subtract(*pair)).max() for pair in pairs])
        place, own = best(narrow, "loss"), best(wide, "loss")
        lost[name] = other[:, *place] - other[:, *own]
        beyond[name] = other[:, place[0], min(place[1] + 1, other.shape[2] - 1)]
        by_seed = np.array(wide["accuracy_by_seed"], float)
        accuracy[name] = 100 * by_seed[:, *best(wide, "accuracy")]
    return {
        "mup-best-pair": moved["mup_sam"].tolist(),
        "mup-keeps-more": (moved["sam"] - moved["mup_sam"]).tolist(),
        "mup-range": (beyond["sam"] - beyond["mup_sam"]).tolist(),
        "mup-keeps-loss": (lost["sam"] - lost["mup_sam"]).tolist(),
        "mup-accuracy": (accuracy["mup_sam"] - accuracy["sam"]).tolist(),
    }


def best(result: dict, criterion: str) -> tuple[int, int]:
    """Return row and column of the best learning rate and rho."""
    return best_place(CRITERIA[criterion] * np.array(result[criterion], np.float64))


def best_place(grid: np.ndarray) -> tuple[int, int]:
    """Return row and column of the largest number; what is not a number is the smallest."""
    grid = np.where(np.isnan(grid), -np.inf, grid)  # runs that diverged
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    return int(row), int(column)


def compare_widths(grids: list[dict], rates: list[float], rhos: list[float]) -> list[dict]:
    """Compute how far the best pair moves between the widths, and the cost of keeping it."""

    def is_at_edge(row, column):  # a better pair may lie outside the grid
        return row in (0, len(rates) - 1) or column in (0, len(rhos) - 1)

    results = []
    for name in METHODS:
        narrow, *_, wide = [grid for grid in grids if grid["method"] == name]
        for criterion in CRITERIA:
            (i, j), (k, m) = best(narrow, criterion), best(wide, criterion)
            results.append(
                {
                    "method": name,
                    "criterion": criterion,
                    "narrow": {"width": narrow["width"], "learning_rate": rates[i], "rho": rhos[j]},
                    "wide": {"width": wide["width"], "learning_rate": rates[k], "rho": rhos[m]},
                    "grid_steps": [k - i, m - j],
                    "wide_with_narrow_best": wide[criterion][i][j],
                    "wide_best": wide[criterion][k][m],
                    "within_one_step": max(abs(k - i), abs(m - j)) <= 1,
                    "at_edge": is_at_edge(i, j) or is_at_edge(k, m),
                }
            )
    return results


def grid_table(result: dict, rates: list[float], rhos: list[float]) -> str:
    """Format the losses of one method and width, with the best in brackets."""
    lines = [f"{title(result)}: loss; learning rates down, rho to the right"]
    lines.append(" " * 8 + "".join(f"{rho:>9g} " for rho in rhos))
    where = best(result, "loss")
    for i, (rate, row) in enumerate(zip(rates, result["loss"], strict=True)):
        cells = ("-" if value is None else f"{value:.3f}" for value in row)
        cells = (f"[{c}]" if (i, j) == where else f"{c} " for j, c in enumerate(cells))
        lines.append(f"{rate:>8g}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def title(result: dict) -> str:
    """Return the title of a grid: method and width."""
    label = METHODS[result["method"]].label
    label = "µP² and SAM" if result["width"] == BASE_WIDTH else label
    return f"{label}, width {result['width']}"


def without_repeats(grids: list[dict]) -> list[dict]:
    """Return the grids; the grid of the base width, which both methods share, only once."""
    return list({title(result): result for result in grids}.values())


def transfer_table(results: list[dict]) -> str:
    """Format one line for each method and criterion."""
    head = f"{'method':<7} {'criterion':<9} {'best of the narrow':>20} {'best of the wide':>18}"
    head += f" {'steps apart':>12} {'kept':>7} {'best':>7} {'at edge':>8}"
    lines = [f"{'':<7} {'':<9} {'(learning rate, rho)':>20} {'':>18} {'':>12} {'in the wide':>15}"]
    lines += [head, "-" * len(head)]
    for result in results:
        narrow, wide = (
            f"({result[key]['learning_rate']:g}, {result[key]['rho']:g})"
            for key in ("narrow", "wide")
        )
        apart = "({:+d}, {:+d})".format(*result["grid_steps"])
        values = (result["wide_with_narrow_best"], result["wide_best"])
        kept, found = ("-" if value is None else f"{value:.3f}" for value in values)
        lines.append(
            f"{METHODS[result['method']].label:<7} {result['criterion']:<9} {narrow:>20} {wide:>18}"
            f" {apart:>12} {kept:>7} {found:>7}"
            f" {'yes' if result['at_edge'] else 'no':>8}"
        )
    return "\n".join(lines)


def draw_effects(axes: Any, results: list[dict], widths: list[int], steps: int) -> None:
    """Plot the effects over the widths after `steps` steps, with all layers perturbed."""
    mine = [r for r in results if r["steps"] == steps and r["perturbed"] == "all"]
    for result in mine:
        is_mup = result["method"] == "mup_sam"
        axes.loglog(
            widths,
            result["effect_by_width"],
            "o-" if is_mup else "s--",
            color=figures.COLORS[LAYERS.index(result["layer"])],
            label=f"{METHODS[result['method']].label}, {result['layer']}: {signed(result)}",
        )
    largest = {
        method.label: max(abs(r["exponent"]) for r in mine if r["method"] == name)
        for name, method in METHODS.items()
    }
    told = ", ".join(f"{size:.2f} ({label})" for label, size in largest.items())
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.set_title(f"after {steps} step{'s' * (steps > 1)}: exponents up to {told}")
    axes.set_xlabel("width")
    axes.grid(alpha=0.3)
    figures.label_ends(axes)


def draw_grid(axes: Any, result: dict, rates: list[float], rhos: list[float], limits: Any) -> Any:
    """Plot the losses as a heat map and mark the best."""
    grid = np.array(result["loss"], np.float64)
    image = axes.imshow(grid, cmap="viridis_r", origin="lower", aspect="auto", **limits)
    row, column = best(result, "loss")
    axes.plot(column, row, "*", color=figures.RED, markersize=14)
    axes.set_xticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
    axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set(title=f"{title(result)}: best {grid[row, column]:.3f}", xlabel="rho")
    return image


def draw(report: dict, args: argparse.Namespace, path: Path) -> None:
    """Plot the effects (top) and the grids (bottom)."""
    rows = [part for part in PARTS if part in args.parts]
    grids = without_repeats(report.get("grids", []))
    columns = max(1.5 * len(args.steps) * ("exponents" in rows), 0.8 * len(grids))
    figure = figures.make_figure(columns, [figures.height_of()] * len(rows))
    left = {"x": 0.01, "ha": "left"}
    for part, row in zip(rows, figure.subfigures(len(rows), 1, squeeze=False)[:, 0], strict=True):
        if part == "exponents":
            panels = row.subplots(1, len(args.steps), squeeze=False)[0]
            for axes, steps in zip(panels, args.steps, strict=True):
                draw_effects(axes, report["exponents"], args.widths, steps)
            limits = [axes.get_ylim() for axes in panels]
            for axes in panels:
                axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
            panels[0].set_ylabel("change of the features, root mean square")
            row.suptitle(f"Effect of the perturbation on each layer, {args.seeds} seeds", **left)
        else:
            panels = row.subplots(1, len(grids), squeeze=False)[0]
            losses = np.array([grid["loss"] for grid in grids], np.float64)
            losses = losses[np.isfinite(losses)]
            limits = {"vmin": losses.min(), "vmax": losses.max()} if losses.size else {}
            pairs = zip(panels, grids, strict=True)
            images = [
                draw_grid(axes, grid, args.learning_rates, args.rhos, limits)
                for axes, grid in pairs
            ]
            panels[0].set_ylabel("learning rate")
            row.colorbar(images[-1], ax=panels, label="loss on the images held out")
            row.suptitle(
                f"Loss after {args.transfer_steps} steps, mean over {args.transfer_seeds} seeds; "
                "star: the best",
                **left,
            )
    figures.save(figure, path)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    choose_folder(args, NAME)
    report, found = Report(args), {}

    if "exponents" in args.parts:
        found["exponents"] = fit(args.widths, args.steps, measure_effects(args))
        print(
            f"\nPower of the width with which the perturbation changes each layer's features, "
            f"widths {args.widths[0]} to {args.widths[-1]}, {args.seeds} seeds "
            "(mean ± standard error)"
        )
        print(exponent_table(found["exponents"]))
        print("perturbed: all layers at once, or only the own parameters of the layer\n")
        print(exponent_verdict(found["exponents"]))
    if "transfer" in args.parts:
        found["grids"] = measure_grids(args)
        found["transfer"] = compare_widths(found["grids"], args.learning_rates, args.rhos)
        print(
            f"\nAfter {args.transfer_steps} steps, mean over {args.transfer_seeds} seeds; "
            "the best in brackets"
        )
        for result in without_repeats(found["grids"]):
            print("\n" + grid_table(result, args.learning_rates, args.rhos))
        print("\n" + transfer_table(found["transfer"]))
        print(
            "kept: what the best pair of the narrow network gives in the wide one\n"
            "at edge: whether one of the two is at the edge of the grid; beyond, better ones may be"
        )

    values = values_of(found)
    claims = found_of({name: CLAIMS[name] for name in CLAIMS if name in values}, values)
    print_claims(claims)
    save(report, NAME, claims, values, **found)
    draw(found, args, args.folder / f"{NAME}.png")
    report.end(f"{NAME}.png")
    return found


if __name__ == "__main__":
    main()
