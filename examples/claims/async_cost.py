"""AsyncSAM: is a step on two devices as fast as SGD's, and which part of the ascent is hidden?

    python examples/claims/async_cost.py
    python examples/claims/async_cost.py --batch 128 --repeats 15
    JAX_PLATFORMS=cuda,cpu python examples/claims/async_cost.py --devices gpu

Without a GPU there are two simulated CPU devices. A program of matrix products uses all cores of a
CPU and would leave nothing for a second device. Therefore the loss here is a loop of small
elementwise operations. It occupies one core per program, so two programs can run at once; they
still share the memory and its bandwidth. With a GPU, the loss is that of a dense network with 1.9M
parameters; the GPU computes the descent, the CPU the ascent.

`samx.asynchronous.pipelined` runs AsyncSAM, with ascent batches of all b examples, half, a quarter,
and the size that `calibrate_ascent_batch` finds, if it is another one. One more row has both
programs of AsyncSAM on one device, where it must cost as much as SAM. Another one has two programs
of SGD, one on each device: it shows what the devices cost each other, whatever they compute.

In each round every row takes some steps, in random order. Times are divided by those of SGD in the
same round. "handed out" is the time until a call returns while its result is still being computed;
it shows that nothing waits between the two gradients. The share of the ascent that is hidden is 1
where a step takes the time of SGD's, and 0 where it takes as long as both programs on one device.
Where two programs of SGD disturb each other, claims on time are not testable; that a step takes no
longer than those two programs is.

The script prints a table, and each claim with its number and the verdict; a number has one value
for each round. It writes results.json and async_cost.png to --out. It takes about a minute on two
CPU cores, which no other program should use.
"""

import argparse
import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.common import arguments

NAME = "async_cost"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    parser.add_argument(
        "--devices",
        choices=["cpu", "gpu"],
        help="cpu: two simulated CPU devices; gpu: a GPU and the CPU; default: gpu if available",
    )
    parser.add_argument("--batch", type=int, help="examples b; default: 64 on cpu, 4096 on gpu")
    parser.add_argument("--length", type=int, default=1000, help="length of the loop on cpu")
    parser.add_argument("--steps", type=int, default=5, help="steps of a row in each round")
    parser.add_argument("--repeats", type=int, default=13, help="rounds")
    arguments.add_out(parser, NAME)
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "length", "steps", "repeats")
    if args.batch is not None and (args.batch < 4 or args.batch % 4):
        parser.error(f"--batch must be a multiple of 4, got {args.batch}")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import samx
from examples.claims.claim import Claim, found_of, print_claims, save
from examples.common import figures, files
from examples.common.async_steps import (
    SHARES,
    base,
    describe_ascent_batch,
    make_rows,
    on_one_device,
    summarized,
    timed,
)
from examples.common.models import problem
from examples.common.output import choose_folder
from examples.common.report import Report

WIDTH, DEPTH = 128, 4  # numbers per example, operations per checkpoint
ONE_DEVICE = "async-sam, b, on one device"
BOTH = "sgd, on both devices at once"
NEARLY, HIDDEN = 1.1, 0.9  # of SGD's time; of the ascent
CONDITION = "needs two devices that do not disturb each other; the line 'condition' says if they do"
SETTING = "two simulated CPU devices of one core each, or those of --devices"
CLAIMS = {
    f"time, {name}": Claim(
        ("async_sam",),
        f"Almost SGD's time. Ascent batch b′ = {name}.",
        "abstract",
        f"time of a step / SGD's; {SETTING}; almost: below {NEARLY}",
        high=NEARLY,
        published="1.02 for ResNet-20 on CIFAR-10 (abstract of the journal's version)",
        why=CONDITION,
    )
    for name in SHARES
} | {
    f"hidden, {name}": Claim(
        ("async_sam",),
        f"The ascent is hidden behind the descent. Ascent batch b′ = {name}.",
        "abstract",
        f"share of the ascent's time that is hidden; {SETTING}; hidden: above {HIDDEN}",
        low=HIDDEN,
        why=CONDITION,
    )
    for name in SHARES
}
CLAIMS |= {
    f"beside SGD, {name}": Claim(
        ("async_sam",),
        f"Nothing waits: it costs what the two devices cost each other. Ascent batch b′ = {name}.",
        "abstract",
        "time of a step / that of two programs of SGD, one on each device, which have nothing to "
        f"do with each other; {SETTING}; the same: below {NEARLY}",
        high=NEARLY,
    )
    for name in SHARES
}
CLAIMS["condition"] = Claim(
    ("async_sam",),
    "The two devices do not disturb each other.",
    "a condition, not a claim",
    f"time of SGD on both devices at once / alone; {SETTING}; undisturbed: below {NEARLY}",
    high=NEARLY,
    why="two cores share their memory, and other programs may use them",
)
CLAIMS["smaller"] = Claim(
    ("async_sam",),
    "A smaller ascent batch hides the ascent on a slower device.",
    "abstract",
    f"time of a step with b′ = b over that with b′ = b/4, of SGD's time; {SETTING}",
    low=0.0,
    why=CONDITION,
)


