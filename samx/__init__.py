"""samx: sharpness-aware training in JAX.

Anatomy of a SAM step:

    gradient          g   = ∇L(w)             at the parameters
    ascent gradient   g_a                     the one that is climbed, usually g
    perturbation      ε   = perturbation(g_a) geometry: a step of radius rho
    sharp gradient    g_s = ∇L(w + ε)         at the perturbed point
    policy            on which steps          the sharp gradient is computed
    combination       updates                 what the base optimizer gets
    base              optax.sgd(...)          the optimizer that takes the step

Every variant is an `optax.GradientTransformationExtraArgs` whose `update` takes the loss as a
closure, `value_fn=lambda params: ...`. Most stand first in an `optax.chain`. `samx.catalog()` lists
them.
"""

from samx import (
    asynchronous,
    averages,
    combinations,
    elastic,
    losses,
    mup,
    perturbations,
    policies,
    posterior,
    schedules,
    selection,
    sharpness,
)
from samx.catalog import catalog
from samx.core.convolutions import fast_convolutions
from samx.core.readings import Readings
from samx.core.sharp import is_sharp_pass, value_and_grad_at
from samx.core.state import HeldBatch
from samx.core.transformation import closure_transformation
from samx.parallel.data_parallel import axis_mean, data_parallel, state_specs, value_and_grad
from samx.policies.perturb_if import perturb_if
from samx.training.accumulate import accumulate
from samx.training.all_readings import all_readings
from samx.training.freeze import freeze
from samx.training.on_merged import on_merged
from samx.training.preflight import preflight
from samx.training.scale_loss import scale_loss
from samx.training.skip_nonfinite import skip_nonfinite
from samx.training.with_base import with_base
from samx.variants.adasam import adasam
from samx.variants.ae_sam import ae_looksam, ae_sam
from samx.variants.arsam import arsam
from samx.variants.arwp import arwp, marwp
from samx.variants.asam import asam
from samx.variants.async_sam import async_sam
from samx.variants.ausam import ausam
from samx.variants.bi_lora import bi_lora
from samx.variants.bisam import bisam
from samx.variants.bsam import bsam
from samx.variants.cr_sam import cr_sam
from samx.variants.eigen_sam import eigen_sam
from samx.variants.esam import esam
from samx.variants.fisher_sam import fisher_sam
from samx.variants.flat_lora import flat_lora
from samx.variants.focal_sam import focal_sam
from samx.variants.friendly_sam import friendly_sam
from samx.variants.functional_sam import functional_sam
from samx.variants.gam import gam, gam_exact
from samx.variants.gcsam import gcsam
from samx.variants.gnp import gnp
from samx.variants.gsam import gsam
from samx.variants.imbalanced_sam import imbalanced_sam
from samx.variants.ksam import ksam
from samx.variants.le_sam import le_sam
from samx.variants.lets import lets
from samx.variants.lightsam import lightsam_adagrad, lightsam_adam, lightsam_norm
from samx.variants.logits_sam import logits_sam
from samx.variants.lookbehind_sam import lookbehind_sam
from samx.variants.looksam import look_layer_sam, looksam
from samx.variants.lpf_sgd import lpf_sgd
from samx.variants.lsam import lsam
from samx.variants.mesa import mesa
from samx.variants.momentum_sam import momentum_sam
from samx.variants.monge_sam import monge_sam
from samx.variants.msam import msam
from samx.variants.mup_sam import mup_sam
from samx.variants.rwp import rwp
from samx.variants.saf import saf
from samx.variants.sagm import sagm
from samx.variants.sam import sam, sharpness_aware
from samx.variants.sam_on import sam_on
from samx.variants.sam_polyak import sam_polyak
from samx.variants.sampa import sampa
from samx.variants.sassha import msassha, sassha
from samx.variants.sl_sam import sl_sam
from samx.variants.sparse_sam import dynamic_sparse_sam, fisher_sparse_sam
from samx.variants.spectral_sam import spectral_sam
from samx.variants.stable_sam import stable_sam
from samx.variants.tsam import tsam
from samx.variants.unified_sam import unified_sam
from samx.variants.usam import usam
from samx.variants.vsam import vsam
from samx.variants.wsam import coupled_wsam, wsam
from samx.variants.x_sam import x_sam
from samx.variants.xsam import xsam
from samx.variants.zsharp import zsharp

__version__ = "0.2.0"

__all__ = [
    "catalog",
    # Variants
    "adasam",
    "ae_looksam",
    "ae_sam",
    "arsam",
    "arwp",
    "asam",
    "async_sam",
    "ausam",
    "bi_lora",
    "bisam",
    "bsam",
    "coupled_wsam",
    "cr_sam",
    "dynamic_sparse_sam",
    "eigen_sam",
    "esam",
    "fisher_sam",
    "fisher_sparse_sam",
    "flat_lora",
    "focal_sam",
    "friendly_sam",
    "functional_sam",
    "gam",
    "gam_exact",
    "gcsam",
    "gnp",
    "gsam",
    "imbalanced_sam",
    "ksam",
    "le_sam",
    "lets",
    "lightsam_adagrad",
    "lightsam_adam",
    "lightsam_norm",
    "logits_sam",
    "look_layer_sam",
    "lookbehind_sam",
    "looksam",
    "lpf_sgd",
    "lsam",
    "marwp",
    "mesa",
    "momentum_sam",
    "monge_sam",
    "msam",
    "msassha",
    "mup_sam",
    "rwp",
    "saf",
    "sagm",
    "sam",
    "sam_on",
    "sam_polyak",
    "sampa",
    "sassha",
    "sharpness_aware",
    "sl_sam",
    "spectral_sam",
    "stable_sam",
    "tsam",
    "unified_sam",
    "usam",
    "vsam",
    "wsam",
    "x_sam",
    "xsam",
    "zsharp",
    # Asynchronous
    "asynchronous",
    "elastic",
    # Building blocks
    "averages",
    "closure_transformation",
    "combinations",
    "is_sharp_pass",
    "losses",
    "mup",
    "perturb_if",
    "perturbations",
    "policies",
    "posterior",
    "schedules",
    "selection",
    "sharpness",
    "value_and_grad_at",
    # Around an optimizer
    "accumulate",
    "all_readings",
    "axis_mean",
    "data_parallel",
    "fast_convolutions",
    "freeze",
    "on_merged",
    "preflight",
    "state_specs",
    "value_and_grad",
    "scale_loss",
    "skip_nonfinite",
    "with_base",
    # In a state
    "HeldBatch",
    "Readings",
]
