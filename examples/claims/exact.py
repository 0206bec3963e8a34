"""Claims that are mathematics: invariances, bounds and limits, checked in float64.

    python examples/claims/exact.py

Nothing is trained. The problem is a small network with random weights and 64 random examples. Each
claim of a paper becomes a number that the claim fixes, such as the change of a step when the same
function is written with other weights. The seeds draw weights and examples.

The script prints each claim with its number and the verdict, and writes results.json and exact.png
to --out. It takes about half a minute.
"""

import argparse

from examples.common import arguments

NAME = "exact"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "seeds", high=1000)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import samx
from examples.claims.claim import COLORS, Claim, Found, found_of, print_claims, save
from examples.common import figures, files
from examples.common.output import choose_folder
from examples.common.report import Report
from samx import perturbations

LEAST = 1e-17  # what is smaller is drawn here
ROUNDING = 1e-8  # what is smaller is 0 in float64; some norms have an epsilon of 1e-12
SCALES = (0.1, 1.0, 10.0)
RHO = 0.3

# What the claims say, and which numbers agree with them.
CLAIMS = {
    "asam-invariance": Claim(
        ("asam",),
        "The step does not depend on scales of the weights that leave the function unchanged.",
        "title and abstract",
        "largest change of the logits at the perturbed weights, when one layer of a ReLU network "
        "is multiplied by 0.1 or 10 and the next one divided by it, relative to SAM's",
        high=ROUNDING,
        why="with eta=0 and every tensor scaled",
    ),
    "asam-invariance-by-default": Claim(
        ("asam",),
        "The step does not depend on such scales, with the settings of the authors' code.",
        "authors' code",
        "change of the logits, as above, relative to SAM's",
        high=ROUNDING,
        why="eta=0.01 is added to every weight, for stability",
    ),
    "monge-invariance": Claim(
        ("monge_sam",),
        "The method is invariant to reparameterization.",
        "abstract",
        "change of the step in w when w = 10 u and u is trained, relative to the step",
        high=ROUNDING,
        why="the published closed form has the metric I + g gᵀ in the coordinates that are "
        "trained; only the transported metric would be invariant",
    ),
    "monge-metric": Claim(
        ("monge_sam",),
        "The length of a step on the graph of the loss does not depend on the coordinates.",
        "abstract",
        "change of the step when u is trained, with the metric of the graph over w expressed in u",
        high=ROUNDING,
    ),
    "le-sam-rise": Claim(
        ("le_sam",),
        "To first order, the loss rises by the same σ wherever the step begins.",
        "abstract",
        "largest |⟨∇L(w), ε⟩ / σ − 1| where the radius is below its limit",
        high=ROUNDING,
    ),
    "bisam-tanh": Claim(
        ("bisam",),
        "The tanh loss is a lower bound of the classification error.",
        "abstract",
        "largest excess over the error of an example, over random logits; mu = 10",
        high=ROUNDING,
        why="the smooth maximum adds up to log(classes) / mu to the bound",
    ),
    "bisam-log": Claim(
        ("bisam",),
        "The logarithmic loss is a lower bound of the classification error.",
        "abstract",
        "largest excess over the error of an example, over random logits; mu = 1",
        high=ROUNDING,
        why="the smooth maximum adds up to log(classes) / mu to the bound",
    ),
    "gsam-fixed": Claim(
        ("gsam",),
        "The step along the orthogonal part does not change the perturbed loss to first order.",
        "section 4",
        "power of the step's length with which L(w + ε) changes, ε held fixed",
        low=1.9,
        high=2.1,
    ),
    "gsam-moving": Claim(
        ("gsam",),
        "The step does not change the perturbed loss, where ε follows w, as in training.",
        "section 4",
        "power of the step's length with which L(w + ε(w)) changes",
        low=1.9,
        high=2.1,
        why="the derivative of ε is left out of SAM's gradient, and so of the argument",
    ),
    "gnp-sam": Claim(
        ("gnp",),
        "SAM is the special case alpha = 1.",
        "abstract",
        "difference to SAM's gradient, relative to it",
        high=ROUNDING,
    ),
    "wsam-sam": Claim(
        ("coupled_wsam",),
        "SAM is the special case γ = 1/2.",
        "section 3",
        "difference to SAM's gradient, relative to it",
        high=ROUNDING,
    ),
    "unified-limits": Claim(
        ("unified_sam",),
        "λ = 0 is the un-normalized SAM, λ = 1 is SAM.",
        "abstract",
        "largest difference to the two, relative to them",
        high=ROUNDING,
    ),
    "stable-length": Claim(
        ("stable_sam",),
        "The sharp gradient gets the length of the gradient.",
        "abstract",
        "largest |length of the update / length of the gradient − 1|",
        high=ROUNDING,
    ),
}


