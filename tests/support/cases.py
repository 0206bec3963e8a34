"""The table of variants, from which every suite is generated.

Every entry of `samx.catalog` has a row here, and every row has an oracle. An entry that needs
nothing special gets its row from `row(name)`, which takes its oracle from the recorded runs.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import reference
import reference_fine_tuning
import reference_passes
from recorded import RECORDED

import samx
from samx import policies
from samx.combinations import mix
from samx.core.aliases import Radius, ScalarOrSchedule
from samx.perturbations import layerwise, linf_ball, magnitude, metric_ball, unnormalized_step

Hyper = dict[str, Any]
Loop = Callable[[Any, int], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """What the suites need to know about a variant.

    Attributes:
        entry: Name of the variant's entry in the catalog, which gives factory, shape and closures.
        factory: Function of the hyperparameters as keywords (after the base, if it wraps one).
        shape: "chain": stands before its base in a chain. "wraps": takes the base as an argument.
            "optimizer": has no base.
        needs: Closures without which `update` must fail.
        hyper: Every numeric hyperparameter, with the value that the tests use.
        schedules: Those that may be schedules.
        oracle: What tells the right steps, at least one. A string: a recorded run of the authors'
            code, made with this row's factory. A function `(base, steps) -> trajectory`: an
            independent loop with the numbers of `hyper`. A limit, such as a radius of 0, is none.
        limit: The same as a loop for radii of 0; default the base on the gradient. `None`: nothing
            simple, as the comment beside it says.
        passes: Forward and backward passes inside one sharp `update`. A pass over some of the
            examples counts as that share of a pass.
        repeats: `step -> times` that a sharp step takes these passes; steps count from 0.
        uses_gradient: Whether the incoming gradient is read (one more gradient per step).
        spent: `(step, state after the step) -> gradients` of a sharp step, if not `gradients`.
        curvature: Flops that the derivative of a gradient adds, in gradients. The derivative with
            respect to the input of the first layer is not needed.
        counts_once: Whether XLA sees every pass once: no loop, and no branch with passes in it.
        copies: Size of the state beyond that of the base with momentum, in copies of the
            parameters. `None` if it holds examples.
        needs_batch_like: Whether the factory takes `batch_like`.
        static_args: Arguments that `optax.inject_hyperparams` must leave alone.
        climbs: Whether `sharp_loss` and `loss` are of the same batch, so that `sharp_loss` is
            higher.
        radii: Hyperparameters that are all 0 in the limit.
        survives_any_scale: Whether steps stay finite where squares of the loss are out of range.
        perturbs: Whether it takes a gradient at another point than the parameters.
        is_noisy: Whether it moves whatever the gradient of the loss is, for example by noise.
        is_gated: Whether a policy skips the sharp gradient on some steps. There are both kinds of
            steps among the first six.
        is_mean_of_shards: Whether the step of devices that climb separately is the mean of their
            own steps. Otherwise something nonlinear is done with the mean gradients.
    """

    entry: str
    factory: Callable[..., optax.GradientTransformation]
    shape: Literal["chain", "wraps", "optimizer"]
    needs: tuple[str, ...]
    hyper: Hyper
    schedules: tuple[str, ...]
    oracle: tuple[str | Loop, ...]
    limit: Loop | None
    passes: tuple[float, float] = (1, 1)
    repeats: Callable[[int], int] = lambda step: 1
    uses_gradient: bool = True
    spent: Callable[[int, Any], float] | None = None
    curvature: float = 0.0
    counts_once: bool = True
    copies: float | None = 0
    needs_batch_like: bool = False
    static_args: tuple[str, ...] = ()
    climbs: bool = True
    radii: tuple[str, ...] = ("rho", "sigma")
    survives_any_scale: bool = True
    perturbs: bool = True
    is_noisy: bool = False
    is_gated: bool = False
    is_mean_of_shards: bool = True

    @property
    def gradients(self) -> float:
        """Gradients of a sharp step; a forward pass alone counts as a third of one."""
        forward, backward = self.passes
        return backward + (forward - backward) / 3 + self.uses_gradient

    def spent_at(self, step: int, state: Any) -> float:
        """Gradients of a sharp step, from the state after it."""
        if self.spent:
            return self.spent(step, state)
        return self.repeats(step) * (self.gradients - self.uses_gradient) + self.uses_gradient

    @property
    def kind(self) -> tuple[Any, ...]:
        """Rows of one kind are handled alike by what stands around a variant."""
        return self.shape, self.needs, self.is_gated, self.uses_gradient, self.counts_once

    def build(
        self,
        base: optax.GradientTransformation | None = None,
        batch_like: Any = None,
        inject: bool = False,
        **changes: Any,
    ) -> optax.GradientTransformationExtraArgs:
        """Build the whole optimizer, with some hyperparameters changed."""
        hyper = self.hyper | changes
        if self.needs_batch_like:
            if batch_like is None:
                batch_like = jax.eval_shape(lambda: problem.batch_at(problem.make("float32")[0], 0))
            hyper["batch_like"] = batch_like
        return self.make(optax.sgd(0.1, momentum=0.9) if base is None else base, hyper, inject)

    def make(
        self, base: optax.GradientTransformation | None, arguments: Hyper, inject: bool = False
    ) -> optax.GradientTransformationExtraArgs:
        """Build the whole optimizer from these arguments of the factory."""
        factory = self.factory
        if inject:
            factory = optax.inject_hyperparams(factory, static_args=self.static_args)
        if self.shape == "chain":
            return optax.chain(factory(**arguments), base)
        wrapped = (base,) if self.shape == "wraps" else ()
        return optax.with_extra_args_support(factory(*wrapped, **arguments))

    def at_rest(self, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """Build the whole optimizer with a learning rate of zero."""
        if "learning_rate" in self.hyper:
            changes |= {"learning_rate": 0.0}
        if "max_learning_rate" in self.hyper:
            changes |= {"max_learning_rate": 0.0}
        return self.build(optax.sgd(0.0, momentum=0.9), **changes)


def row(
    entry: str,
    hyper: Hyper | None = None,
    *,
    factory: Callable[..., Any] | None = None,
    fixed: Hyper | None = None,
    oracle: str | Loop | None = None,
    **fields: Any,
) -> Case:
    """Make a row of the table.

    Args:
        entry: Name of the entry in the catalog.
        hyper: Every numeric hyperparameter with its value; default the factory's defaults.
        factory: Replaces the entry's factory.
        fixed: Further arguments of the factory, which no test changes.
        oracle: One recorded run, or a loop; default every recorded run of the entry.
        **fields: Other fields of `Case`.
    """
    (found,) = samx.catalog(entry)
    parameters = inspect.signature(factory or found.factory).parameters.values()
    if hyper is None:
        hyper = {p.name: float(p.default) for p in parameters if isinstance(p.default, float)}
    oracles = (oracle,) if oracle else tuple(n for n, run in RECORDED.items() if run.entry == entry)
    if not oracles:
        raise ValueError(f"{entry}: no recorded run; its row needs an `oracle`")
    kinds = (Radius, ScalarOrSchedule, ScalarOrSchedule | None)
    scheduled = [p.name for p in parameters if p.annotation in kinds]
    return Case(
        entry=entry,
        factory=partial(factory or found.factory, **fixed or {}),
        shape=found.shape,
        needs=found.closures,
        hyper=hyper,
        schedules=tuple(name for name in scheduled if name in hyper),
        oracle=oracles,
        **{"limit": base_alone} | fields,
    )


# ---- Oracles: loops of `reference.py` with the numbers of the row, and a radius.


def base_alone(base, steps):
    return reference.train_sam(base, reference.ball(0.0), steps)


def climbing(perturb, combine=lambda: lambda t, g, look: look()):
    """A loop that combines the gradient and the sharp gradient at the point of `perturb`."""
    return lambda base, steps: reference.train_gated(base, perturb, combine(), steps)[0]


def every_second(t, g):
    return t % 2 == 0


def drawn(t, g):
    """The draws of `policies.random`, from its definition."""
    return jax.random.uniform(jax.random.fold_in(jax.random.key(KEY), t)) < 0.8


def sampa_without_radius(base, steps):
    return reference.train_sampa(base, 0.0, 0.2, steps)


def sl_sam_loop(rho):
    def draw(t, p):
        key = jax.random.fold_in(jax.random.key(0), t)
        return int(jax.random.categorical(key, jnp.log(jnp.asarray(p, jnp.float32))))

    def train(base, steps):
        groups = [["W1"], ["W2", "b1", "b2"]]
        return reference.train_sl_sam(base, reference.ball(rho), groups, draw, 0.5, 0.2, steps)[0]

    return train


def signs(like, steps, draws):
    """The draws of `draws.signs_like` with the default key, from their definition."""

    def sign(i, w, t, j):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), j), t), i)
        return np.asarray(jax.random.rademacher(key, w.shape, np.float64))

    return {
        k: np.array([[sign(i, w, t, j) for j in range(draws)] for t in range(steps)])
        for i, (k, w) in enumerate(sorted(like.items()))
    }


def msassha_loop(base, steps):
    del base
    drawn = signs(problem.make()[1], steps, 1)
    rule = reference_passes.Sassha(
        *(reference.ball(0.1), drawn, 0.01),
        **{"every": 2, "samples": 1, "power": 0.5, "b2": 0.99, "by_momentum": True},
    )
    return reference_passes.train(rule, steps)


def x_sam_loop(base, steps):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    start = {
        k: np.asarray(jax.random.normal(jax.random.fold_in(key, i), w.shape, np.float64))
        for i, (k, w) in enumerate(sorted(problem.make()[1].items()))
    }
    combine = reference_passes.x_sam(reference.ball(0.05), 0.2, 2, 5, start)
    return reference_passes.train(reference_passes.on(base, combine), steps)


def lookbehind_loop(rho):
    def train(base, steps):
        rule = reference_passes.lookbehind(base, reference.ball(rho), 2, 0.5)
        return reference_passes.train(rule, steps)

    return train


def flat_lora_loop(base, steps):
    draws = {k: x[:, 0] for k, x in normals(problem.make()[1], steps).items()}
    rule = reference_fine_tuning.flat_lora(0.2, 4, draws)
    return reference_fine_tuning.train_whole(rule, base, steps)


def bi_lora_loop(base, steps):
    shapes = {"W1": (10, 2), "W2": (16, 2)}
    first = {
        k: np.asarray(jax.random.normal(jax.random.fold_in(first_key(), i), shape, np.float64))
        for i, (k, shape) in zip((0, 2), shapes.items(), strict=True)
    }
    first = {k: a / a.shape[0] ** 0.5 for k, a in first.items()}
    rule = reference_fine_tuning.BiLoRA(0.2, first, reference.SGD(0.5), {"W1": 16, "W2": 3})
    return reference_fine_tuning.train_whole(rule, base, steps)


def first_key():
    """The key of the first draw with the default key, from its definition."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)


