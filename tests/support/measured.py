"""Reference values of the measures of sharpness, their settings, and a small problem for devices.

The values come from dense Hessians and Jacobians in float64. A "flat" vector has the order of
`jax.flatten_util.ravel_pytree`, as the parameters here have: W1, W2, b1, b2.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import problem
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P
from regimes import mapped, mesh_of, place

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


def small_problem():
    """A small network and 32 examples `(x, y, weights)`, of which one, far off, has no weight."""
    rng = np.random.RandomState(0)
    x, y, weights = rng.randn(32, 3), rng.randn(32), rng.rand(32) * (np.arange(32) != 5)
    x[5], y[5] = 100, 100
    w = {"kernel": rng.randn(3, 8), "out": rng.randn(8)}
    return jax.tree.map(jnp.asarray, (w, x, y, weights))


def small_loss(x, y, weights=None, **how):
    """Its squared error, which gathers parameters that are sharded on a mesh with explicit axes."""

    def whole(x):
        return jax.sharding.reshard(x, P()) if any(jax.typeof(x).sharding.spec) else x

    def losses_fn(w, batch):
        w = jax.tree.map(whole, w)
        return (jnp.tanh(batch["x"] @ w["kernel"]) @ w["out"] - batch["y"]) ** 2

    return sharpness.objective(losses_fn=losses_fn, batch={"x": x, "y": y}, weights=weights, **how)


def on_a_mesh(measure, axis_type, is_sharded=True, transform=jax.jit):
    """Call `transform(measure)` with sharded examples, and perhaps sharded parameters."""
    mesh = mesh_of(axis_type=axis_type)
    w, *examples = small_problem()
    specs = {"kernel": P(None, "data"), "out": P("data")} if is_sharded else P()
    with jax.set_mesh(mesh):
        return transform(measure)(place(w, mesh, specs), *place(examples, mesh, P("data")))


def in_regime(measure, regime, num_batches, has_weights):
    """Call `measure(w, x, y, weights)` on eight devices, each with its own examples."""
    w, *examples = small_problem()[: 4 if has_weights else 3]

    def run(*args):
        return measure(*args, axis_name="data", num_batches=num_batches)

    return mapped(run, regime, len(examples))(w, *examples)
