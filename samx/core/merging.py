"""Parameters seen through a map: where losses take merged weights, and parameters are adapters."""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from samx.core import tree
from samx.core.hyperparams import check_function


class Merged(NamedTuple):
    """Weights that stand where the parameters are expected, to be used as they are.

    A closure that sees its parameters through a map does not apply the map to `Merged` weights.

    Attributes:
        weights: What the map returned, or a point near it.
    """

    weights: Any


def view(merge_fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the function `params -> weights` that leaves `Merged` weights as they are."""
    check_function("merge_fn", merge_fn, 1)

    def weights_of(params):
        if isinstance(params, Merged):
            return params.weights
        weights = merge_fn(params)
        tree.check_arrays("merge_fn(params)", weights)
        return weights

    return weights_of


def taking_weights(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a caller's closure; its errors say that it gets what `merge_fn` returns."""

    @wraps(fn)
    def of_weights(weights, *rest):
        try:
            return fn(weights, *rest)
        except Exception as error:
            error.add_note(
                "samx: with `merge_fn`, closures take what `merge_fn(params)` returns, and not "
                "`params`."
            )
            raise

    return of_weights
