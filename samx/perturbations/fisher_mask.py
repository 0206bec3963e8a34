"""Sparse SAM's mask by Fisher information. Public in `samx.perturbations`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, PartitionSpec

from samx.core import tree
from samx.core.aliases import ScalarOrSchedule, Transformation
from samx.core.closures import LossesClosure, batch_size, unit_weights
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import Default, as_count, at_step, check_hyperparam, next_step
from samx.core.microbatches import strided
from samx.core.transformation import as_transformation, closure_transformation
from samx.perturbations.patterns import Pattern, check_pattern, chosen
from samx.perturbations.top_entries import check_mask, num_entries, rounded_down


class FisherMaskState(NamedTuple):
    """State of `fisher_mask`.

    Attributes:
        step: int32, optimizer steps so far; schedules count them.
        next_look: int32, the next step that recomputes the mask.
        mask: Booleans shaped like the parameters: which entries are perturbed.
        extra_gradients: float32, the gradients that the last step computed for the mask, in passes
            over one batch; 0 on steps that do not recompute it.
        perturbation: State of the perturbation.
    """

    step: jax.Array
    next_look: jax.Array
    mask: Any
    extra_gradients: jax.Array
    perturbation: optax.OptState


def fisher_mask(
    perturbation: optax.GradientTransformation,
    sparsity: ScalarOrSchedule = Default(0.5),
    *,
    period: int,
    pattern: Pattern = "unstructured",
    num_microbatches: int | None = None,
) -> Transformation:
    """Perturb the entries to which the loss is most sensitive (largest Fisher information).

        on the steps 1, 1 + period, 1 + 2 period, ...:
            F = Σ_j (∇ℓ_j(w))²                         (one gradient for each example j)
            M = 1 at the largest entries of F, else 0
        ε = M · perturbation(g)                        (M = 0 on step 0)

    `perturbation` sees the whole gradient, so norms include the masked entries, and the masked step
    of a ball is shorter than ρ.

    Args:
        perturbation: Computes the step, for example `metric_ball(0.05)`.
        sparsity: Fraction s in [0, 1] of the entries that are not perturbed, a number or a
            schedule; default 0.5.
        period: Steps T ≥ 1 from one mask to the next; the authors use one epoch, or five.
        pattern: "unstructured", the default: the int(P (1 − s)) largest of all P entries.
            "structured": whole leaves, largest mean first, until at least as many entries are
            perturbed. `(n, m)`: the n largest of each m consecutive entries of a leaf, and all
            entries of a leaf with fewer than two axes; leave `sparsity` out with this pattern.
        num_microbatches: Number K ≥ 1 of microbatches; it must divide the number of examples per
            device. The gradients of single examples are computed together within a microbatch. The
            microbatches run one after the other. Default: one example after the other. If the
            examples are sharded under `jax.jit`, use at most as many as each device has examples.

    Returns:
        An optax transformation `g -> ε`. `update` needs `losses_fn` and `batch`. The Fisher
        information is computed over `fisher_batch` if it is passed; otherwise over the current
        batch, with its `weights`.

    Raises:
        ValueError: If `sparsity` is outside [0, 1] or given together with a pattern (n, m),
            `period` or `num_microbatches` is below 1, or `pattern` is unknown; in `update`, if m
            does not divide the size of a leaf, `num_microbatches` does not divide the number of
            examples, the state's mask does not have the shapes of the parameters, or there are
            more than 2³¹ − 1 parameters.
        TypeError: If `sparsity` is neither a number nor a schedule, `period` or `num_microbatches`
            is not a Python int, or `perturbation` is not a transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import fisher_mask, metric_ball
        >>> ball = fisher_mask(metric_ball(1.0), sparsity=0.5, period=10)
        >>> w, g, batch = jnp.ones(4), jnp.ones(4), jnp.array([[0.0, 3.0, 1.0, 2.0]])
        >>> state = ball.init(w)
        >>> for _ in range(2):
        ...     eps, state = ball.update(g, state, w, losses_fn=lambda w, x: x @ w, batch=batch)
        ...     print(eps.tolist())
        [0.0, 0.0, 0.0, 0.0]
        [0.0, 0.5, 0.0, 0.5]

    References:
        Mi, Shen, Ren, Zhou, Sun, Ji, Tao, "Make Sharpness-Aware Minimization Stronger: A Sparsified
        Perturbation Approach", NeurIPS 2022, https://arxiv.org/abs/2210.05177; Mi et al., IEEE
        TPAMI 2025, https://arxiv.org/abs/2306.17504 (the patterns)

    Notes:
        The m consecutive entries are those of the flattened leaf; the last axis varies fastest. In
        a Flax kernel these are outputs, in the authors' PyTorch code inputs. Normalization over
        the batch sees single examples while the Fisher information is computed, as in the authors'
        code. Variants that take `losses_fn` themselves (`msam`, `ksam`, `esam`, `ausam`,
        `focal_sam`, `imbalanced_sam`, `sampa`) and `momentum_sam` do not pass it on. If a mask is
        due on a step without a sharp gradient (`perturb_if`), the next sharp step computes it.
        Cost: on steps that compute a mask, one gradient per example and 2 × 32 comparisons of all
        parameters (64 + 32 for 64-bit parameters); elementwise work on the others. State: one mask
        of booleans. While a mask is computed: one more copy of the parameters, and one for each
        example of a microbatch. `static_args`: `period`, `pattern`, `num_microbatches`.
    """
    name = "fisher_mask"
    check_hyperparam("sparsity", sparsity, 0, 1)
    period = as_count("period", period)
    if num_microbatches is not None:
        num_microbatches = as_count("num_microbatches", num_microbatches)
    check_pattern(name, pattern, sparsity)
    perturbation = as_transformation(name, "perturbation", perturbation)

    def init_fn(params):
        mask = jax.tree.map(lambda w: jnp.zeros_like(w, bool), params)
        return FisherMaskState(
            step=jnp.zeros((), jnp.int32),
            next_look=jnp.ones((), jnp.int32),
            mask=mask,
            extra_gradients=jnp.zeros((), jnp.float32),
            perturbation=perturbation.init(params),
        )

    def update_fn(
        updates, state, params, *, losses_fn, batch, weights=None, fisher_batch=None, **extra
    ):
        check_mask(name, state.mask, params)
        examples, weights = (batch, weights) if fisher_batch is None else (fisher_batch, None)
        size = batch_size(name, examples)
        if num_microbatches and size % num_microbatches:
            raise ValueError(
                f"{name}: `num_microbatches` must divide the {size} examples that the Fisher "
                f"information is taken over, got {num_microbatches}"
            )
        num_kept = rounded_down(num_entries(name, params) * (1 - at_step(sparsity, state.step)))

        length = tree.length(updates)
        scale = jnp.where(length.norm == 0, 1, length.scale)

        def look(params, examples, weights, scale):
            count = num_microbatches or size
            fisher = _fisher(losses_fn, params, examples, weights, scale, count)
            return chosen(name, pattern, fisher, num_kept)

        is_due = (state.step >= state.next_look) & (not losses_fn.evaluation.is_skipped_step)
        in_time = state.step + period - (state.step - 1) % period
        weights = unit_weights(examples, jnp.float32) if weights is None else weights
        mask = fast_convolutions(jax.lax.cond)(
            is_due,
            lambda: _where_the_compiler_shards(look, params)(params, examples, weights, scale),
            lambda: state.mask,
        )
        keywords = extra | {"losses_fn": losses_fn, "batch": batch}
        eps, inner = perturbation.update(updates, state.perturbation, params, **keywords)
        spent = jnp.where(is_due, size / batch_size(name, batch), 0).astype(jnp.float32)
        return tree.masked(eps, mask), FisherMaskState(
            step=next_step(state.step),
            next_look=jnp.where(is_due, in_time, state.next_look),
            mask=mask,
            extra_gradients=spent,
            perturbation=inner,
        )

    return closure_transformation(init_fn, update_fn, name=name)


def _fisher(
    losses_fn: LossesClosure,
    params: Any,
    examples: Any,
    weights: Any,
    scale: jax.Array,
    num_microbatches: int,
) -> Any:
    """Return `Σ_j weight_j (scale ∇ℓ_j(w))²` over the examples of all devices.

    Only the order of the numbers counts. `scale`, nearly always 1, keeps the squares in range.
    """
    devices = losses_fn.evaluation.devices
    own_params = devices.pcast(params)

    def squares(example, weight):
        def loss(params):
            batch = jax.tree.map(lambda x: x[None], example)
            return tree.widen(losses_fn(params, batch))[0]

        g = tree.keep_floating(jax.grad(loss, allow_int=True)(own_params), params)
        return jax.tree.map(lambda g: weight * jnp.abs(tree.widen(g) * scale) ** 2, g)

    def add(total, part):
        several = jax.vmap(squares)(*part)
        return jax.tree.map(lambda t, x: t + jnp.sum(x, 0).astype(t.dtype), total, several), None

    zeros = jax.tree.map(
        lambda w: jnp.zeros_like(w, tree.real_dtype(w)) if tree.is_inexact(w) else w, own_params
    )
    total, _ = jax.lax.scan(
        add, devices.pcast(zeros), strided(num_microbatches, (examples, weights))
    )
    return jax.tree.map(devices.psum, total)


def _where_the_compiler_shards(look: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """Return `look`; on an Explicit mesh, the compiler chooses the shardings inside it.

    Inside `look`, there are single examples and flattened leaves. They have no sharding that a loss
    could name. The result, a mask, is sharded like the parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return look
    specs = jax.tree.map(lambda w: PartitionSpec(*jax.typeof(w).sharding.spec), params)
    return jax.sharding.auto_axes(look, out_sharding=specs)