class Problem(NamedTuple):
    """A network with random weights, and its loss."""

    params: Any
    logits: Callable[[Any], jax.Array]
    loss: Callable[[Any], jax.Array]


def problem_of(seed: int) -> Problem:
    """Return a ReLU network without biases, 5-16-3, with 64 examples."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "first": jax.random.normal(keys[0], (5, 16)) / np.sqrt(5),
        "second": jax.random.normal(keys[1], (16, 3)) / 4,
    }
    x, y = jax.random.normal(keys[2], (64, 5)), jax.random.randint(keys[3], (64,), 0, 3)

    def logits(params):
        return jax.nn.relu(x @ params["first"]) @ params["second"]

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params), y).mean()

    return Problem(params, logits, loss)


def update_of(tx: Any, loss: Any, params: Any, **extra: Any) -> Any:
    """Return what a transformation makes of the gradient, and its state."""
    g = jax.grad(loss)(params)
    return tx.update(g, tx.init(params), params, value_fn=loss, value=loss(params), **extra)


def epsilon_of(perturbation: Any, loss: Any, params: Any) -> Any:
    """Return the step ε of a perturbation."""
    g = jax.grad(loss)(params)
    return perturbation.update(g, perturbation.init(params), params, value_fn=loss)[0]


def relative(one: Any, other: Any) -> float:
    """Return ‖one − other‖ / ‖other‖."""
    return float(optax.tree.norm(optax.tree.sub(one, other)) / optax.tree.norm(other))


def rescaled(params: Any, scale: float) -> Any:
    """Return other weights of the same function."""
    return {"first": scale * params["first"], "second": params["second"] / scale}


def change_by_scale(perturbation: Any, problem: Problem) -> float:
    """Return the largest change of the logits at the perturbed weights, when layers are scaled."""
    found = []
    for scale in SCALES:
        params = rescaled(problem.params, scale)
        eps = epsilon_of(perturbation, problem.loss, params)
        found.append(problem.logits(optax.tree.add(params, eps)))
    return max(float(jnp.abs(one - found[1]).max()) for one in found)


def asam(problem: Problem) -> dict[str, float]:
    """Scale the layers of a ReLU network against each other."""
    everything = {"is_scaled": lambda path, leaf: True}
    of_sam = change_by_scale(perturbations.metric_ball(RHO), problem)
    exact = perturbations.metric_ball(RHO, perturbations.magnitude(0.0, **everything))
    default = perturbations.metric_ball(RHO, perturbations.magnitude(0.01, **everything))
    return {
        "asam-invariance": change_by_scale(exact, problem) / of_sam,
        "asam-invariance-by-default": change_by_scale(default, problem) / of_sam,
    }


def monge(problem: Problem) -> dict[str, float]:
    """Train w, or u with w = 10 u."""
    scale, params = 10.0, problem.params
    inner = optax.tree.scale(1 / scale, params)

    def loss(u):
        return problem.loss(optax.tree.scale(scale, u))

    ball = perturbations.monge_ball(RHO)
    wanted = epsilon_of(ball, problem.loss, params)
    published = optax.tree.scale(scale, epsilon_of(ball, loss, inner))
    # The metric over w in the coordinates u is scale² I + g_u g_uᵀ.
    g = jax.grad(loss)(inner)
    square = optax.tree.norm(g, squared=True)
    length = jnp.sqrt(square) / scale * jnp.sqrt(1 + square / scale**2)
    transported = optax.tree.scale(scale * RHO / length / scale**2, g)
    return {
        "monge-invariance": relative(published, wanted),
        "monge-metric": relative(transported, wanted),
    }


def le_sam(problem: Problem) -> dict[str, float]:
    """Climb from points with gradients of many lengths."""
    ball, found = perturbations.loss_rise_ball(RHO, None), []
    for scale in SCALES:
        params = optax.tree.scale(scale, problem.params)
        g = jax.grad(problem.loss)(params)
        rise = jnp.asarray(optax.tree.vdot(g, epsilon_of(ball, problem.loss, params)))
        found.append(abs(float(rise) / RHO - 1))
    return {"le-sam-rise": max(found)}


def bisam(seed: int) -> dict[str, float]:
    """Compare both bounds with the error of examples, right and wrong ones."""
    logits = 3 * jax.random.normal(jax.random.key(seed), (10_000, 3))
    labels = jnp.zeros(len(logits), int)
    is_wrong = logits.argmax(axis=1) != 0
    bounds = {
        "bisam-tanh": samx.losses.tanh_lower_bound(logits, labels),
        "bisam-log": samx.losses.log_lower_bound(logits, labels),
    }
    return {name: float((bound - is_wrong).max()) for name, bound in bounds.items()}


def gsam(problem: Problem) -> dict[str, float]:
    """Go along the orthogonal part, and see how the perturbed loss changes."""
    params, loss = problem.params, problem.loss
    ball = perturbations.metric_ball(RHO)
    eps = epsilon_of(ball, loss, params)
    g, g_s = (jax.grad(loss)(point) for point in (params, optax.tree.add(params, eps)))
    along = optax.tree.vdot(g, g_s) / optax.tree.norm(g_s, squared=True)
    orthogonal = optax.tree.sub(g, optax.tree.scale(along, g_s))

    def fixed(params):
        return loss(optax.tree.add(params, eps))

    def moving(params):
        return fixed(optax.tree.add(params, optax.tree.sub(epsilon_of(ball, loss, params), eps)))

    lengths = np.array([1e-4, 1e-3])
    found = {}
    for name, f in (("gsam-fixed", fixed), ("gsam-moving", moving)):
        points = [optax.tree.add(params, optax.tree.scale(step, orthogonal)) for step in lengths]
        changes = np.abs([float(f(point) - f(params)) for point in points])
        found[name] = float(np.diff(np.log(changes))[0] / np.diff(np.log(lengths))[0])
    return found


def limits(problem: Problem) -> dict[str, float]:
    """Compare special cases."""

    def gradient(tx):
        return update_of(tx, problem.loss, problem.params)[0]

    sam, usam = gradient(samx.sam(RHO)), gradient(samx.usam(RHO))
    unified = [
        relative(gradient(samx.unified_sam(RHO, lam)), end)
        for lam, end in ((0.0, usam), (1.0, sam))
    ]
    stable = gradient(samx.stable_sam(RHO))
    g = jax.grad(problem.loss)(problem.params)
    return {
        "gnp-sam": relative(gradient(samx.gnp(RHO, 1.0)), sam),
        "wsam-sam": relative(gradient(samx.coupled_wsam(RHO, 0.5)), sam),
        "unified-limits": max(unified),
        "stable-length": abs(float(optax.tree.norm(stable) / optax.tree.norm(g)) - 1),
    }


def measure(seeds: int) -> dict[str, list[float]]:
    """Return the numbers of each claim, one for each seed."""
    values: dict[str, list[float]] = {name: [] for name in CLAIMS}
    with jax.enable_x64(True):
        for seed in range(seeds):
            problem = problem_of(seed)
            parts = asam, monge, le_sam, gsam, limits
            found = bisam(seed) | {
                name: value for part in parts for name, value in part(problem).items()
            }
            for name, value in found.items():
                values[name].append(value)
    return values


def draw(found: Sequence[Found], path: Path) -> None:
    """Draw the numbers that a claim wants to be 0, beside what counts as 0."""
    mine = [one for one in reversed(found) if one.claim.high == ROUNDING]
    figure = figures.make_figure(1.6, [figures.height_of(len(mine))])
    axes = figure.subplots()
    for position, one in enumerate(mine):
        number = max(one.number.value, LEAST)
        axes.plot(number, position, "o", color=COLORS[one.verdict])
    axes.axvline(ROUNDING, color="0.7", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_ylim(-0.7, len(mine) - 0.3)
    axes.set_yticks(range(len(mine)), [one.name for one in mine])
    axes.set_xlabel("number that the claim wants to be 0, in float64")
    axes.grid(axis="x", alpha=0.3)
    figures.save(figure, path, "Claims that are mathematics; left of the line: holds")


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    values = measure(args.seeds)
    found = found_of(CLAIMS, values)
    print_claims(found)
    save(report, NAME, found, values)
    draw(found, args.folder / "exact.png")
    report.end("exact.png")
    return found


if __name__ == "__main__":
    main()
