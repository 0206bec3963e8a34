"""The Gaussian posterior that `samx.bsam` learns: draws, and predictions averaged over them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samx.core import tree
from samx.core.convolutions import fast_convolutions
from samx.core.hyperparams import RandomKey, as_count, check_function
from samx.core.sharp import perturbed
from samx.variants.bsam import BSAMState, posterior_noise

__all__ = ["average", "sample"]


def sample(opt_state: optax.OptState, params: Any, key: int | jax.Array) -> Any:
    """Draw parameters from the posterior of bSAM.

        n ~ N(0, I)
        return w + n / √(N s)

    Args:
        opt_state: A state that holds that of `samx.bsam`, as it is or inside wrappers.
        params: The parameters w, the mean of the posterior.
        key: Seed or random key of the draw.

    Returns:
        A tree like `params`. Half-precision leaves come in float32, in which the draw is not
        rounded away.

    Raises:
        ValueError: If `opt_state` does not hold exactly one state of `samx.bsam`, or `params` is
            not a tree like those that it was made for.
        TypeError: If `key` is neither a seed nor a random key.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> w = jnp.zeros(1000)
        >>> state = samx.bsam(0.1, num_examples=100, init_precision=4.0).init(w)
        >>> round(float(samx.posterior.sample(state, w, jax.random.key(0)).std()), 3)
        0.049

    References:
        Möllenhoff, Khan, "SAM as an Optimal Relaxation of Bayes", ICLR 2023,
        https://arxiv.org/abs/2210.01620

    Notes:
        Give each draw a key of its own: the same key gives the same draw, and the key of the
        training gives the noise of its next step. Under `jax.vmap` over
        keys, it gives many at once. Cost: one draw per parameter.
    """
    return _drawn(_state_of("sample", opt_state), params, _as_key(key))


def average(
    fn: Callable[[Any], Any],
    opt_state: optax.OptState,
    params: Any,
    key: int | jax.Array,
    draws: int = 32,
) -> Any:
    """Average a function of the parameters over the posterior of bSAM: its predictions.

        return the mean of fn(w_i) over draws w_1, ..., w_K

    Args:
        fn: `params -> values`, any tree of numbers: for a classifier
            `lambda p: jax.nn.softmax(model.apply(p, x))`. Average probabilities, not logits.
        opt_state: A state that holds that of `samx.bsam`.
        params: The parameters w, the mean of the posterior.
        key: Seed or random key of the draws.
        draws: Number K ≥ 1 of draws; default 32, the authors'.

    Returns:
        A tree like that of `fn`, in float32 or wider.

    Raises:
        ValueError: As `sample`, or if `draws` is below 1.
        TypeError: As `sample`, or if `fn` is not a function, or `draws` is not a Python int.

    Example:
        >>> import jax, jax.numpy as jnp, samx
        >>> w = jnp.array([1.0, 0.0])
        >>> state = samx.bsam(0.1, num_examples=10, init_precision=10.0).init(w)
        >>> mean = samx.posterior.average(lambda w: w ** 2, state, w, jax.random.key(0), draws=1000)
        >>> [round(float(x), 2) for x in mean]  # w² and the variance 1 / (10 · 10)
        [1.01, 0.01]

    References:
        Möllenhoff, Khan, ICLR 2023, https://arxiv.org/abs/2210.01620

    Notes:
        The draws run one after the other; one is in memory at a time. Turn dropout off, and use
        stored statistics of BatchNorm. Cost: K times `fn`.
    """
    check_function("fn", fn, 1)
    draws = as_count("draws", draws)
    state, key = _state_of("average", opt_state), _as_key(key)

    def value(i):
        values = fn(_drawn(state, params, jax.random.fold_in(key, i)))
        tree.check_arrays("fn(params)", values)
        return jax.tree.map(lambda x: tree.widen(jnp.asarray(x)) / draws, values)

    def add(total, i):
        return jax.tree.map(jnp.add, total, value(i)), None

    shapes = jax.eval_shape(value, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return fast_convolutions(jax.lax.scan)(add, zeros, jnp.arange(draws, dtype=jnp.int32))[0]


def _drawn(state: BSAMState, params: Any, key: jax.Array) -> Any:
    tree.check_arrays("params", params)
    tree.check_like("params", params, "opt_state.momentum", state.momentum)
    return perturbed(params, posterior_noise(state, key, params), "float32")


def _state_of(name: str, opt_state: Any) -> BSAMState:
    """Return the one state of bSAM in a state."""

    def is_ours(node):
        return isinstance(node, BSAMState)

    found = list(filter(is_ours, jax.tree.leaves(opt_state, is_leaf=is_ours)))
    if len(found) != 1:
        raise ValueError(
            f"{name}: `opt_state` must hold one state of samx.bsam, found {len(found)} in a "
            f"{type(opt_state).__name__}"
        )
    return found[0]


def _as_key(key: Any) -> jax.Array:
    keys = RandomKey(key)
    return keys.of(keys.data())
