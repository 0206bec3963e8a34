"""Selection: which examples of a batch are used, with sizes that are fixed when tracing.

A selection is an array of positions, `int32[num_groups, n]`: row j holds the places of the n chosen
examples inside the j-th contiguous group of the batch. Groups keep the choice local: with one group
per device, no example leaves its device.
"""

from samx.selection.examples import largest, put, sampled, take

__all__ = ["largest", "put", "sampled", "take"]
