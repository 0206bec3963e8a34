"""Exact computations at frozen weights: ascents, gradients and curvature of batches of a data set.

Every function returns the measures of one point of a training, as a dict of arrays. Weights are a
tree or, which compiles faster, a vector. Perturbations are samx's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import samx
from examples.claims.recorded import Net, cosines, flat
from samx import perturbations

RESTARTS, ASCENTS = 8, 100  # of the search for the maximum in a ball
ITERATIONS = 30  # of Lanczos
STEPS = 5  # of the ascent with many steps
STRONG = 1e4  # η of Fisher SAM for which 1 + η g² is far from 1
SMALL = 0.01  # a radius at which the loss is linear
CARRIED = 0.9  # share of a sum, for the share of weights that carries it
DRAWS, LINES, POINTS, LENGTH = 8, 2, 41, 0.5  # of TSAM's points; random lines through the weights
TILT = 1.0


Measures = dict[str, Any]  # an array for each name


class Place(NamedTuple):
    """A batch at frozen weights.

    Attributes:
        net: The functions of the network.
        params: The weights.
        batch: The examples.
        rho: Radius of SAM.
        g: Gradient of the batch.
        eps: SAM's step.
        g_s: SAM's gradient.
    """

    net: Net
    params: Any
    batch: Any
    rho: Any
    g: Any
    eps: Any
    g_s: Any

    def loss(self, params: Any) -> jax.Array:
        """Return the loss of the batch."""
        return self.net.losses_fn(params, self.batch).mean()

    def rise(self, eps: Any) -> jax.Array:
        """Return by how much the loss of the batch rises."""
        return rise_of(self.loss, self.params, eps)


def place_of(net: Net, params: Any, batch: Any, rho: Any) -> Place:
    """Compute what all measures of a batch need."""

    def loss(params):
        return net.losses_fn(params, batch).mean()

    g = jax.grad(loss)(params)
    eps = step_of(perturbations.metric_ball(rho), g, params)
    return Place(net, params, batch, rho, g, eps, jax.grad(loss)(optax.tree.add(params, eps)))


def step_of(perturbation: Any, g: Any, params: Any) -> Any:
    """Return the step ε of a perturbation."""
    return perturbation.update(g, perturbation.init(params), params)[0]


def climb_of(tx: Any, g: Any, params: Any, **closures: Any) -> Any:
    """Return the step ε of a whole method: half of the square of x has the gradient x."""

    def half(params):
        return optax.tree.norm(params, squared=True) / 2

    point, _ = tx.update(g, tx.init(params), params, value_fn=half, **closures)
    return optax.tree.sub(point, params)


def rise_of(loss: Callable[[Any], jax.Array], params: Any, eps: Any) -> jax.Array:
    """Return L(w + ε) − L(w)."""
    return loss(optax.tree.add(params, eps)) - loss(params)


def cosine(a: Any, b: Any) -> jax.Array:
    """Return the cosine of two trees."""
    return cosines(flat(a), flat(b))


def carriers(x: Any) -> jax.Array:
    """Return the share of the numbers whose squares are `CARRIED` of the sum of squares."""
    squares = jnp.sort(flat(x) ** 2)[::-1]
    total = jnp.cumsum(squares)
    return jnp.mean(total - squares < CARRIED * total[-1])


def ascent(place: Place) -> Measures:
    """Measure SAM's ascent: how linear it is, and what it does to single examples and weights."""
    g, h = place.g, optax.tree.sub(place.g_s, place.g)
    rise, slope = place.rise(place.eps), optax.tree.vdot(g, place.eps)
    losses = place.net.losses_fn

    def norm(example):
        one = jax.tree.map(lambda x: x[None], example)
        return optax.tree.norm(jax.grad(lambda p: losses(p, one)[0])(place.params))

    moved = losses(optax.tree.add(place.params, place.eps), place.batch)
    return {
        "rise": rise,
        "slope": slope,
        "norm_at": optax.tree.norm(g),
        "change_at": optax.tree.norm(h),
        "example_changes": jnp.abs(moved - losses(place.params, place.batch)),
        "example_norms": jax.vmap(norm)(place.batch),
        "carry_rise": carriers(g),
        "carry_change": carriers(h),
    }


def loss_rise(place: Place, sigma: jax.Array) -> Measures:
    """Compare LE-SAM's change of the gradient with SAM's, and with the slope of ‖g‖."""
    params, g = place.params, place.g
    eps = step_of(perturbations.loss_rise_ball(sigma, None), g, params)
    h = optax.tree.sub(jax.grad(place.loss)(optax.tree.add(params, eps)), g)
    along = samx.sharpness.hvp(place.loss, params)(g)  # ‖g‖ times the gradient of ‖g‖
    return {
        "le_change": optax.tree.norm(h),
        "curvature": optax.tree.vdot(g, along) / optax.tree.norm(g, squared=True),
        "le_along_norm": cosine(h, along),
        "sam_along_norm": cosine(optax.tree.sub(place.g_s, g), along),
    }


