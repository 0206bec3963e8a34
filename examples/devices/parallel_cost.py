"""Count what each of N devices computes, sends and holds in one sharpness-aware step.

    python examples/devices/parallel_cost.py
    python examples/devices/parallel_cost.py --model conv --batch 256 --devices 2 4

The first table shows the flops, the bytes sent and the memory of one device. Each number comes from
a formula and from a count in the compiled program. The rows are plain training, SAM with global and
with local ascent, SAMPa, and SAMPa with two groups of devices that compute one gradient each. All
devices share one batch. The counts are exact on every machine: if there are not enough
accelerators, the devices are simulated CPU devices.

The second table shows a time. SAM on N devices takes two gradients of B/N examples, one after the
other. SAMPa on two groups takes a single gradient of 2B/N examples. SAMPa is faster if the share
B/N does not fill a device. The gradient is timed on one device for every share, and the ratio
follows from these times. The ratio does not include the all-reduces: two for SAM, and one of twice
the size for SAMPa.

The script prints both tables. It writes results.json and parallel_cost.png to --out.
"""

import argparse
import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from examples.common import arguments, choices


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=[*choices.BATCHES], default="dense")
    parser.add_argument("--batch", type=int, default=512, help="a power of two, over all devices")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=9, help="rounds of the timing")
    arguments.add_out(parser, "parallel_cost")
    args = parser.parse_args(argv)
    args.devices = sorted(set(args.devices))
    for name, values in (("batch", [args.batch]), ("devices", args.devices)):
        if any(value < 1 or value & (value - 1) for value in values):
            parser.error(f"--{name} must be powers of two, got {values}")
    if args.batch < max(args.devices):
        parser.error(f"--batch must be at least the number of devices, got {args.batch}")
    arguments.check_range(parser, args, "repeats")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import samx
from examples.common import figures, files
from examples.common.models import problem
from examples.common.output import choose_folder
from examples.common.programs import communicated_bytes
from examples.common.registry import BASES
from examples.common.report import Report

RHO, LEARNING_RATE = 0.05, 0.1
LEAST_SECONDS = 0.05  # of one measurement


class Symbols(NamedTuple):
    """The symbols of the formulas."""

    G: float  # flops of one gradient of the whole batch
    P: int  # bytes of the parameters
    S: int  # bytes of the batch
    B: int  # examples in the batch
    T: Callable[[int], int]  # temporary bytes of a plain step on b examples
    n: int  # devices


class Formula(NamedTuple):
    """A formula: its printed text, and its value."""

    text: str
    value: Callable[[Symbols], float]


class Method(NamedTuple):
    """A row of the table: how to build the optimizer, and the formulas of its cost."""

    make: Callable[[Any, Any], optax.GradientTransformationExtraArgs]  # from batch and base
    flops: Formula
    sent: Formula
    state: Formula  # state of the optimizer; the base is SGD with momentum
    temporary: Formula
    ascent: Literal["global", "local"] = "global"
    has_groups: bool = False


