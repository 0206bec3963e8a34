"""Measures of sharpness: curvature, worst and average cases, slices of the loss, the edge.

Every measure is a pure function `(f, params, ...)`. `f` is a loss, `params -> scalar`, or an
`objective` made from the closures of the contract. A ball or a metric of `samx.perturbations` that
trains is also the one that measures. Measures work under `jit`, `vmap`, on sharded arrays and
inside mapped functions. They never form a matrix of parameters.
"""

from samx.sharpness.edge import edge
from samx.sharpness.estimates import Estimate
from samx.sharpness.objective import Objective, objective
from samx.sharpness.products import ggn_vp, hvp

__all__ = [
    "objective",
    "Objective",
    "hvp",
    "ggn_vp",
    "Estimate",
    # Predicted
    "edge",
]