def errors(place: Place) -> Measures:
    """Measure by how many points the error of the batch rises: SAM's step and BiSAM's steps."""
    net, params, batch = place.net, place.params, place.batch
    tx = samx.bisam(place.rho)

    def after(eps):
        logits = net.logits(optax.tree.add(params, eps), batch["x"])
        return 100 * jnp.mean(logits.argmax(-1) != batch["y"])

    def bisam(bound, **numbers):
        def ascent_fn(params):
            return bound(net.logits(params, batch["x"]), batch["y"], **numbers).mean()

        return after(climb_of(tx, place.g, params, ascent_fn=ascent_fn))

    before = after(optax.tree.zeros_like(params))
    return {
        "sam_error": after(place.eps) - before,
        "log_error": bisam(samx.losses.log_lower_bound) - before,
        "tanh_error": bisam(samx.losses.tanh_lower_bound) - before,
    }


def paths(place: Place) -> Measures:
    """Return the shares of both paths in SAM's change of the gradient; they add up to 1."""
    batch = place.batch
    closures = {
        "apply_fn": lambda params, batch: place.net.logits(params, batch["x"]),
        "loss_on_logits": place.net.loss_on_logits,
        "batch": batch,
    }
    tx = samx.functional_sam(place.rho)
    functional, _ = tx.update(place.g, tx.init(place.params), place.params, **closures)
    h, by_logits = (optax.tree.sub(place.g_s, x) for x in (place.g, functional))
    total = optax.tree.norm(h, squared=True)
    return {"logit_share": optax.tree.vdot(by_logits, h) / total}


def alignment(place: Place, vectors: Any) -> jax.Array:
    """Return |cosine| of SAM's step and an eigenvector, the first of `vectors`."""
    return jnp.sqrt(samx.sharpness.alignment(vectors, place.eps)[0])


def top_of(loss: Callable[[Any], jax.Array], params: Any, radius: Any) -> samx.sharpness.WorstCase:
    """Search for the highest point in a ball."""
    ball = perturbations.metric_ball(radius)
    return samx.sharpness.worst_case(loss, params, ball, steps=ASCENTS, restarts=RESTARTS)


def after_steps(place: Place, radius: Any, steps: int) -> Any:
    """Return the gradient after so many ascent steps of a radius."""
    tx = samx.sharpness_aware(perturbations.metric_ball(radius), steps)
    return tx.update(place.g, tx.init(place.params), place.params, value_fn=place.loss)[0]


def maximum(place: Place) -> Measures:
    """Compare gradients with the way to the highest point in the ball, and with the curvature.

    The wide ball has the radius of all ascent steps together.
    """
    params, rho = place.params, place.rho
    top, wide = (top_of(place.loss, params, radius) for radius in (rho, STEPS * rho))
    curved = samx.sharpness.eigenvalues(place.loss, params, k=1, iterations=ITERATIONS)

    def to_top(g, top=top):
        return cosine(g, top.perturbation)

    def xsam(tx):
        found, state = tx.update(place.g, tx.init(params), params, value_fn=place.loss)
        return found, (state.alpha > 2 - 0.05).astype(jnp.float32)

    (found, at_limit), (_, at_limit_by_default) = (
        xsam(samx.xsam(rho, rho_max=rho)),
        xsam(samx.xsam()),
    )
    far = after_steps(place, rho, STEPS)
    return {
        "to_top_g": to_top(place.g),
        "to_top_1": to_top(place.g_s),
        "to_top_many": to_top(after_steps(place, rho / STEPS, STEPS)),
        "to_top_far": to_top(far),
        "to_wide_1": to_top(after_steps(place, STEPS * rho, 1), wide),
        "to_wide_many": to_top(far, wide),
        "to_top_xsam": to_top(found),
        "at_limit": at_limit,
        "at_limit_by_default": at_limit_by_default,
        "one_step_share": place.rise(place.eps) / top.value,
        "agreeing": jnp.mean(top.per_restart > 0.999 * top.value),
        "along_own_top": alignment(place, curved.vectors),
    }


