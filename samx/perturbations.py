"""Perturbations: optax transformations from an ascent gradient `g` to a step `ε` up the loss.

A ball has a radius `rho` and a metric. A metric is a function `params -> T`, a tree like `params`
of elementwise scales (a leaf may be a scalar): parameters with a large `T` may move further.
"""

from samx._balls import gradient_step, linf_ball, metric_ball, monge_ball
from samx._deviation import deviation
from samx._dynamic_mask import dynamic_mask
from samx._fisher_mask import fisher_mask
from samx._layer_steps import layer_steps, trust_ratio
from samx._leaves import on_leaves, random_leaves
from samx._metrics import (
    constants,
    identity,
    is_normalization,
    is_not_bias,
    layerwise,
    magnitude,
)
from samx._mup import mup_ball

__all__ = [
    "constants",
    "deviation",
    "dynamic_mask",
    "fisher_mask",
    "gradient_step",
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
