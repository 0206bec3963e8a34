"""Measures of sharpness: curvature, worst and average cases, slices of the loss, the edge.

Every measure is a pure function `(f, params, ...)`. `f` is a loss, `params -> scalar`, or an
`objective` made from the closures of the contract. A ball or a metric of `samx.perturbations` that
trains is also the one that measures. Measures work under `jit`, `vmap`, on sharded arrays and
inside mapped functions. They never form a matrix of parameters.
"""

from samx.sharpness.average_case import average_case, smoothed
from samx.sharpness.barrier import Barrier, barrier
from samx.sharpness.directions import alignment, directional, relative_flatness
from samx.sharpness.estimates import Estimate
from samx.sharpness.first_order import (
    ExactSAMGradient,
    exact_sam_gradient,
    first_order,
    m_sharpness,
)
from samx.sharpness.objective import Objective, objective
from samx.sharpness.products import ggn_vp, hvp
from samx.sharpness.slices import filter_normalize, slice_1d, slice_2d
from samx.sharpness.worst_case import WorstCase, worst_case

__all__ = [
    # the loss
    "objective",
    "Objective",
    "Estimate",
    # products
    "hvp",
    "ggn_vp",
    # the loss around the parameters
    "average_case",
    "smoothed",
    "first_order",
    "m_sharpness",
    "exact_sam_gradient",
    "ExactSAMGradient",
    "worst_case",
    "WorstCase",
    # curvature along directions
    "directional",
    "alignment",
    "relative_flatness",
    # slices
    "filter_normalize",
    "slice_1d",
    "slice_2d",
    "barrier",
    "Barrier",
]