def normals(like, steps):
    """The draws of `draws.normal_like` with the default key, from their definition."""

    @jax.jit
    def normal(t):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), t)
        return {
            k: jax.random.normal(jax.random.fold_in(key, i), (1, *w.shape), np.float64)
            for i, (k, w) in enumerate(sorted(like.items()))
        }

    drawn = [normal(t) for t in range(steps)]
    return {k: np.array([each[k] for each in drawn]) for k in like}


def lsam_loop(rho):
    return lambda base, steps: reference.train_lsam(base, reference.ball(rho), 0.9, 2, steps)


def lets_loop(base, steps):
    return reference.train_lets(
        base, reference.ball(1.0), 0.1, 50.0, steps, held_out=reference.shrunk
    )[0]


def without_radius(make_optimizer):
    """The limit of a variant that is the optimizer."""
    return lambda base, steps: reference.train_sam(make_optimizer(), reference.ball(0.0), steps)


def factors_alone(plain, sharp):
    """The limit of a variant that weighs classes: the sum of both parts of the loss."""
    return lambda base, steps: reference.train_split(
        base, reference.ball(0.0), (plain, sharp), steps
    )


# ---- Factories of rows that are more than one call.


def ball_of(make: Callable[..., Any], ascent_steps: int = 1) -> Callable[..., Any]:
    def factory(rho: Radius) -> optax.GradientTransformation:
        return samx.sharpness_aware(make(rho), ascent_steps)

    return factory


