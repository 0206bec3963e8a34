"""One call before training: is the step what its author thinks it is?"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from samx.core.hyperparams import check_function, check_static_number
from samx.core.inspection import Update, checksum, inspecting
from samx.core.tree import is_inexact

Name = tuple[str, ...]
Leaves = dict[Name, Any]


def preflight(step: Callable[..., Any], *args: Any, rtol: float = 1e-3) -> list[str]:
    """Run your training step once, on copies of its arguments, and report what is wrong with it.

        for problem in samx.preflight(step, params, opt_state, batch):
            print(problem)

    It finds:

    - An incoming gradient that is not the gradient of the closure: scaled, summed or already
      averaged over devices, not conjugated, or changed by what stands in front in the chain.
    - A step that is mapped over devices without `samx.data_parallel`.
    - `value_fn` and `losses_fn` that are not the same objective, or a `value` that is not the loss
      at the parameters. A step that passes both closures works with every variant. If they differ,
      for example by a regularizer, a change of the variant silently changes the loss.
    - A perturbation that half precision rounds away.
    - Leaves that are perturbed although the step does not train them.
    - A step without any update of samx.

    Args:
        step: Your own step, compiled or not: a function under `jax.jit`, `jax.pmap`,
            `jax.shard_map` or `nnx.jit`, or a plain one.
        args: Its arguments, as you would pass them in training. They are copied, so that a step
            may donate them, and do not change.
        rtol: Relative tolerance of the comparisons, > 0; default 1e-3, or 8 times the machine
            epsilon of half-precision parameters.

    Returns:
        One line for each problem, which says what to change. No line if nothing was found.

    Raises:
        TypeError: If `step` is not a function.
        ValueError: If `rtol` is not above 0. What the step raises is passed through.

    Example:
        The optimizer stands in front of SAM:

        >>> import jax, jax.numpy as jnp, optax, samx
        >>> tx = optax.chain(optax.sgd(0.1), samx.sam(0.05))
        >>> @jax.jit
        ... def step(w, state):
        ...     value_fn = lambda w: w @ w
        ...     value, grads = jax.value_and_grad(value_fn)(w)
        ...     updates, state = tx.update(grads, state, w, value=value, value_fn=value_fn)
        ...     return optax.apply_updates(w, updates), state
        >>> w = jnp.ones(2)
        >>> samx.preflight(step, w, tx.init(w))
        ['sam: the incoming gradient is -0.1 times ... Put samx first in the chain...']

    References:
        README, "The contract".

    Notes:
        What is done on purpose is reported too, for example clipping in front of SAM: the report is
        not an error. The step is traced again, with one more gradient in it, and compiled; your
        compiled step and its cache stay as they are. Call it where the parameters have been trained
        for a few steps, too: zero gradients show nothing. Cost: one compilation, one step with an
        additional gradient and a copy of the arguments.
    """
    from jax.experimental.xla_metadata import set_xla_metadata  # `import jax` does not load it

    check_function("step", step, len(args))
    check_static_number("rtol", rtol, 0, excluded=0)
    copies = jax.tree.map(_copied, args)
    # Other metadata make JAX trace functions again that it has compiled already.
    with inspecting() as found, set_xla_metadata(samx="preflight"):
        results = step(*copies)
        jax.block_until_ready(results)
        jax.effects_barrier()
    updates = [update for update in found if update.seen]
    if not updates:
        return [
            "preflight: the step has no update of samx. Pass the function itself, or its jax.jit, "
            "not a compiled program; in Flax use samx.flax.TrainState"
        ]
    problems = []
    for update in updates:
        tolerance = max(rtol, 8 * update.eps if update.eps > 1e-4 else 0.0)
        problems += [f"{update.name}: {problem}" for problem in _problems(update, tolerance)]
        frozen = _frozen(update, args, (results, copies))
        if frozen:
            problems.append(
                f"{update.name}: {', '.join(frozen)} are perturbed, but the step does not train "
                "them. They take a part of the radius. Write samx.freeze(tx, mask)"
            )
    return list(dict.fromkeys(problems))


def _problems(update: Update, rtol: float) -> Iterator[str]:
    seen, points = update.seen, update.points
    if _is_mapped_without_means(update, rtol):
        yield (
            f"all {len(seen)} devices got the same gradient, but each has another loss, so that "
            "their parameters drift apart. Write samx.data_parallel(tx, axis_name)"
        )
    else:
        yield from (problem for numbers in seen[:1] for problem in _of_gradient(numbers, rtol))
    for numbers in seen[:1]:
        yield from _of_losses(numbers, rtol)
    shares = [float(p["arrived"] / p["length"]) for p in points if p["length"] > 0]
    if shares and min(shares) < 0.9:
        yield (
            f"half precision rounds {1 - min(shares):.0%} of the perturbation away. Leave "
            "perturb_dtype at float32, or keep the parameters in float32"
        )


def _is_mapped_without_means(update: Update, rtol: float) -> bool:
    seen = [numbers for numbers in update.seen if "incoming_norm" in numbers]
    if len(seen) < 2:
        return False

    def spread(key):
        values = np.array([float(numbers[key]) for numbers in seen])
        return np.ptp(values) / max(np.max(np.abs(values)), np.finfo(np.float32).tiny)

    return spread("incoming_norm") < 1e-6 and spread("norm") > rtol


def _of_gradient(numbers: dict[str, Any], rtol: float) -> Iterator[str]:
    if "difference" not in numbers:
        return
    got, wanted, cosine = (float(numbers[k]) for k in ("incoming_norm", "norm", "cosine"))
    if float(numbers["difference"]) <= rtol * max(got, wanted):
        return
    if got == 0 or wanted == 0:
        zero, other = ("incoming gradient", wanted) if got == 0 else ("closure's gradient", got)
        yield (
            f"the {zero} is zero, the other is {other:.4g} long. Pass the gradient of the closure"
        )
    elif float(numbers["cosine_of_conjugate"]) > max(1 - rtol, cosine):
        yield (
            "the incoming gradient is not conjugated. Parameters are complex: pass "
            "jax.tree.map(jnp.conj, grads), as to every optimizer of optax"
        )
    elif abs(cosine) > 1 - rtol:
        factor = np.copysign(got / wanted, cosine)
        yield (
            f"the incoming gradient is {factor:.4g} times the gradient of the closure. Put samx "
            "first in the chain, take both gradients from the same loss (a loss scale: "
            "samx.scale_loss), and means over devices from samx.data_parallel"
        )
    else:
        yield (
            f"the incoming gradient is not that of the closure (cosine {cosine:.4g}, "
            f"{got / wanted:.4g} times as long). Put samx first in the chain, before clipping and "
            "weight decay, and use the same batch, masks and loss in both. With `merge_fn`, the "
            "closure takes the merged weights"
        )


def _of_losses(numbers: dict[str, Any], rtol: float) -> Iterator[str]:
    for key, what, fix in (
        ("value", "`value`", "pass the loss at the parameters, as `value_fn` returns it"),
        ("mean_of_losses", "the mean of `losses_fn`", "they must be the same objective"),
        (
            "mean_of_two_parts",
            "the mean of `loss_on_logits` after `apply_fn`",
            "they must be the same objective",
        ),
    ):
        if key in numbers and "loss" in numbers:
            got, wanted = float(numbers[key]), float(numbers["loss"])
            if not np.isclose(got, wanted, rtol=rtol, atol=1e-6):
                yield f"{what} is {got:.8g}, but `value_fn` gives {wanted:.8g}; {fix}"


def _frozen(update: Update, before: Any, after: Any) -> list[str]:
    """Return the names of the leaves that are perturbed, but that the step leaves as they are."""
    names = [_name(path) for path in update.paths]
    shapes = dict(zip(names, update.shapes, strict=True))
    sums = dict(zip(names, update.seen[0]["sums"], strict=True))
    old = next((part for part in _parts(before, shapes) if _has_sums(part, sums)), None)
    changed = [part for part in _parts(after, shapes) if old and _distance(part, old) > 0]
    if old is None or not changed or not update.points:
        return []
    new = min(changed, key=lambda part: _distance(part, old))
    moves = np.max([point["moves"] for point in update.points], axis=0)
    return [
        jax.tree_util.keystr(path)
        for path, name, move in zip(update.paths, names, moves, strict=True)
        if move > 0 and jnp.array_equal(old[name], new[name])
    ]


def _parts(tree: Any, shapes: dict[Name, tuple[int, ...]]) -> list[Leaves]:
    """Return the parts of a tree that have a leaf of each of these names and shapes."""
    parts: dict[Name, Leaves] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        whole = _name(path)
        for name, shape in shapes.items():
            start = len(whole) - len(name)
            if whole[start:] == name and jnp.shape(leaf) == shape and not _is_deleted(leaf):
                parts.setdefault(whole[:start], {})[name] = leaf
    return [part for part in parts.values() if part.keys() == shapes.keys()]


def _name(path: Any) -> Name:
    """Return the names along a key path, alike for dicts, attributes and `nnx.State`s."""
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path]
    while names and names[-1] in ("value", "raw_value"):
        names.pop()
    return tuple(names)


def _has_sums(part: Leaves, sums: dict[Name, Any]) -> bool:
    return all(np.isclose(checksum(part[name]), x, rtol=1e-4) for name, x in sums.items())


def _distance(a: Leaves, b: Leaves) -> float:
    return sum(float(checksum(jnp.subtract(a[name], b[name]))) for name in a if is_inexact(b[name]))


def _is_deleted(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.is_deleted()


def _copied(leaf: Any) -> Any:
    return jnp.array(leaf, copy=True) if isinstance(leaf, jax.Array) else leaf
