"""Scales of each layer, for a network that is wider than the one that was tuned.

The maximal update parametrization (µP) multiplies the learning rate of each layer by a power of the
width, and µP² its perturbation too. Then features change by the same amount at any width, and the
best learning rate and radius of a narrow network remain the best ones of a wide network.

    s = (fan_out / base fan_out) / (fan_in / base fan_in)      of each leaf

Both networks are given by their parameters, or by the shapes of their parameters:
`jax.eval_shape(model.init, ...)`. A network of base width has `s = 1` everywhere.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from samx.core.hyperparams import (
    as_count,
    as_list,
    check_choice,
    check_function,
    check_static_number,
)
from samx.core.tree import check_arrays
from samx.perturbations.metrics import names_of
from samx.perturbations.mup_ball import matched

__all__ = ["flax_fans", "layer_scales", "learning_rates"]

Fans: TypeAlias = Callable[[Any, tuple[int, ...]], tuple[int, int]]


def flax_fans(path: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the fan-in and fan-out of a parameter of a Flax layer, from its name and shape.

        kernel of Dense, Conv              [..., in, out]          all axes but the last, the last
        kernel of query, key, value        [in, heads, head_dim]   the first, all others
        kernel of out, in attention        [heads, head_dim, out]  all axes but the last, the last
        embedding                          [vocabulary, features]  1, the last
        bias, scale, any vector or scalar                          1, all axes

    Args:
        path: Key path of the leaf, as `jax.tree_util.tree_map_with_path` passes it.
        shape: Shape of the leaf.

    Returns:
        `(fan_in, fan_out)`. Only their growth with the width matters, so the spatial axes of a
        convolution may be counted as inputs.

    Raises:
        Nothing.

    Example:
        If these rules are wrong for a layer, write a function that treats this layer first:

        >>> import jax, samx
        >>> def fans(path, shape):  # a table of classes, [features, classes, prototypes]
        ...     if "prototypes" in jax.tree_util.keystr(path):
        ...         return shape[0], shape[1] * shape[2]
        ...     return samx.mup.flax_fans(path, shape)
        >>> wide = {"prototypes": jax.numpy.zeros((8, 3, 5)), "bias": jax.numpy.zeros(8)}
        >>> base = {"prototypes": jax.numpy.zeros((2, 3, 5)), "bias": jax.numpy.zeros(2)}
        >>> samx.mup.layer_scales(wide, base, fans=fans)
        {'bias': 4.0, 'prototypes': 0.25}

    References:
        `flax.linen` and `flax.nnx`, whose layers share these names.

    Notes:
        An embedding that is also used as the output layer (`attend`) is scaled as an embedding. A
        depthwise convolution has one input per output, and is scaled like a vector. Cost: none.
    """
    parent, name = ["", "", *names_of(path)][-2:]
    shape = tuple(as_count("shape", length, 0) for length in as_list("shape", shape, "integers"))
    if len(shape) < 2 or name in ("bias", "scale"):
        return 1, math.prod(shape)
    if name == "embedding":
        return 1, shape[-1]
    if parent in ("query", "key", "value"):
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1]


def layer_scales(params: Any, base_params: Any, *, fans: Fans = flax_fans) -> Any:
    """Return how much further each layer may move than in the network of base width.

        s = (fan_out / base fan_out) / (fan_in / base fan_in)

    Pass it to `samx.mup_sam`. It also gives the learning rates of SGD. If all widths are r times
    those of the base network:

        embeddings, input layers, biases, norm scales    r
        hidden layers                                    1
        output layer                                     1 / r
        its bias                                         1

    Args:
        params: Parameters of the network, or their `jax.ShapeDtypeStruct`s.
        base_params: The same for the network of base width: the same tree, other shapes.
        fans: `(path, shape) -> (fan_in, fan_out)`; default `flax_fans`.

    Returns:
        A tree like `params` of Python numbers.

    Raises:
        ValueError: If the two trees have different leaves, or a leaf has different numbers of axes.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, samx
        >>> def shapes(width):
        ...     net = nn.Sequential([nn.Dense(width), nn.Dense(width), nn.Dense(10)])
        ...     return jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 64)))["params"]
        >>> scales = samx.mup.layer_scales(shapes(1024), shapes(64))
        >>> [(scales[layer]["kernel"], scales[layer]["bias"]) for layer in sorted(scales)]
        [(16.0, 16.0), (1.0, 16.0), (0.0625, 1.0)]

    References:
        Haas, Xu, Cevher, Vankadara, NeurIPS 2024, https://arxiv.org/abs/2411.00075; Yang, Simon,
        Bernstein, "A Spectral Condition for Feature Learning", 2023,
        https://arxiv.org/abs/2310.17813 (steps of spectral norm √(fan_out / fan_in)).

    Notes:
        The compact rule is derived from the exponents in the first author's code. It reproduces all
        of them except that of the output bias: there the perturbation of the output bias grows with
        the width under layer-wise normalization, here it does not. For `flax.nnx` pass both trees
        as optimizers see them, `nnx.as_pure(nnx.state(model, nnx.Param))`. Cost: none.
    """

    def scale(growth_in, growth_out):
        return growth_out / growth_in

    return _from_growth("layer_scales", params, base_params, fans, scale)


