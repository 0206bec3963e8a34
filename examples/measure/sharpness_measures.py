"""What sharpness.py measures: the programs that run, and the rows of its table.

A program is a function `(problem, params) -> {name: array}`. It compiles once for all checkpoints.
"""

import argparse
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from examples.common.training import data_of, make_functions
from samx import perturbations, sharpness

OPERATORS = {
    "hessian": "Hessian",
    "ggn": "Gauss-Newton",
    "empirical_fisher": "empirical Fisher",
}
SHARDS = (1, 4, 20, 250, 500, 1000)  # examples that one step of SAM sees, for m-sharpness
BATCH = 100  # that of training
ALPHAS = np.linspace(-1, 1, 21)
GRID, WIDTH = 500, 0.008  # points of the density, and its smoothing: a share of the grid's length
POINTS = 21  # on the line between two checkpoints
ADAPTIVE = perturbations.magnitude(0.0, is_scaled=lambda path, leaf: True)  # |w|, biases included
NEAR = 0.01  # a restart has found the maximum if it is that close to the best one

Result = dict[str, Any]
Program = Callable[["Problem", Any], Result]


class Problem(NamedTuple):
    """The loss that is measured, the test images, and the eigenvalues where a density is wanted."""

    train: sharpness.Objective
    test: dict[str, jax.Array]
    grid: jax.Array


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        program: The name of the program.
        title: The title of the row.
        value: Which of the program's numbers is shown.
        error: Which one is its standard error or error bound, if any.
        is_flatness: Whether a lower value means flatter.
        factor: The value is shown times this.
    """

    program: str
    title: str
    value: str = "value"
    error: str = "error"
    is_flatness: bool = True
    factor: float = 1.0


def problem_of(args: argparse.Namespace) -> Problem:
    """Return the loss over all training images, in batches.

    The images are shuffled: the wrong labels stand first, and m-sharpness takes neighbours
    together.
    """
    images, _, test = data_of(args.seed, args.noise)
    order = np.random.default_rng(0).permutation(len(images["y"]))
    logits = make_functions(args.width).logits
    train = sharpness.objective(
        apply_fn=lambda params, batch: logits(params, batch["x"]),
        loss_on_logits=cross_entropy,
        batch={name: jnp.asarray(images[name])[order] for name in ("x", "y")},
        num_batches=args.batches,
    )
    return Problem(train, jax.device_put(test), jnp.zeros(GRID))


def cross_entropy(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def balls(args: argparse.Namespace) -> dict[str, Any]:
    """Return the perturbations by their names."""
    found = {f"L2, ρ = {rho:g}": perturbations.metric_ball(rho) for rho in args.l2}
    found |= {
        f"adaptive L2, ρ = {rho:g}": perturbations.metric_ball(rho, ADAPTIVE)
        for rho in args.adaptive
    }
    return found | {f"L∞, ρ = {rho:g}": perturbations.linf_ball(rho) for rho in args.linf}


def basics(problem: Problem, params: Any) -> Result:
    """Return losses, accuracies, the length of the gradient, and the largest eigenvalue."""
    train, test = problem.train, problem.test
    found = {}
    for name, data in (("train", train.batch), ("test", test)):
        logits = train.apply_fn(params, data)  # type: ignore[misc]
        losses, is_right = cross_entropy(logits, data), logits.argmax(-1) == data["y"]
        size = len(losses)
        found |= {name: losses.mean(), f"{name}_error": jnp.std(losses) / size**0.5}
        found |= {f"{name}_accuracy": is_right.mean()}
        found |= {f"{name}_accuracy_error": jnp.std(is_right) / size**0.5}
    top = sharpness.extreme_eigenvalue(train, params).values[0]
    return {**found, "grad_norm": optax.tree.norm(jax.grad(train)(params)), "top": top}


def top_eigenvalues(operator: Any, problem: Problem, params: Any) -> Result:
    f = problem.train
    found = sharpness.eigenvalues(f, params, operator=operator)
    share = jnp.sum(sharpness.alignment(found.vectors, jax.grad(f)(params)))
    first = {"value": found.values[0], "error": found.residuals[0], "share": share}
    last = {"fifth": found.values[-1], "fifth_error": found.residuals[-1]}
    return {**first, **last, "values": found.values, "residuals": found.residuals}


def bottom_eigenvalue(problem: Problem, params: Any) -> Result:
    found = sharpness.eigenvalues(problem.train, params, k=1, which="bottom", iterations=40)
    return {"value": found.values[0], "error": found.residuals[0]}


def estimate(measure: Callable[..., Any], *args: Any, **keywords: Any) -> Program:
    """Return the program of a measure that gives an `Estimate`."""

    def program(problem, params):
        found = measure(problem.train, params, *args, **keywords)
        return {"value": found.mean, "error": found.stderr}

    return program


def single(measure: Callable[..., jax.Array], *args: Any, **keywords: Any) -> Program:
    """Return the program of a measure that is one number."""
    return lambda problem, params: {"value": measure(problem.train, params, *args, **keywords)}


def smoothed_rise(sigma: float, draws: int, problem: Problem, params: Any) -> Result:
    found = sharpness.smoothed(problem.train, params, sigma, draws=draws)
    return {"value": found.mean - problem.train(params), "error": found.stderr}


def worst_case(perturbation: Any, args: argparse.Namespace, problem: Problem, params: Any):
    found = sharpness.worst_case(
        problem.train, params, perturbation, steps=args.steps, restarts=args.restarts
    )
    agree = jnp.mean(found.per_restart >= (1 - NEAR) * found.value)
    several = {"per_restart": found.per_restart, "stationarity": found.stationarity}
    return {"value": found.value, "agree": agree, **several}


def density(draws: int, problem: Problem, params: Any) -> Result:
    sigma = WIDTH * (problem.grid[-1] - problem.grid[0])
    found = sharpness.density(problem.train, params, problem.grid, sigma=sigma, draws=draws)
    return {"grid": problem.grid, "density": found.mean, "density_error": found.stderr}


def along_gradient(problem: Problem, params: Any) -> Result:
    g = jax.grad(problem.train)(params)
    return {"value": sharpness.directional(problem.train, params, g)}


def last_kernel(path: Any, leaf: Any) -> bool:
    return "head" in jax.tree_util.keystr(path) and leaf.ndim == 2


def sam_gradient(perturbation: Any, problem: Problem, params: Any) -> Result:
    return {"value": sharpness.exact_sam_gradient(problem.train, params, perturbation).cosine}


def random_direction(seed: int, params: Any) -> Any:
    """Return a random direction whose columns are as long as those of the kernels."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draws = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return sharpness.filter_normalize(structure.unflatten(draws), params)


