"""The table of variants: one row each, from which every suite is generated."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import optax
import problem

import samx
from samx.perturbations import layerwise, linf_ball, metric_ball, on_leaves

Hyper = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What the suites need to know of a variant.

    Attributes:
        factory: Takes the hyperparameters by keyword (and the base first, where it wraps one).
        shape: "chain" stands in front of its base, "wraps" takes it as an argument.
        hyper: Every numeric hyperparameter, at the value that the tests use.
        passes: Forward and backward passes inside one `update`.
        needs: Closures without which `update` must fail.
        uses_gradient: Whether the incoming gradient is read (one more gradient per step).
        has_base_limit: Whether `rho=0` is the base optimizer.
        needs_batch_like: Whether the factory takes `batch_like`.
        static_args: What `optax.inject_hyperparams` must leave alone.
        climbs: Whether `sharp_loss` and `loss` are of the same batch, so that it is the higher one.
    """

    factory: Callable[..., optax.GradientTransformation]
    shape: Literal["chain", "wraps"]
    hyper: Hyper
    passes: tuple[int, int]
    needs: tuple[str, ...] = ("value_fn",)
    uses_gradient: bool = True
    has_base_limit: bool = True
    needs_batch_like: bool = False
    static_args: tuple[str, ...] = ()
    climbs: bool = True

    @property
    def gradients(self) -> float:
        return self.passes[1] + self.uses_gradient

    def build(
        self,
        base: optax.GradientTransformation | None = None,
        batch_like: Any = None,
        inject: bool = False,
        **changes: Any,
    ) -> optax.GradientTransformationExtraArgs:
        """The whole optimizer, with some hyperparameters changed."""
        base = optax.sgd(0.1, momentum=0.9) if base is None else base
        hyper = self.hyper | changes
        if self.needs_batch_like:
            if batch_like is None:
                batch_like = jax.eval_shape(lambda: problem.batch_at(problem.make("float32")[0], 0))
            hyper["batch_like"] = batch_like
        factory = self.factory
        if inject:
            factory = optax.inject_hyperparams(factory, static_args=self.static_args)
        if self.shape == "wraps":
            return optax.with_extra_args_support(factory(base, **hyper))
        return optax.chain(factory(**hyper), base)


def _ball(make: Callable[..., Any], ascent_steps: int = 1) -> Callable[..., Any]:
    return lambda rho: samx.sharpness_aware(make(rho), ascent_steps)


def _is_weight(path: Any, leaf: Any) -> bool:
    return path[-1].key.startswith("W")


SAMPA = Case(
    samx.sampa,
    "wraps",
    {"rho": 0.1, "lam": 0.2},
    (2, 2),
    needs=("losses_fn", "batch"),
    uses_gradient=False,
    has_base_limit=False,
    needs_batch_like=True,
    static_args=("batch_like",),
    climbs=False,
)
VARIANTS = {
    "sam": Case(samx.sam, "chain", {"rho": 0.05}, (1, 1)),
    "asam": Case(samx.asam, "chain", {"rho": 0.5, "eta": 0.01}, (1, 1), static_args=("is_scaled",)),
    "sampa": SAMPA,
    # The same, computed or measured differently: every row must keep the whole contract.
    "sampa, separate": replace(SAMPA, factory=partial(samx.sampa, gradients="separate")),
    "two ascent steps": Case(_ball(metric_ball, ascent_steps=2), "chain", {"rho": 0.05}, (2, 2)),
    "layerwise": Case(
        _ball(lambda rho: metric_ball(rho, layerwise())), "chain", {"rho": 0.1}, (1, 1)
    ),
    "l-infinity": Case(_ball(linf_ball), "chain", {"rho": 0.005}, (1, 1)),
    "weights only": Case(
        _ball(lambda rho: on_leaves(metric_ball(rho), _is_weight)), "chain", {"rho": 0.05}, (1, 1)
    ),
}
