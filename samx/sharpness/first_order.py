"""The rise that SAM's own step sees, and the gradient of that step. Public in `samx.sharpness`."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from samx.core import tree
from samx.core.closures import unit_weights
from samx.core.convolutions import fast_convolutions
from samx.core.devices import ONE_DEVICE
from samx.core.hyperparams import as_count
from samx.sharpness.coordinates import Coordinates, Vector, check_params
from samx.sharpness.objective import Objective, as_objective, padded
from samx.sharpness.products import gradient_at
from samx.sharpness.rises import climb_with, rise_from


def first_order(f: Any, params: Any, perturbation: optax.GradientTransformation) -> jax.Array:
    """Measure by how much the loss rises along the step that SAM takes.

        L(w + ε(g)) − L(w),   g = ∇L(w)

    It is what SAM minimizes beside the loss: the sharpness from one step to the edge of the ball.

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree.
        perturbation: Computes the step ε, for example `samx.perturbations.metric_ball(0.05)`; the
            one that trains. It acts as on the first step of training: schedules are at step 0,
            masks and averages are those of a new state.

    Returns:
        The rise, one number. It is at most the `samx.sharpness.worst_case` of the same ball.

    Raises:
        TypeError: If `f` is not a function, `params` hold something other than arrays, or
            `perturbation` is not an optax transformation.
        ValueError: If `perturbation` needs the losses of examples, and `f` has none.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> ball = samx.perturbations.metric_ball(0.5)
        >>> float(samx.sharpness.first_order(lambda w: w @ w, jnp.array([1.0, 0.0]), ball))
        1.25

    References:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization",
        ICLR 2021, https://arxiv.org/abs/2010.01412

    Notes:
        For large radii it is far below the worst case: one step is no maximization. Cost: one
        gradient, one forward pass, and one copy of the parameters.
    """
    found, space = as_objective("first_order", f), Coordinates("first_order", params)
    return _first_order("first_order", found, space, perturbation)


def _first_order(name: str, f: Objective, space: Coordinates, perturbation: Any) -> jax.Array:
    climb = climb_with(name, f, space, perturbation)
    eps = climb(space.start, gradient_at(name, f, space)(space.start))
    return rise_from(name, f, space)(_plus(space.start, eps))


def m_sharpness(
    f: Any, params: Any, perturbation: optax.GradientTransformation, *, shard_size: int
) -> jax.Array:
    """Measure SAM's rise for each small shard of the examples, and return the mean.

        mean over shards s of  L_s(w + ε(∇L_s(w))) − L_s(w)

    Shard j holds the examples jm, ..., jm + m − 1 for m = `shard_size`. With one shard it is
    `first_order`. The smaller the shards, the larger the rise: each shard moves the parameters in
    the direction that hurts its own examples. Shuffle examples that are sorted, by class for
    example: batches of training hold all kinds.

    Args:
        f: `samx.sharpness.objective(...)` with losses of examples.
        params: The parameters w, any pytree.
        perturbation: Computes the step ε of each shard, as in `first_order`.
        shard_size: m, the number of examples in a shard; from 1 to their number B. It need not
            divide B: the last shard is smaller, and counts by its examples.

    Returns:
        The mean rise, one number. Shards count by the sum of their weights.

    Raises:
        ValueError: If `f` has no losses of examples, or `shard_size` is not in 1 to B.
        TypeError: If an argument has a wrong type.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> f = samx.sharpness.objective(losses_fn=lambda w, x: x @ w, batch=jnp.eye(2))
        >>> ball = samx.perturbations.metric_ball(1.0)
        >>> for m in (1, 2):
        ...     found = samx.sharpness.m_sharpness(f, jnp.ones(2), ball, shard_size=m)
        ...     print(round(float(found), 4))
        1.0
        0.7071

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412, section 4.1;
        Andriushchenko, Flammarion, "Towards Understanding Sharpness-Aware Minimization", ICML 2022,
        https://arxiv.org/abs/2206.06232

    Notes:
        One shard at a time; a shard that is larger than a batch of the objective is split into
        batches too. Inside mapped functions the shards are those of each device, the devices work
        at the same time, and the mean is over all shards. Under `jax.jit` with a sharded batch
        every shard is spread over the devices, and the examples are exchanged once: slower if
        shards are small. Cost: one gradient and one forward pass over the examples.
    """
    found = as_objective("m_sharpness", f)
    losses_fn = found.losses("m_sharpness")
    check_params("m_sharpness", params)
    devices = losses_fn.evaluation.devices
    space = Coordinates("m_sharpness", devices.pcast(params))
    size = len(jax.tree.leaves(found.batch)[0])
    count = as_count("shard_size", shard_size)
    if count > size:
        raise ValueError(f"m_sharpness: `shard_size` must be at most {size} examples, got {count}")

    batch, weights = padded(found.batch, found.weights, count)
    largest = -(-size // found.num_batches)
    settings = {"num_batches": -(-count // largest), "axis_names": ()}

    def of_shard(shard):
        batch, weights = shard
        one = replace(found, batch=batch, weights=weights, **settings)
        rise = _first_order("m_sharpness", one, space, perturbation)
        return rise, jnp.sum(weights, dtype=rise.dtype)

    given = unit_weights(batch, jnp.float32) if weights is None else weights
    shards = jax.tree.map(lambda x: _contiguous(count, x), (batch, given))
    rises, totals = fast_convolutions(jax.lax.map)(of_shard, shards)
    mean = tree.ratio(jnp.sum(rises * totals), jnp.sum(totals))
    return devices.mean(mean, devices.share(weights))


def _contiguous(size: int, x: Any) -> jax.Array:
    """Reshape `[B, ...]` to `[K, size, ...]`; row j holds the examples j·size, j·size + 1, ...

    On an Explicit mesh every shard is spread over the devices that held the batch, if they divide
    it, since a loop runs over an axis that no device owns.
    """
    x = jnp.asarray(x)
    sharding = jax.typeof(x).sharding
    shards = ONE_DEVICE.all_gather(x).reshape(-1, size, *x.shape[1:])
    if not any(sharding.spec):
        return shards
    one = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    num_parts = x.shape[0] // one.shard_shape(x.shape[:1])[0]
    if size % num_parts:
        return shards
    spec = PartitionSpec(None, *sharding.spec)
    return jax.sharding.reshard(shards, NamedSharding(sharding.mesh, spec))


class ExactSAMGradient(NamedTuple):
    """The gradient of the loss that SAM minimizes, and SAM's approximation of it.

    Attributes:
        gradient: ∇_w L(w + ε(∇L(w), w)), a tree like the parameters.
        first_order: ∇L(w + ε), SAM's gradient, in which ε counts as a constant.
        cosine: The cosine of the angle between the two; 0 if one of them is zero.

    Example:
        >>> import jax.numpy as jnp, samx
        >>> ball = samx.perturbations.unnormalized_step(0.5)
        >>> found = samx.sharpness.exact_sam_gradient(lambda w: w @ w, jnp.ones(1), ball)
        >>> [x.tolist() for x in found]
        [[8.0], [4.0], 1.0]
    """

    gradient: Any
    first_order: Any
    cosine: jax.Array


def exact_sam_gradient(
    f: Any, params: Any, perturbation: optax.GradientTransformation
) -> ExactSAMGradient:
    """Differentiate SAM's loss through its perturbation, with the second derivatives of the loss.

        F(w) = L(w + ε(g, w)),   g = ∇L(w),   g_s = ∇L(w + ε)
        ∇F(w) = g_s + (∂ε/∂w)ᵀ g_s + ∇²L(w) (∂ε/∂g)ᵀ g_s

    SAM takes g_s alone. The cosine between the two says how good that approximation is here.

    Args:
        f: The loss, `params -> scalar`, or `samx.sharpness.objective(...)`.
        params: The parameters w, any pytree.
        perturbation: Computes the step ε, as in `samx.sharpness.first_order`.

    Returns:
        An `ExactSAMGradient`. Its trees are in float32 or wider. At complex leaves they are
        conjugated, as `update` takes gradients: they point uphill.

    Raises:
        TypeError: If `f` is not a function, `params` hold something other than arrays, or
            `perturbation` is not an optax transformation.
        ValueError: If `perturbation` needs the losses of examples, and `f` has none.

    Example:
        In a narrow valley, SAM's gradient is off by 20 degrees:

        >>> import jax.numpy as jnp, samx
        >>> ball = samx.perturbations.metric_ball(0.5)
        >>> def loss(w):
        ...     return w[0] ** 2 + 5 * w[1] ** 2
        >>> found = samx.sharpness.exact_sam_gradient(loss, jnp.array([1.0, 0.1]), ball)
        >>> round(float(found.cosine), 4)
        0.9396

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412, equation 3 and appendix C.4,
        which drops the second derivatives.

    Notes:
        Sign functions, masks and ranks in a perturbation count as constants, as always in JAX.
        Cost: two gradients, one product with the Hessian (about 2 gradients), and one backward pass
        through the perturbation; about four gradients.
    """
    name = "exact_sam_gradient"
    found, space = as_objective(name, f), Coordinates(name, params)
    gradient = gradient_at(name, found, space)
    climb = climb_with(name, found, space, perturbation)

    eps, pull = jax.vjp(climb, space.start, gradient(space.start))
    g_s = gradient(_plus(space.start, eps))
    along_w, along_g = pull(g_s)
    _, curved = jax.jvp(gradient, (space.start,), (along_g,))
    exact = _plus(_plus(g_s, along_w), curved)

    component = tree.along(g_s, exact, tree.length(exact))
    cosine = tree.ratio(component, tree.norm(g_s))
    return ExactSAMGradient(space.vector(exact), space.vector(g_s), cosine)


def _plus(x: Vector, y: Vector) -> Vector:
    return [a + b for a, b in zip(x, y, strict=True)]
