"""Reference values of the measures of sharpness, and the two settings in which they hold.

The values come from dense Hessians and Jacobians in float64. A "flat" vector has the order of
`jax.flatten_util.ravel_pytree`, as the parameters here have: W1, W2, b1, b2.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import problem
from jax.flatten_util import ravel_pytree

from samx import sharpness

REFERENCE = dict(np.load(Path(__file__).parent / "sharpness_reference.npz"))


def net_params(name="net"):
    """The 10-16-3 tanh network of `problem.py` after 200 steps; "net_b" is a second one."""
    return {key: jnp.asarray(REFERENCE[f"{name}/params/{key}"]) for key in ("W1", "W2", "b1", "b2")}


def net_loss(data=None, **changes):
    """Its mean cross-entropy over the 64 examples, in two parts."""
    data = problem.make()[0] if data is None else data
    return sharpness.objective(
        apply_fn=problem.logits_of,
        loss_on_logits=lambda logits, batch: problem.cross_entropy(logits, batch["y"]),
        batch=data,
        **changes,
    )


def net_tree(flat):
    """A flat vector `[227]`, or a stack `[n, 227]`, as a tree like the parameters."""
    flat, unravel = jnp.asarray(flat), ravel_pytree(net_params())[1]
    return unravel(flat) if flat.ndim == 1 else jax.vmap(unravel)(flat)


def quadratic(name="psd"):
    """Return f(v) = v'Av/2 + b'v over a tree of 16 numbers, its point, A and b."""
    prefix = f"quad/{name}" if f"quad/{name}/A" in REFERENCE else "quad/psd"
    point = f"quad/{name}/w" if f"quad/{name}/w" in REFERENCE else "quad/w"
    a, b = jnp.asarray(REFERENCE[f"{prefix}/A"]), jnp.asarray(REFERENCE["quad/b"])
    flat = jnp.asarray(REFERENCE[point])
    params = {"a": flat[:12].reshape(3, 4), "b": flat[12:]}

    def loss(params):
        v = ravel_pytree(params)[0]
        return 0.5 * v @ a @ v + b @ v

    return loss, params, a, b
