"""Measures of sharpness: curvature, worst and average cases, slices of the loss, the edge.

Every measure is a pure function `(f, params, ...)`. `f` is a loss, `params -> scalar`, or an
`objective` made from the closures of the contract. A ball or a metric of `samx.perturbations` that
trains is also the one that measures. Measures work under `jit`, `vmap`, on sharded arrays and
inside mapped functions. They never form a matrix of parameters.
"""

from samx.core.readings import Monitored
from samx.sharpness.density import density
from samx.sharpness.edge import edge
from samx.sharpness.eigenvalues import Eigenvalues, eigenvalues, extreme_eigenvalue
from samx.sharpness.estimates import Estimate
from samx.sharpness.monitor import monitor
from samx.sharpness.objective import Objective, objective
from samx.sharpness.products import ggn_vp, hvp
from samx.sharpness.traces import diagonal, frobenius, moments, trace

__all__ = [
    # The loss that is measured
    "objective",
    "Objective",
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
    # During training
    "edge",
    "monitor",
    "Monitored",
]
