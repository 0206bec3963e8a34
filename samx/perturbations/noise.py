"""Random perturbations, which need no gradient. Public in `samx.perturbations`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from samx.core import draws, tree
from samx.core.aliases import Radius, ScalarOrSchedule, Transformation
from samx.core.hyperparams import RandomKey, at_step, check_hyperparam, next_step
from samx.core.transformation import checked_transformation
from samx.perturbations.balls import along, times
from samx.perturbations.metrics import Metric, checked_metric


class NoiseState(NamedTuple):
    """State of a random perturbation.

    Attributes:
        step: int32, optimizer steps so far; schedules count them.
        key: uint32, the data of the random key of all draws (`jax.random.key_data`).
    """

    step: jax.Array
    key: jax.Array


def gaussian_noise(
    sigma: ScalarOrSchedule, metric: Metric | None = None, *, key: int | jax.Array = 0
) -> Transformation:
    """Perturb by Gaussian noise of a given standard deviation.

        n ~ N(0, I)
        T = metric(w)
        ε = σ T n

    Args:
        sigma: Standard deviation σ ≥ 0, a number or a schedule over the optimizer's steps.
        metric: `params -> T`; default `identity()`. `filterwise()` is the noise of RWP and LPF-SGD.
        key: Seed or random key of the draws, the same on all devices; default 0.

    Returns:
        An optax transformation `g -> ε`, which uses only the shapes of g.

    Raises:
        ValueError: If `sigma` is a negative number.
        TypeError: If `sigma` is neither a number nor a schedule; in `init`, if `key` is neither a
            seed nor a random key.

    Example:
        >>> import jax.numpy as jnp
        >>> from samx.perturbations import filterwise, gaussian_noise
        >>> noise = gaussian_noise(0.1, filterwise())
        >>> w = {"kernel": jnp.array([[0.0, 30.0], [0.0, 40.0]])}
        >>> eps, _ = noise.update(w, noise.init(w), w)
        >>> [bool(jnp.all(eps["kernel"][:, i] == 0)) for i in range(2)]  # the first filter is zero
        [True, False]

    References:
        Bisla, Wang, Choromanska, AISTATS 2022, https://arxiv.org/abs/2201.08025

    Notes:
        The noise of step t depends on the key and t alone, so that a resumed run draws the same.
        Use it in `lpf_sgd`, which needs one gradient per step, rather than in `sharpness_aware`,
        which needs two. Complex entries get noise whose real and imaginary parts have the variance
        σ²/2 each. Cost: one draw per parameter; one key in the state. `static_args`: `metric`.
    """
    check_hyperparam("sigma", sigma, 0)
    metric = checked_metric("gaussian_noise", metric)

    def scale(noise, params, sigma):
        return tree.scaled(sigma, jax.tree.map(times, noise, metric(params)))

    return _noise("gaussian_noise", scale, sigma, key)


def sphere_noise(
    rho: Radius, metric: Metric | None = None, *, key: int | jax.Array = 0
) -> Transformation:
    """Move to a random point on a sphere.

        n ~ N(0, I)
        T = metric(w)
        ε = ρ T n / ‖n‖                          so that  ‖ε / T‖ = ρ

    Args:
        rho: Radius ρ ≥ 0, a number or a schedule over the optimizer's steps.
        metric: `params -> T`; default `identity()`.
        key: Seed or random key of the draws, the same on all devices; default 0.

    Returns:
        An optax transformation `g -> ε`, which uses only the shapes of g.

    Raises:
        ValueError: If `rho` is a negative number.
        TypeError: If `rho` is neither a number nor a schedule; in `init`, if `key` is neither a
            seed nor a random key.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from samx.perturbations import sphere_noise
        >>> noise, w = sphere_noise(0.5), {"a": jnp.ones(3), "b": jnp.ones(())}
        >>> state = noise.init(w)
        >>> for _ in range(2):
        ...     eps, state = noise.update(w, state, w)
        ...     print(round(float(optax.tree.norm(eps)), 4))
        0.5
        0.5

    References:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412: a random direction in place of
        the gradient's.

    Notes:
        The baseline for every ascent of the same length: `lpf_sgd(noise=sphere_noise(rho))`. As in
        `gaussian_noise`, a draw depends on the key and the step alone. Cost: one draw per
        parameter, and one norm; one key in the state. `static_args`: `metric`.
    """
    check_hyperparam("rho", rho, 0)
    metric = checked_metric("sphere_noise", metric)

    def scale(noise, params, radius):
        unit = jax.tree.map(jnp.ones_like, noise)
        on_sphere = along(noise, unit, radius)
        return jax.tree.map(times, on_sphere, metric(params))

    return _noise("sphere_noise", scale, rho, key)


def _noise(
    name: str, scale: Callable[[Any, Any, Any], Any], size: ScalarOrSchedule, key: Any
) -> Transformation:
    """Return the perturbation `scale(n, params, size)` of standard normal numbers n."""
    keys = RandomKey(key)

    def init_fn(params):
        del params
        return NoiseState(jnp.zeros((), jnp.int32), keys.data())

    def update_fn(updates, state, params=None, **extra):
        draw = extra.get("draw", 0)  # several of one step, one for each microbatch
        noise = draws.normal_like(keys.of(state.key), state.step, updates, draw)
        eps = scale(noise, params, at_step(size, state.step))
        return eps, NoiseState(next_step(state.step), state.key)

    return checked_transformation(name, init_fn, update_fn)
