"""Split the parameters into static groups of layers, and select leaves: `None` marks the others."""

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.aliases import Transformation
from samx.core.closures import Closure
from samx.core.hyperparams import as_count, check_function

LayerGroups: TypeAlias = int | Callable[[Any, Any], Hashable]


def as_groups(groups: Any) -> LayerGroups:
    """Return a function as it is, and a count as a Python int."""
    if not callable(groups):
        return as_count("groups", groups)
    check_function("groups", groups, 2)
    return groups


def groups_of(groups: LayerGroups, params: Any) -> list[Any]:
    """Return for each group a tree of booleans, True at its leaves. Integers are in no group."""
    leaves = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if tree.is_inexact(leaf)
    ]
    if callable(groups):
        label_of = {path: groups(path, leaf) for path, leaf in leaves}
    else:
        sizes: dict[Any, int] = {}
        for path, leaf in leaves:
            sizes[_layer(path)] = sizes.get(_layer(path), 0) + jnp.size(leaf)
        parts = _even_parts(list(sizes.values()), min(groups, len(sizes)))
        part_of = dict(zip(sizes, parts, strict=True))
        label_of = {path: part_of[_layer(path)] for path, _ in leaves}
    return [
        jax.tree_util.tree_map_with_path(
            lambda path, _, label=label: path in label_of and label_of[path] == label, params
        )
        for label in dict.fromkeys(label_of.values())
    ]


def _layer(path: Any) -> Any:
    """Return the module of a leaf; in a flat tree the leaf itself."""
    return path[:-1] or path


def _even_parts(sizes: list[int], num_parts: int) -> list[int]:
    """Return the part of each layer. Parts are consecutive, not empty, and end at their share."""
    parts, part, seen = [], 0, 0
    for position, size in enumerate(sizes):
        parts.append(part)
        seen += size
        layers_left, parts_left = len(sizes) - position - 1, num_parts - part - 1
        is_full = seen * num_parts >= sum(sizes) * (part + 1)
        if parts_left and (is_full or layers_left == parts_left):
            part += 1
    return parts


def only(tree: Any, active: Any) -> Any:
    """Keep the active leaves, and put `None` at the others."""
    return jax.tree.map(lambda x, is_active: x if is_active else None, tree, active)


def filled(part: Any, whole: Any) -> Any:
    """Take the active leaves from `part`, and the others from `whole`."""
    return jax.tree.map(
        lambda x, other: other if x is None else x, part, whole, is_leaf=lambda x: x is None
    )


def seen_by_part(
    ball: optax.GradientTransformationExtraArgs, active: Any, whole: Any, value_fn: Closure
) -> Transformation:
    """Give the active leaves a perturbation of all parameters; other gradients are zero."""
    zeros = optax.tree.zeros_like(whole)

    def update_fn(updates, state, params=None, **keywords):
        del params
        keywords |= {"value_fn": value_fn}
        eps, state = ball.update(filled(updates, zeros), state, whole, **keywords)
        return only(eps, active), state

    return optax.GradientTransformationExtraArgs(ball.init, update_fn)


def share_of(part: Any, params: Any) -> float:
    """Return the share of the parameters that is in `part`."""
    active, whole = (sum(jnp.size(x) for x in jax.tree.leaves(tree)) for tree in (part, params))
    return active / whole
