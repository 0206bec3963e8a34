"""Where vectors live: the parameters as a list of real arrays in float32 or wider."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from samx.core import tree
from samx.core.sharp import perturbed

Vector = list[jax.Array]


class Coordinates:
    """The real coordinates of parameters.

    A half-precision leaf is widened to float32. A complex leaf is two arrays, its real and its
    imaginary part. A leaf of integers has no coordinates.

    Attributes:
        params: The parameters.
        start: Their coordinates.
        size: The number of coordinates, P.
        dtype: The dtype of inner products of vectors.
    """

    def __init__(self, name: str, params: Any):
        tree.check_arrays("params", params)
        self.name, self.params = name, params
        self.start = self._split(params)
        self.size = sum(x.size for x in self.start)
        if not self.size:
            raise ValueError(f"{name}: `params` must hold floating numbers, got none")
        self.dtype = tree.real_dtype(*self.start)

    def point(self, x: Vector) -> Any:
        """Return the parameters with these coordinates; integers are those of `params`."""
        return self._join(x, lambda w: w)

    def vector(self, x: Vector, leading: tuple[int, ...] = ()) -> Any:
        """Return a vector as a tree like `params`, with zeros at the integers.

        A stack of vectors has the axes `leading` in front.
        """
        return self._join(x, lambda w: jnp.zeros((*leading, *jnp.shape(w)), jnp.result_type(w)))

    def of(self, keyword: str, vector: Any) -> Vector:
        """Return the coordinates of a tree like `params`, in the dtypes of `start`."""
        try:
            tree.check_like(keyword, vector, "params", self.params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from error
        found = []
        for x, w in zip(self._leaves(vector), jax.tree.leaves(self.params), strict=True):
            if jnp.iscomplexobj(w):
                found += [jnp.real(x), jnp.imag(x)]
            elif tree.is_inexact(w):
                found.append(jnp.asarray(x))
        return [x.astype(y.dtype) for x, y in zip(found, self.start, strict=True)]

    def moved(self, eps: Any) -> Vector:
        """Return the coordinates of `params + eps`, which a perturbation made."""
        return self._split(perturbed(self.params, eps, "float32"))

    def random(self, key: jax.Array, sample: Callable[..., jax.Array]) -> Vector:
        """Draw a vector; `sample(key, shape, dtype)` draws the numbers of one array."""
        keys = jax.random.split(key, len(self.start))
        return [
            sharded_like(x, sample(k, x.shape, x.dtype))
            for k, x in zip(keys, self.start, strict=True)
        ]

    def _leaves(self, vector: Any) -> list[Any]:
        return jax.tree.structure(self.params).flatten_up_to(vector)

    def _split(self, params: Any) -> Vector:
        found = []
        for leaf in map(tree.widen, filter(tree.is_inexact, jax.tree.leaves(params))):
            is_complex = jnp.iscomplexobj(leaf)
            found += [jnp.real(leaf), jnp.imag(leaf)] if is_complex else [leaf]
        return found

    def _join(self, x: Vector, of_integers: Callable[[Any], Any]) -> Any:
        numbers = iter(x)

        def leaf(w):
            if jnp.iscomplexobj(w):
                return jax.lax.complex(next(numbers), next(numbers))
            return next(numbers) if tree.is_inexact(w) else of_integers(w)

        leaves, structure = jax.tree.flatten(self.params)
        return structure.unflatten([leaf(w) for w in leaves])


def sharded_like(like: Any, x: jax.Array) -> jax.Array:
    """Return `x` sharded like an array or the shape of one, if the mesh has explicit axes."""
    typed = like if isinstance(like, jax.ShapeDtypeStruct) else jax.typeof(like)
    sharding = typed.sharding
    return jax.sharding.reshard(x, sharding) if sharding and any(sharding.spec) else x


def signs(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw random signs."""
    return jax.random.rademacher(key, shape, dtype)


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw standard normal numbers."""
    return jax.random.normal(key, shape, dtype)


def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw numbers between -1 and 1."""
    return jax.random.uniform(key, shape, dtype, -1, 1)
