"""Training at the edge of stability: the optimizers, the task, and what is measured.

A small network learns 300 digits with full batches, in float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import samx
from examples.common.digits_task import load_digits

EXAMPLES, SIZES = 300, (64, 24, 24, 10)
EVERY = 100  # steps from one measurement to the next


class Case(NamedTuple):
    """An optimizer, and what the edge depends on."""

    title: str
    rho: float = 0.0
    is_normalized: bool = True  # the perturbation: by SAM, or by un-normalized SAM
    weight: float = 1.0
    momentum: float = 0.0
    loss_name: str = "squared"

    def optimizer(self, learning_rate: float) -> optax.GradientTransformationExtraArgs:
        """Return the transformation of samx, and its base."""
        base = optax.sgd(learning_rate, momentum=self.momentum or None)
        if not self.rho:
            return optax.with_extra_args_support(base)
        sharp = samx.sam(self.rho) if self.is_normalized else samx.usam(self.rho)
        if self.weight != 1:
            sharp = samx.combinations.mix(sharp, self.weight)
        return optax.chain(sharp, base)

    def edge(self, learning_rate: float, grad_norm: Any) -> Any:
        """Return the edge at parameters with this norm of the gradient."""
        radius = self.rho / grad_norm if self.is_normalized else self.rho
        return samx.sharpness.edge(
            learning_rate, radius=radius, momentum=self.momentum, weight=self.weight
        )


def data() -> dict[str, jax.Array]:
    """Return the images, with mean 0, and the labels."""
    x, y = load_digits()
    x = x[:EXAMPLES] / 16
    return {"x": jnp.asarray(x - x.mean(), jnp.float32), "y": jax.nn.one_hot(y[:EXAMPLES], 10)}


def initial_params() -> list[dict[str, jax.Array]]:
    """Return the weights, of variance 1 / fan-in, and the biases, which are 0."""
    layers = zip(jax.random.split(jax.random.key(0), 3), SIZES[:-1], SIZES[1:], strict=True)
    return [
        {"w": jax.random.normal(key, (fan_in, width)) / fan_in**0.5, "b": jnp.zeros(width)}
        for key, fan_in, width in layers
    ]


def network(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Return the outputs of the network, which has two hidden layers of tanh units."""
    *hidden, last = params
    x = batch["x"]
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x @ last["w"] + last["b"][None]


def squared(outputs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    return 0.5 * jnp.sum((outputs - batch["y"]) ** 2, axis=1)


def cross_entropy(outputs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    return optax.softmax_cross_entropy(outputs, batch["y"])


@jax.jit
def measure(objective: samx.sharpness.Objective, params: Any) -> dict[str, jax.Array]:
    """Return the largest eigenvalue of the Hessian, the loss and the norm of the gradient."""
    loss, grads = jax.value_and_grad(objective)(params)
    top = samx.sharpness.eigenvalues(objective, params, k=1)
    return {"eigenvalue": top.values[0], "loss": loss, "grad_norm": optax.tree.norm(grads)}


def train(case: Case, learning_rate: float, steps: int, bar: Any = None) -> dict[str, Any]:
    """Train and measure; return what was measured as lists, until a number is not finite."""
    loss = {"squared": squared, "cross_entropy": cross_entropy}[case.loss_name]
    objective = samx.sharpness.objective(apply_fn=network, loss_on_logits=loss, batch=data())
    tx = case.optimizer(learning_rate)

    @jax.jit
    def advance(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(
                jax.grad(objective)(params), state, params, value_fn=objective
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, length=EVERY)[0]

    params = initial_params()
    state, points = tx.init(params), []
    for step in range(0, steps + 1, EVERY):
        point = {name: float(value) for name, value in measure(objective, params).items()}
        if not all(map(np.isfinite, point.values())):
            break
        points.append({"step": step, **point})
        if step < steps:
            params, state = advance(params, state)
        if bar is not None:
            bar.update(EVERY if step else 0)
    columns = {name: [point[name] for point in points] for name in points[0]}
    edge = np.asarray(case.edge(learning_rate, np.array(columns["grad_norm"])))
    return {**columns, "edge": np.broadcast_to(edge, len(points)).tolist()}


def ratios(run: dict[str, Any], first: int, last: float = np.inf) -> np.ndarray:
    """Return eigenvalue / edge at the steps from `first` to `last`."""
    step = np.array(run["step"])
    return (np.array(run["eigenvalue"]) / run["edge"])[(first <= step) & (step <= last)]
