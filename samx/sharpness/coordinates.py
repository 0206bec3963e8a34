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
        name: Name of the measure in error messages.
        keyword: Name of the parameters in error messages.
        params: The parameters.
        start: Their coordinates.
        size: The number of coordinates, P.
        dtype: The dtype of inner products of vectors.
    """

    def __init__(self, name: str, params: Any, keyword: str = "params"):
        check_params(name, params, keyword)
        self.name, self.keyword, self.params = name, keyword, params
        self.start = self._split(params)
        self.size = sum(x.size for x in self.start)
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
            tree.check_like(keyword, vector, self.keyword, self.params)
            tree.check_arrays(keyword, vector)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from error
        return self._coordinates(vector)

    def stack(self, keyword: str, vectors: Any) -> Vector:
        """Return the coordinates `[k, ...]` of a tree like `params` with one more axis in front."""
        shapes = [jnp.shape(x) for x in jax.tree.leaves(vectors) if tree.is_array(x)]
        count = max((shape[0] for shape in shapes if shape), default=1)
        if not count:
            raise ValueError(f"{self.name}: `{keyword}` must hold at least one vector, got none")
        like = jax.tree.map(
            lambda w: jax.ShapeDtypeStruct((count, *jnp.shape(w)), jnp.result_type(w)), self.params
        )
        try:
            tree.check_like(keyword, vectors, self.keyword, like)
            tree.check_arrays(keyword, vectors)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{self.name}: {error}; `{keyword}` has one more axis in front"
            ) from error
        return self._coordinates(vectors)

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

    def _coordinates(self, vector: Any) -> Vector:
        """Return the coordinates of one vector, or of several at once."""
        found = []
        others = jax.tree.structure(self.params).flatten_up_to(vector)
        for x, w in zip(others, jax.tree.leaves(self.params), strict=True):
            if jnp.iscomplexobj(w):
                found += [jnp.real(x), jnp.imag(x)]
            elif tree.is_inexact(w):
                found.append(jnp.asarray(x))
        return [x.astype(y.dtype) for x, y in zip(found, self.start, strict=True)]

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


def check_params(name: str, params: Any, keyword: str = "params") -> None:
    """Require a tree of arrays with at least one floating number, and without random keys."""
    try:
        tree.check_arrays(keyword, params)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    tree.check_no_keys(name, params, keyword)
    if not any(jnp.size(x) for x in jax.tree.leaves(params) if tree.is_inexact(x)):
        raise ValueError(f"{name}: `{keyword}` must hold floating numbers, got none")


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