def elementwise(batch_size: int, length: int) -> tuple[Any, Any, Any]:
    """Return loss `(params, batch) -> mean`, params, and a batch; the loss loops on one core."""

    @jax.checkpoint
    def body(x, params):
        for _ in range(DEPTH):
            x = jnp.tanh(x * params["scale"] + params["shift"])
        return x

    def loss(params, batch):
        x, _ = jax.lax.scan(lambda x, _: (body(x, params), None), batch["x"], length=length)
        return jnp.mean(x**2)

    params = {"scale": np.full((1, WIDTH), 1.5, np.float32), "shift": np.zeros((1, WIDTH))}
    x = np.random.default_rng(0).normal(size=(batch_size, WIDTH))
    return loss, jax.tree.map(np.float32, params), {"x": np.float32(x)}


def dense(batch_size: int) -> tuple[Any, Any, Any]:
    """Return the same for the dense network that step_cost.py times."""
    losses_fn, params, batch = problem("dense", batch_size)
    return lambda params, batch: losses_fn(params, batch).mean(), params, batch


def measure(rows: dict[str, Iterator[Any]], repeats: int, count: int) -> list[dict]:
    """Time all rows in rounds, in random order."""
    for steps in tqdm(rows.values(), desc="compile", unit="row", disable=None):
        timed(steps, 2)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    order = random.Random(0)
    with tqdm(total=repeats * len(rows), desc="measure", unit="row", disable=None) as bar:
        for _ in range(repeats):
            for name in order.sample(list(rows), len(rows)):
                seconds[name].append(timed(rows[name], count))
                bar.update()
    return summarized(seconds)


def on_both(loss: Any, params: Any, batch: Any, devices: tuple[Any, Any]) -> Iterator[Any]:
    """Yield steps of SGD without end, one on each device; neither waits for the other."""
    return zip(
        *(on_one_device(base(), loss, params, batch, device) for device in devices), strict=True
    )


def values_of(results: list[dict]) -> dict[str, list[float]]:
    """Return the numbers of each claim, one for each round; none where a claim is not testable."""
    seconds = {result["row"]: np.array(result["seconds"]) for result in results}
    plain, both = seconds["sgd"], seconds[ONE_DEVICE]
    values = {}
    for name, share in SHARES.items():
        time = seconds[f"async-sam, {name}"]
        values[f"time, {name}"] = time / plain
        values[f"beside SGD, {name}"] = time / seconds[BOTH]
        values[f"hidden, {name}"] = 1 - (time - plain) / (share * (both - plain))
    values["smaller"] = values["time, b"] - values["time, b/4"]
    condition = seconds[BOTH] / plain
    if condition.mean() >= NEARLY:  # what needs devices of their own cannot be tested
        values = {
            name: each if name.startswith("beside") else np.zeros(0)
            for name, each in values.items()
        }
    values["condition"] = condition
    return {name: each.tolist() for name, each in values.items()}


