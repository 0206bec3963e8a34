"""Table of all variants for the examples: how to build each one, and its candidate radii."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import samx
from examples.common.choices import ELSEWHERE
from samx import policies

TEN = jax.ShapeDtypeStruct((10,), np.float32)


class Setting(NamedTuple):
    """Properties of the training run that some variants need.

    Attributes:
        batch: Shapes of a batch as `update` sees it. In a mapped function this is the batch of one
            device.
        batch_size: Number of examples in a whole batch.
        num_examples: Number of examples in the data set.
        aux: Shapes of the aux of the loss, for variants that hold an aux in their state.
        logits: Shape and dtype of one example's logits; default ten classes.
        num_groups: Number of groups into which example selection splits a batch, one per device.
        learning_rate: Learning rate of the base, a number or a schedule, for variants that take
            their own step.
    """

    batch: Any
    batch_size: int
    num_examples: int
    aux: Any = None
    logits: Any = TEN
    num_groups: int = 1
    learning_rate: Any = 0.1


Make = Callable[[Any, optax.GradientTransformation, Setting], optax.GradientTransformation]


class Variant(NamedTuple):
    """A row of the examples' tables.

    Attributes:
        make: `(rho, base, setting) -> tx`.
        start: Value of rho with which the search on a validation split begins; 0 is not searched.
        gradients: Gradients per step, in passes over one batch. This is an estimate if a policy
            depends on the gradients (`ae-sam`, `ae-looksam`, `vsam`, `arsam`) or if a bandit
            chooses layers.
        rho: The paper's recommendation for CIFAR-10.
        keeps_aux: Whether the state holds the aux of one of the variant's passes, because the
            caller's clean pass is not used.
        cycle: Number of steps that are timed together. The pattern of sharp and plain steps repeats
            after one cycle; a random pattern repeats approximately. If `cycle` is more than 1,
            some steps are plain.
        settling: Steps before the first cycle: a warm-up of sharp steps, and averages that fill.
        uses_gradient: Whether `update` reads the gradient that it is given. If not, the compiler
            removes its computation.
        learning_rate: Where the search for the learning rate begins, if the variant is an optimizer
            and has no base.
    """

    make: Make
    start: float
    gradients: float
    rho: float
    keeps_aux: bool = False
    cycle: int = 1
    settling: int = 0
    uses_gradient: bool = True
    learning_rate: float | None = None


def of(name: str, **fixed: Any) -> Make:
    """Return a `Make` for a row of `samx.catalog`, with some arguments of its factory fixed.

    A variant that is itself the optimizer takes the learning rate. It does not use the weight decay
    of the base.
    """
    (entry,) = samx.catalog(name)
    factory = partial(entry.factory, **fixed)
    if entry.shape == "optimizer":
        return lambda rho, base, setting: factory(setting.learning_rate, rho)
    if entry.shape == "wraps":
        return lambda rho, base, setting: factory(base, rho)
    return lambda rho, base, setting: optax.chain(factory(rho), base)


def in_front(variant: Callable[[Any], optax.GradientTransformation]) -> Make:
    """Return a `Make` for a transformation that stands before its base in a chain."""
    return lambda rho, base, setting: optax.chain(variant(rho), base)


def g_rst(rho: Any) -> optax.GradientTransformation:
    """Build G-RST: a sharp gradient on a random half of the steps, mixed in with weight 2."""
    mixed = samx.combinations.mix(samx.sam(rho), 2.0)
    return samx.perturb_if(policies.random(0.5), mixed)


def by_setting(
    variant: Callable[[Any, Setting], optax.GradientTransformation],
) -> Make:
    """Return a `Make` for a variant that stands before its base and needs the `Setting`."""
    return lambda rho, base, setting: optax.chain(variant(rho, setting), base)


def ksam(rho: Any, setting: Setting) -> optax.GradientTransformation:
    """Build K-SAM on the half of the examples with the largest losses."""
    half = max(1, setting.batch_size // setting.num_groups // 2)
    return samx.ksam(rho, half * setting.num_groups, num_groups=setting.num_groups)


def esam(rho: Any, setting: Setting) -> optax.GradientTransformation:
    """Build ESAM with the authors' fractions for ResNet-18."""
    return samx.esam(rho, 0.6, 0.5, num_groups=setting.num_groups)


def ausam(rho: Any, setting: Setting) -> optax.GradientTransformation:
    """Build AUSAM on half of each batch, with a score table for the setting's data set."""
    return samx.ausam(
        rho, 0.5, setting.num_examples, num_groups=setting.num_groups, aux_like=setting.aux
    )


