"""Measures of sharpness: curvature, worst and average cases, slices of the loss, the edge.

Every measure is a pure function `(f, params, ...)`. `f` is a loss, `params -> scalar`, or an
`objective` made from the closures of the contract. A ball or a metric of `samx.perturbations` that
trains is also the one that measures. Measures work under `jit`, `vmap`, on sharded arrays and
inside mapped functions. They never form a matrix of parameters. Where the loss is not a finite
number, neither is what they measure.
"""

from samx.core.readings import Monitored
from samx.sharpness.average_case import average_case, smoothed
from samx.sharpness.barrier import Barrier, barrier
from samx.sharpness.density import density
from samx.sharpness.directions import alignment, directional, relative_flatness
from samx.sharpness.edge import edge
from samx.sharpness.eigenvalues import Eigenvalues, eigenvalues, extreme_eigenvalue
from samx.sharpness.estimates import Estimate
from samx.sharpness.first_order import (
    ExactSAMGradient,
    exact_sam_gradient,
    first_order,
    m_sharpness,
)
from samx.sharpness.logits import normalize_logits
from samx.sharpness.monitor import monitor
from samx.sharpness.objective import Objective, objective
from samx.sharpness.products import ggn_vp, hvp
from samx.sharpness.slices import filter_normalize, slice_1d, slice_2d
from samx.sharpness.traces import diagonal, frobenius, moments, trace
from samx.sharpness.worst_case import WorstCase, worst_case

__all__ = [
    # The loss that is measured
    "objective",
    "Objective",
    "normalize_logits",
    # Curvature
    "hvp",
    "ggn_vp",
    "eigenvalues",
    "extreme_eigenvalue",
    "Eigenvalues",
    "trace",
    "frobenius",
    "diagonal",
    "moments",
    "density",
    "Estimate",
    # Curvature along directions
    "directional",
    "alignment",
    "relative_flatness",
    # The loss around the parameters
    "worst_case",
    "WorstCase",
    "first_order",
    "m_sharpness",
    "average_case",
    "smoothed",
    "exact_sam_gradient",
    "ExactSAMGradient",
    # Slices
    "filter_normalize",
    "slice_1d",
    "slice_2d",
    "barrier",
    "Barrier",
    # During training
    "edge",
    "monitor",
    "Monitored",
]