def line(problem: Problem, params: Any) -> Result:
    losses = sharpness.slice_1d(problem.train, params, random_direction(0, params), ALPHAS)
    middle, quarter = len(ALPHAS) // 2, len(ALPHAS) // 4
    rise = (losses[quarter] + losses[-1 - quarter]) / 2 - losses[middle]
    return {"value": rise, "losses": losses}


def plane(problem: Problem, params: Any) -> Result:
    directions = [random_direction(seed, params) for seed in (0, 1)]
    return {"losses": sharpness.slice_2d(problem.train, params, directions, ALPHAS, ALPHAS)}


def barrier(problem: Problem, pair: Any) -> Result:
    found = sharpness.barrier(problem.train, *pair, points=POINTS)
    return {"value": found.height, "t": found.t, "losses": found.losses}


def shards_of(args: argparse.Namespace) -> list[int]:
    """Return the sizes of shards, with that of the batches of training."""
    size = len(data_of(args.seed, args.noise)[0]["y"])
    return sorted({min(m, size) for m in (*SHARDS, BATCH)})


def programs_of(args: argparse.Namespace) -> dict[str, Program]:
    """Return the programs of the chosen measures, by name; the slow ones first."""
    draws, named = {"draws": args.draws}, balls(args)
    sam_ball = perturbations.metric_ball(args.l2[0])
    of_measure: dict[str, dict[str, Program]] = {
        "worst-case": {
            f"worst case, {name}": partial(worst_case, ball, args) for name, ball in named.items()
        },
        "density": {"density": partial(density, max(2, args.draws // 10))},
        "trace": {
            f"trace, {operator}": estimate(sharpness.trace, operator=operator, **draws)
            for operator in OPERATORS
        },
        "frobenius": {"frobenius": estimate(sharpness.frobenius, **draws)},
        "eigenvalues": {
            f"eigenvalues, {operator}": partial(top_eigenvalues, operator) for operator in OPERATORS
        }
        | {"bottom eigenvalue": bottom_eigenvalue},
        "relative-flatness": {
            "relative flatness": estimate(sharpness.relative_flatness, last_kernel)
        },
        "average-case": {
            "average case": estimate(sharpness.average_case, args.sigma, **draws),
            "average case, adaptive": estimate(
                sharpness.average_case, args.adaptive_sigma, metric=ADAPTIVE, **draws
            ),
        },
        "smoothed": {"smoothed": partial(smoothed_rise, args.sigma, args.draws)},
        "first-order": {
            f"first order, {name}": single(sharpness.first_order, ball)
            for name, ball in named.items()
        },
        "m-sharpness": {
            f"m-sharpness, {m}": single(sharpness.m_sharpness, sam_ball, shard_size=m)
            for m in shards_of(args)
        },
        "directional": {"directional": along_gradient},
        "sam-gradient": {"sam gradient": partial(sam_gradient, sam_ball)},
        "slice": {"slice": line},
        "plane": {"plane": plane},
    }
    return {
        name: program
        for measure, programs in of_measure.items()
        if measure in args.measures
        for name, program in programs.items()
    }


def rows_of(args: argparse.Namespace) -> list[Row]:
    """Return the rows of the table, those of measures that were not chosen included."""
    radius = f"ρ = {args.l2[0]:g}"
    rows = [
        reading("basics", "test accuracy, %", "test_accuracy", "test_accuracy_error", 100),
        reading("basics", "test loss", "test", "test_error"),
        reading("basics", "training accuracy, %", "train_accuracy", factor=100),
        reading("basics", "training loss", "train"),
        reading("basics", "length of its gradient", "grad_norm"),
    ]
    for operator, title in OPERATORS.items():
        rows.append(Row(f"eigenvalues, {operator}", f"largest eigenvalue, {title}"))
    hessian, share = "eigenvalues, hessian", "gradient² along the top five eigenvectors, %"
    rows += [
        Row(hessian, "fifth largest eigenvalue, Hessian", "fifth", "fifth_error"),
        reading("bottom eigenvalue", "smallest eigenvalue, Hessian", error="error"),
    ]
    for operator, title in OPERATORS.items():
        rows.append(Row(f"trace, {operator}", f"trace, {title}"))
    rows += [
        Row("frobenius", "sum of squared eigenvalues, Hessian"),
        Row("directional", "curvature along the gradient"),
        reading(hessian, share, "share", factor=100),
        Row("relative flatness", "relative flatness, last kernel"),
    ]
    for name in balls(args):
        worst = f"worst case, {name}"
        rows += [
            Row(f"first order, {name}", f"one step of SAM on all images, {name}"),
            Row(worst, worst),
            reading(worst, f"  ascents within {NEAR:.0%} of it, %", "agree", factor=100),
            reading(worst, "  its stationarity", "stationarity"),
        ]
    for m in shards_of(args)[:-1]:
        title = f"one step of SAM on every {m} images, {radius}" if m > 1 else ""
        rows.append(Row(f"m-sharpness, {m}", title or f"one step of SAM on every image, {radius}"))
    return [
        *rows,
        Row("average case", f"average case, normal noise, σ = {args.sigma:g}"),
        Row("average case, adaptive", f"average case, noise of {args.adaptive_sigma:.0%} of |w|"),
        Row("smoothed", f"smoothed loss, σ = {args.sigma:g}"),
        Row("slice", "random direction of half the length of w"),
        reading("sam gradient", f"cosine of SAM's and the exact gradient, {radius}"),
    ]


def reading(
    program: str, title: str, value: str = "value", error: str = "", factor: float = 1.0
) -> Row:
    """Return a row that is no measure of flatness."""
    return Row(program, title, value, error, False, factor)


def number_of(measured: dict[str, Result], row: Row) -> tuple[float, float]:
    """Return the value of a row, and its error; an error that there is not is 0."""
    result = measured[row.program]
    return row.factor * result[row.value], row.factor * result.get(row.error, 0.0)


def run_all(
    programs: dict[str, Program], problem: Problem, params: dict[Any, Any], bar: tqdm
) -> dict[Any, dict[str, Result]]:
    """Run every program on every set of parameters; one program for each core at a time."""
    found: dict[Any, dict[str, Result]] = {name: {} for name in params}

    def run(name: str) -> None:
        lowered = jax.jit(programs[name]).lower(problem, next(iter(params.values())))
        compiled = lowered.compile()
        for checkpoint, values in params.items():
            result = jax.device_get(compiled(problem, values))
            found[checkpoint][name] = jax.tree.map(lambda x: np.asarray(x).tolist(), result)
            bar.update()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for _ in pool.map(run, programs):
                pass
        finally:  # an error or an interrupt does not wait for the programs that have not begun
            pool.shutdown(cancel_futures=True)
    return {
        checkpoint: {name: results[name] for name in programs}
        for checkpoint, results in found.items()
    }


def grid_of(tops: Iterable[float]) -> jax.Array:
    """Return the eigenvalues at which densities are wanted, for all checkpoints the same."""
    largest = max(tops)
    return jnp.linspace(-0.2 * largest, 1.1 * largest, GRID)
