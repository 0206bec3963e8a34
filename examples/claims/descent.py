"""One loop for all methods on functions whose gradient is cheap, and two methods that fail there.

Scripts of claims on convergence share it. Learning rates, radii and seeds may be arrays of a
`jax.vmap`, so that one program runs all of them.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Problem(NamedTuple):
    """A mean over examples, and where the descent starts.

    Attributes:
        losses: `(x, examples) -> [examples]`.
        data: All examples.
        start: The first x.
    """

    losses: Callable[..., jax.Array]
    data: Any
    start: jax.Array

    def whole(self, x: jax.Array) -> jax.Array:
        """Return the loss of all examples."""
        return self.losses(x, self.data).mean()


def function(f: Callable[[jax.Array], jax.Array], start: jax.Array) -> Problem:
    """Return the problem of a function without examples."""
    return Problem(lambda x, examples: f(x) + 0 * examples, jnp.zeros(1, start.dtype), start)


def logistic(seed: jax.Array | int, size: int = 10, examples: int = 200) -> Problem:
    """Return logistic regression from x = 0; a tenth of the labels are wrong, so it has a minimum.

    The labels are those of a random direction.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (examples, size))
    margins = x @ jax.random.normal(keys[1], (size,))
    is_wrong = jax.random.uniform(keys[2], (examples,)) < 0.1
    signed = x * jnp.where((margins > 0) ^ is_wrong, 1.0, -1.0)[:, None]
    return Problem(lambda w, signed: jax.nn.softplus(-signed @ w), signed, jnp.zeros(size, x.dtype))


def descend(
    tx: optax.GradientTransformation,
    problem: Problem,
    steps: int,
    *,
    every: int = 1,
    batch: int | None = None,
    seed: jax.Array | int = 0,
    measure: Callable[[Problem, jax.Array], Any] | None = None,
) -> Any:
    """Descend, and measure before every so many steps.

    Args:
        tx: The method with its base optimizer.
        problem: What it descends.
        steps: Steps, a multiple of `every`.
        every: Steps from one measurement to the next.
        batch: Random examples of a step; default: all.
        seed: Seed of the batches.
        measure: What is measured of x; default: the norm of the gradient of the whole loss.

    Returns:
        What was measured, [steps / every, ...].
    """
    tx, measure = optax.with_extra_args_support(tx), measure or gradient_norm
    count = len(jax.tree.leaves(problem.data)[0])

    def step(carry, t):
        x, state = carry
        examples = problem.data
        if batch is not None:
            rows = jax.random.randint(
                jax.random.fold_in(jax.random.key(seed), t), (batch,), 0, count
            )
            examples = jax.tree.map(lambda leaf: leaf[rows], examples)

        def value_fn(x):
            return problem.losses(x, examples).mean()

        value, g = jax.value_and_grad(value_fn)(x)
        updates, state = tx.update(
            *(g, state, x),
            value=value,
            grad=g,
            value_fn=value_fn,
            losses_fn=problem.losses,
            batch=examples,
        )
        return (optax.apply_updates(x, updates), state), None

    def part(carry, index):
        seen = measure(problem, carry[0])
        return jax.lax.scan(step, carry, index * every + jnp.arange(every))[0], seen

    carry = problem.start, tx.init(problem.start)
    return jax.lax.scan(part, carry, jnp.arange(steps // every))[1]


def gradient_norm(problem: Problem, x: jax.Array) -> jax.Array:
    """Return the norm of the gradient of the whole loss."""
    return jnp.linalg.norm(jax.grad(problem.whole)(x))


def transformation(init: Any, update: Any) -> optax.GradientTransformationExtraArgs:
    """Return a transformation whose `update` needs `value_fn`."""
    return optax.GradientTransformationExtraArgs(init, update)


class OptSAMState(NamedTuple):
    """State of `opt_sam`: the last perturbed point, and the gradient there."""

    point: Any
    gradient: Any


def opt_sam(rho: Any, on_this_batch: bool = False) -> optax.GradientTransformationExtraArgs:
    """OptSAM in two readings: both gradients of a step are taken at one point, the perturbed one.

        x̃   = x + ρ a / ‖a‖
        return g_s = ∇L(x̃; B)
        a   = g_s, or ∇L(x̃; B′) on the next batch

    The paper's own equation was not readable. Without batches both readings are the same.

    Args:
        rho: Radius.
        on_this_batch: Whether the gradient that is climbed is that of the batch that is descended,
            at the old point; otherwise the last descent is climbed, and the first step climbs none.
    """

    def init_fn(params):
        return OptSAMState(params, optax.tree.zeros_like(params))

    def update_fn(_, state, params, *, value_fn, **keywords):
        del keywords
        climbed = jax.grad(value_fn)(state.point) if on_this_batch else state.gradient
        norm = optax.tree.norm(climbed)
        eps = optax.tree.scale(rho / jnp.where(norm > 0, norm, 1.0), climbed)
        point = optax.tree.add(params, eps)
        g_s = jax.grad(value_fn)(point)
        return g_s, OptSAMState(point, g_s)

    return transformation(init_fn, update_fn)


def rand_sam(rho: Any, seed: Any = 0) -> optax.GradientTransformationExtraArgs:
    """RandSAM: SAM with a random direction."""

    def init_fn(_):
        return jnp.zeros((), jnp.int32)

    def update_fn(_, step, params, *, value_fn, **keywords):
        del keywords
        key = jax.random.fold_in(jax.random.key(seed), step)
        noise = optax.tree.random_like(key, params, jax.random.normal)
        eps = optax.tree.scale(rho / optax.tree.norm(noise), noise)
        return jax.grad(value_fn)(optax.tree.add(params, eps)), step + 1

    return transformation(init_fn, update_fn)


def power(x: Sequence[float] | np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the power p of y ~ x**p, by least squares of the logarithms; y is [..., x]."""
    logs = np.log(x) - np.log(x).mean()
    return np.log(y) @ logs / (logs @ logs)


def late_power(seen: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Return the power of the steps with which a measure falls, without the first `share` of them.

    The measures [..., steps] are averaged over twenty parts of equal length on the logarithmic
    axis, so that late steps do not count for more than early ones.
    """
    count = seen.shape[-1]
    ends = np.unique(np.geomspace(max(1, share * count), count, 21).astype(int))
    means = [seen[..., a:b].mean(-1) for a, b in itertools.pairwise(ends)]
    return power(np.sqrt(ends[:-1] * ends[1:]), np.stack(means, axis=-1))
