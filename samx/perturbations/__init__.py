"""Perturbations: optax transformations from an ascent gradient `g` to a perturbation `ε`.

A ball has a radius `rho` and a metric. A metric is a function `params -> T`. `T` is a tree like
`params` of elementwise scales (a leaf may be a scalar): a parameter with a larger `T` may move
further.
"""

from samx.perturbations.balls import ball, linf_ball, metric_ball, monge_ball, unnormalized_step
from samx.perturbations.dynamic_mask import dynamic_mask
from samx.perturbations.filters import centralize, centralized_ball, filterwise
from samx.perturbations.fisher_mask import fisher_mask
from samx.perturbations.gradient_steps import (
    gradient_matching_step,
    loss_rise_ball,
    partly_normalized_step,
)
from samx.perturbations.layer_steps import layer_steps, trust_ratio
from samx.perturbations.leaves import on_leaves, random_leaves
from samx.perturbations.metrics import (
    constants,
    identity,
    is_normalization,
    is_not_bias,
    layerwise,
    magnitude,
)
from samx.perturbations.moving_average import subtract_ema
from samx.perturbations.mup_ball import mup_ball
from samx.perturbations.noise import gaussian_noise, sphere_noise
from samx.perturbations.per_layer import per_layer
from samx.perturbations.spectral_ball import spectral_ball
from samx.perturbations.z_score_ball import z_score_ball

__all__ = [
    "ball",
    "centralize",
    "centralized_ball",
    "filterwise",
    "gaussian_noise",
    "gradient_matching_step",
    "loss_rise_ball",
    "partly_normalized_step",
    "per_layer",
    "spectral_ball",
    "sphere_noise",
    "z_score_ball",
    "constants",
    "subtract_ema",
    "dynamic_mask",
    "fisher_mask",
    "unnormalized_step",
    "identity",
    "is_normalization",
    "is_not_bias",
    "layer_steps",
    "layerwise",
    "linf_ball",
    "magnitude",
    "metric_ball",
    "monge_ball",
    "mup_ball",
    "on_leaves",
    "random_leaves",
    "trust_ratio",
]
