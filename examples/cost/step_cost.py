"""Measure what a sharpness-aware step costs: passes, flops, memory and time of every variant.

    python examples/cost/step_cost.py                        # every variant, three models
    python examples/cost/step_cost.py --variants sam sampa --models dense --repeats 5
    python examples/cost/step_cost.py --variants sam sampa --batch 1 4 16 64 256

Every row of the table is one jitted training step with SGD and momentum. All rows are compared with
the plain step, which has no perturbation. In each round every row is timed once, in random order.
Its time is divided by the time of the plain step in the same round, because what slows the machine
down for a while slows both. The parameters do not change, so that every call does the same work.
Each step gets the optimizer state that the previous call returned. The labels change from call to
call, so that policies that depend on the gradient see different gradients. Variants that take a
sharp gradient only on some steps are timed over whole cycles, after their warm-up. How often an
adaptive policy (`ae-sam`, `ae-looksam`, `vsam`, `arsam`) takes a sharp gradient here says nothing
about training; for `vsam` and `arsam` see second_order.py.

Passes are counted while a narrow copy of the model takes the same steps, over whole cycles.
Callbacks in the losses that `update` sees count how many examples go forward and backward. Half of
a batch is half a pass. A backward pass that stops early counts as a whole pass. The compiler gives
the flops and the memory. A step with branches is also compiled once for each branch alone, and the
counted steps show how often each branch is taken.

Two more rows show what SAM costs without samx: written by hand, and with optax.contrib.sam. The
script prints a table for each model and batch size. It writes results.json and step_cost.png to
--out.

Without --variants every variant is measured. On two CPU cores this takes about half an
hour; the conv net alone took 24 minutes on two cores that also did other work.

Several batch sizes show at which size a step fills the machine. Below that size, SAMPa's two
gradients in one vmapped call can take about as long as one gradient. With several sizes the script
also prints a summary of each model and writes sizes.png.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.common import arguments, choices

REPEATS = 7


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser((__doc__ or "").splitlines()[0])
    variants = [name for name in choices.VARIANTS if name != "base"]
    names = [*variants, "all"]
    arguments.add_names(parser, "--variants", names, "; default: all", nargs="+", default=["all"])
    models = [*choices.BATCHES]
    arguments.add_names(parser, "--models", models, "; default: all", nargs="+", default=models)
    text = f"rounds (default {REPEATS})"
    parser.add_argument("--repeats", type=int, default=REPEATS, help=text)
    defaults = ", ".join(f"{size} for {name}" for name, size in choices.BATCHES.items())
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="SIZE",
        help=f"one or several sizes (default {defaults})",
    )
    arguments.add_out(parser, "step_cost")
    args = parser.parse_args(argv)
    if "all" in args.variants:
        args.variants = variants
    arguments.check_range(parser, args, "repeats", "batch")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import samx
from examples.common import figures, files
from examples.common.models import CLASSES, MODELS, Model, as_problem
from examples.common.output import choose_folder
from examples.common.programs import peak_bytes
from examples.common.registry import VARIANTS
from examples.common.report import Report, aligned
from examples.common.steps import CHEAP, Row, reference_rows, samx_row
from examples.cost.passes import Counter, Forks

# A measurement is long enough for the resolution of the clock. It covers whole cycles of the
# variants that do not take a sharp gradient on every step.
LEAST_SECONDS = 0.02
LEAST_CALLS = 5
# Passes are counted over whole cycles and at least this many steps: enough for random policies.
COUNTED_STEPS, COUNTED_EXAMPLES = 100, 8
SAME = 0.005  # branches whose flops differ relatively by less share a number in the table
COMPARISONS = {
    "samx SAM vs by hand": ("sam", "sam by hand"),
    "the same with all readings": ("sam, all readings", "sam by hand"),
    "samx SAM vs optax.contrib.sam": ("sam", "optax.contrib.sam"),
    "SAMPa vmap vs separate": ("sampa", "sampa-separate"),
    "LookSAM vs samx SAM": ("looksam", "sam"),
    "Momentum-SAM vs plain": ("momentum-sam", "plain"),
}
BY_SIZE = ("plain", "sam", "sampa", "sampa-separate")


def make_rows(
    model: Model, size: int, variants: list[str], watch: Callable[[Callable], Callable]
) -> tuple[dict[str, Row], Any, list[dict[str, jax.Array]]]:
    """Return all rows, the parameters, and the batches in their order.

    `watch` wraps the losses where every pass has to happen: in the rows without samx, and in
    `update`. It does not wrap the pass of the caller of `update`, because the compiler removes this
    pass if the variant ignores its result.
    """
    losses_fn, params, batch = as_problem(model, size)
    rows = reference_rows(watch(losses_fn))
    for name in variants:
        rows[name] = samx_row(name, losses_fn, batch, watch)
        if name == "sam":
            wrap = samx.all_readings
            rows["sam, all readings"] = samx_row(name, losses_fn, batch, watch, wrap)
    index = jnp.arange(size, dtype=jnp.int32)
    shifted = [(batch["label"] + shift) % CLASSES for shift in range(CLASSES)]
    return rows, params, [batch | {"label": label, "index": index} for label in shifted]


def count_passes(model: str, variants: list[str]) -> dict[str, dict]:
    """Count passes per step and how often each branch is taken, for every row, at run time."""
    full = MODELS[model]
    small = full._replace(make=full.narrow or full.make)
    counter, forks = Counter(COUNTED_EXAMPLES), Forks()

    def watch(losses_fn):
        return forks.watch(counter.watch(losses_fn))

    rows, params, batches = make_rows(small, COUNTED_EXAMPLES, variants, watch)
    counts = {}
    for name, row in tqdm(rows.items(), desc=f"{model}: count passes", unit="row", disable=None):
        counted = math.ceil(COUNTED_STEPS / row.cycle) * row.cycle
        state = row.init(params)
        with forks.counted():
            step = compile_step(row.step, params, state, batches[0], is_timed=False)
        for call in range(row.settling + counted):
            if call == row.settling:
                counter.clear()
                forks.taken.clear()
            _, state, _ = step(params, state, batches[call % CLASSES])
        jax.block_until_ready(state)
        passes = {way: row.outside + n / counted for way, n in counter.passes().items()}
        shares = np.bincount(forks.taken, minlength=forks.number) / counted
        counts[name] = passes | {"branch_shares": shares.tolist(), "counted_steps": counted}
    return counts


def compile_step(step: Callable, *args: Any, is_timed: bool = True) -> Any:
    """Compile the step; if it is not timed, compile faster, to the same number of flops."""
    hasty = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    lowered = jax.jit(lambda *args: step(*args)).lower(*args)  # a new function has no cached trace
    return lowered.compile(None if is_timed else hasty)


def flops_of(compiled: Any) -> float:
    return compiled.cost_analysis()["flops"]


class Runner:
    """A compiled row; each call starts from the state that the previous call returned."""

    def __init__(self, row: Row, params: Any, batches: list[dict[str, jax.Array]]):
        self.row, self.params, self.batches = row, params, batches
        self.state, self.made = row.init(params), 0
        self.compiled = compile_step(row.step, params, self.state, batches[0])
        self.seconds(max(1, row.settling))
        cycle = self.seconds(row.cycle)
        self.calls = math.ceil(max(LEAST_CALLS, LEAST_SECONDS / cycle) / row.cycle) * row.cycle
        self.start = self.spent(), self.made

    def seconds(self, times: int) -> float:
        """Make `times` calls and return the seconds per call."""
        start = time.perf_counter()
        for call in range(self.made, self.made + times):
            out = self.compiled(self.params, self.state, self.batches[call % CLASSES])
            self.state = out[1]
        jax.block_until_ready(out)
        self.made += times
        return (time.perf_counter() - start) / times

    def spent(self) -> float:
        """Return the gradients spent so far; 0 if the state does not count them."""
        return float(optax.tree.get(self.state, "gradients_spent", default=0))

    def gradients(self) -> float:
        """Return the gradients per step, over the steps after `settling` and the first cycle."""
        spent, made = self.start
        return (self.spent() - spent) / (self.made - made) or self.row.gradients

    def costs(self) -> dict[str, Any]:
        """Return the flops and bytes that the compiler reports."""
        return {
            "flops": flops_of(self.compiled),
            "bytes": self.compiled.cost_analysis()["bytes accessed"],
            "temporary_bytes": self.compiled.memory_analysis().temp_size_in_bytes,
            "peak_bytes": peak_bytes(self.compiled),
        }


def flops_of_branches(forks: Forks, number: int, step: Callable, *args: Any) -> list[float]:
    """Return the flops of the step with each of its branches alone."""
    flops = []
    for choice in range(number):
        with forks.only(choice):
            flops.append(flops_of(compile_step(step, *args, is_timed=False)))
    return flops


def time_in_rounds(runners: dict[str, Runner], repeats: int, title: str) -> dict[str, list[float]]:
    """Return the seconds per step of each row in each round."""
    shuffle = random.Random(0)
    rounds = [shuffle.sample(list(runners), len(runners)) for _ in range(repeats)]
    seconds = {name: [] for name in runners}
    order = [name for names in rounds for name in names]
    for name in tqdm(order, desc=f"{title}: time", unit="measurement", disable=None):
        seconds[name].append(runners[name].seconds(runners[name].calls))
    return seconds


def measure(
    model: str, size: int, variants: list[str], repeats: int, counts: dict[str, dict]
) -> dict:
    """Compile every row of one model at one batch size, then time them all in `repeats` rounds.

    `counts` comes from `count_passes`.
    """
    forks = Forks()
    rows, params, batches = make_rows(MODELS[model], size, variants, forks.watch)
    runners, results, title = {}, {}, f"{model}, batch {size}"
    for name, row in tqdm(rows.items(), desc=f"{title}: compile", unit="step", disable=None):
        args = row.step, params, row.init(params), batches[0]
        number = forks.number_in(*args)
        flops = flops_of_branches(forks, number, *args)
        runners[name] = Runner(row, params, batches)
        results[name] = {"num_branches": number, "branch_flops": flops} | counts[name]
        results[name] |= runners[name].costs()

    for name, seconds in time_in_rounds(runners, repeats, title).items():
        results[name] |= {"seconds": seconds, "gradients": runners[name].gradients()}
    leaves = jax.tree.leaves(params)
    relate(results, sum(leaf.nbytes for leaf in leaves))
    about = {"model": model, "batch": size, "parameters": sum(leaf.size for leaf in leaves)}
    return about | {"rows": results}


def relate(results: dict[str, dict], copy: int) -> None:
    """Add the ratios to the reference rows of one model; `copy`: bytes of the parameters."""
    gradient, plain, by_hand = (results[name] for name in ("gradient", "plain", "sam by hand"))
    for result in results.values():
        result["mean_flops"] = mean_flops(result)
        branches = result["branch_flops"] or [result["flops"]]
        result["branch_flops_to_gradient"] = [flops / gradient["flops"] for flops in branches]
        result["mean_flops_to_gradient"] = result["mean_flops"] / gradient["flops"]
        result["bytes_to_plain"] = result["bytes"] / plain["bytes"]
        result["peak_to_plain"] = result["peak_bytes"] / plain["peak_bytes"]
        result["memory_copies"] = (result["temporary_bytes"] - plain["temporary_bytes"]) / copy
        result["milliseconds"] = 1000 * float(np.median(result["seconds"]))
        result["steps_per_second"] = 1 / float(np.median(result["seconds"]))
        result["time_to_plain"] = quartiles(result, plain)
        result["time_to_by_hand"] = quartiles(result, by_hand)


def mean_flops(result: dict) -> float:
    """Return the mean flops of a step; weight each branch by its share of the counted steps."""
    if not result["num_branches"]:
        return result["flops"]
    return float(np.dot(result["branch_shares"], result["branch_flops"]))


def quartiles(result: dict, reference: dict) -> list[float]:
    """Return the quartiles of the time ratio over the rounds."""
    ratios = np.divide(result["seconds"], reference["seconds"])
    return np.percentile(ratios, [25, 50, 75]).tolist()


def spread(three: list[float]) -> str:
    return "{1:.2f} [{0:.2f}, {2:.2f}]".format(*three)


def distinct(numbers: list[float]) -> list[float]:
    """Sort the numbers and drop those that are almost equal to the one before."""
    kept = []
    for number in sorted(numbers):
        if not kept or number > kept[-1] * (1 + SAME):
            kept.append(number)
    return kept


def cells(name: str, row: dict) -> tuple[str, ...]:
    """Return one line of the table."""
    return (
        name + "*" * bool(row["num_branches"]),
        f"{row['forward']:.2f}",
        f"{row['backward']:.2f}",
        f"{row['gradients']:.2f}",
        " | ".join(f"{flops:.2f}" for flops in distinct(row["branch_flops_to_gradient"])),
        f"{row['mean_flops_to_gradient']:.2f}",
        f"{row['bytes_to_plain']:.2f}",
        f"{row['peak_to_plain']:.2f}",
        f"{row['milliseconds']:.2f}",
        spread(row["time_to_plain"]),
        f"{row['time_to_by_hand'][1]:.2f}",
    )


HEADER = (
    ("", "passes", "", "", "flops", "", "bytes", "peak", "", "time", "time"),
    (
        *("", "forward", "backward", "gradients"),
        *("/gradient", "mean", "/plain", "/plain", "ms", "/plain", "/by hand"),
    ),
)


def table(rows: dict) -> str:
    grid = [*HEADER, *(cells(name, row) for name, row in rows.items())]
    lines = aligned(grid)
    lines.append(
        "Passes: over one batch, per step. Peak: arguments, results and temporaries.\n"
        "Flops and bytes of a loop, msam's say, are those of its body: one of its rounds.\n"
        "Time ratios: median [quartiles] of the rounds."
    )
    if any(row["num_branches"] for row in rows.values()):
        lines.append(
            "* has branches; flops: of each one, and the mean over the steps whose passes are "
            "counted.\n  gradients: of the steps that are timed. bytes: of the costliest branch."
        )
    lines.append("")
    for title, (name, reference) in COMPARISONS.items():
        if name in rows and reference in rows:
            one, other = rows[name], rows[reference]
            lines.append(
                f"{title:<38}time {spread(quartiles(one, other))}"
                f"   flops {one['mean_flops'] / other['mean_flops']:.3f}"
                f"   bytes {one['bytes'] / other['bytes']:.2f}"
            )
    return "\n".join(lines)


def summary(results: list[dict]) -> str:
    """Return a table of steps per second of one model over its batch sizes."""
    names = [name for name in BY_SIZE if name in results[0]["rows"]]
    sampa = "sampa" in names
    title = "time sampa/plain" if sampa else ""
    lines = [f"{'batch':>8}" + "".join(f"{name:>17}" for name in names) + f"{title:>24}"]
    for result in results:
        rows = result["rows"]
        rates = "".join(f"{rows[name]['steps_per_second']:>17.1f}" for name in names)
        ratio = spread(rows["sampa"]["time_to_plain"]) if sampa else ""
        lines.append(f"{result['batch']:>8}{rates}{ratio:>24}")
    if sampa:
        cheap = [r["batch"] for r in results if r["rows"]["sampa"]["time_to_plain"][1] < CHEAP]
        largest = max(cheap, default="none of these")
        lines.append(f"\nLargest batch at which sampa takes less than {CHEAP} x plain: {largest}")
    return "\n".join(lines)


def heading(result: dict) -> str:
    return f"{result['model']}: {result['parameters']:,} parameters, batch {result['batch']}"


def plot(models: list[list[dict]], path: Path) -> None:
    """Draw bars of time and flops: one column of panels per model, one row per batch size."""
    results = list(itertools.chain(*models))
    names = list(dict.fromkeys(name for result in results for name in result["rows"]))
    num_sizes = len(models[0])
    heights = [figures.height_of(len(names) + 3)] * num_sizes
    figure = figures.make_figure(len(models) + 0.4, heights)
    panels = figure.subplots(num_sizes, len(models), sharey=True, squeeze=False)
    for axes, result in zip(panels.T.flat, results, strict=True):
        rows = result["rows"]
        place = np.array([names.index(name) for name in rows])
        low, middle, high = np.transpose([row["time_to_plain"] for row in rows.values()])
        flops = [row["mean_flops"] / rows["plain"]["mean_flops"] for row in rows.values()]
        is_ours = [name.split(",")[0] in VARIANTS for name in rows]
        colors = [figures.BLUE if ours else figures.GREY for ours in is_ours]
        axes.barh(place, middle, 0.75, color=colors, xerr=[middle - low, high - middle], capsize=2)
        axes.plot(flops, place, "|", color=figures.ORANGE, markersize=12, markeredgewidth=2.5)
        for y, x, ratio in zip(place, np.maximum(high, flops), middle, strict=True):
            shift = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{ratio:.2f}", (x, y), fontsize=9, **shift)
        axes.axvline(1, color=figures.INK, linewidth=0.8)
        axes.margins(x=0.12)
        told = f"{sum(middle < CHEAP)} of {len(rows)} below {CHEAP} times a plain step"
        axes.set_title(f"{heading(result)}: {told}")
    for axes in panels[:, 0]:
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
    for axes in panels[-1]:
        axes.set_xlabel("relative to the plain step")
    title = "Time of a training step: blue with samx, grey without; orange marks: flops, the mean "
    figures.save(figure, path, f"{title}over the branches taken")


def plot_sizes(models: list[list[dict]], path: Path) -> None:
    """Draw steps per second over the batch size: one panel per model."""
    figure = figures.make_figure(len(models))
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, results in zip(panels, models, strict=True):
        sizes = [result["batch"] for result in results]
        for name in BY_SIZE:
            if name in results[0]["rows"]:
                rates = [result["rows"][name]["steps_per_second"] for result in results]
                axes.loglog(sizes, rates, "o-", markersize=4, label=name)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.set_xlabel("batch size")
        axes.set_title(f"{results[0]['model']}: steps per second")
        figures.label_ends(axes)
    figures.save(figure, path)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    choose_folder(args, "step_cost")
    report = Report(args)
    models = []
    for model in dict.fromkeys(args.models):
        results, counts = [], count_passes(model, args.variants)
        for size in sorted(set(args.batch or [MODELS[model].batch])):
            result = measure(model, size, args.variants, args.repeats, counts)
            print(f"\n{heading(result)}\n\n{table(result['rows'])}\n")
            results.append(result)
        models.append(results)
        if len(results) > 1:
            print(f"\n{model}: steps per second\n\n{summary(results)}\n")

    report.save(results=list(itertools.chain(*models)))
    plot(models, args.folder / "step_cost.png")
    plots = ["step_cost.png"]
    if len(models[0]) > 1:
        plot_sizes(models, args.folder / "sizes.png")
        plots.append("sizes.png")
    report.end(*plots)


if __name__ == "__main__":
    main()
