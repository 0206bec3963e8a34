"""samx: sharpness-aware training in JAX.

Anatomy of a SAM step:

    gradient          g   = ∇L(w)             at the parameters
    ascent gradient   g_a                     the one that is climbed, usually g
    perturbation      ε   = perturbation(g_a) geometry: a step of radius rho
    sharp gradient    g_s = ∇L(w + ε)         at the perturbed point
    combination       updates                 what the base optimizer gets
    base              optax.sgd(...)          the optimizer that takes the step

Every variant is an `optax.GradientTransformationExtraArgs` whose `update` takes the loss as a
closure, `value_fn=lambda params: ...`; most stand first in an `optax.chain`.
"""

from samx import perturbations
from samx._base import check_closures, closure_transformation
from samx._held import HeldBatch
from samx._sharp import is_sharp_pass, value_and_grad_at
from samx.accumulation import accumulate
from samx.parallel import axis_mean, data_parallel, state_specs, value_and_grad
from samx.precision import scale_loss
from samx.readings import Readings
from samx.variants.asam import asam
from samx.variants.sam import sam, sharpness_aware
from samx.variants.sampa import sampa
from samx.wrappers import skip_nonfinite, with_base

__version__ = "0.1.0"

__all__ = [
    # Variants
    "asam",
    "sam",
    "sampa",
    "sharpness_aware",
    # Building blocks
    "closure_transformation",
    "is_sharp_pass",
    "perturbations",
    "value_and_grad_at",
    # Around an optimizer
    "accumulate",
    "axis_mean",
    "check_closures",
    "data_parallel",
    "state_specs",
    "value_and_grad",
    "scale_loss",
    "skip_nonfinite",
    "with_base",
    # In a state
    "HeldBatch",
    "Readings",
]