def is_weight(path: Any, leaf: Any) -> bool:
    return path[-1].key.startswith("W")


def periodic(rho: Radius) -> optax.GradientTransformation:
    return samx.perturb_if(policies.every(2), samx.sam(rho))


def between(rho: Radius) -> optax.GradientTransformation:
    return samx.perturb_if(policies.between(1, 4), samx.sam(rho))


def adaptive_usam(rho: Radius) -> optax.GradientTransformation:
    return samx.usam(perturbation=unnormalized_step(rho, magnitude(0.1)))


def rst(rho: Radius, p: ScalarOrSchedule) -> optax.GradientTransformation:
    return samx.perturb_if(policies.random(p, KEY), samx.sam(rho))


def g_rst(
    rho: Radius, probability: ScalarOrSchedule, weight: ScalarOrSchedule
) -> optax.GradientTransformation:
    return samx.perturb_if(policies.random(probability, KEY), mix(samx.sam(rho), weight))


KEY = 7  # makes the second step sharp with a probability of 0.8, but not of 0.4
GATED = {"is_gated": True, "counts_once": False}
REUSING = GATED | {"copies": 1, "is_mean_of_shards": False}
SELECTING = {"uses_gradient": False, "climbs": False}
NOISY = SELECTING | {"is_noisy": True}
TEACHING = SELECTING | {"perturbs": False, "is_gated": True, "radii": ("lam",)}
TEACHING |= {"survives_any_scale": False}  # the teacher's term does not scale with the loss
# Two thirds more of the output layer's matrix, which has 48 of the problem's 227 parameters.
HEAD = {"uses_gradient": False, "climbs": False, "spent": lambda step, state: 1 + 2 / 3 * 48 / 227}
HEAD |= {"static_args": ("is_perturbed",)}
SAMPA = {
    "passes": (2, 2),
    "limit": sampa_without_radius,
    "uses_gradient": False,
    "copies": None,
    "needs_batch_like": True,
    "static_args": ("batch_like",),
    "climbs": False,
}
VARIANTS = {
    "sam": row("sam", {"rho": 0.05}),
    "asam": row("asam", {"rho": 0.5, "eta": 0.01}, static_args=("is_scaled",)),
    "sampa": row("sampa", {"rho": 0.1, "lam": 0.2}, **SAMPA),
    # The same, computed or measured differently. Every row must keep the whole contract.
    "sampa, separate": row(
        "sampa",
        {"rho": 0.1, "lam": 0.2},
        fixed={"gradients": "separate"},
        oracle="sampa__sgdm_lam0.2_rho0.1",
        **SAMPA,
    ),
    "two ascent steps": row(
        "sharpness_aware",
        {"rho": 0.05},
        factory=ball_of(metric_ball, ascent_steps=2),
        oracle=lambda base, steps: reference.train_sam(base, reference.ball(0.05), steps, 2),
        passes=(2, 2),
        counts_once=False,
    ),
    "layerwise": row(
        "sharpness_aware",
        {"rho": 0.1},
        factory=ball_of(lambda rho: metric_ball(rho, layerwise(0.2))),
        oracle=climbing(reference.layer_ball(0.1, 0.2, {"W1", "W2"})),
    ),
    "l-infinity": row(
        "sharpness_aware",
        {"rho": 0.005},
        factory=ball_of(linf_ball),
        oracle=climbing(reference.sign_ball(0.005)),
    ),
    "sam_on": row(  # no normalization layers here, so only the weights
        "sam_on",
        {"rho": 0.05},
        fixed={"is_perturbed": is_weight},
        static_args=("is_perturbed",),
    ),
    "periodic": row(
        "periodic",
        {"rho": 0.05},
        factory=periodic,
        oracle=climbing(reference.ball(0.05), lambda: reference.sometimes(every_second)),
        **GATED,
    ),
    "between": row(
        "periodic",
        {"rho": 0.05},
        factory=between,
        oracle=climbing(reference.ball(0.05), lambda: reference.sometimes(lambda t, g: 1 <= t < 4)),
        **GATED,
    ),
    "rst": row(
        "rst",
        {"rho": 0.05, "p": 0.8},
        factory=rst,
        oracle=climbing(reference.ball(0.05), lambda: reference.sometimes(drawn)),
        **GATED,
    ),
    "g-rst": row(
        "g_rst",
        {"rho": 0.05, "probability": 0.8, "weight": 2.0},
        factory=g_rst,
        oracle=climbing(reference.ball(0.05), lambda: reference.sometimes(drawn, gamma=2.0)),
        **GATED,
    ),
    "ae_sam": row(
        "ae_sam",
        {"rho": 0.05, "threshold": -0.2, "decay": 0.9},
        is_mean_of_shards=False,
        **GATED,
    ),
    "looksam": row(
        "looksam",
        {"rho": 0.05, "alpha": 0.7},
        fixed={"period": 2},
        static_args=("period", "first"),
        **REUSING,
    ),
    "look_layer_sam": row(
        "look_layer_sam",
        {"rho": 0.05, "alpha": 0.7},
        fixed={"period": 2},
        oracle=climbing(
            reference.layer_steps(0.05, lambda w, g, total: w / g / total),
            lambda: reference.LookSAM(every_second, 0.7),
        ),
        static_args=("period", "first", "scaling"),
        **REUSING,
    ),
    "ae_looksam": row(
        "ae_looksam",
        {"rho": 0.05, "threshold": -0.2, "alpha": 0.7, "decay": 0.9},
        **REUSING,
    ),
    "vsam": row(
        "vsam",
        {"rho": 0.05, "decay": 0.7},
        fixed={"policy": policies.quota(window=4, num_blocks=2, warmup_steps=1)},
        static_args=("reuse_steps", "policy"),
        **REUSING,
    ),
    "arsam": row(
        "arsam",
        {"rho": 0.05},
        fixed={"policy": policies.every(2)},
        oracle=climbing(reference.ball(0.05), lambda: reference.Reuse(every_second, 0.7)),
        **REUSING,
    ),
    "momentum_sam": row("momentum_sam", {"rho": 0.3}, **SELECTING),
    # One group per device, with two examples each.
    "ksam": row(
        "ksam",
        {"rho": 0.05},
        fixed={"num_selected": 8, "num_groups": 8},
        limit=lambda base, steps: reference.train_on_examples(
            base, reference.ksam(reference.ball(0.0), 1, num_groups=8), steps
        ),
        passes=(2, 1),
        static_args=("num_selected", "num_groups"),
        **SELECTING,
    ),
    "esam": row(
        "esam",
        {"rho": 0.05, "perturbed_fraction": 0.6},
        fixed={"selected_fraction": 0.5, "num_groups": 8},
        limit=None,  # no loss rises, so the choice of examples is one of equals
        passes=(2.5, 1.5),
        uses_gradient=False,
        static_args=("selected_fraction", "select", "sharp_pass", "num_groups", "key"),
    ),
    "ausam": row(
        "ausam",
        {"rho": 0.05, "low": 0.1, "high": 0.5},
        fixed={
            "fraction": 0.5,
            "num_examples": 64,
            "warmup_steps": 1,
            "ramp_steps": 2,
            "num_groups": 8,
        },
        limit=None,  # all scores are equal
        repeats=lambda step: 2 if step == 0 else 1,  # the first step takes the whole batch
        copies=None,
        counts_once=False,
        is_mean_of_shards=False,
        static_args=(
            *("fraction", "num_examples", "warmup_steps", "ramp_steps"),
            *("num_groups", "key", "aux_like"),
        ),
        **SELECTING,
    ),
    "sl_sam": row(
        "sl_sam",
        {"rho": 0.05, "bandit_learning_rate": 0.5, "exploration": 0.2},
        fixed={"groups": 2},
        oracle=sl_sam_loop(0.05),
        limit=sl_sam_loop(0.0),
        passes=(2, 2),  # only through some of the layers
        spent=lambda step, state: (4 + 2 * SL_SHARES[int(optax.tree.get(state, "group"))]) / 3,
        counts_once=False,
        static_args=("groups", "key", "aux_like"),
        **SELECTING,
    ),
    "gsam": row(
        "gsam", {"rho": 0.05, "alpha": 0.4}, is_mean_of_shards=False, static_args=("descend",)
    ),
    "gsam, clean": row(
        "gsam",
        {"rho": 0.05, "alpha": 0.4},
        fixed={"descend": "clean"},
        oracle=climbing(reference.ball(0.05), lambda: reference.gsam(0.4, clean=True)),
        is_mean_of_shards=False,
        static_args=("descend",),
    ),
    "coupled_wsam": row("coupled_wsam", {"rho": 0.05, "gamma": 0.9}),
    "wsam": row("wsam", {"learning_rate": 0.1, "rho": 0.05, "gamma": 0.9}),
    "stable_sam": row(
        "stable_sam", {"rho": 0.05}, is_mean_of_shards=False, static_args=("normalize",)
    ),
    "usam": row("usam", {"rho": 0.05}),
    "usam, adaptive": row(
        "usam",
        {"rho": 0.5},
        factory=adaptive_usam,
        oracle=climbing(reference.adaptive_step(0.5, 0.1, {"W1", "W2"})),
    ),
    "friendly_sam": row("friendly_sam", {"rho": 0.05, "sigma": 0.8, "decay": 0.9}, copies=1),
    "monge_sam": row("monge_sam", {"rho": 0.05}),
    "mup_sam": row(
        "mup_sam",
        {"rho": 0.05},
        fixed={"scales": {"W1": 4.0, "b1": 4.0, "W2": 0.25, "b2": 1.0}},
        static_args=("scales", "normalization", "width"),
    ),
    "msam": row(
        "msam",
        {"rho": 0.05},
        fixed={"num_microbatches": 2},
        passes=(2, 2),
        counts_once=False,
        static_args=("num_microbatches", "how", "aux_like"),
        **SELECTING,
    ),
    "lightsam_norm": row(
        "lightsam_norm",
        {"learning_rate": 0.1, "rho": 0.05},
        fixed={"eps": 0.1},
        limit=without_radius(lambda: reference.AdaGradNorm(0.1, 0.1)),
        copies=-1,
        is_mean_of_shards=False,
    ),
    "lightsam_adagrad": row(
        "lightsam_adagrad",
        {"learning_rate": 0.1, "rho": 0.01},
        fixed={"eps": 0.1},
        limit=without_radius(lambda: reference.AdaGrad(0.1, 0.1)),
        copies=1,
        is_mean_of_shards=False,
    ),
    "lightsam_adam": row(
        "lightsam_adam",
        {"learning_rate": 0.01, "rho": 0.01, "b1": 0.9, "b2": 0.99},
        fixed={"eps": 0.1},
        limit=without_radius(lambda: reference.RawAdam(0.01, 0.9, 0.99, 0.1)),
        copies=3,
        is_mean_of_shards=False,
    ),
    "adasam": row(
        "adasam",
        {"learning_rate": 0.01, "rho": 0.05, "b1": 0.9, "b2": 0.99},
        fixed={"eps": 0.1},
        limit=without_radius(lambda: reference.RawAdam(0.01, 0.9, 0.99, 0.1, largest=True)),
        copies=2,
        is_mean_of_shards=False,
    ),
    "bisam": row("bisam", {"rho": 0.05}, passes=(2, 2), **SELECTING),
    "lsam": row(
        "lsam",
        {"rho": 0.05, "beta": 0.9},
        fixed={"period": 2},
        oracle=lsam_loop(0.05),
        limit=lsam_loop(0.0),  # elastic averaging
        copies=1,
        static_args=("period", "worker_axis", "exchange"),
    ),
    "async_sam": row(
        "async_sam",
        {"rho": 0.05},
        passes=(2, 2),  # because `ascent_fn` is given
        copies=1,
        static_args=("first", "ascent_share", "role_axis", "aux_like", "perturb_dtype"),
        **SELECTING,
    ),
    "focal_sam": row(
        "focal_sam",
        {"rho": 0.05, "gamma": 2.0, "sharpness": 0.8},
        fixed={"class_counts": [28, 11, 25]},
        limit=base_alone,  # the parts add up to the loss
        passes=(2, 3),
        uses_gradient=False,
        static_args=("class_counts",),
    ),
    "imbalanced_sam": row(
        "imbalanced_sam",
        {"rho": 0.05, "tail_weight": 2.0},
        fixed={"tail_classes": [1]},
        limit=factors_alone([1, 0, 1], [0, 2, 0]),
        passes=(2, 3),
        static_args=("tail_classes",),
        **SELECTING,
    ),
    "fisher_sparse_sam": row(
        "fisher_sparse_sam",
        {"rho": 0.05, "sparsity": 0.6},
        fixed={"period": 3, "num_microbatches": 2},
        repeats=lambda step: 2 if step % 3 == 1 else 1,
        counts_once=False,
        copies=1 / 4,  # a mask has one byte per entry
        climbs=False,  # except on its first step
        is_mean_of_shards=False,
        static_args=("period", "pattern", "num_microbatches"),
    ),
    "dynamic_sparse_sam": row(
        "dynamic_sparse_sam",
        {"rho": 0.05, "sparsity": 0.6, "drop_rate": 0.4},
        fixed={"period": 3},
        counts_once=False,
        copies=1 / 4,
        is_mean_of_shards=False,
        static_args=("period", "drop", "grow", "key"),
    ),
    "lets": row(
        "lets",
        {"rho_learning_rate": 50.0},
        fixed={"rho": 0.1},
        oracle=lets_loop,
        limit=None,  # its radius is not a hyperparameter
        passes=(3, 3),
        curvature=2 - 1 / 3,
        spent=lambda step, state: 6.0,  # two more for the derivative of the sharp gradient
        is_mean_of_shards=False,
    ),
    "gcsam": row("gcsam", {"rho": 0.05}, static_args=("norm", "filter_axis")),
    "zsharp": row("zsharp", {"rho": 0.05, "quantile": 0.8}, static_args=("norm",)),
    "le_sam": row("le_sam", {"sigma": 0.05, "rho_max": 0.06, "alpha": 0.1}, limit=None),
    "unified_sam": row("unified_sam", {"rho": 0.1, "lam": 0.5}),
    "sagm": row("sagm", {"rho": 0.05, "alpha": 0.001}, radii=("rho", "alpha")),
    "gnp": row("gnp", {"rho": 0.1, "alpha": 0.8}, static_args=("clean",)),
    "gnp, unit": row(
        "gnp",
        {"rho": 0.1, "alpha": 0.8},
        fixed={"clean": "unit"},
        oracle="gnp__nesterov_r0.1_a0.8_default",
        limit=None,
        static_args=("clean",),
    ),
    "eigen_sam": row(
        "eigen_sam",
        {"rho": 0.05, "alpha": 0.2},
        fixed={"every": 2},
        spent=lambda step, state: 2.0 + 10.0 * (step > 0 and step % 2 == 0),
        counts_once=False,
        copies=1,
        is_mean_of_shards=False,  # the Hessian is that of the whole batch
        static_args=("every", "iterations", "before_refresh", "steps_per_epoch"),
    ),
    "spectral_sam": row("spectral_sam", {"rho": 0.02}, static_args=("norm", "vectors", "polar")),
    "lpf_sgd": row(
        "lpf_sgd",
        {"sigma": 0.01},
        fixed={"num_microbatches": 2},
        counts_once=False,
        static_args=("num_microbatches",),
        **NOISY,
    ),
    "rwp": row("rwp", {"sigma": 0.01, "alpha": 0.4}, limit=None, **NOISY),
    "arwp": row(
        "arwp",
        {"sigma": 0.01, "eta": 1.0, "decay": 0.9},
        copies=1,
        is_mean_of_shards=False,
        **NOISY,
    ),
    "marwp": row(
        "marwp",
        {"sigma": 0.01, "eta": 1.0, "decay": 0.9, "lam": 0.4},
        limit=None,
        copies=1,
        is_mean_of_shards=False,
        **NOISY,
    ),
    # The first epoch is without a teacher, all others have one. All batches here share their rows
    # of the table, so SAF's first two steps are one epoch: at first nothing may move.
    "saf": row(
        "saf",
        {"lam": 0.3, "temperature": 2.0},
        fixed={
            "num_examples": 64,
            "logits_like": jax.ShapeDtypeStruct((3,), np.float64),
            **{"lag": 1, "start": 0, "steps_per_epoch": 2},
        },
        copies=None,
        is_mean_of_shards=False,  # each shard would have a table
        static_args=("num_examples", "logits_like", "lag", "start", "end", "steps_per_epoch"),
        **TEACHING,
    ),
    "mesa": row(
        "mesa",
        {"lam": 0.3, "temperature": 2.0, "decay": 0.9},
        fixed={"steps_per_epoch": 1, "start": 0},
        passes=(2, 1),
        counts_once=False,
        copies=1,
        static_args=("steps_per_epoch", "start", "end"),
        **TEACHING,
    ),
    "functional_sam": row("functional_sam", {"rho": 0.1}, passes=(2, 2), uses_gradient=False),
    "logits_sam": row("logits_sam", {"rho": 0.3}, **HEAD),
    "flat_lora": row(
        "flat_lora",
        {"rho": 0.2},
        fixed={"num_steps": 4},
        oracle=flat_lora_loop,
        static_args=("num_steps", "weights_like"),
        **NOISY,
    ),
    "bi_lora": row(
        "bi_lora",
        {"rho": 0.2},
        fixed={"rank": 2, "ascent_optimizer": optax.sgd(0.5)},
        oracle=bi_lora_loop,
        copies=None,
        static_args=("rank", "ascent_optimizer", "weights_like"),
        **NOISY | {"is_noisy": False},
    ),
    "bsam": row(
        "bsam",
        {
            "learning_rate": 0.1,
            "num_examples": 64.0,
            "rho": 0.05,
            "b1": 0.9,
            "b2": 0.99,
            "damping": 0.1,
        },
        fixed={"prior_precision": 0.0, "num_microbatches": 2},
        limit=None,
        survives_any_scale=False,  # ρ multiplies the gradient, and no base follows
        passes=(2, 2),
        counts_once=False,
        copies=1,
        is_mean_of_shards=False,
        static_args=("num_microbatches",),
        **SELECTING,
    ),
}
VARIANTS |= {
    "cr_sam": row(
        "cr_sam",
        {"rho": 0.1, "gamma": 0.1, "beta": 0.05},
        passes=(2, 2),
    ),
    "xsam": row(
        "xsam",
        {"rho": 0.15, "rho_max": 0.8},
        fixed={"every": 2, "alpha_max": 30.0, "alpha_step": 1.5},
        limit=base_alone,
        spent=lambda step, state: 2.0 + 7.0 * (step % 2 == 0),
        counts_once=False,
        is_mean_of_shards=False,
        static_args=("every", "alpha", "alpha_max", "alpha_step", "ascent_steps"),
    ),
    "x_sam": row(
        "x_sam",
        {"rho": 0.05, "alpha": 0.2},
        fixed={"every": 2},
        oracle=x_sam_loop,
        limit=None,  # its steps have length 1
        spent=lambda step, state: 2.0 + 10.0 * (step > 0 and step % 2 == 0),
        counts_once=False,
        copies=1,
        is_mean_of_shards=False,
        static_args=("every", "iterations", "steps_per_epoch"),
    ),
    "lookbehind_sam": row(
        "lookbehind_sam",
        {"rho": 0.05, "alpha": 0.5},
        fixed={"steps": 2},
        limit=lookbehind_loop(0.0),
        passes=(2, 2),
        counts_once=False,
        is_mean_of_shards=False,
        static_args=("steps",),
    ),
    "tsam": row(
        "tsam",
        {"rho": 0.05, "tilt": 1.0, "radius": 0.45, "sigma": 0.03},
        fixed={"samples": 2},
        limit=None,  # the noise stays
        passes=(4, 4),
        counts_once=False,
        is_mean_of_shards=False,
        static_args=("samples",),
        **NOISY,
    ),
    "sam_polyak": row(
        "sam_polyak",
        {
            "rho": 0.1,
            "max_learning_rate": 0.84,
            "lam": 0.9,
            "min_loss": 0.1,
            "weight_decay": 0.01,
        },
        limit=None,  # a step size that depends on the loss
        copies=-1,  # no momentum
        survives_any_scale=False,  # below λ = 1 the step of the ascent grows with the gradient
        is_mean_of_shards=False,
    ),
    "sassha": row(
        "sassha",
        {
            "learning_rate": 0.01,
            "rho": 0.1,
            "b1": 0.9,
            "b2": 0.99,
            "eps": 1e-4,
        },
        fixed={"every": 2},
        limit=None,
        survives_any_scale=False,  # m grows as the loss does, and the root as its root
        repeats=lambda step: 2 if step % 2 == 0 else 1,
        spent=lambda step, state: 2.0 + 2.0 * (step % 2 == 0),
        counts_once=False,
        copies=1,
        is_mean_of_shards=False,
        static_args=("every", "samples"),
    ),
    "msassha": row(
        "msassha",
        {
            "learning_rate": 0.01,
            "rho": 0.1,
            "b1": 0.9,
            "b2": 0.99,
            "eps": 1e-4,
        },
        fixed={"every": 2, "power": 0.5, "weight_decay": 0.0},
        oracle=msassha_loop,
        limit=None,
        survives_any_scale=False,
        repeats=lambda step: 2 if step % 2 == 0 else 1,
        spent=lambda step, state: 1.0 + 2.0 * (step % 2 == 0),
        counts_once=False,
        copies=1,
        is_mean_of_shards=False,
        static_args=("every", "samples"),
        **SELECTING,
    ),
    "gam": row(
        "gam",
        {"rho": 0.2, "rho_prime": 0.05, "beta0": 0.5, "beta1": 0.6, "gamma": 0.1},
        radii=("rho", "rho_prime"),
        passes=(3, 3),
    ),
    "gam_exact": row(
        "gam_exact",
        {"rho": 0.2, "alpha": 0.5},
        passes=(3, 3),
        spent=lambda step, state: 6.0,  # a Hessian product costs two gradients
        counts_once=False,
    ),
}
SL_SHARES = (160 / 227, 67 / 227)  # of the parameters: W1, and the others
ROWS = {case.entry for case in VARIANTS.values()}
VARIANTS |= {entry.name: row(entry.name) for entry in samx.catalog() if entry.name not in ROWS}


def first_of_each(key: Callable[[Case], Any]) -> list[str]:
    """Return the first row for each value of `key`."""
    firsts = {}
    for name, case in VARIANTS.items():
        firsts.setdefault(key(case), name)
    return list(firsts.values())


KINDS = first_of_each(lambda case: case.kind)
CLOSURES = first_of_each(lambda case: case.needs)