def table(results: list[dict]) -> str:
    """Format one line per row."""
    width = max(len(result["row"]) for result in results)
    head = f"{'step':<{width}} {'ms':>8} {'/ SGD [quartiles]':>20} {'handed out, ms':>15}"
    lines = [head, "-" * len(head)]
    for result in results:
        middle, low, high = result["ratio"]
        ratio = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(
            f"{result['row']:<{width}} {result['ms']:>8.2f} {ratio:>20}"
            f" {result['handed_out_ms']:>15.2f}"
        )
    return "\n".join(lines)


def draw(results: list[dict], path: Path, title: str) -> None:
    """Plot the times of a step relative to SGD."""
    figure = figures.make_figure(1.5, [figures.height_of(len(results))])
    axes = figure.subplots()
    middle, low, high = np.array([result["ratio"] for result in results]).T
    is_reference = [not result["row"].startswith("async-sam") for result in results]
    colors = [figures.GREY if reference else figures.BLUE for reference in is_reference]
    axes.barh(
        range(len(results)), middle, xerr=[middle - low, high - middle], color=colors, capsize=3
    )
    for place, (end, value) in enumerate(zip(high, middle, strict=True)):
        shift = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{value:.2f}", (end, place), **shift)
    axes.set_yticks(range(len(results)), [result["row"] for result in results])
    axes.invert_yaxis()
    axes.axvline(1, color=figures.INK, linewidth=1)
    axes.set_xlim(0, 1.15 * max(high))
    axes.set_xlabel("time of a step / SGD (median and quartiles)")
    times = {result["row"]: result["ratio"][0] for result in results}
    others = [row for row in times if row.startswith("async-sam")]
    if others:
        fastest = min(others, key=lambda row: times[row])
        told = f"{fastest} takes {times[fastest]:.2f} times as long as SGD"
        axes.set_title(told + (f", SAM {times['sam']:.2f} times" if "sam" in times else ""))
    figures.save(figure, path, title)


def choose_devices(args: argparse.Namespace) -> None:
    """Set --devices and --batch to their defaults here; refuse a GPU that is not there."""
    with contextlib.suppress(RuntimeError):  # a running backend cannot be changed
        jax.config.update("jax_num_cpu_devices", 2)
    has_gpu = jax.default_backend() == "gpu"
    if args.devices == "gpu" and not has_gpu:
        arguments.refuse(f"--devices gpu: jax sees none, only {jax.default_backend()}")
    args.devices = args.devices or ("gpu" if has_gpu else "cpu")
    args.batch = args.batch or {"cpu": 64, "gpu": 4096}[args.devices]


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    choose_devices(args)
    choose_folder(args, NAME)
    if args.devices == "gpu":
        devices = jax.devices()[0], jax.devices("cpu")[0]
        loss, params, batch = dense(args.batch)
    else:
        devices = tuple(jax.devices("cpu")[:2])
        loss, params, batch = elementwise(args.batch, args.length)
    kinds = " and ".join(device.device_kind for device in devices)
    report = Report(args, f"{kinds} ({os.cpu_count()} CPU cores)")
    one, other = devices
    hidden = samx.asynchronous.calibrate_ascent_batch(
        jax.grad(loss), params, batch, descent_device=one, ascent_device=other
    )
    rows = make_rows(loss, params, batch, hidden.size, devices)
    rows[BOTH] = on_both(loss, params, batch, devices)
    results = measure(rows, args.repeats, args.steps)
    print(f"\n{table(results)}\n\n{describe_ascent_batch(hidden)}")
    values = values_of(results)
    found = found_of(CLAIMS, values)
    print_claims(found)

    measured = {"results": results, "ascent_batch": hidden._asdict()}
    save(report, NAME, found, values, **measured)
    draw(results, args.folder / "async_cost.png", f"AsyncSAM on {kinds}, {args.batch} examples")
    report.end("async_cost.png")
    return measured


if __name__ == "__main__":
    main()