def smoothness(place: Place) -> Measures:
    """Return the largest second differences of objectives along random lines.

    TSAM's with `TILT` and without a limit of the tilt, and SAM's.
    """
    ball, params, rho = perturbations.metric_ball(place.rho), place.params, place.rho

    def climbed(point):
        eps = step_of(ball, jax.grad(place.loss)(point), point)
        return place.loss(optax.tree.add(point, eps))

    def noisy(point):
        def of_draw(key):
            noise = perturbations.sphere_noise(rho, key=key)
            return climbed(optax.tree.add(point, step_of(noise, point, point)))

        return jax.lax.map(of_draw, jax.random.split(jax.random.key(0), DRAWS))

    def objectives(point):
        losses = noisy(point)
        tilted = (jax.nn.logsumexp(TILT * losses) - jnp.log(DRAWS)) / TILT
        return jnp.stack([tilted, losses.max(), climbed(point)])

    alphas = jnp.linspace(-LENGTH, LENGTH, POINTS)

    def of_line(key):
        line = perturbations.sphere_noise(1.0, key=key)
        d = step_of(line, params, params)
        points = lambda a: objectives(optax.tree.add_scale(params, a, d))  # noqa: E731
        values = jax.lax.map(points, alphas)
        return jnp.abs(values[2:] - 2 * values[1:-1] + values[:-2]).max(axis=0)

    found = jax.lax.map(of_line, jax.random.split(jax.random.key(1), LINES)).mean(axis=0)
    found = found / (alphas[1] - alphas[0]) ** 2
    return dict(zip(("tilted_bend", "largest_bend", "sam_bend"), found, strict=True))


def divergence(net: Net, params: Any, eps: Any, batch: Any) -> jax.Array:
    """Return the mean KL divergence of the predictions at w from those at w + ε."""
    p, q = (
        jax.nn.log_softmax(net.logits(w, batch["x"])) for w in (params, optax.tree.add(params, eps))
    )
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1).mean()


def fisher_steps(place: Place) -> dict[str, Any]:
    """Return the steps ε of radius 1: that of SAM's ball, and those of three Fisher balls.

    "default" and "strong" have the metric 1 + η g², "examples" has 1 + F / mean F, where F is the
    mean of the squared gradients of examples. All of them are linear in the radius.
    """
    losses, params, g = place.net.losses_fn, place.params, place.g

    def gradient(example):
        one = jax.tree.map(lambda x: x[None], example)
        return jax.grad(lambda params: losses(params, one)[0])(params)

    squares = jax.tree.map(lambda x: jnp.mean(x**2, axis=0), jax.vmap(gradient)(place.batch))
    mean = flat(squares).mean()
    metric = jax.tree.map(lambda f: (1 + f / mean) ** -0.5, squares)
    return {
        "ball": step_of(perturbations.metric_ball(1.0), g, params),
        "default": climb_of(samx.fisher_sam(1.0), g, params),
        "strong": climb_of(samx.fisher_sam(1.0, STRONG), g, params),
        "examples": step_of(perturbations.metric_ball(1.0, lambda w: metric), g, params),
    }


def friendly(place: Place, whole: Callable[[Any], jax.Array], average: Any) -> Measures:
    """Measure what parts of the gradient do to the loss of the whole data set.

    Args:
        place: The batch.
        whole: The loss of the whole data set.
        average: Friendly SAM's moving average of gradients.
    """
    full, found = jax.grad(whole)(place.params), {}
    parts = {
        "sam": place.g,
        "full": full,
        "batch": optax.tree.sub(place.g, full),
        "ema": optax.tree.sub(place.g, average),
    }
    for name, radius in (("", place.rho), ("_small", SMALL)):
        ball = perturbations.metric_ball(radius)
        for part, direction in parts.items():
            eps = step_of(ball, direction, place.params)
            found[f"{part}{name}"] = rise_of(whole, place.params, eps)
    return found | {"ema_cosine": cosine(average, full), "batch_cosine": cosine(place.g, full)}


def variances(gradients: jax.Array, tree: Callable[[jax.Array], Any]) -> Measures:
    """Compare the variance over batches of gradients and of centralized gradients.

    Args:
        gradients: Those of the batches, [batches, P].
        tree: Makes a tree with kernels of a vector.
    """
    centralize = perturbations.centralize()

    def central(g):
        return flat(centralize.update(tree(g), centralize.init(g))[0])

    found = []
    for rows in (gradients, jax.vmap(central)(gradients)):
        mean = rows.mean(axis=0, keepdims=True)
        found.append((jnp.sum((rows - mean) ** 2), jnp.sum(mean**2)))
    (variance, square), (new_variance, new_square) = found
    return {
        "central_variance": new_variance / variance,
        "central_relative": (new_variance / new_square) / (variance / square),
    }


def whole_set(loss: Callable[[Any], jax.Array], params: Any, rho: Any) -> dict[str, Any]:
    """Measure over all examples: the top eigenvalue, the rise along SAM's step, the maximum."""
    found = samx.sharpness.eigenvalues(loss, params, k=1, iterations=ITERATIONS)
    ball = perturbations.metric_ball(rho)
    gap = samx.sharpness.first_order(loss, params, ball)
    return {
        "top": found.values[0],
        "gap": gap,
        "highest": top_of(loss, params, rho).value,
        "loss": loss(params),
        "vectors": found.vectors,
    }
