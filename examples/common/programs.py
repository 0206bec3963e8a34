"""What one device's compiled program computes, sends and holds.

The compiler's own totals count the body of a loop once, however often it runs. The counts here go
through the text of the program and multiply by the number of rounds, wherever the compiler knows
it: that of `jax.lax.scan` and of a `fori_loop` with fixed bounds. Other loops count as one round,
if the caller does not say how many. Of the sides of a branch, the costliest counts.
"""

import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

Counts = dict[str, float]

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.-]+), false_computation=%?([\w.-]+)"
)
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
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
        Bytes per device and call, for each kind of operation that occurs.
    """
    return {kind: int(size) for kind, size in _counted(program).items() if kind in OPERATIONS}


def product_flops(program: Any, rounds: int = 1) -> float:
    """Return the flops of the matrix products of one device's program, 2 for each multiplication.

    On a CPU every product is an instruction of the program. Other compilers hide products in calls
    of libraries, where they are not found.

    Args:
        program: A compiled function.
        rounds: The number of rounds of every loop of which the compiler does not know it.
    """
    return _counted(program, rounds).get("dot", 0.0)


def peak_bytes(program: Any) -> int:
    """Return the peak memory of a run: arguments, results, and the arena of temporaries.

    `peak_memory_in_bytes` is not used, because on the CPU it leaves out the temporaries (jax 0.10).
    """
    memory = program.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return size + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def _counted(program: Any, rounds: int = 1) -> Counts:
    """Return the totals of the program's entry."""
    computations, entry = _computations(program.as_text())

    @cache
    def total(name: str) -> Counts:
        found: Counts = {}
        arrays: dict[str, str] = {}
        for result, shape, operation, rest in computations.get(name, ()):
            arrays[result] = shape
            for kind, size in _own(shape, operation, rest, arrays):
                found[kind] = found.get(kind, 0) + size
            for kind, size in _inside(operation, rest, total, rounds).items():
                found[kind] = found.get(kind, 0) + size
        return found

    return total(entry)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, ...]]], str]:
    """Return the instructions of each computation, and the name of the entry."""
    found: dict[str, list[tuple[str, ...]]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            found[name].append(instruction.groups())
    return found, entry


def _own(
    shape: str, operation: str, rest: str, arrays: dict[str, str]
) -> Iterator[tuple[str, float]]:
    """Yield what an instruction itself sends or computes."""
    kind = operation.removesuffix("-start")
    if kind in OPERATIONS and not _is_alone(rest):
        size = _bytes_of(shape)
        if operation != kind and kind != "all-reduce":  # its result includes the operands
            size -= _bytes_of(rest.split(")")[0])
        yield kind, size
    if operation == "dot":
        left = rest.split(")")[0].split(",")[0].split(" ")[-1].removeprefix("%")
        dims = _dims_of(arrays.get(left, "") or rest)
        contracted = _CONTRACTED.search(rest)
        indices = contracted[1].split(",") if contracted and contracted[1] else []
        yield "dot", 2.0 * math.prod(_dims_of(shape)) * math.prod(dims[int(i)] for i in indices)


def _inside(operation: str, rest: str, total: Any, rounds: int) -> Counts:
    """Return the totals of the computations that an instruction runs."""
    if operation == "conditional" and (sides := _BRANCHES.search(rest)):
        names = sides[1].split(",") if sides[1] else sides.groups()[1:]
        counts = [total(name.strip().removeprefix("%")) for name in names]
        kinds = {kind for count in counts for kind in count}
        return {kind: max(count.get(kind, 0) for count in counts) for kind in kinds}
    if operation not in ("while", "fusion", "call", "async-start"):
        return {}
    called = _CALLED.search(rest)
    known = _ROUNDS.search(rest)
    times = (int(known[1]) if known else rounds) if operation == "while" else 1
    return {kind: times * size for kind, size in (total(called[1]) if called else {}).items()}


def _is_alone(text: str) -> bool:
    """Return whether each group of an instruction has one device only."""
    mesh = _MESH.search(text)
    if mesh is None:
        return _ALONE.search(text) is not None
    sizes = dict(_SIZE.findall(mesh[1]))
    return all(int(part or sizes[axis]) == 1 for axis, part in _AXIS.findall(mesh[2]))


def _bytes_of(text: str) -> int:
    """Return the bytes of all arrays in a text."""
    return sum(_bytes(*array) for array in _ARRAY.findall(text))


def _bytes(dtype: str, bits: str, shape: str) -> int:
    width = 1 if dtype == "pred" else int(bits) // 8
    return width * math.prod(int(n) for n in shape.split(",") if n)


def _dims_of(text: str) -> list[int]:
    """Return the dimensions of the first array in a text."""
    found = _ARRAY.search(text)
    return [int(n) for n in found[3].split(",") if n] if found else []
