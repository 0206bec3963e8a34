"""SAF: stay close to what the model said about the same examples some epochs ago.

Du, Zhou, Feng, Tan, Zhou. "Sharpness-Aware Training for Free", NeurIPS 2022.
https://arxiv.org/abs/2205.14083
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.closures import batch_size
from samx.core.hyperparams import as_count, next_step
from samx.core.readings import Readings, no_readings
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import closure_transformation
from samx.selection.logits_table import as_logits_like, first_table, logits_at, with_logits
from samx.selection.score_table import nan_if_outside, places_of
from samx.selection.score_table import steps_per_epoch as derived_epoch
from samx.variants._teacher import Model, TeacherTerm


class SAFState(NamedTuple):
    """State of `saf`.

    Attributes:
        step: int32, optimizer steps so far.
        logits: `[lag + 1, num_examples, ...]`, the logits of each example in the last epochs; those
            of epoch e are in row e mod (lag + 1). Zeros at first.
        aux: Aux of the last step, shaped like `aux_like`.
        readings: Readings of the last step.
    """

    step: jax.Array
    logits: jax.Array
    aux: Any
    readings: Readings


def saf(
    lam: ScalarOrSchedule = 0.3,
    temperature: ScalarOrSchedule = 5.0,
    *,
    num_examples: int,
    logits_like: Any,
    lag: int = 3,
    start: int = 5,
    end: int | None = None,
    steps_per_epoch: int | None = None,
    aux_like: Any = None,
) -> Transformation:
    """Sharpness-Aware training for Free (SAF): the trajectory loss takes the place of the ascent.

        z_i  = logits of example i at w
        ẑ_i  = logits of example i in its pass of epoch e − lag     (zeros if there was none)
        R    = T² mean_i KL(softmax(ẑ_i / T) ‖ softmax(z_i / T))
        return ∇(L + λ R)(w)           if start < e < end,   e = ⌊step / steps_per_epoch⌋
               ∇L(w)                   otherwise

    No gradient flows to ẑ. The logits of every step are written, with and without R.

    Args:
        lam: Weight λ ≥ 0 of R; default 0.3, of the authors' command for ResNet-50 on ImageNet (the
            default of their code: 0.16).
        temperature: Temperature T > 0 of both softmaxes; default 5.
        num_examples: Number N of examples in the data set.
        logits_like: An array or a `jax.ShapeDtypeStruct` shaped like the logits of one example,
            `[..., classes]`. The table of logits has its dtype: bfloat16 takes half of the memory
            of float32.
        lag: Epochs ≥ 1 between the two passes of an example; default 3, of the authors' code (their
            command: 2).
        start: Last epoch without R, counted from 0; default 5. Their README also recommends 30% of
            all epochs. −1: the first epoch has R too.
        end: First epoch that is without R again; default `None`: never. The authors' code: 300.
        steps_per_epoch: Default ⌈N / B⌉. Pass ⌊N / B⌋ if your loader drops the last examples.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `apply_fn`. The state
            then holds the last aux (BatchNorm statistics, for example); read it with
            `optax.tree.get(state, "aux")`. Default: aux is dropped.

    Returns:
        A transformation that stands first in a chain. `update` needs `apply_fn`, `loss_on_logits`,
        `batch` and `index`, `int[B]`, the positions of the examples in the data set. It respects
        `weights`: padding has no weight, and its logits are not written. It does not use the
        incoming gradient, so XLA drops its computation.

    Raises:
        ValueError: If a number is out of range, or `end` leaves no epoch with R; in `update`, if
            `index` is not `[B]` or lies outside the table, the logits are not shaped like
            `logits_like`, or aux differs in shape from `aux_like`.
        TypeError: If a hyperparameter is neither a number nor a schedule, a count is not a Python
            int, or `logits_like` is not an array of real floating numbers; in `update`, if `index`
            is not of integers, or the logits are not one array.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> x, y, logits_like = jnp.eye(4), jnp.arange(4) % 2, jax.ShapeDtypeStruct((2,), float)
        >>> tx = optax.chain(
        ...     samx.saf(num_examples=4, logits_like=logits_like, lag=1, start=0), optax.sgd(0.5))
        >>> cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        >>> closures = {
        ...     "apply_fn": lambda w, batch: batch["x"] @ w,
        ...     "loss_on_logits": lambda logits, batch: cross_entropy(logits, batch["y"])}
        >>> w = jnp.zeros((4, 2))
        >>> state = tx.init(w)
        >>> for epoch in range(3):
        ...     for rows in (jnp.array([0, 1]), jnp.array([2, 3])):
        ...         batch = {"x": x[rows], "y": y[rows]}
        ...         updates, state = tx.update(w, state, w, batch=batch, index=rows, **closures)
        ...         w = optax.apply_updates(w, updates)
        ...     print(f"{float(optax.tree.get(state, 'sharpness')):.4f}")  # λ R
        inf
        0.0023
        0.0016

    References:
        Du, Zhou, Feng, Tan, Zhou, NeurIPS 2022, https://arxiv.org/abs/2205.14083

    Notes:
        `lam=0` is the base optimizer. Before epoch `lag` there is no earlier pass: with
        `start < lag − 1`, ẑ is zeros there, a uniform teacher, as in the authors' code. The table
        is a ring of lag + 1 epochs: an example that occurs twice in an epoch has the same teacher
        twice, and one that was left out in epoch e − lag has its logits of the round before, or
        zeros. Logits with a NaN or +∞ are not written either, nor those of a step that `perturb_if`
        skips. With logits `[B, ..., classes]` R is a mean over the axes between. Half-precision
        logits are compared in float32. Under `jax.jit` an index outside the table makes the updates
        NaN.
        Readings: `loss` is L, `sharp_loss` L + λ R, `sharpness` λ R and `grad_norm` ‖∇(L + λ R)‖;
        `is_sharp` says whether the step had R. Nothing is perturbed. Cost: 1 gradient per step. The
        state holds (lag + 1) N logits: 80 MB for CIFAR-100, 20 GB for ImageNet. In mapped functions
        every device holds them all, and the devices exchange the logits of the batch. Under
        `jax.jit` they may be sharded over the examples.
        Fidelity: matches AngusDujw/SAF. `static_args`: `num_examples`, `logits_like`, `lag`,
        `start`, `end`, `steps_per_epoch`.
    """
    term = TeacherTerm("saf", lam, temperature, start, end)
    num_examples, lag = as_count("num_examples", num_examples), as_count("lag", lag)
    if steps_per_epoch is not None:
        steps_per_epoch = as_count("steps_per_epoch", steps_per_epoch)
    like = as_logits_like(logits_like)

    def init_fn(params):
        table = first_table(lag + 1, num_examples, like)
        return SAFState(jnp.zeros((), jnp.int32), table, first_aux(aux_like), no_readings(params))

    def epoch_of(step, losses_fn, size):
        return step // (steps_per_epoch or derived_epoch(losses_fn, num_examples, size))

    def update_fn(
        _, state, params, *, apply_fn, loss_on_logits, batch, index, losses_fn, weights=None
    ):
        size = batch_size("saf", batch)
        place = places_of("saf", losses_fn, index, size, num_examples, weights)
        epoch = epoch_of(state.step, losses_fn, size)
        teacher = logits_at(losses_fn, state.logits, epoch - lag, place)
        model = Model(apply_fn, loss_on_logits, losses_fn, batch, weights)
        step = term.descend(state, params, model, term.acts(epoch), teacher, taught, 1)
        table = with_logits(losses_fn, state.logits, epoch, place, step.logits)
        aux = kept_aux("saf", step.aux, aux_like, state.aux, "apply_fn")
        updates = nan_if_outside(step.updates, place, num_examples)
        return updates, SAFState(next_step(state.step), table, aux, step.readings)

    def taught(_, teacher, logits):
        if logits.shape[1:] != like.shape:
            raise ValueError(
                f"saf: the logits of one example must be shaped like `logits_like`, {like.shape}, "
                f"got {logits.shape[1:]}"
            )
        return teacher

    return closure_transformation(init_fn, update_fn, name="saf")
