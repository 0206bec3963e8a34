"""The table of variants, from which every suite is generated.

Every entry of `samx.catalog` has a row here. `plain` makes the row of an entry that needs nothing
special.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import optax
import problem

import samx
from samx import policies
from samx.combinations import mix
from samx.perturbations import layerwise, linf_ball, metric_ball

Hyper = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What the suites need to know about a variant.

    Attributes:
        entry: Name of the variant's entry in the catalog, which gives factory, shape and closures.
        factory: Function of the hyperparameters as keywords (after the base, if it wraps one).
        shape: "chain": stands before its base in a chain. "wraps": takes the base as an argument.
            "optimizer": has no base.
        hyper: Every numeric hyperparameter, with the value that the tests use.
        passes: Forward and backward passes inside one sharp `update`. A pass over some of the
            examples counts as that share of a pass.
        needs: Closures without which `update` must fail.
        uses_gradient: Whether the incoming gradient is read (one more gradient per step).
        has_base_limit: Whether `rho=0` gives the base optimizer.
        needs_batch_like: Whether the factory takes `batch_like`.
        static_args: Arguments that `optax.inject_hyperparams` must leave alone.
        climbs: Whether `sharp_loss` and `loss` are of the same batch, so that `sharp_loss` is
            higher.
        like: Another row with the same program, except for what is passed in. Suites that compile
            for a long time test only that row.
        spent: `(step, state after the step) -> gradients` of a sharp step, if they are not always
            `gradients`; steps count from 0.
        curvature: Flops that the derivative of a gradient adds, in gradients. The derivative with
            respect to the input of the first layer is not needed.
        is_gated: Whether a policy skips the sharp gradient on some steps. There are both kinds of
            steps among the first six.
    """

    entry: str
    factory: Callable[..., optax.GradientTransformation]
    shape: Literal["chain", "wraps", "optimizer"]
    hyper: Hyper
    passes: tuple[float, float]
    needs: tuple[str, ...]
    uses_gradient: bool = True
    has_base_limit: bool = True
    needs_batch_like: bool = False
    static_args: tuple[str, ...] = ()
    climbs: bool = True
    curvature: float = 0.0
    is_gated: bool = False
    like: str | None = None
    spent: Callable[[int, Any], float] | None = None

    @property
    def gradients(self) -> float:
        """Gradients of a sharp step; a forward pass alone counts as a third of one."""
        forward, backward = self.passes
        return backward + (forward - backward) / 3 + self.uses_gradient

    def build(
        self,
        base: optax.GradientTransformation | None = None,
        batch_like: Any = None,
        inject: bool = False,
        **changes: Any,
    ) -> optax.GradientTransformationExtraArgs:
        """Build the whole optimizer, with some hyperparameters changed."""
        base = optax.sgd(0.1, momentum=0.9) if base is None else base
        hyper = self.hyper | changes
        if self.needs_batch_like:
            if batch_like is None:
                batch_like = jax.eval_shape(lambda: problem.batch_at(problem.make("float32")[0], 0))
            hyper["batch_like"] = batch_like
        factory = self.factory
        if inject:
            factory = optax.inject_hyperparams(factory, static_args=self.static_args)
        if self.shape == "chain":
            return optax.chain(factory(**hyper), base)
        base = (base,) if self.shape == "wraps" else ()
        return optax.with_extra_args_support(factory(*base, **hyper))

    def at_rest(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """Build the whole optimizer with a learning rate of zero."""
        if "learning_rate" in self.hyper:
            changes |= {"learning_rate": 0.0}
        return self.build(optax.sgd(0.0, momentum=0.9), **changes)


def _ball(make: Callable[..., Any], ascent_steps: int = 1) -> Callable[..., Any]:
    return lambda rho: samx.sharpness_aware(make(rho), ascent_steps)


def _is_weight(path: Any, leaf: Any) -> bool:
    return path[-1].key.startswith("W")


def _random(rho: Any, probability: Any, weight: Any = None) -> optax.GradientTransformation:
    sam = samx.sam(rho) if weight is None else mix(samx.sam(rho), weight)
    return samx.perturb_if(policies.random(probability, KEY), sam)


def of(entry: str, **fixed: Any) -> dict[str, Any]:
    """Return what a row takes from the catalog; `fixed` are fixed arguments of its factory."""
    (found,) = samx.catalog(entry)
    factory = partial(found.factory, **fixed) if fixed else found.factory
    return {
        "entry": entry,
        "factory": factory,
        "shape": found.shape,
        "needs": found.closures,
    }


KEY = 7  # makes the second step sharp with a probability of 0.8, but not of 0.4
SAMPA = Case(
    **of("sampa"),
    hyper={"rho": 0.1, "lam": 0.2},
    passes=(2, 2),
    uses_gradient=False,
    has_base_limit=False,
    needs_batch_like=True,
    static_args=("batch_like",),
    climbs=False,
)
SAM = Case(**of("sam"), hyper={"rho": 0.05}, passes=(1, 1))
GATED = replace(SAM, is_gated=True)
VARIANTS = {
    "sam": SAM,
    "asam": replace(
        SAM,
        **of("asam"),
        hyper={"rho": 0.5, "eta": 0.01},
        static_args=("is_scaled",),
        like="sam",
    ),
    "sampa": SAMPA,
    # The same, computed or measured differently. Every row must keep the whole contract.
    "sampa, separate": replace(SAMPA, **of("sampa", gradients="separate"), like="sampa"),
    "two ascent steps": replace(
        SAM,
        entry="sharpness_aware",
        factory=_ball(metric_ball, ascent_steps=2),
        passes=(2, 2),
        like="sam",
    ),
    "layerwise": replace(
        SAM,
        entry="sharpness_aware",
        factory=_ball(lambda rho: metric_ball(rho, layerwise())),
        hyper={"rho": 0.1},
        like="sam",
    ),
    "l-infinity": replace(
        SAM, entry="sharpness_aware", factory=_ball(linf_ball), hyper={"rho": 0.005}, like="sam"
    ),
    "sam_on": replace(  # no normalization layers here, so only the weights
        SAM,
        **of("sam_on", is_perturbed=_is_weight),
        static_args=("is_perturbed",),
        like="sam",
    ),
    "periodic": replace(
        GATED,
        entry="periodic",
        factory=lambda rho: samx.perturb_if(policies.every(2), samx.sam(rho)),
        like="rst",
    ),
    "rst": replace(
        GATED, entry="rst", factory=lambda rho, p: _random(rho, p), hyper={"rho": 0.05, "p": 0.8}
    ),
    "g-rst": replace(
        GATED,
        entry="g_rst",
        factory=_random,
        hyper={"rho": 0.05, "probability": 0.8, "weight": 2.0},
        like="rst",
    ),
    "ae_sam": replace(
        GATED,
        **of("ae_sam"),
        hyper={"rho": 0.05, "threshold": -0.2, "decay": 0.9},
        like="rst",
    ),
    "looksam": replace(
        GATED,
        **of("looksam", period=2),
        hyper={"rho": 0.05, "alpha": 0.7},
        static_args=("period", "first"),
    ),
    "look_layer_sam": replace(
        GATED,
        **of("look_layer_sam", period=2),
        hyper={"rho": 0.05, "alpha": 0.7},
        static_args=("period", "first", "scaling"),
        like="looksam",
    ),
    "ae_looksam": replace(
        GATED,
        **of("ae_looksam"),
        hyper={"rho": 0.05, "threshold": -0.2, "alpha": 0.7, "decay": 0.9},
        like="looksam",
    ),
    "vsam": replace(
        GATED,
        **of("vsam", policy=policies.quota(window=4, num_blocks=2, warmup_steps=1)),
        hyper={"rho": 0.05, "decay": 0.7},
        static_args=("reuse_steps", "policy"),
        like="looksam",
    ),
    "arsam": replace(GATED, **of("arsam", policy=policies.every(2)), like="looksam"),
    "momentum_sam": replace(
        SAM,
        **of("momentum_sam"),
        hyper={"rho": 0.3},
        uses_gradient=False,
        climbs=False,
    ),
}
SL_SHARES = (160 / 227, 67 / 227)  # of the parameters: W1, and the others
SELECTING = replace(SAM, uses_gradient=False, has_base_limit=False)
VARIANTS |= {
    # One group per device, with two examples each.
    "ksam": replace(
        SELECTING,
        **of("ksam", num_selected=8, num_groups=8),
        passes=(2, 1),
        climbs=False,
        like="ausam",
        static_args=("num_selected", "num_groups"),
    ),
    "esam": replace(
        SELECTING,
        **of("esam", selected_fraction=0.5, num_groups=8),
        hyper={"rho": 0.05, "perturbed_fraction": 0.6},
        passes=(2.5, 1.5),
        static_args=("selected_fraction", "select", "sharp_pass", "num_groups", "key"),
    ),
    "ausam": replace(
        SELECTING,
        **of("ausam", fraction=0.5, num_examples=64, warmup_steps=1, num_groups=8),
        hyper={"rho": 0.05, "low": 0.1, "high": 0.5},
        passes=(1, 1),  # after the first step, which takes twice as many
        spent=lambda t, state: 2.0 if t == 0 else 1.0,
        climbs=False,
        static_args=(
            *("fraction", "num_examples", "warmup_steps", "ramp_steps"),
            *("num_groups", "key", "aux_like"),
        ),
    ),
    "sl_sam": replace(
        SAM,
        **of("sl_sam", groups=2),
        hyper={"rho": 0.05, "bandit_learning_rate": 0.5, "exploration": 0.2},
        passes=(2, 2),  # only through some of the layers
        spent=lambda t, state: (4 + 2 * SL_SHARES[int(optax.tree.get(state, "group"))]) / 3,
        uses_gradient=False,
        has_base_limit=False,
        climbs=False,
        static_args=("groups", "key", "aux_like"),
    ),
}
WIDER = {"W1": 4.0, "b1": 4.0, "W2": 0.25, "b2": 1.0}
VARIANTS |= {
    "gsam": replace(
        SAM,
        **of("gsam"),
        hyper={"rho": 0.05, "alpha": 0.4},
        static_args=("descend",),
    ),
    "gsam, clean": replace(
        SAM,
        **of("gsam", descend="clean"),
        hyper={"rho": 0.05, "alpha": 0.4},
        static_args=("descend",),
        like="gsam",
    ),
    "coupled_wsam": replace(
        SAM, **of("coupled_wsam"), hyper={"rho": 0.05, "gamma": 0.9}, like="gsam"
    ),
    "wsam": replace(
        SAM,
        **of("wsam"),
        hyper={"learning_rate": 0.1, "rho": 0.05, "gamma": 0.9},
        like="gsam",
    ),
    "stable_sam": replace(
        SAM,
        **of("stable_sam"),
        has_base_limit=False,  # not to the last bit
        static_args=("normalize",),
        like="gsam",
    ),
    "usam": replace(
        SAM,
        **of("usam"),
        like="sam",
    ),
    "friendly_sam": replace(
        SAM,
        **of("friendly_sam"),
        hyper={"rho": 0.05, "sigma": 0.8, "decay": 0.9},
        like="lightsam_adam",
    ),
    "monge_sam": replace(SAM, **of("monge_sam"), like="sam"),
    "mup_sam": replace(
        SAM,
        **of("mup_sam", scales=WIDER),
        static_args=("scales", "normalization", "width"),
        like="sam",
    ),
    "msam": replace(
        SAM,
        **of("msam", num_microbatches=2),
        passes=(2, 2),
        uses_gradient=False,
        has_base_limit=False,
        climbs=False,
        static_args=("num_microbatches", "how", "aux_like"),
    ),
    "lightsam_norm": replace(
        SAM,
        **of("lightsam_norm", eps=0.1),
        hyper={"learning_rate": 0.1, "rho": 0.05},
        has_base_limit=False,
        like="lightsam_adam",
    ),
    "lightsam_adagrad": replace(
        SAM,
        **of("lightsam_adagrad", eps=0.1),
        hyper={"learning_rate": 0.1, "rho": 0.01},
        has_base_limit=False,
        like="lightsam_adam",
    ),
    "lightsam_adam": replace(
        SAM,
        **of("lightsam_adam", eps=0.1),
        hyper={"learning_rate": 0.01, "rho": 0.01, "b1": 0.9, "b2": 0.99},
        has_base_limit=False,
    ),
    "adasam": replace(
        SAM,
        **of("adasam", eps=0.1),
        hyper={"learning_rate": 0.01, "rho": 0.05, "b1": 0.9, "b2": 0.99},
        has_base_limit=False,
        like="lightsam_adam",
    ),
}
FOCAL = replace(
    SAM,
    **of("focal_sam", class_counts=[28, 11, 25]),
    hyper={"rho": 0.05, "gamma": 2.0, "sharpness": 0.8},
    passes=(2, 3),
    uses_gradient=False,
    has_base_limit=False,
    static_args=("class_counts",),
)
VARIANTS |= {
    "bisam": replace(
        SAM,
        **of("bisam"),
        passes=(2, 2),
        uses_gradient=False,
        climbs=False,
    ),
    "lsam": replace(
        SAM,
        **of("lsam", period=2),
        hyper={"rho": 0.05, "beta": 0.9},
        has_base_limit=False,  # the limit is elastic averaging
        static_args=("period", "worker_axis", "exchange"),
        like="sam",
    ),
    "async_sam": replace(
        SAM,
        **of("async_sam"),
        passes=(2, 2),
        uses_gradient=False,  # because `ascent_fn` is given
        climbs=False,
        static_args=("first", "ascent_share", "role_axis", "aux_like", "perturb_dtype"),
        like="bisam",  # except that it climbs a step later
    ),
    "focal_sam": FOCAL,
    "imbalanced_sam": replace(
        FOCAL,
        **of("imbalanced_sam", tail_classes=[1]),
        hyper={"rho": 0.05, "tail_weight": 2.0},
        static_args=("tail_classes",),
        climbs=False,
        like="focal_sam",
    ),
    "fisher_sparse_sam": replace(
        SAM,
        **of("fisher_sparse_sam", period=3, num_microbatches=2),
        hyper={"rho": 0.05, "sparsity": 0.6},
        static_args=("period", "pattern", "num_microbatches"),
        spent=lambda t, state: 3.0 if t % 3 == 1 else 2.0,
        climbs=False,  # except on its first step
    ),
    "dynamic_sparse_sam": replace(
        SAM,
        **of("dynamic_sparse_sam", period=3),
        hyper={"rho": 0.05, "sparsity": 0.6, "drop_rate": 0.4},
        static_args=("period", "drop", "grow", "key"),
        like="fisher_sparse_sam",
    ),
    "lets": replace(
        SAM,
        **of("lets", rho=0.05),
        hyper={"rho_learning_rate": 1.0},
        passes=(3, 3),
        has_base_limit=False,
        curvature=2 - 1 / 3,
        spent=lambda t, state: 6.0,  # two more for the derivative of the sharp gradient
    ),
}


def plain(entry: Any) -> Case:
    """Make the row of an entry that has none above; its numbers are the factory's defaults."""
    parameters = inspect.signature(entry.factory).parameters.values()
    hyper = {p.name: float(p.default) for p in parameters if isinstance(p.default, float)}
    return replace(SAM, **of(entry.name), hyper=hyper)


ROWS = {case.entry for case in VARIANTS.values()}
VARIANTS |= {entry.name: plain(entry) for entry in samx.catalog() if entry.name not in ROWS}
APART = [name for name, case in VARIANTS.items() if case.like is None]
