"""Asynchronous elastic averaging: LSAM, and EASGD with plain gradients.

rule        `Rule`, `exchange`, `apply_move`: how workers and center move towards each other
worker      `Worker`: your step, with any variant and base, and a stream of batches
simulation  `Simulation`, driven by `timeline` or `in_order`: deterministic, the reference
engines     `train` with `Threads` or `Ray`: real parallel resources
in step     `averaging`, `nesterov`: the synchronous form, and the local rule of EAMSGD
checkpoint  `Checkpoint`, `Progress`, `Trained`
"""

from samx.elastic._averaging import averaging, nesterov
from samx.elastic._center import CenterLost
from samx.elastic._engine import Threads
from samx.elastic._ledger import WorkerRecord
from samx.elastic._progress import Checkpoint, Progress, Trained
from samx.elastic._ray import Ray
from samx.elastic._rule import Rule, apply_move, exchange
from samx.elastic._simulation import Event, Simulation, in_order, timeline
from samx.elastic._training import train
from samx.elastic._worker import Worker

__all__ = [
    "CenterLost",
    "Checkpoint",
    "Event",
    "Progress",
    "Ray",
    "Rule",
    "Simulation",
    "Threads",
    "Trained",
    "Worker",
    "WorkerRecord",
    "apply_move",
    "averaging",
    "exchange",
    "in_order",
    "nesterov",
    "timeline",
    "train",
]
