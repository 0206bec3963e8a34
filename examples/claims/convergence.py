"""Claims on convergence, on functions where it can be computed.

    python examples/claims/convergence.py
    python examples/claims/convergence.py --parts parallel saddle
    python examples/claims/convergence.py --parts digits map --seeds 5

The parts are

    parallel    SAMPa, OptSAM, RandSAM and AsyncSAM with a fixed radius: |x|² in one and in ten
                dimensions, a quadratic with condition 30, logistic regression; all examples. The
                learning rate is constant, or falls as 1/√t
    lightsam    LightSAM with any radius and rate: logistic regression with mini-batches. How fast
                does the mean squared gradient of the first T steps fall with T?
    unified     Unified SAM on x² + 3 sin²x, which is not convex but has one stationary point, and
                on least squares with a single random example in each step
    polyak      SAM-Polyak, strongly convex and convex
    batches     AdaSAM: how many steps does it take with larger batches?
    stable      Stable SAM: the largest learning rate on quadratics
    saddle      Stable SAM and Monge SAM: do they leave the saddle of x² − y² + y⁴/4?
    digits      OptSAM trains a small network on digits.py's task, next to SGD, SAM and SAMPa; every
                method is tuned in the same way, and trains for 40 epochs
    map         Stable SAM on the same task: at which learning rates and radii is it good?

OptSAM is the paper's name for a simplified parallel form, whose equation was not readable. Both of
its gradients are taken at one point, the perturbed one. It is read in two ways that differ with
mini-batches: the last descent is climbed, or the gradient at the same point on the next batch.

SAM itself does not reach the minimum at a constant learning rate η. On |x|² it stays at a distance
of ηρ / (1 − η). So convergence with a fixed radius is judged with rates that fall.

The script prints each claim with its number and the verdict, and writes results.json and
convergence.png to --out. The seeds draw starts, data and batches. It takes about 3 minutes on two
CPU cores, half of it for the digits.
"""

import argparse

from examples.common import arguments

NAME = "convergence"
PARTS = (
    *("parallel", "lightsam", "unified", "polyak", "batches", "stable", "saddle"),
    *("digits", "map"),
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=10)
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", high=1000)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import samx
from examples.claims import arms
from examples.claims.claim import Found, found_of, print_claims, save
from examples.claims.convergence_claims import CLAIMS
from examples.claims.descent import (
    Problem,
    descend,
    function,
    late_power,
    logistic,
    opt_sam,
    power,
    rand_sam,
)
from examples.common import figures, files
from examples.common.output import choose_folder
from examples.common.registry import RADIUS, VARIANTS, Variant, in_front, of
from examples.common.report import Report
from examples.common.training import data_of, make_trainer, map_runs, start_of, train_run
from examples.common.tuning import Runs, runs_of

RHOS = (0.001, 0.01, 0.1, 1.0)
RATES = (0.01, 0.03, 0.1, 0.3)  # constant ones
FALLING = 0.3  # the first of the rates that fall
STEEPER = 10  # how much larger it is on logistic regression, which is less curved
STEPS = 4000
SIZE = 10  # dimensions
SHARES = (0.0, 0.5, 1.0, "1-1/t")  # λ of Unified SAM
RATES_OF_ALL = (0.01, 0.3, 10.0)  # learning rates, and radii, at which LightSAM has to converge
HORIZONS = (1000, 10_000, 100_000)
BATCHES = (1, 4, 16, 64)
STEEPNESSES = (1.0, 30.0)  # of the saddle
EPOCHS, WIDTH = 40, 64
MAP_RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
MAP_RHOS = (0.1, 0.3, 1.0, 3.0)
GOOD = 2.0  # points below the best of the map
LEARNED = 50.0  # percent; who has less has not learned the digits
LABELS = {0.3: "30% wrong labels", 0.0: "clean labels"}

Values = dict[str, Any]  # for each claim one number for each seed
Rows = dict[str, Any]  # what the figure needs


