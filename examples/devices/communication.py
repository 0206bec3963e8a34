"""Count the bytes that devices send to each other, read from the compiled program."""

import math
import re
from typing import Any

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(rf"= (.+?) ({'|'.join(OPERATIONS)})(-start)?\((.*)$", re.MULTILINE)
# Groups of one device: `{{0},{1}}` and `[2,1]<=[2]`; or a mesh with the axes that form a group,
# `mesh['a'=2,'one'=1] {'one'}`, where `'a':(1)2` is a part of size 2 of an axis.
_ALONE = re.compile(r"replica_groups=(\{(\{\d+\},?)+\}|\[\d+,1\])")
_MESH = re.compile(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}")
_SIZE = re.compile(r"([^',]+)'?=(\d+)")
_AXIS = re.compile(r"'?([^',:]+)'?(?::\(\d+\)(\d+))?")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


def communicated_bytes(program: Any) -> dict[str, int]:
    """Return the bytes in the collective operations of one device's program, by kind.

    An all-reduce of P bytes counts as P bytes. Other operations count as the bytes of their
    results. Operations within a group of one device move nothing and are not counted.

    Args:
        program: A compiled function, `jax.jit(f).lower(...).compile()`.

    Returns:
        Bytes per device and call, for each kind of operation that occurs. The body of a loop counts
            once.
    """
    found: dict[str, int] = {}
    for result, operation, start, rest in _INSTRUCTION.findall(program.as_text()):
        if _is_alone(rest):
            continue
        size = sum(_bytes(*array) for array in _ARRAY.findall(result))
        if start and operation != "all-reduce":  # its result includes the operands
            size -= sum(_bytes(*array) for array in _ARRAY.findall(rest.split(")")[0]))
        found[operation] = found.get(operation, 0) + size
    return found


def _is_alone(text: str) -> bool:
    """Return whether each group of an instruction has one device only."""
    mesh = _MESH.search(text)
    if mesh is None:
        return _ALONE.search(text) is not None
    sizes = dict(_SIZE.findall(mesh[1]))
    return all(int(part or sizes[axis]) == 1 for axis, part in _AXIS.findall(mesh[2]))


def _bytes(dtype: str, bits: str, shape: str) -> int:
    width = 1 if dtype == "pred" else int(bits) // 8
    return width * math.prod(int(n) for n in shape.split(",") if n)