def fisher_sparse_sam(rho: Any, setting: Setting) -> optax.GradientTransformation:
    """Build Sparse SAM; microbatches of one batch give the Fisher information."""
    examples = setting.batch_size // setting.num_groups
    return samx.fisher_sparse_sam(
        rho, period=PERIOD, num_microbatches=math.gcd(examples, max(1, examples // 16))
    )


def msam(rho: Any, setting: Setting) -> optax.GradientTransformation:
    """Build micro-batch SAM with 4 microbatches, or fewer if 4 does not divide a device's batch."""
    examples = setting.batch_size // setting.num_groups
    num_microbatches = next(count for count in (4, 3, 2, 1) if examples % count == 0)
    return samx.msam(rho, num_microbatches, aux_like=setting.aux)


def lpf_sgd(sigma: Any, setting: Setting) -> optax.GradientTransformation:
    """Build LPF-SGD with one draw for the whole batch."""
    return samx.lpf_sgd(sigma, aux_like=setting.aux)


def rwp(sigma: Any, setting: Setting) -> optax.GradientTransformation:
    """Build RWP."""
    return samx.rwp(sigma, aux_like=setting.aux)


def marwp(sigma: Any, setting: Setting) -> optax.GradientTransformation:
    """Build m-ARWP."""
    return samx.marwp(sigma, aux_like=setting.aux)


def arwp(sigma: Any, setting: Setting) -> optax.GradientTransformation:
    """Build ARWP."""
    return samx.arwp(sigma, aux_like=setting.aux)


def bsam(rho: Any, base: Any, setting: Setting) -> optax.GradientTransformation:
    """Build bSAM with a weight decay of `DECAY`, and 4 microbatches or fewer on a device."""
    del base
    return samx.bsam(
        setting.learning_rate,
        setting.num_examples,
        rho,
        prior_precision=DECAY * setting.num_examples,
        num_microbatches=math.gcd(setting.batch_size // setting.num_groups, 4),
        aux_like=setting.aux,
    )


def tsam(rho: Any, setting: Setting) -> optax.GradientTransformation:
    """Build TSAM, whose noise is as long as the ascent."""
    return samx.tsam(rho, radius=rho, aux_like=setting.aux)


def gam(rho: Any) -> optax.GradientTransformation:
    """Build GAM with the authors' ratio of both radii for ResNets on CIFAR-100."""
    return samx.gam(rho, rho / 10)


def msassha(rho: Any, base: Any, setting: Setting) -> optax.GradientTransformation:
    """Build M-SASSHA with SASSHA's settings."""
    del base
    return samx.msassha(
        setting.learning_rate, rho, power=0.5, weight_decay=0.0, aux_like=setting.aux
    )


def sam_polyak(rho: Any, base: Any, setting: Setting) -> optax.GradientTransformation:
    """Build SAM-Polyak, for which the learning rate is the bound of its own."""
    del base
    return samx.sam_polyak(rho, setting.learning_rate)


def async_sam(rho: Any) -> optax.GradientTransformationExtraArgs:
    """Build AsyncSAM that climbs its own loss: drop the examples' `ascent_fn`, made for BiSAM."""
    tx = samx.async_sam(rho)

    def update_fn(g, state, params, *, ascent_fn=None, **keywords):
        del ascent_fn
        return tx.update(g, state, params, **keywords)

    return samx.closure_transformation(tx.init, update_fn, name="async_sam")


def saf(lam: Any, setting: Setting) -> optax.GradientTransformation:
    """Build SAF with the paper's epochs; a table too large for a machine is refused."""
    numbers = SAF_EPOCHS * setting.num_examples * math.prod(setting.logits.shape)
    if numbers > LARGEST_TABLE:
        raise ValueError(
            f"saf: the logits of {setting.num_examples:,} examples in {SAF_EPOCHS} epochs take "
            f"{4e-9 * numbers:,.0f} GB; take mesa, whose teacher needs no table"
        )
    return samx.saf(
        lam,
        num_examples=setting.num_examples,
        logits_like=setting.logits,
        aux_like=setting.aux,
    )


def mesa(lam: Any, setting: Setting) -> optax.GradientTransformation:
    """Build MESA, whose teacher averages about one epoch."""
    steps = max(1, setting.num_examples // setting.batch_size)
    decay = 1 - 1 / (steps + 1)
    return samx.mesa(lam, decay=decay, steps_per_epoch=steps, aux_like=setting.aux)


SAF_EPOCHS, LARGEST_TABLE = 4, 2**31  # of its table of logits, and numbers in it

RADIUS = 0.2
SMALL = 0.05  # for a variant in which sharpness has nine times the weight
FACTOR = 0.5  # for ε = rho g, or an ε that shrinks as g grows
STEP = 2e-3  # the size of the perturbation of one element
ADAM_RATE = 2e-3
GSAM_ALPHA = 0.1  # between the paper's value for ResNets and its default for vision transformers
DECAY = 5e-4  # of bSAM, the precision of its prior for one example
NOISE = 0.02  # the deviation of one weight, relative to its filter
PERIOD = 50  # steps between two computations of the mask
WINDOW, WARMUP = 50, 50  # for `policies.quota`; its first window is one step shorter

VARIANTS = {
    "base": Variant(lambda rho, base, setting: base, 0.0, 1, 0.0),
    "sam": Variant(of("sam"), RADIUS, 2, 0.05),
    "asam": Variant(of("asam"), 1.0, 2, 0.5),
    "sampa": Variant(
        lambda rho, base, setting: samx.sampa(
            base, rho, batch_like=setting.batch, aux_like=setting.aux
        ),
        RADIUS,
        2,
        0.1,
        keeps_aux=True,
        uses_gradient=False,
    ),
    "sampa-separate": Variant(  # the same result; faster on the CPU
        lambda rho, base, setting: samx.sampa(
            base, rho, batch_like=setting.batch, aux_like=setting.aux, gradients="separate"
        ),
        RADIUS,
        2,
        0.1,
        keeps_aux=True,
        uses_gradient=False,
    ),
    "periodic": Variant(
        in_front(lambda rho: samx.perturb_if(policies.every(5), samx.sam(rho))),
        RADIUS,
        1.2,
        0.05,
        cycle=5,
    ),
    "rst": Variant(
        in_front(lambda rho: samx.perturb_if(policies.random(0.5), samx.sam(rho))),
        RADIUS,
        1.5,
        0.05,
        cycle=20,
    ),
    "g-rst": Variant(in_front(g_rst), RADIUS, 1.5, 0.05, cycle=20),
    "looksam": Variant(of("looksam"), RADIUS, 1.2, 0.05, cycle=5),
    "look-layer-sam": Variant(
        of("look_layer_sam"),
        0.005,
        1.2,
        0.05,
        cycle=5,
    ),
    "ae-sam": Variant(of("ae_sam"), RADIUS, 1.5, 0.05, cycle=10, settling=50),
    "ae-looksam": Variant(of("ae_looksam"), RADIUS, 1.5, 0.05, cycle=10, settling=50),
    "vsam": Variant(of("vsam"), RADIUS, 1.3, 0.05, cycle=WINDOW, settling=WARMUP + WINDOW - 1),
    "arsam": Variant(of("arsam"), RADIUS, 1.3, 0.05, cycle=WINDOW, settling=WARMUP + WINDOW - 1),
    "ksam": Variant(by_setting(ksam), RADIUS, 1 + 1 / 3, 0.05, uses_gradient=False),
    "esam": Variant(by_setting(esam), RADIUS, 1 + 1 / 3 + 0.5, 0.05, uses_gradient=False),
    "ausam": Variant(
        by_setting(ausam), RADIUS, 1, 0.1, keeps_aux=True, settling=1, uses_gradient=False
    ),
    "sl-sam": Variant(
        lambda rho, base, setting: samx.sl_sam(base, rho, aux_like=setting.aux),
        RADIUS,
        1.5,
        0.05,
        keeps_aux=True,
        cycle=20,
        uses_gradient=False,
    ),
    "gsam": Variant(of("gsam", alpha=GSAM_ALPHA), RADIUS, 2, 0.05),
    "wsam": Variant(
        lambda rho, base, setting: samx.wsam(base, setting.learning_rate, rho), RADIUS, 2, 0.05
    ),
    "coupled-wsam": Variant(of("coupled_wsam"), SMALL, 2, 0.05),
    "stable-sam": Variant(of("stable_sam"), FACTOR, 2, 0.05),
    "usam": Variant(of("usam"), FACTOR, 2, 0.05),
    "friendly-sam": Variant(of("friendly_sam"), RADIUS, 2, 0.1),
    "monge-sam": Variant(of("monge_sam"), FACTOR, 2, 0.05),
    "msam": Variant(by_setting(msam), RADIUS, 2, 0.05, keeps_aux=True, uses_gradient=False),
    "bisam": Variant(of("bisam"), RADIUS, 2, 0.05, uses_gradient=False),
    "async-sam": Variant(in_front(async_sam), RADIUS, 2, 0.05),  # on one device it saves no time
    "fisher-sparse-sam": Variant(
        by_setting(fisher_sparse_sam), RADIUS, 2 + 1 / PERIOD, 0.1, cycle=PERIOD, settling=1
    ),
    "dynamic-sparse-sam": Variant(of("dynamic_sparse_sam", period=PERIOD), RADIUS, 2, 0.1),
    "lightsam-norm": Variant(of("lightsam_norm"), FACTOR, 2, 0.05, learning_rate=5.0),
    "lightsam-adagrad": Variant(of("lightsam_adagrad"), STEP, 2, 1e-3, learning_rate=0.05),
    "lightsam-adam": Variant(of("lightsam_adam"), STEP, 2, 1e-3, learning_rate=ADAM_RATE),
    "adasam": Variant(of("adasam"), RADIUS, 2, 0.05, learning_rate=ADAM_RATE),
    "bsam": Variant(bsam, 0.02, 2, 0.01, keeps_aux=True, uses_gradient=False, learning_rate=0.2),
    "zsharp": Variant(of("zsharp"), RADIUS, 2, 0.05),
    "le-sam": Variant(of("le_sam"), 0.05, 2, 0.35),  # σ, the rise of the loss
    "unified-sam": Variant(of("unified_sam"), RADIUS, 2, 0.1),
    "spectral-sam": Variant(of("spectral_sam"), SMALL, 2, 0.05),
    "eigen-sam": Variant(of("eigen_sam"), RADIUS, 2.1, 0.05, cycle=100),
    "gnp": Variant(of("gnp"), RADIUS, 2, 0.1),
    "lpf-sgd": Variant(by_setting(lpf_sgd), NOISE, 1, 0.001, keeps_aux=True, uses_gradient=False),
    "rwp": Variant(by_setting(rwp), NOISE, 1, 0.01, keeps_aux=True, uses_gradient=False),
    "arwp": Variant(by_setting(arwp), NOISE, 1, 0.01, keeps_aux=True, uses_gradient=False),
    "marwp": Variant(by_setting(marwp), NOISE, 1, 0.01, keeps_aux=True, uses_gradient=False),
    "cr-sam": Variant(of("cr_sam"), RADIUS, 3, 0.1),
    "xsam": Variant(of("xsam"), RADIUS, 2 + 7 / 100, 0.15, cycle=100),
    "x-sam": Variant(of("x_sam"), RADIUS, 4, 0.05, cycle=5, settling=1),
    "lookbehind-sam": Variant(of("lookbehind_sam"), SMALL, 6, 0.05),
    "tsam": Variant(by_setting(tsam), RADIUS, 6, 0.05, keeps_aux=True, uses_gradient=False),
    "sam-polyak": Variant(sam_polyak, RADIUS, 2, 0.1, learning_rate=1.0),
    "sassha": Variant(of("sassha"), RADIUS, 2.2, 0.05, cycle=10, learning_rate=0.1),
    "msassha": Variant(
        msassha,
        RADIUS,
        1.2,
        0.05,
        keeps_aux=True,
        cycle=10,
        uses_gradient=False,
        learning_rate=0.1,
    ),
    "gam": Variant(in_front(gam), RADIUS, 4, 0.2),
    "gam-exact": Variant(of("gam_exact"), RADIUS, 6, 0.2),
    "functional-sam": Variant(of("functional_sam"), RADIUS, 2, 0.05, uses_gradient=False),
    "logits-sam": Variant(of("logits_sam"), RADIUS, 1, 0.05, uses_gradient=False),  # and its head
    "saf": Variant(by_setting(saf), 1.0, 1, 0.3, keeps_aux=True, uses_gradient=False),  # rho is λ
    "mesa": Variant(
        by_setting(mesa), 1.0, 4 / 3, 0.8, keeps_aux=True, settling=6, uses_gradient=False
    ),
    "momentum-sam": Variant(
        lambda rho, base, setting: samx.momentum_sam(base, rho, aux_like=setting.aux),
        0.5,
        1,
        3.0,
        keeps_aux=True,
        uses_gradient=False,
    ),
}


def plain(entry: Any) -> Variant:
    """Return the row of a variant that has no row above: SAM's radii, two gradients."""
    return Variant(
        of(entry.name), RADIUS, 2, inspect.signature(entry.factory).parameters["rho"].default
    )


VARIANTS |= {
    name: plain(entry)
    for entry in samx.catalog()
    if (name := entry.name.replace("_", "-")) not in VARIANTS and entry.name not in ELSEWHERE
}

BASES = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adamw": optax.adamw,
}


def check_base(variant: str, base: str) -> None:
    """Raise samx's `ValueError` if the variant rejects the base, for example without momentum."""
    x = jax.ShapeDtypeStruct((1,), jnp.float32)
    setting = Setting(x, batch_size=1, num_examples=1)
    # Evaluate shapes only: nothing may run on a device before `data_parallel.py` chooses some.
    jax.eval_shape(VARIANTS[variant].make(0.0, BASES[base](0.0), setting).init, x)