def vmapped(one: Callable[..., Any], seeds: int, *axes: Any) -> np.ndarray:
    """Return what `one(seed, *values)` gives for all seeds and all values: [seeds, *axes, ...]."""
    count = len(axes)
    for at in reversed(range(count)):
        one = jax.vmap(one, (None, *(0 if at == other else None for other in range(count))))
    found = jax.jit(jax.vmap(one, (0, *[None] * count)))(jnp.arange(seeds), *map(jnp.array, axes))
    return np.asarray(found, float)


def distance(_: Problem, x: jax.Array) -> jax.Array:
    """Return the distance from 0."""
    return jnp.linalg.norm(x)


def excess(problem: Problem, x: jax.Array) -> jax.Array:
    """Return the loss."""
    return problem.whole(x)


# Both gradients at the same time


class Quadratic(NamedTuple):
    """A quadratic with the largest eigenvalue 2, and learning rates c / t**fall."""

    condition: float
    size: int
    rate: float
    fall: float


PROBLEMS = ("|x|²", "x²", "condition 30", "logistic")
QUADRATICS = {
    **{f"|x|², rate {rate:g}": Quadratic(1.0, SIZE, rate, 0.0) for rate in RATES},
    "|x|²": Quadratic(1.0, SIZE, FALLING, 0.5),
    "x²": Quadratic(1.0, 1, FALLING, 0.5),
    "condition 30": Quadratic(30.0, SIZE, FALLING, 0.5),
}

PARALLEL: dict[str, Callable[..., optax.GradientTransformation]] = {
    "SAM": lambda base, rho, seed, data: optax.chain(samx.sam(rho), base),
    "SAMPa, λ 0": lambda base, rho, seed, data: samx.sampa(base, rho, 0.0, batch_like=data),
    "SAMPa, λ 0.5": lambda base, rho, seed, data: samx.sampa(base, rho, 0.5, batch_like=data),
    "AsyncSAM": lambda base, rho, seed, data: optax.chain(samx.async_sam(rho), base),
    "RandSAM": lambda base, rho, seed, data: optax.chain(rand_sam(rho, seed), base),
    "OptSAM": lambda base, rho, seed, data: optax.chain(opt_sam(rho), base),
}


def norms(method: str, seeds: int) -> dict[str, np.ndarray]:
    """Return the norms of the gradient for each problem, [seeds, radii, steps]."""

    def on(problem, seed, rho, rate, fall):
        base = optax.sgd(lambda count: rate * (count + 1.0) ** -fall)
        return descend(PARALLEL[method](base, rho, seed, problem.data), problem, STEPS)

    def of_quadratic(seed, rho, which):
        here = Quadratic(*which)
        position = jnp.arange(SIZE)
        halves = here.condition ** -(position / (SIZE - 1.0))
        start = jax.random.normal(jax.random.key(seed), (SIZE,)) * (position < here.size)
        problem = function(lambda x: jnp.sum(halves * x**2), start)
        return on(problem, seed, rho, here.rate, here.fall)

    def of_logistic(seed, rho):
        return on(logistic(seed, size=5, examples=50), seed, rho, STEEPER * FALLING, 0.5)

    found = vmapped(of_quadratic, seeds, RHOS, list(QUADRATICS.values()))
    by_name = {name: found[:, :, at] for at, name in enumerate(QUADRATICS)}
    return by_name | {"logistic": vmapped(of_logistic, seeds, RHOS)}


def exact_distances(rates: np.ndarray, rhos: np.ndarray) -> dict[str, np.ndarray]:
    """Return how far from the minimum of |x|² two methods stay at a constant rate."""
    return {"SAM": rates / (1 - rates) * rhos, "OptSAM": np.sqrt(2 * rates) * rhos}


