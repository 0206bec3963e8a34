"""Selection: choose examples of a batch; all sizes are fixed at trace time.

A selection is an array of positions, `int32[num_groups, n]`. Row j holds the positions of the n
chosen examples inside the j-th contiguous group of the batch. Groups keep the selection local: with
one group per device, no example leaves its device.
"""

from samx.selection.examples import largest, put, sampled, take

__all__ = ["largest", "put", "sampled", "take"]
