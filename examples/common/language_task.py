"""The step of a language model, and where its arrays are: what training and counting share.

Under data parallelism every device holds the parameters; each has its own examples. Under FSDP
(fully sharded data parallelism, also called ZeRO-3) every device holds a part of each large array
only: of parameters, gradients, and everything in the optimizer's state that is shaped like them. A
layer's parameters are gathered when the layer is computed, and its gradient is scattered after it.
Both are the same program of `jax.jit`; only the shardings differ.

With adapters (LoRA) they alone are the parameters. The frozen weights are a field of the state: no
optimizer holds something of their shape, and no variant climbs or copies them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import samx
import samx.flax
from examples.common import monitoring
from examples.common.gpt import GPT, Size, losses_of
from examples.common.readings import readings_of

Parallel = Literal["data", "fsdp"]


class State(samx.flax.TrainState):
    """A training state.

    Attributes:
        frozen: Weights that are not trained, beside `params`; `None` if all are.
    """

    frozen: Any = None


class Task(NamedTuple):
    """A training task, before anything is computed.

    Attributes:
        init: `key -> state`; compiled, so that each device makes its own part.
        state: Shapes, dtypes and shardings of the state.
        step: `(state, batch) -> (state, readings)`, to be called or lowered; it donates the state.
        batch_sharding: The sharding of every leaf of a batch.
    """

    init: Callable[[jax.Array], State]
    state: State
    step: Any
    batch_sharding: NamedSharding


def make_task(
    size: Size,
    tx: optax.GradientTransformation,
    *,
    devices: Sequence[Any],
    parallel: Parallel = "data",
    remat: bool = False,
    lora_rank: int = 0,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> Task:
    """Describe a training of the language model.

    Args:
        size: The size of the model.
        tx: The whole optimizer.
        devices: The devices that share each batch.
        parallel: What the devices hold of the parameters: "data" all of them, "fsdp" a part.
        remat: Whether the backward pass computes each layer again.
        lora_rank: Rank of the adapters that alone are trained; 0 trains the whole model.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the parameters.
    """
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    parts = mesh.size if parallel == "fsdp" else 1

    def make_model(key):
        return GPT(
            size,
            remat=remat,
            gather=None if parts == 1 else lambda params: gather(params, mesh),
            lora_rank=lora_rank,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(key),
        )

    graph = nnx.graphdef(nnx.eval_shape(make_model, jax.random.key(0)))
    trained = nnx.LoRAParam if lora_rank else nnx.Param

    def apply_fn(weights, x, method="__call__"):
        return getattr(nnx.merge(graph, weights), method)(x)

    def create(key):
        _, *parts = nnx.split(make_model(key), trained, ...)
        params, frozen = map(nnx.to_pure_dict, parts)
        return State.create(apply_fn=apply_fn, params=params, tx=tx, frozen=frozen or None)

    state = jax.eval_shape(create, jax.random.key(0))
    param_specs = specs_of(state.params, parts)
    specs = jax.tree.map(lambda _: P(), state).replace(
        params=param_specs,
        frozen=state.frozen and specs_of(state.frozen, parts),
        opt_state=samx.state_specs(
            tx, state.params, param_specs=param_specs, batch_specs=P("data")
        ),
    )
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    everywhere = NamedSharding(mesh, P())
    return Task(
        init=jax.jit(create, out_shardings=shardings),
        state=jax.tree.map(lambda x, at: x.update(sharding=at), state, shardings),
        step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere)),
        batch_sharding=NamedSharding(mesh, P("data")),
    )


def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
    """Take one step of any variant.

    Args:
        state: The training state.
        batch: "tokens", int[B, T + 1], and "index", int[B], the examples' numbers in the data.
    """

    def apply(params, x, **method):
        return state.apply_fn(union(params, state.frozen or {}), x, **method)

    def logits_of(params, batch):
        return apply(params, batch["tokens"][:, :-1])

    def features_of(params, batch):
        return apply(params, batch["tokens"][:, :-1], method="features")

    def head_of(params, features):
        return apply(params, features, method="head")

    def loss_on_logits(logits, batch):
        return losses_of(logits, batch["tokens"][:, 1:])

    def losses_fn(params, batch):
        return loss_on_logits(logits_of(params, batch), batch)

    def ascent_fn(params):
        targets = batch["tokens"][:, 1:]
        return samx.losses.log_lower_bound(logits_of(params, batch), targets).mean()

    value, grads = jax.value_and_grad(lambda params: losses_fn(params, batch).mean())(state.params)
    new = state.apply_gradients(
        grads=grads,
        value=value,
        losses_fn=losses_fn,
        apply_fn=logits_of,
        features_fn=features_of,
        head_fn=head_of,
        loss_on_logits=loss_on_logits,
        batch=batch,
        index=batch["index"],
        ascent_fn=ascent_fn,
    )
    measured = monitoring.measured(new.opt_state, state.step)
    return new, readings_of(new.opt_state, value) | measured


def union(params: Any, others: Any) -> Any:
    """Return a tree with the leaves of two nested dicts."""
    flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(others)
    return traverse_util.unflatten_dict(flat)


def batch_like(size: Size, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch."""
    return {
        "tokens": jax.ShapeDtypeStruct((examples, size.length + 1), jnp.int32),
        "index": jax.ShapeDtypeStruct((examples,), jnp.int32),
    }


def logits_like(size: Size) -> jax.ShapeDtypeStruct:
    """Return the shape of the logits of one example."""
    return jax.ShapeDtypeStruct((size.length, size.vocabulary), jnp.float32)


def spec_of(shape: tuple[int, ...], parts: int) -> P:
    """Split the longest dimension that `parts` divides; vectors are small and stay whole."""
    fitting = [n if n % parts == 0 else 0 for n in shape]
    if parts == 1 or len(shape) < 2 or not any(fitting):
        return P()
    return P(*([None] * fitting.index(max(fitting))), "data")


def specs_of(params: Any, parts: int) -> Any:
    """Return the `PartitionSpec` of each parameter; the layers of a stack are not split up."""
    specs = {name: jax.tree.map(lambda x: spec_of(x.shape, parts), params[name]) for name in params}
    stack = jax.tree.map(lambda x: P(None, *spec_of(x.shape[1:], parts)), params["blocks"])
    return specs | {"blocks": stack}


def gather(params: Any, mesh: Mesh) -> Any:
    """Give every device the whole of some parameters of which each holds a part.

    In a backward pass the same two constraints, in the other order, sum the gradient over the
    devices and leave each its part.
    """

    def of(x):
        part = NamedSharding(mesh, spec_of(x.shape, mesh.size))
        x = jax.lax.with_sharding_constraint(x, part)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))

    return jax.tree.map(of, params)
