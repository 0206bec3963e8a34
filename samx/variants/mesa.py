"""MESA: stay close to what the average of the earlier weights says about the same examples.

Du, Zhou, Feng, Tan, Zhou. "Sharpness-Aware Training for Free", NeurIPS 2022.
https://arxiv.org/abs/2205.14083
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.closures import LogitsClosure
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import as_count, at_step, check_hyperparam, next_step
from samx.core.readings import FORWARD, Readings, no_readings
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.variants._teacher import Model, TeacherTerm, check_logits


class MESAState(NamedTuple):
    """State of `mesa`.

    Attributes:
        step: int32, optimizer steps so far.
        teacher: Moving average of the parameters, float32 or wider.
        aux: Aux of the last step, shaped like `aux_like`.
        readings: Readings of the last step.
    """

    step: jax.Array
    teacher: Any
    aux: Any
    readings: Readings


def mesa(
    lam: ScalarOrSchedule = 0.8,
    temperature: ScalarOrSchedule = 5.0,
    decay: ScalarOrSchedule = 0.9998,
    *,
    steps_per_epoch: int,
    start: int = 5,
    end: int | None = None,
    aux_like: Any = None,
) -> Transformation:
    """Memory-Efficient SAF (MESA): the teacher is the moving average of the weights.

        v    = β v + (1 − β) w                     (v = w on the first step)
        z, ẑ = logits at w, logits at v            (the same examples)
        R    = T² mean KL(softmax(ẑ / T) ‖ softmax(z / T))
        return ∇(L + λ R)(w)           if start < e < end,   e = ⌊step / steps_per_epoch⌋
               ∇L(w)                   otherwise

    No gradient flows to ẑ. v is updated on every step, with and without R.

    Args:
        lam: Weight λ ≥ 0 of R; default 0.8, of the authors' command for ResNet-50 on ImageNet (the
            default of their code: 0.3).
        temperature: Temperature T > 0 of both softmaxes; default 5.
        decay: β in [0, 1], default 0.9998. 1 keeps the first weights; with 0, R is 0.
        steps_per_epoch: Optimizer steps per epoch, in which `start` and `end` are counted.
        start: Last epoch without R, counted from 0; default 5. −1: the first epoch has R too.
        end: First epoch that is without R again; default `None`: never. The authors' code: 360.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `apply_fn`. The state
            then holds the last aux at w (BatchNorm statistics, for example); read it with
            `optax.tree.get(state, "aux")`. Default: aux is dropped.

    Returns:
        A transformation that stands first in a chain. `update` needs `apply_fn`, `loss_on_logits`
        and `batch`, and takes `teacher_fn`, `(v, batch) -> logits`; default `apply_fn`. It respects
        `weights`. It does not use the incoming gradient, so XLA drops its computation.

    Raises:
        ValueError: If a number is out of range, or `end` leaves no epoch with R; in `update`, if
            `teacher_fn` returns logits of another shape than `apply_fn`, or aux differs in shape
            from `aux_like`.
        TypeError: If a hyperparameter is neither a number nor a schedule, or a count is not a
            Python int; in `update`, if the logits are not one array.

    Example:
        With a Flax model, the teacher evaluates and the student trains:

        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, samx
        >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
        >>> batch = {"x": jnp.eye(4), "y": jnp.arange(4) % 2}
        >>> params = jax.jit(model.init)(jax.random.key(0), batch["x"])
        >>> tx = optax.chain(samx.mesa(decay=0.9, steps_per_epoch=1, start=-1), optax.sgd(0.5))
        >>> cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        >>> closures = {
        ...     "apply_fn": lambda p, batch: model.apply(p, batch["x"]),  # train=True
        ...     "teacher_fn": lambda p, batch: model.apply(p, batch["x"]),  # train=False
        ...     "loss_on_logits": lambda logits, batch: cross_entropy(logits, batch["y"])}
        >>> update = jax.jit(lambda *args: tx.update(*args, batch=batch, **closures))
        >>> state = tx.init(params)
        >>> for step in range(2):
        ...     updates, state = update(params, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(bool(optax.tree.get(state, "sharpness") > 0))  # λ R; at first v = w
        False
        True

    References:
        Du, Zhou, Feng, Tan, Zhou, NeurIPS 2022, https://arxiv.org/abs/2205.14083

    Notes:
        `lam=0` is the base optimizer. The authors' average moves after each step; here it moves
        when the next step begins, which is the same sequence. Their teacher runs in evaluation
        mode, without dropout, with averaged BatchNorm statistics: pass it as `teacher_fn`, with
        your own statistics. Without `teacher_fn`, the teacher is called as the model is, and sees
        the same dropout masks; its aux is dropped. The teacher gets v in the dtypes of the
        parameters. With logits `[B, ..., classes]` R is a mean over the axes between.
        Half-precision logits are compared in float32.
        Readings: `loss` is L, `sharp_loss` L + λ R, `sharpness` λ R and `grad_norm` ‖∇(L + λ R)‖;
        `is_sharp` says whether the step had R. Nothing is perturbed. Cost: 1 gradient and, on steps
        with R, one more forward pass, in a branch (`jax.lax.cond`) unless all epochs have R. State:
        one copy of the parameters, sharded like them.
        Fidelity: matches AngusDujw/SAF (MESA). `static_args`: `steps_per_epoch`, `start`, `end`.
    """
    term = TeacherTerm("mesa", lam, temperature, start, end)
    check_hyperparam("decay", decay, 0, 1)
    steps_per_epoch = as_count("steps_per_epoch", steps_per_epoch)

    def init_fn(params):
        teacher = jax.tree.map(_copied, params)
        return MESAState(
            jnp.zeros((), jnp.int32), teacher, first_aux(aux_like), no_readings(params)
        )

    def update_fn(
        _,
        state,
        params,
        *,
        apply_fn,
        loss_on_logits,
        batch,
        losses_fn,
        teacher_fn=None,
        weights=None,
    ):
        beta = jnp.where(state.step == 0, 0, at_step(decay, state.step))
        v = _averaged(beta, state.teacher, params)
        acts = term.acts(state.step // steps_per_epoch)
        teach = partial(_teach, teacher_fn or apply_fn, tree.cast_like(v, params))
        if not term.is_permanent:
            teach = partial(_if_it_acts, acts, teach)
        model = Model(apply_fn, loss_on_logits, losses_fn, batch, weights)
        step = term.descend(state, params, model, acts, (), teach, 1 + FORWARD)
        aux = kept_aux("mesa", step.aux, aux_like, state.aux, "apply_fn")
        return step.updates, MESAState(next_step(state.step), v, aux, step.readings)

    return closure_transformation(init_fn, update_fn, name="mesa")


def _copied(w: Any) -> jax.Array:
    return jnp.array(tree.widen(w) if tree.is_inexact(w) else w, copy=True)


def _averaged(beta: jax.Array, teacher: Any, params: Any) -> Any:
    """Return the moving average after these parameters; integers are those of the parameters."""

    def averaged(v, w):
        if not tree.is_inexact(v):
            return w
        decay = beta.astype(v.real.dtype)
        return decay * v + (1 - decay) * w.astype(v.dtype)

    return jax.tree.map(averaged, teacher, params)


def _teach(teacher_fn: LogitsClosure, v: Any, batch: Any, _: Any, logits: jax.Array) -> jax.Array:
    """Return the teacher's logits; as a type, they vary over the devices as the model's do."""
    taught = teacher_fn(v, batch)
    check_logits("mesa", teacher_fn.keyword, taught)
    if taught.shape != logits.shape:
        raise ValueError(
            f"mesa: `{teacher_fn.keyword}` must return logits in the shape of the model's, "
            f"{logits.shape}, got {taught.shape}"
        )
    return jnp.where(jnp.ones((), bool), taught.astype(logits.dtype), stop_gradient(logits))


def _if_it_acts(
    acts: jax.Array, teach: Callable[..., jax.Array], batch: Any, _: Any, logits: jax.Array
) -> jax.Array:
    """Return the teacher's logits; the model's own on a step without the term."""
    branch = fast_convolutions(jax.lax.cond)
    return branch(acts, lambda: teach(batch, _, logits), lambda: stop_gradient(logits))
