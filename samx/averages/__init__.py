"""Averages of the parameters around any optimizer, and statistics of BatchNorm at an average.

running     `ema`, `swa`, `latest`: of the iterates, the parameters after each step
by losses   `swad`, with `end_segment`: of the iterates around the minimum of a validation loss
evaluate    `params`: the average, for evaluation; `batch_stats`: BatchNorm's statistics there

An average does not change the training. With SAM inside, it is the average of SAM's iterates, which
is called WASAM:

    tx = samx.averages.swa(optax.chain(samx.sam(0.05), optax.sgd(0.1)), start=750)

Notes for all of them:

- Wrap the whole optimizer. The iterate is `optax.apply_updates(params, updates)`. It is averaged in
  float32, or in float64 if it is so wide. An integer leaf has no average: it stays that of the
  parameters.
- Around `samx.skip_nonfinite`, a skipped step repeats the last iterate, which counts once more.
  Inside of it, a skipped step leaves the average alone. The same holds for `optax.MultiSteps`:
  around it, each of its small steps counts; inside of it, each step of the optimizer.
- An entry of an iterate that is not finite is left out, each entry for itself. So one bad step does
  not spoil an average, and nothing is sent to find out.
- The state is sharded as the parameters are, see `samx.state_specs`. Nothing is sent for an
  average. Inside `jax.shard_map` and `jax.pmap`, each device averages what it holds.
"""

from samx.averages._evaluation import batch_stats, params
from samx.averages._running import ema, latest, swa
from samx.averages._swad import end_segment, swad

__all__ = ["batch_stats", "ema", "end_segment", "latest", "params", "swa", "swad"]