def learning_rates(
    params: Any,
    base_params: Any,
    optimizer: Literal["sgd", "adam"] = "sgd",
    *,
    fans: Fans = flax_fans,
) -> Any:
    """Return the learning rate of each layer, relative to the network of base width.

        "sgd":   (fan_out / base fan_out) / (fan_in / base fan_in)
        "adam":  1 / (fan_in / base fan_in)

    Args:
        params: As for `layer_scales`.
        base_params: As for `layer_scales`.
        optimizer: "sgd", the default, for updates of the size of the gradient, with or without
            momentum; "adam" for updates with entries of size one (Adam and similar optimizers).
        fans: As for `layer_scales`.

    Returns:
        A tree like `params` of Python numbers.

    Raises:
        ValueError: As for `layer_scales`; or if `optimizer` is neither "sgd" nor "adam".

    Example:
        Multiply the steps before the weight decay, which must not be multiplied:

        >>> import jax, jax.numpy as jnp, optax, samx
        >>> wide, base = {"kernel": jnp.ones((8, 8))}, {"kernel": jnp.ones((2, 2))}
        >>> rates = samx.mup.learning_rates(wide, base, "adam")
        >>> tx = optax.chain(
        ...     samx.mup_sam(0.05, samx.mup.layer_scales(wide, base)),
        ...     optax.scale_by_adam(),
        ...     optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, rates)),
        ...     optax.add_decayed_weights(0.01),
        ...     optax.scale_by_learning_rate(1e-3),
        ... )
        >>> rates
        {'kernel': 0.25}

    References:
        Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter
        Transfer", 2022, https://arxiv.org/abs/2203.03466; https://arxiv.org/abs/2411.00075

    Notes:
        Use these rates with the initialization of µP: variance 1 / fan_in, as in `lecun_normal`,
        except for the output layer, whose variance is 1 / r of that, or zero. Cost: none.
    """
    check_choice("optimizer", optimizer, ("sgd", "adam"))

    def rate(growth_in, growth_out):
        return (growth_out if optimizer == "sgd" else 1.0) / growth_in

    return _from_growth("learning_rates", params, base_params, fans, rate)


def _from_growth(
    name: str, params: Any, base_params: Any, fans: Fans, rule: Callable[[float, float], float]
) -> Any:
    """Return `rule(growth of fan_in, growth of fan_out)` for every leaf."""
    check_function("fans", fans, 2)
    check_arrays("params", params, has_shapes=True)
    check_arrays("base_params", base_params, has_shapes=True)
    base_params = matched(name, "base_params", base_params, "params", params)

    def number(path, leaf, base_leaf):
        shapes = jnp.shape(leaf), jnp.shape(base_leaf)
        if len(shapes[0]) != len(shapes[1]) or 0 in (*shapes[0], *shapes[1]):
            raise ValueError(
                f"{name}: `base_params`{jax.tree_util.keystr(path)} must have as many axes as "
                f"`params`, none of length 0, got shapes {shapes[1]} and {shapes[0]}"
            )
        (fan_in, fan_out), (base_in, base_out) = (_checked(fans(path, shape)) for shape in shapes)
        return rule(fan_in / base_in, fan_out / base_out)

    return jax.tree_util.tree_map_with_path(number, params, base_params)


def _checked(fans: Any) -> tuple[int, int]:
    if not isinstance(fans, tuple | list) or len(fans) != 2:
        raise TypeError(f"`fans` must return two numbers, fan-in and fan-out, got {fans!r}")
    for fan in fans:
        check_static_number("fans(path, shape)", fan, 0, excluded=0)
    return fans[0], fans[1]
