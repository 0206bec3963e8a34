"""Gradient accumulation: the step of a large batch in the memory of a small one."""

from typing import Any, NamedTuple

import optax

from samx.core.aliases import Transformation
from samx.core.closures import batch_size, evaluate, mean_loss
from samx.core.hyperparams import as_count
from samx.core.state import first_aux, kept_aux
from samx.core.transformation import as_transformation, closure_transformation


class AccumulateState(NamedTuple):
    """State of `accumulate` with `aux_like`.

    Attributes:
        inner: State of the wrapped optimizer.
        aux: The aux of the pass at the parameters, shaped like `aux_like`.
    """

    inner: optax.OptState
    aux: Any


def accumulate(
    tx: optax.GradientTransformation, num_microbatches: int, *, aux_like: Any = None
) -> Transformation:
    """Accumulate every gradient of an optimizer over microbatches, one after the other.

        ∇L(w) = Σ_j ∇L_j(w)       L_j: the share of microbatch j in the mean loss of the batch

    All gradients of a step are accumulated in this way, at `w`, at `w + ε` and at other points. The
    step is exactly that of the whole batch, but memory holds the activations of one microbatch at a
    time. Micro-batch SAM is another algorithm, see Notes.

    Args:
        tx: The whole optimizer: sharpness-aware transformation and base together.
        num_microbatches: Number K ≥ 1 of microbatches, a divisor of `B`. Microbatch j holds the
            examples j, j + K, j + 2K, ..., so that a batch that is sharded over devices stays
            where it is. Inside `data_parallel`, `B` counts the examples of one device.
        aux_like: Arrays or `jax.ShapeDtypeStruct`s shaped like the aux of `losses_fn`, for
            optimizers that keep no aux themselves. The state then holds the aux of the pass at `w`,
            for example BatchNorm statistics; read it with `optax.tree.get(state, "aux")`. Before
            the first step it holds these arrays, or zeros. Default `None`: aux is dropped.

    Returns:
        A transformation. Its state is that of `tx`; with `aux_like` it is an `AccumulateState`
        around it. `update` needs `losses_fn` and `batch`, and respects `weights`. It computes the
        gradient and `value` from them: do not compute your own. Pass anything shaped like `params`,
        and read the loss with `optax.tree.get(state, "loss")`.

    Raises:
        TypeError: If `num_microbatches` is not a Python int.
        ValueError: If it is below 1; in `update`, if it does not divide the examples of a device,
            if aux differs in shape from `aux_like`, or if `tx` contains `data_parallel`: put
            `data_parallel` around `accumulate`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, samx
        >>> whole = optax.chain(samx.sam(0.1), optax.sgd(0.5))
        >>> w, batch = jnp.array([1.0, 2.0]), jnp.eye(4, 2)
        >>> losses_fn = lambda w, x: (x @ w) ** 2
        >>> for tx in (whole, samx.accumulate(whole, 2)):
        ...     value_fn = lambda w: losses_fn(w, batch).mean()
        ...     g = jax.grad(value_fn)(w)
        ...     updates, _ = tx.update(g, tx.init(w), w, losses_fn=losses_fn, batch=batch)
        ...     print([round(float(u), 3) for u in updates])
        [-0.261, -0.522]
        [-0.261, -0.522]

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412

    Notes:
        If an aux is kept, its floating leaves are means over the microbatches; other leaves come
        from the last microbatch. Normalization over the batch sees one microbatch at a time.
        Half-precision gradients are added in float32. `ascent_fn`, `training_fn` and
        `validation_fn` are not split.
        Micro-batch SAM climbs each microbatch separately: use `samx.msam`, or, with one microbatch
        per call,
        `optax.chain(samx.sam(rho), optax.MultiSteps(base, K).gradient_transformation())`.
        `optax.MultiSteps` around the whole optimizer is neither of the two: it climbs the mean
        gradient, but descends on the last microbatch alone.
        Cost: the gradients of `tx`, each in K pieces, and one more copy of the parameters.
        `static_args`: all arguments.
    """
    num_microbatches = as_count("num_microbatches", num_microbatches)
    inner = as_transformation("accumulate", "tx", tx)

    def init_fn(params):
        state = inner.init(params)
        return state if aux_like is None else AccumulateState(state, first_aux(aux_like))

    def update_fn(_, state, params, *, losses_fn, batch, weights=None, **extra):
        size = batch_size("accumulate", batch)
        if size % num_microbatches:
            raise ValueError(
                f"accumulate: `num_microbatches` must divide the batch of {size} examples, got "
                f"{num_microbatches}; pad the batch and pass `weights`"
            )
        losses_fn = losses_fn.evaluated(num_microbatches=num_microbatches)
        keywords, aux = evaluate(mean_loss(losses_fn, batch, weights), params)
        extra |= {"losses_fn": losses_fn, "batch": batch, "weights": weights} | keywords
        if aux_like is None:
            return inner.update(extra["grad"], state, params, **extra)
        aux = kept_aux("accumulate", aux, aux_like, state.aux, "losses_fn")
        updates, inner_state = inner.update(extra["grad"], state.inner, params, **extra)
        return updates, AccumulateState(inner_state, aux)

    return closure_transformation(init_fn, update_fn, name="accumulate")