def parallel(args: argparse.Namespace, advance: Callable[[], Any]) -> tuple[Values, Rows]:
    """Take both gradients at once, with a fixed radius."""
    stays, powers, curves = {}, {}, {}
    with jax.enable_x64(True):
        for method in PARALLEL:
            found = norms(method, args.seeds)
            last = [found[f"|x|², rate {rate:g}"][..., -(STEPS // 4) :].mean(-1) for rate in RATES]
            stays[method] = np.stack(last, axis=-1) / 2  # [seeds, radii, rates]; |∇| is 2 |x|
            powers |= {(method, name): late_power(found[name]) for name in PROBLEMS}
            curves[method] = found["|x|²"][0, -1]  # of the largest radius
            advance()
    exact = exact_distances(np.array(RATES), np.array(RHOS)[:, None])
    off = {name: np.abs(stays[name] / wanted - 1).max((1, 2)) for name, wanted in exact.items()}
    above = {name: np.exp(np.log(stays[name] / stays["SAM"]).mean((1, 2))) for name in PARALLEL}
    sampa = [name for name in PARALLEL if name.startswith("SAMPa")]
    hard = ("condition 30", "logistic")

    def worst(names, problems):
        return np.max([powers[name, p] for name in names for p in problems], axis=(0, 2))

    values = {
        "sampa-converges": worst(sampa, PROBLEMS),
        "sampa-like-sam": np.max([power(RATES, stays[name]).min(-1) for name in sampa], axis=0),
        "sam-stays": off["SAM"],
        "optsam-above-sam": above["OptSAM"],
        "optsam-stays": off["OptSAM"],
        "optsam-falling": powers["OptSAM", "|x|²"].mean(-1),
        "optsam-falling-line": powers["OptSAM", "x²"][:, -1],
        "optsam-falling-hard": np.mean([powers["OptSAM", p][:, -1] for p in hard], axis=0),
        "randsam-above-sam": above["RandSAM"],
        "randsam-falling": powers["RandSAM", "|x|²"].mean(-1),
        "async-neighbourhood": power(RATES, stays["AsyncSAM"]).min(-1),
    }
    rows = {
        "rates": list(RATES),
        "distances": {name: found[:, -1].mean(0).tolist() for name, found in stays.items()},
        "curves": {name: binned(curve).tolist() for name, curve in curves.items()},
        "powers": {f"{m}, {p}": found.mean(0).tolist() for (m, p), found in powers.items()},
    }
    return values, rows


# Any radius and any learning rate

LIGHT: dict[str, Callable[..., optax.GradientTransformation]] = {
    "lightsam_norm": samx.lightsam_norm,
    "lightsam_adagrad": samx.lightsam_adagrad,
    "lightsam_adam": samx.lightsam_adam,
    "sam": lambda rate, rho: optax.chain(samx.sam(rho), optax.sgd(rate)),
}


def squares(make: Callable[..., Any], steps: int, seeds: int, every: int) -> np.ndarray:
    """Return the squared gradients along descents, [seeds, rates, radii, steps / every]."""

    def one(seed, rate, rho):
        problem = logistic(seed, size=5, examples=100)
        return descend(make(rate, rho), problem, steps, every=every, batch=5, seed=seed)

    return vmapped(one, seeds, RATES_OF_ALL, RATES_OF_ALL) ** 2


def with_horizon(rate: Any, rho: Any, steps: int, fall: float) -> Any:
    """Return LightSAM-III whose rate, averages and (with `fall` 1/2) radius know the last step."""
    return samx.lightsam_adam(rate * steps**-0.5, rho * steps**-fall, b2=1 - 1 / steps)


def lightsam(args: argparse.Namespace, advance: Callable[[], Any]) -> tuple[Values, Rows]:
    """Let LightSAM descend with any radius and rate."""
    last, every = HORIZONS[-1], HORIZONS[0] // 20
    ends = np.array(HORIZONS) // every
    values, means = {}, {}
    for name, make in LIGHT.items():
        found = squares(make, last, args.seeds, every).cumsum(-1)
        means[name] = found[..., ends - 1] / ends
        advance()
    for name, fall in (("rate", 0.0), ("both", 0.5)):
        forms = [functools.partial(with_horizon, steps=steps, fall=fall) for steps in HORIZONS]
        found = [
            squares(form, steps, args.seeds, every).mean(-1)
            for form, steps in zip(forms, HORIZONS, strict=True)
        ]
        means[f"lightsam_adam, {name}"] = np.stack(found, axis=-1)
        advance()
    for name, found in means.items():
        values[f"{name.replace('lightsam_', 'light-')}-falls"] = power(HORIZONS, found).max((1, 2))
    worst = {name: found.mean(0).reshape(-1, len(HORIZONS)).max(0) for name, found in means.items()}
    return values, {"worst": {name: found.tolist() for name, found in worst.items()}}


# Polyak-Łojasiewicz functions, and a step from the loss


def wavy(seed: jax.Array) -> Problem:
    """Return x² + 3 sin²x, from a random start."""
    start = jax.random.uniform(jax.random.key(seed), (1,), minval=-10, maxval=10)
    return function(lambda x: jnp.sum(x**2 + 3 * jnp.sin(x) ** 2), start)


def least_squares(seed: jax.Array, size: int = 5, examples: int = 50) -> tuple[Problem, jax.Array]:
    """Return least squares with noise, and its smallest loss."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (examples, size))
    y = x @ jax.random.normal(keys[1], (size,)) + jax.random.normal(keys[2], (examples,))
    problem = Problem(lambda w, data: (data[0] @ w - data[1]) ** 2, (x, y), jnp.zeros(size))
    return problem, problem.whole(jnp.linalg.lstsq(x, y)[0])


def with_share(lam: float | str, rate: Any, rho: Any = 0.05) -> Any:
    """Return Unified SAM with SGD."""
    share: Any = samx.schedules.one_minus_inverse if lam == "1-1/t" else lam
    return optax.chain(samx.unified_sam(rho, share), optax.sgd(rate))


def fall_of(losses: np.ndarray) -> np.ndarray:
    """Return the power of the steps with which a loss falls; it is -inf if it arrives at 0."""
    arrived = losses[..., -1] < 1e-25
    return np.where(arrived, -np.inf, late_power(np.maximum(losses, 1e-300)))


def unified(args: argparse.Namespace, advance: Callable[[], Any]) -> tuple[Values, Rows]:
    """Descend functions that are not convex, or random examples, with every share λ."""
    steps, rate = 5 * STEPS, 0.06

    def of_wavy(seed, falls, lam):
        tx = with_share(
            lam, lambda count: jnp.where(falls, jnp.minimum(rate, 64 / (count + 1)), rate)
        )
        return descend(tx, wavy(seed), steps, every=10, measure=excess)

    def of_random(seed, fall, lam):
        problem, lowest = least_squares(seed)
        tx = with_share(
            lam,
            lambda count: jnp.minimum(0.02, 4 / (count + 1)),
            lambda count: 0.05 * (count + 1.0) ** -fall,
        )
        seen = {"every": 10, "batch": 1, "seed": seed, "measure": excess}
        return descend(tx, problem, steps, **seen) - lowest

    found = []
    with jax.enable_x64(True):
        for lam in SHARES:
            sure = vmapped(functools.partial(of_wavy, lam=lam), args.seeds, [False, True])
            random = vmapped(functools.partial(of_random, lam=lam), args.seeds, [0.0, 0.5])
            constant = sure[:, 0, -1] / sure[:, 0, 0]
            found.append([constant, fall_of(sure[:, 1]), *fall_of(random).T])
            advance()
    names = "unified-constant", "unified-falling", "unified-random", "unified-random-shrinking"
    return dict(zip(names, np.max(found, axis=0), strict=True)), {}


def second_half(losses: np.ndarray) -> np.ndarray:
    """Return how far ln(loss) falls in the second half, relative to the first: 1 if linear."""
    logs = np.log(losses[..., [0, losses.shape[-1] // 2, -1]])
    return (logs[..., 1] - logs[..., 2]) / (logs[..., 0] - logs[..., 1])


def polyak(args: argparse.Namespace, advance: Callable[[], Any]) -> tuple[Values, Rows]:
    """Take the step size from the loss, on quadratics."""
    strong, convex = np.geomspace(0.1, 1, SIZE), np.arange(1.0, 101) ** -2
    forms: dict[str, dict[str, Any]] = {
        "": {},
        "-unnormalized": {"lam": 0.0},
        "-shrinking": {"rho": lambda count: 0.1 / (count + 1)},
    }
    values = {}
    with jax.enable_x64(True):
        for name, form in forms.items():
            numbers: dict[str, Any] = {"rho": 0.1, "max_learning_rate": 100.0, "weight_decay": 0.0}
            tx = samx.sam_polyak(**numbers | form)

            def of(eigenvalues, steps, tx=tx):
                def one(seed):
                    start = jax.random.normal(jax.random.key(seed), eigenvalues.shape)
                    problem = function(lambda x: 0.5 * jnp.sum(eigenvalues * x**2), start)
                    return descend(tx, problem, steps, measure=excess)

                return vmapped(one, args.seeds)

            values[f"polyak-strong{name}"] = second_half(of(strong, 300))
            values[f"polyak-convex{name}"] = late_power(of(convex, 2000))
            advance()
    return values, {}


# Larger batches


def steps_until(squares: np.ndarray, limit: float, every: int) -> np.ndarray:
    """Return after how many steps the last fifth of them has a small mean square; else infinity."""
    total = np.concatenate([np.zeros((*squares.shape[:-1], 1)), squares.cumsum(-1)], axis=-1)
    now = np.arange(1, squares.shape[-1] + 1)
    before = (0.8 * now).astype(int)
    hit = (total[..., now] - total[..., before]) / (now - before) <= limit**2
    return np.where(hit.any(-1), every * (1.0 + hit.argmax(-1)), np.inf)


def batches(args: argparse.Namespace, advance: Callable[[], Any]) -> tuple[Values, Rows]:
    """Let AdaSAM descend with larger batches; each has the learning rate that needs fewest steps.

    The rate is chosen with as many other seeds. Who never gets there counts with all steps.
    """
    rates, every = 10.0 ** np.arange(-3, -1.2, 0.25), 10
    limits = {"adasam-small": 0.015, "adasam-large": 0.05}
    steps: dict[str, list[Any]] = {name: [] for name in limits}
    for batch in BATCHES:
        count = int(5 * STEPS / batch**0.5) // every * every

        def one(seed, rate, batch=batch, count=count):
            problem = logistic(seed, size=5, examples=100)
            tx = samx.adasam(rate, 0.05)
            return descend(tx, problem, count, every=every, batch=batch, seed=seed)

        seen = vmapped(one, 2 * args.seeds, rates) ** 2
        for name, limit in limits.items():
            needed = steps_until(seen, limit, every)  # [seeds, rates]
            best = np.log(needed[args.seeds :]).mean(0).argmin()
            steps[name].append(np.minimum(needed[: args.seeds, best], count))
        advance()
    needed = {name: np.stack(found, axis=-1) for name, found in steps.items()}
    values = {name: power(BATCHES, found) for name, found in needed.items()}
    return values, {"steps": {name: found.mean(0).tolist() for name, found in needed.items()}}


# Stability and saddles

FORMS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "SGD": lambda rho: optax.identity(),
    "SAM": samx.sam,
    "USAM": samx.usam,
    "Stable SAM": samx.stable_sam,
    "Stable SAM, ball": lambda rho: samx.stable_sam(rho, normalize=True),
    "Monge SAM": samx.monge_sam,
}


def stable(args: argparse.Namespace, advance: Callable[[], Any]) -> tuple[Values, Rows]:
    """Find the largest learning rate at which a quadratic with top eigenvalue 1 stays bounded."""
    shares, limits = np.geomspace(0.1, 1.2, 60), {}  # of 2, which is SGD's limit

    with jax.enable_x64(True):
        for name in ("SGD", "SAM", "USAM", "Stable SAM", "Stable SAM, ball"):

            def one(seed, share, name=name):
                keys = jax.random.split(jax.random.key(seed))
                eigenvalues = jax.random.uniform(keys[0], (SIZE,), minval=0.1).at[0].set(1.0)
                start = jax.random.normal(keys[1], (SIZE,))
                problem = function(lambda x: 0.5 * jnp.sum(eigenvalues * x**2), start)
                tx = optax.chain(FORMS[name](1.0), optax.sgd(2 * share))
                return descend(tx, problem, STEPS // 2, every=STEPS // 20, measure=distance)

            found = vmapped(one, args.seeds, shares)
            is_bounded = found[..., -1] < 10 * found[..., 0]  # NaN is not
            limits[name] = shares[is_bounded.sum(-1) - 1]
            advance()
    values = {
        "stable-limit": limits["Stable SAM"] / limits["USAM"],
        "usam-limit": limits["USAM"] / limits["SGD"],
        "stable-ball-limit": limits["Stable SAM, ball"] / limits["SAM"],
    }
    return values, {"limits": {name: float(2 * found.mean()) for name, found in limits.items()}}


def saddle(args: argparse.Namespace, advance: Callable[[], Any]) -> tuple[Values, Rows]:
    """Start near a saddle, and see who leaves it; the numbers are paired by start."""
    steps, left = 3000, {}

    def one(seed, rho, steepness, name):
        keys = jax.random.split(jax.random.key(seed))
        direction = jax.random.normal(keys[0], (2,))
        radius = 10 ** jax.random.uniform(keys[1], minval=-3, maxval=0)
        start = radius * direction / jnp.linalg.norm(direction)
        problem = function(lambda x: steepness * (x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4), start)
        tx = optax.chain(FORMS[name](rho), optax.sgd(0.05 / steepness))
        return descend(tx, problem, steps, every=10, measure=lambda problem, x: jnp.abs(x[1]))

    with jax.enable_x64(True):
        for name in FORMS:
            here = functools.partial(one, name=name)
            found = vmapped(here, 5 * args.seeds, (0.03, 0.1, 0.3), STEEPNESSES)
            share = (found > 1).any(-1).mean(1)
            left |= {(name, steep): share[:, at] for at, steep in enumerate(STEEPNESSES)}
            advance()

    def over_sam(name, steepness):
        return left[name, steepness] - left["SAM", steepness]

    values = {
        "stable-saddle": over_sam("Stable SAM", 1.0),
        "usam-saddle": over_sam("USAM", 1.0),
        "stable-ball-saddle": over_sam("Stable SAM, ball", 1.0),
        "stable-saddle-steep": over_sam("Stable SAM", 30.0),
        "monge-saddle": over_sam("Monge SAM", 1.0),
        "monge-saddle-steep": over_sam("Monge SAM", 30.0),
    }
    return values, {"left": {f"{n}, {s:g}": float(found.mean()) for (n, s), found in left.items()}}


# On the digits

ARMS = {
    "base": VARIANTS["base"],
    "sam": VARIANTS["sam"],
    "sampa": VARIANTS["sampa-separate"],
    "optsam": Variant(in_front(opt_sam), RADIUS, 1, 0.05),
    "optsam, next batch": Variant(
        in_front(functools.partial(opt_sam, on_this_batch=True)), RADIUS, 2, 0.05
    ),
}


def digits(args: argparse.Namespace, advance: Callable[[], Any]) -> tuple[Values, Rows]:
    """Train both readings of OptSAM on the digits, and what they are compared with."""
    settings = argparse.Namespace(
        base="momentum", width=WIDTH, epochs=EPOCHS, seeds=args.seeds, rho=None
    )
    results = arms.train_arms(ARMS, settings, list(LABELS))
    advance()
    values = {}
    for noise, labels in LABELS.items():
        points = {name: arms.points(results, name, noise) for name in ARMS}
        values[f"optsam-digits, {labels}"] = points["optsam"] - points["base"]
        values[f"optsam-next-digits, {labels}"] = points["optsam, next batch"] - points["base"]
        values[f"optsam-below-sam, {labels}"] = points["optsam"] - points["sam"]
        values[f"optsam-next-below-sam, {labels}"] = points["optsam, next batch"] - points["sam"]
        values[f"sampa-digits, {labels}"] = points["sampa"] - points["sam"]
    return values, {"trainings": results}


MAP = {
    "USAM": VARIANTS["usam"],
    "Stable SAM": VARIANTS["stable-sam"],
    "SAM": VARIANTS["sam"],
    "Stable SAM, ball": Variant(of("stable_sam", normalize=True), RADIUS, 2, 0.05),
}


def mapped(args: argparse.Namespace, advance: Callable[[], Any]) -> tuple[Values, Rows]:
    """Train at all learning rates and radii, with wrong labels."""
    seeds, noise, accuracy = args.seeds, 0.3, {}
    pairs = [(rate, rho) for rate in MAP_RATES for rho in MAP_RHOS]
    for name, variant in MAP.items():
        trainer = make_trainer(variant, "momentum", WIDTH, EPOCHS)

        def of_run(run, trainer=trainer):
            images, _, test = data_of(int(run.seed), noise)
            trained = train_run(trainer, start_of(int(run.seed), WIDTH), run, images, EPOCHS)
            return trainer.accuracy(trained.params, test)

        found = map_runs(of_run, Runs(*runs_of(range(seeds), pairs)), advance=lambda count: None)
        accuracy[name] = 100 * np.reshape(found, (len(pairs), seeds))
        advance()
    best = max(found.mean(1).max() for found in accuracy.values())
    values = {}
    for label, low in (("map", best - GOOD), ("map-learns", LEARNED)):
        shares = {name: (found > low).mean(0) for name, found in accuracy.items()}
        values[f"stable-{label}"] = shares["Stable SAM"] - shares["USAM"]
        values[f"stable-ball-{label}"] = shares["Stable SAM, ball"] - shares["SAM"]
    rows = {name: found.tolist() for name, found in accuracy.items()}
    return values, {"pairs": pairs, "accuracy": rows}


MEASURES: Mapping[str, tuple[Callable[..., tuple[Values, Rows]], int]] = {
    "parallel": (parallel, len(PARALLEL)),
    "lightsam": (lightsam, len(LIGHT) + 2),
    "unified": (unified, len(SHARES)),
    "polyak": (polyak, 3),
    "batches": (batches, len(BATCHES)),
    "stable": (stable, 5),
    "saddle": (saddle, len(FORMS)),
    "digits": (digits, 1),
    "map": (mapped, len(MAP)),
}


def measure(args: argparse.Namespace) -> tuple[Values, dict[str, Rows]]:
    """Return the numbers of each claim, and what the figure needs, of the parts asked for."""
    values, rows = {}, {}
    total = sum(MEASURES[part][1] for part in args.parts)
    with tqdm(total=total, unit=" methods", disable=None) as bar:
        for part in args.parts:
            bar.set_description(part)
            found, rows[part] = MEASURES[part][0](args, bar.update)
            values |= {name: np.asarray(each, float).tolist() for name, each in found.items()}
    return values, rows


def binned(curve: np.ndarray, parts: int = 60) -> np.ndarray:
    """Return steps and means of parts of a curve that are equally long on a logarithmic axis."""
    ends = np.unique(np.geomspace(1, len(curve) + 1, parts).astype(int))
    means = [curve[a - 1 : b - 1].mean() for a, b in itertools.pairwise(ends)]
    return np.stack([np.sqrt(ends[:-1] * ends[1:]), means])


def draw_distances(axes: Any, rows: dict[str, Rows]) -> None:
    """Draw how far from the minimum of |x|² each method stays, over the constant rate."""
    for name, found in rows["parallel"]["distances"].items():
        color = COLORS[name]
        axes.loglog(rows["parallel"]["rates"], found, "o-", color=color, label=name)
    axes.set(xlabel="constant learning rate", ylabel="distance from the minimum of |x|²")
    found = {name: np.log(each) for name, each in rows["parallel"]["distances"].items()}
    farther = np.exp(np.mean(found["OptSAM"] - found["SAM"]))
    axes.set_title(f"constant rate: OptSAM stays {farther:.1f} times as far away as SAM")
    figures.label_ends(axes)


def draw_curves(axes: Any, rows: dict[str, Rows]) -> None:
    """Draw the norm of the gradient over the steps, with rates that fall."""
    for name, found in rows["parallel"]["curves"].items():
        axes.loglog(*found, color=COLORS[name], label=name)
    axes.set(xlabel="step", ylabel="norm of the gradient of |x|²")
    powers = rows["parallel"]["powers"]
    sam, opt = (powers[f"{name}, |x|²"][-1] for name in ("SAM", "OptSAM"))
    axes.set_title(f"rate {FALLING:g} / √t: SAM falls as t^{sam:.2f}, OptSAM as t^{opt:.2f}")
    figures.label_ends(axes)


def draw_lightsam(axes: Any, rows: dict[str, Rows]) -> None:
    """Draw the mean squared gradient of the worst pair over the number of steps."""
    names = {
        "lightsam_norm": ("LightSAM-I", figures.BLUE),
        "lightsam_adagrad": ("LightSAM-II", figures.GREEN),
        "lightsam_adam": ("LightSAM-III", figures.RED),
        "lightsam_adam, both": ("III, η, ρ ~ 1/√T", figures.ORANGE),
        "sam": ("SAM", figures.GREY),
    }
    for name, (label, color) in names.items():
        axes.loglog(HORIZONS, rows["lightsam"]["worst"][name], "o-", color=color, label=label)
    axes.set(xlabel="steps T", ylabel="mean squared gradient")
    worst = {name: power(HORIZONS, np.array(rows["lightsam"]["worst"][name])) for name in names}
    axes.set_title(
        f"worst rate and radius: LightSAM-I falls as T^{worst['lightsam_norm']:.2f}, III as "
        f"T^{worst['lightsam_adam']:.2f}"
    )
    figures.label_ends(axes)


def draw_saddle(axes: Any, rows: dict[str, Rows]) -> None:
    """Draw the share of starts that leave the saddle, at both steepnesses."""
    left, names = rows["saddle"]["left"], list(FORMS)[::-1]
    for offset, (steepness, color) in enumerate((("1", figures.BLUE), ("30", figures.ORANGE))):
        shares = [100 * left[f"{name}, {steepness}"] for name in names]
        places = np.arange(len(names)) + 0.2 - 0.4 * offset
        axes.barh(places, shares, 0.38, color=color)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="starts that leave the saddle, %", xlim=(0, 100))
    gentle, steep = (100 * left[f"Stable SAM, {steepness}"] for steepness in ("1", "30"))
    axes.set_title(
        f"Stable SAM leaves from {gentle:.0f}% of the starts (blue), from {steep:.0f}% where the "
        "loss is 30 times as steep (orange)"
    )


COLORS = dict(zip(PARALLEL, (figures.GREY, *figures.COLORS), strict=False))
PANELS = {
    "parallel": (draw_distances, draw_curves),
    "lightsam": (draw_lightsam,),
    "saddle": (draw_saddle,),
}


def draw(rows: dict[str, Rows], path: Path) -> None:
    """Draw the panels of the parts that ran, two side by side."""
    panels = [panel for part in PANELS if part in rows for panel in PANELS[part]]
    lines = -(-len(panels) // 2)
    figure = figures.make_figure(2, [figures.height_of()] * lines)
    grid = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes, rows)
    for axes in grid[len(panels) :]:
        axes.remove()
    figures.save(figure, path)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    values, rows = measure(args)
    found = found_of({name: CLAIMS[name] for name in CLAIMS if name in values}, values)
    print_claims(found)
    save(report, NAME, found, values, rows=rows)
    plots = [f"{NAME}.png"] if PANELS.keys() & rows.keys() else []
    for plot in plots:
        draw(rows, args.folder / plot)
    report.end(*plots)
    return found


if __name__ == "__main__":
    main()
