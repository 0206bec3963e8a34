"""The perturbation of µP². Public in `samx.perturbations`; `samx.mup` computes the scales."""

import math
import re
from typing import Any, Literal

import jax

from samx.core import tree
from samx.core.aliases import Radius, Transformation
from samx.core.hyperparams import check_choice, check_number, check_static_number
from samx.perturbations.balls import ball


def mup_ball(
    rho: Radius,
    scales: Any,
    *,
    normalization: Literal["decoupled", "layerwise"] = "decoupled",
    width: float | None = None,
    norm_eps: float = 0.0,
) -> Transformation:
    """Perturb so that the effect on the features of each layer does not depend on the width.

        s = scales                                     (one number for each leaf, 1 at base width)
        "decoupled":  ε = ρ s g / (‖√s g‖ + norm_eps)
        "layerwise":  ε = ρ s g / (‖s g‖ / √width + norm_eps)

    Args:
        rho: Radius ρ ≥ 0 at base width, a number or a schedule.
        scales: Tree like `params` of numbers s ≥ 0, from `samx.mup.layer_scales`.
        normalization: How much each layer contributes to the norm. "decoupled", the default: the
            same at any width. "layerwise": scaled by the same powers of the width as the step,
            Definition 4 of the paper; in wide networks only input-like layers and biases
            matter for this norm.
        width: The width of the network divided by its base width; only with "layerwise".
        norm_eps: Added to the norm; default 0. A zero gradient gives a zero step.

    Returns:
        An optax transformation `g -> ε`. Half-precision gradients give a float32 step.

    Raises:
        ValueError: If `rho` or a scale is negative, `normalization` is unknown, `width` is not
            above 0, or `width` is missing with "layerwise" or given without it; in `update`, if
            `scales` does not match `params`.
        TypeError: If `rho` is not a number, array or schedule, or a scale is not a number.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import mup_ball
        >>> ball = mup_ball(0.3, {"hidden": 1.0, "bias": 4.0})
        >>> g = {"hidden": jnp.array([2.0]), "bias": jnp.array([1.0])}
        >>> eps, _ = ball.update(g, ball.init(g), g)
        >>> [round(float(x[0]), 3) for x in (eps["hidden"], eps["bias"])]
        [0.212, 0.424]

    References:
        Haas, Xu, Cevher, Vankadara, "µP²: Effective Sharpness Aware Minimization Requires
        Layerwise Perturbation Scaling", NeurIPS 2024, https://arxiv.org/abs/2411.00075

    Notes:
        "decoupled" is `metric_ball` with the metric `constants(√s)`. Cost: one norm, elementwise
        work. `static_args`: `scales`, `normalization`, `width`.
    """
    check_choice("normalization", normalization, ("decoupled", "layerwise"))
    check_number("norm_eps", norm_eps, 0)
    if (width is None) == (normalization == "layerwise"):
        raise ValueError(
            "mup_ball: `width`, how many times as wide as its base the network is, must be given "
            f"with normalization='layerwise' and only there, got {width!r}"
        )
    if width is not None:
        check_static_number("width", width, 0, excluded=0)
    _check_scales(scales)

    def weight(s):
        return math.sqrt(s) if width is None else s / math.sqrt(width)

    def climb(g, params, radius):
        s = matched("mup_ball", "scales", scales, "params", params)
        length = tree.length(jax.tree.map(lambda g, s: g * weight(s), g, s))
        step = tree.with_length(g, radius, length, norm_eps)
        return jax.tree.map(lambda x, s: x * s, step, s)

    return ball(rho, climb)


def matched(name: str, keyword: str, tree: Any, other: str, like: Any) -> Any:
    """Return `tree` in the structure of `like`; require that both have the same leaf paths.

    The containers may differ: dict or `FrozenDict`, `nnx.State` with or without its variables.
    """
    got, wanted = (
        {
            re.sub(r"\.(raw_)?value$", "", jax.tree_util.keystr(path)): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(t)
        }
        for t in (tree, like)
    )
    missing, surplus = [p for p in wanted if p not in got], [p for p in got if p not in wanted]
    if missing or surplus:
        raise ValueError(
            f"{name}: `{keyword}` must have the leaves of `{other}`, one for one; it lacks "
            f"{missing or 'none'} and has {surplus or 'none'} that are not there"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [got[path] for path in wanted])


def _check_scales(scales: Any) -> None:
    if not jax.tree.leaves(scales):
        raise ValueError(
            f"mup_ball: `scales` must have a number for each parameter, got {scales!r}"
        )
    for path, s in jax.tree_util.tree_leaves_with_path(scales):
        check_static_number(f"scales{jax.tree_util.keystr(path)}", s, 0)
