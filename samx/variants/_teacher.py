"""Shared by SAF and MESA: the loss with the term of a teacher, and the epochs that have it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.closures import (
    LogitsClosure,
    LossesClosure,
    PerExample,
    evaluate,
    in_two_parts,
    mean_loss,
    mean_over_batch,
)
from samx.core.hyperparams import as_count, at_step, check_hyperparam
from samx.core.readings import Readings, skip_readings, take_readings
from samx.losses import trajectory_loss


class Model(NamedTuple):
    """The closures of `update` in two parts, and their examples."""

    apply_fn: LogitsClosure
    loss_on_logits: Callable[[Any, Any], Any]
    losses_fn: LossesClosure
    batch: Any
    weights: Any


class Descent(NamedTuple):
    """Results of a step: the gradient with the term, the logits, their aux, and the readings."""

    updates: Any
    logits: jax.Array
    aux: Any
    readings: Readings


class TeacherTerm:
    """The term λ T² KL(teacher ‖ model) of a loss, while start < epoch < end."""

    def __init__(self, name: str, lam: Any, temperature: Any, start: Any, end: Any):
        check_hyperparam("lam", lam, 0)
        check_hyperparam("temperature", temperature, 0, excluded=0)
        self.name, self.lam, self.temperature = name, lam, temperature
        self.start = as_count("start", start, -1)
        self.end = None if end is None else as_count("end", end, self.start + 2)

    @property
    def is_permanent(self) -> bool:
        """Whether all epochs have the term."""
        return self.start < 0 and self.end is None

    def acts(self, epoch: jax.Array) -> jax.Array:
        """Return whether this epoch has the term."""
        if self.is_permanent:
            return jnp.ones((), bool)
        acts = epoch > self.start
        return acts if self.end is None else acts & (epoch < self.end)

    def descend(
        self,
        state: Any,
        params: Any,
        model: Model,
        acts: jax.Array,
        examples: Any,
        teacher_of: Callable[[Any, Any, jax.Array], jax.Array],
        gradients: float,
    ) -> Descent:
        """Return the gradient of the loss with the term.

        Args:
            state: Its fields `step` and `readings` are read.
            params: The parameters w.
            model: The model and its loss.
            acts: Whether this step has the term.
            examples: Pytree with leading axis `B`: what else `teacher_of` needs.
            teacher_of: `(batch, examples, logits) -> teacher's logits`, of some of the examples.
            gradients: Cost of a step with the term.
        """
        lam, temperature = (at_step(x, state.step) for x in (self.lam, self.temperature))
        whole = in_two_parts(self.name, model.apply_fn, model.loss_on_logits)

        def penalized(params, data):
            batch, examples = data
            logits, aux = model.apply_fn.with_aux(params, batch)
            check_logits(self.name, "apply_fn", logits)
            losses = model.loss_on_logits(logits, batch)
            whole.check(losses, batch)
            term = trajectory_loss(logits, teacher_of(batch, examples, logits), temperature)
            term = jnp.where(acts, jnp.asarray(lam, term.dtype) * term, 0)
            dtype = tree.common_dtype(losses.dtype, term.dtype)
            return losses.astype(dtype) + term.astype(dtype), (aux, PerExample((losses, logits)))

        losses_fn = model.losses_fn.with_fn(penalized)
        seen, (aux, kept) = evaluate(
            mean_loss(losses_fn, (model.batch, examples), model.weights), params
        )
        (losses, logits), g, last = kept.examples, seen["grad"], state.readings
        loss = mean_over_batch(losses_fn, tree.widen(losses), model.weights)
        taken = take_readings(
            *(last, loss, seen["value"], g, g, params, lambda: params, gradients, None)
        )
        return Descent(g, logits, aux, tree.where(acts, taken, skip_readings(last, loss, g)))


def check_logits(name: str, keyword: str, logits: Any) -> None:
    """Require one array with an axis of examples and one of classes."""
    if not tree.is_array(logits):
        kind = type(logits).__name__
        raise TypeError(f"{name}: `{keyword}` must return one array of logits, got a {kind}")
    shape = jnp.shape(logits)
    if len(shape) < 2:
        raise ValueError(
            f"{name}: `{keyword}` must return logits [B, ..., classes], got shape {shape}"
        )