ONE_GRADIENT = Formula("G/n", lambda s: s.G / s.n)
TWO_GRADIENTS = Formula("2G/n", lambda s: 2 * s.G / s.n)
ONE_COPY = Formula("P", lambda s: s.P)
TWO_COPIES = Formula("2P", lambda s: 2 * s.P)
SAM_TEMPORARY = Formula("T(B/n) + P", lambda s: s.T(s.B // s.n) + s.P)


def sam(_: Any, base: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(samx.sam(RHO), base)


METHODS = {
    "plain": Method(
        lambda batch, base: optax.with_extra_args_support(base),
        flops=ONE_GRADIENT,
        sent=ONE_COPY,
        state=ONE_COPY,
        temporary=Formula("T(B/n)", lambda s: s.T(s.B // s.n)),
    ),
    "SAM, global": Method(
        sam, flops=TWO_GRADIENTS, sent=TWO_COPIES, state=ONE_COPY, temporary=SAM_TEMPORARY
    ),
    "SAM, local": Method(
        sam,
        flops=TWO_GRADIENTS,
        sent=ONE_COPY,
        state=ONE_COPY,
        temporary=SAM_TEMPORARY,
        ascent="local",
    ),
    "SAMPa": Method(
        lambda batch, base: samx.sampa(base, RHO, batch_like=batch),
        flops=TWO_GRADIENTS,
        sent=TWO_COPIES,
        state=Formula("2P + S/n", lambda s: 2 * s.P + s.S / s.n),
        temporary=Formula("2T(B/n) + P", lambda s: 2 * s.T(s.B // s.n) + s.P),
    ),
    "SAMPa, pair": Method(
        lambda batch, base: samx.sampa(base, RHO, batch_like=batch, pair_sharding=P("pair")),
        flops=TWO_GRADIENTS,
        sent=TWO_COPIES,
        state=Formula("2P + 2S/n", lambda s: 2 * s.P + 2 * s.S / s.n),
        temporary=Formula("T(2B/n) + 2P", lambda s: s.T(2 * s.B // s.n) + 2 * s.P),
        has_groups=True,
    ),
}
COSTS = ("flops", "sent", "state", "temporary")


def compile_step(
    method: Method, num_devices: int, losses_fn: Callable, params: Any, batch: Any
) -> tuple[Any, int]:
    """Return the program of one device, and the bytes of optimizer state on this device."""
    groups = 2 if method.has_groups else 1
    shape, names = (groups, num_devices // groups), ("pair", "data")
    mesh = Mesh(np.reshape(devices_for(num_devices), shape), names)
    tx = method.make(batch, BASES["momentum"](LEARNING_RATE))
    tx = samx.data_parallel(tx, "data", method.ascent)

    def step(params, state, batch):
        updates, state = tx.update(params, state, params, losses_fn=losses_fn, batch=batch)
        return optax.apply_updates(params, updates), state

    specs = samx.state_specs(tx, params, batch_specs=P("data"))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs)
    )
    state = jax.eval_shape(tx.init, params)
    layout = P(), specs, P("data")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout)
    jitted = jax.jit(mapped, in_shardings=shardings, donate_argnums=(0, 1))
    held = sum(
        leaf.dtype.itemsize * int(np.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape)))
        for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True)
    )
    return jitted.lower(params, state, batch).compile(), held


def devices_for(number: int) -> list[Any]:
    """Return `number` devices; simulated CPU devices if there are fewer accelerators."""
    devices = jax.devices() if jax.device_count() >= number else jax.devices("cpu")
    return devices[:number]


def single_gradient(
    losses_fn: Callable, params: Any, batch: Any, size: int
) -> tuple[Any, tuple[Any, Any]]:
    """Return a compiled gradient of the first `size` examples on one device, and its inputs."""
    share = jax.tree.map(lambda x: x[:size], batch)
    gradient = jax.jit(jax.grad(lambda p, share: losses_fn(p, share).mean()))
    return gradient.lower(params, share).compile(), (params, share)


def count(args: argparse.Namespace, losses_fn: Callable, params: Any, batch: Any) -> list[dict]:
    """Count flops, bytes and memory of every method on every number of devices."""
    jobs = [
        (n, name)
        for n in args.devices
        for name, method in METHODS.items()
        if n > 1 or not method.has_groups
    ]
    whole, _ = single_gradient(losses_fn, params, batch, args.batch)

    @functools.cache
    def plain_temporary(size):
        share = jax.tree.map(lambda x: x[:size], batch)
        program, _ = compile_step(METHODS["plain"], 1, losses_fn, params, share)
        return program.memory_analysis().temp_size_in_bytes

    results = []
    for n, name in tqdm(jobs, desc="compile", unit="program", disable=None):
        method = METHODS[name]
        program, held = compile_step(method, n, losses_fn, params, batch)
        symbols = Symbols(
            G=whole.cost_analysis()["flops"],
            P=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
            S=sum(leaf.nbytes for leaf in jax.tree.leaves(batch)),
            B=args.batch,
            T=plain_temporary,
            n=n,
        )
        formula = {cost: getattr(method, cost).value(symbols) for cost in COSTS}
        if n == 1:
            formula["sent"] = 0
        counted = {
            "flops": program.cost_analysis()["flops"],
            "sent": sum(communicated_bytes(program).values()),
            "state": held,
            "temporary": program.memory_analysis().temp_size_in_bytes,
        }
        results.append({"method": name, "devices": n, "formula": formula, "counted": counted})
    return results


def time_shares(losses_fn: Callable, params: Any, batch: Any, repeats: int) -> dict[int, float]:
    """Return median seconds of a gradient on one device, for shares of 1, 2, 4, ... examples."""
    sizes = [2**i for i in range(len(batch["label"]).bit_length())]
    programs = {size: single_gradient(losses_fn, params, batch, size) for size in sizes}
    calls, seconds = {}, {size: [] for size in sizes}

    def run(size, times):
        program, arguments = programs[size]
        start = time.perf_counter()
        for _ in range(times):
            result = program(*arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / times

    for size in sizes:
        run(size, 2)
        calls[size] = max(3, int(LEAST_SECONDS / run(size, 1)))
    for _ in tqdm(range(repeats), desc="time", unit="round", disable=None):
        for size in sizes:
            seconds[size].append(run(size, calls[size]))
    return {size: float(np.median(values)) for size, values in seconds.items()}


def lead_of_groups(seconds: dict[int, float]) -> list[dict]:
    """Compare SAM's two gradients of a share with one gradient of twice the share."""
    largest = max(seconds)
    return [
        {
            "devices": largest // size,
            "share": size,
            "sam_seconds": 2 * seconds[size],
            "pair_seconds": seconds[2 * size],
            "lead": 2 * seconds[size] / seconds[2 * size],
        }
        for size in sorted(seconds, reverse=True)[1:]
    ]


def print_counts(results: list[dict], num_parameters: int, batch: int) -> None:
    print(f"\nPer device, {num_parameters:,} parameters, batch {batch} over n devices")
    print("(G: flops of one gradient of the batch; P, S: bytes of parameters and batch;")
    print(" T(b): temporary memory of a plain step on b of the B examples)\n")
    head = f"{'':<14}{'n':>3}"
    for title in ("Mflops", "MB sent", "MB state", "MB temporary"):
        head += f"{title:>31}"
    print(head + "\n" + "-" * len(head))
    for result in results:
        line = f"{result['method']:<14}{result['devices']:>3}"
        for cost in COSTS:
            text = getattr(METHODS[result["method"]], cost).text
            wanted, found = result["formula"][cost] / 1e6, result["counted"][cost] / 1e6
            line += f"{text:>13}{wanted:>9.2f}{found:>9.2f}"
        print(line)
    print("Each: the formula, its value, and the count from the compiled program.")


def print_times(rows: list[dict], device: str) -> None:
    print(f"\nWhere two groups lead: gradients timed on one device ({device}), no communication")
    head = f"{'n':>4}{'B/n':>6}{'SAM: 2 t(B/n), ms':>20}{'pair: t(2B/n), ms':>20}{'lead':>8}"
    print(head + "\n" + "-" * len(head))
    for row in rows:
        print(
            f"{row['devices']:>4}{row['share']:>6}{1e3 * row['sam_seconds']:>20.3f}"
            f"{1e3 * row['pair_seconds']:>20.3f}{row['lead']:>8.2f}"
        )


def draw(results: list[dict], rows: list[dict], path: Path, title: str) -> None:
    """Plot flops and bytes of a device over the number of devices, and where two groups lead."""
    figure = figures.make_figure(3)
    flops, sent, lead = figure.subplots(1, 3)
    for position, name in enumerate(METHODS):
        mine = [r for r in results if r["method"] == name]
        devices = [r["devices"] for r in mine]
        color, size = figures.COLORS[position], 14 - 2.5 * position  # many points coincide
        for axes, cost in ((flops, "flops"), (sent, "sent")):
            found, wanted = ([r[kind][cost] / 1e6 for r in mine] for kind in ("counted", "formula"))
            axes.plot(devices, found, "o", color=color, markersize=size, mfc="none")
            axes.plot(devices, wanted, color=color, alpha=0.5, label=name)
    for axes, name in ((flops, "Mflops per device and step"), (sent, "MB all-reduced per step")):
        numbers = sorted({result["devices"] for result in results})
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, map(str, numbers))
        axes.set_xlabel("devices (circles: counted; lines: formula)")
        axes.set_title(name)
        axes.grid(alpha=0.3)
    flops.set_yscale("log")
    for axes in (flops, sent):
        figures.label_ends(axes)
    lead.plot([row["share"] for row in rows], [row["lead"] for row in rows], "o-")
    lead.axhline(1, color=figures.GREY, linewidth=0.8)
    lead.set_xscale("log", base=2)
    lead.set_xlabel("examples of a device, B/n")
    ahead = sum(row["lead"] > 1 for row in rows)
    lead.set_title(f"SAM's time / SAMPa's on two groups: above 1 at {ahead} of {len(rows)} sizes")
    lead.grid(alpha=0.3)
    figures.save(figure, path, title)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    choose_folder(args, "parallel_cost")
    with contextlib.suppress(RuntimeError):  # a running backend stays unchanged
        jax.config.update("jax_num_cpu_devices", args.devices[-1])
    losses_fn, params, batch = problem(args.model, args.batch)
    report = Report(args)
    results = count(args, losses_fn, params, batch)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    print_counts(results, num_parameters, args.batch)
    rows = lead_of_groups(time_shares(losses_fn, params, batch, args.repeats))
    print_times(rows, jax.devices()[0].device_kind)
    report.save(parameters=num_parameters, counts=results, times=rows)
    title = f"{args.model}, {num_parameters:,} parameters, one batch of {args.batch}"
    draw(results, rows, args.folder / "parallel_cost.png", title)
    report.end("parallel_cost.png")
    return results


if __name__ == "__main__":
    main()
