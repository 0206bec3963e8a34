"""What each measure of samx.sharpness costs: gradients and memory, counted, and time.

    python examples/measure/sharpness_cost.py
    python examples/measure/sharpness_cost.py --rows hvp eigenvalues extreme --layers 40

flops   matrix products of a measure, divided by those of a gradient on the same examples; counted
        in the compiled program, loops times their rounds
passes  the same as a sum of passes: F is a loss, G a gradient, H a product with the Hessian, N one
        with the Gauss-Newton matrix. What all rounds of a loop share, the compiler computes once:
        then the flops are fewer
time    the same on this machine: programs take turns for several rounds; the median of the ratios
        to a gradient in the same round
memory  peak memory in copies P of the parameters, parameters and results included. It is counted
        for a net of dense layers with about 10 million parameters, of which only the shapes exist,
        and for 8 examples: their activations do not matter. The order of the program is the one
        that needs least memory, as on an accelerator

Flops and time are for a smaller net and 512 examples. A product with the Hessian depends on the
depth: it costs 1.5 gradients with one hidden layer (--small-layers 1), and up to 2.7 with many. The
numbers of draws, steps and points are small here; the cost is proportional to them. The script
prints a table. It writes results.json and sharpness_cost.png to --out.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from examples.common import arguments

ROWS = (
    *("loss", "gradient", "hvp", "ggn_vp", "eigenvalues", "eigenvalues-alone", "extreme"),
    *("extreme-alone", "trace", "frobenius", "diagonal", "moments", "density", "worst_case"),
    *("average_case", "smoothed", "first_order", "m_sharpness", "exact_sam_gradient"),
    *("directional", "relative_flatness", "slice_1d", "slice_2d", "barrier"),
)
ALWAYS = ("loss", "gradient", "hvp", "ggn_vp")  # the passes of which others consist
SHARDS = 4  # into which the examples are split for m-sharpness


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    text = f"; default: all; always: {', '.join(ALWAYS)}"
    arguments.add_names(parser, "--rows", ROWS, text, nargs="+", default=[*ROWS])
    add("--layers", type=int, default=6, help="hidden layers of the large net; default: 6")
    add("--width", type=int, default=1280, help="their width; default: 1280")
    add("--small-layers", type=int, default=3, help="those of the net that is timed; default: 3")
    add("--small-width", type=int, default=128, help="their width; default: 128")
    add("--examples", type=int, default=512, help="examples that are timed; default: 512")
    add("--rounds", type=int, default=7, help="of the times; default: 7")
    arguments.add_out(parser, "sharpness_cost")
    args = parser.parse_args(argv)
    names = ("layers", "width", "small_layers", "small_width", "rounds")
    arguments.check_range(parser, args, *names)
    arguments.check_range(parser, args, "examples", low=SHARDS)
    args.rows = [name for name in ROWS if name in {*ALWAYS, *args.rows}]
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import itertools
import os
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm import tqdm

from examples.common import figures, files
from examples.common.measuring import Runner, described, in_rounds, started, time_of
from examples.common.output import choose_folder
from examples.common.programs import peak_bytes, product_flops
from examples.common.report import Report, aligned
from examples.common.shapes import OPTIONS
from samx import perturbations, sharpness

CLASSES, FEW = 10, 8  # classes of labels; examples for which memory is counted
ITERATIONS, DRAWS, STEPS, RESTARTS, POINTS = 20, 10, 10, 2, 11
LEAST = 0.02  # seconds of a measurement of a time
NOTES = """\
flops, time: those of a gradient of the same examples are 1.
passes: F a loss, G a gradient, H a product with the Hessian, N one with the Gauss-Newton matrix;
"of passes" is what they cost one by one. Fewer flops: rounds of a loop share what does not change.
memory: peak, in copies of the parameters, with the parameters and the results."""
CAPTION = """\
Work: matrix products and time, for a net with {small:,} parameters and {examples} examples. Memory:
for a net with {large:.1f} million parameters in {layers} hidden layers and 8 examples, from its
shapes alone. Costs are proportional to the numbers of draws, iterations, steps and points."""

Measure = Callable[[Any, Any, Any], Any]  # of the loss, the parameters and a vector


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        title: What is measured.
        measure: `(f, params, vector) -> result`.
        passes: How many passes it makes: a number for each of F, G, H and N.
        rounds: Rounds of a loop that ends by itself, at most.
    """

    title: str
    measure: Measure
    passes: dict[str, int]
    rounds: int = 1


class Net(NamedTuple):
    """A net of dense layers: its parameters or their shapes, its loss and a vector like them."""

    params: Any
    f: sharpness.Objective
    vector: Any

    @property
    def arguments(self) -> tuple[Any, Any, Any]:
        """What a measure takes."""
        return self.f, self.params, self.vector

    @property
    def examples(self) -> int:
        """How many examples the loss is a mean over."""
        return len(self.f.batch["y"])

    @property
    def copy(self) -> int:
        """Bytes of the parameters."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.params))


def rows_of(examples: int) -> dict[str, Row]:
    """Return all rows; `examples` is their number in the loss."""
    ball = perturbations.metric_ball(0.1)
    steps = jnp.linspace(-1.0, 1.0, POINTS)
    few = jnp.linspace(-1.0, 1.0, 5)

    def top(**keywords):
        return lambda f, w, _: sharpness.eigenvalues(f, w, iterations=ITERATIONS, **keywords)

    def extreme(f, w, _):
        return sharpness.extreme_eigenvalue(f, w, iterations=ITERATIONS)

    def density(f, w, _):
        return sharpness.density(f, w, steps, sigma=0.1, iterations=ITERATIONS, draws=2)

    def worst(f, w, _):
        return sharpness.worst_case(f, w, ball, steps=STEPS, restarts=RESTARTS)

    def shards(f, w, _):
        return sharpness.m_sharpness(f, w, ball, shard_size=examples // SHARDS)

    def flatness(f, w, _):
        return sharpness.relative_flatness(f, w, is_last, draws=DRAWS)

    many, found = ITERATIONS, f"{ITERATIONS} iterations"
    return {
        "loss": Row("loss", lambda f, w, v: f(w), {"F": 1}),
        "gradient": Row("gradient", lambda f, w, v: jax.grad(f)(w), {"G": 1}),
        "hvp": Row("hvp", lambda f, w, v: sharpness.hvp(f, w)(v), {"H": 1}),
        "ggn_vp": Row("ggn_vp", lambda f, w, v: sharpness.ggn_vp(f, w)(v), {"N": 1}),
        "eigenvalues": Row(f"eigenvalues, k = 5, {found}", top(), {"H": many}),
        "eigenvalues-alone": Row(
            "… the values alone", lambda f, w, v: top()(f, w, v).values, {"H": many}
        ),
        "extreme": Row(f"extreme_eigenvalue, {found}", extreme, {"H": 2 * many + 1}),
        "extreme-alone": Row(
            "… the value alone", lambda f, w, v: extreme(f, w, v).values, {"H": many}
        ),
        "trace": Row(
            f"trace, {DRAWS} draws",
            lambda f, w, v: sharpness.trace(f, w, draws=DRAWS),
            {"H": DRAWS},
        ),
        "frobenius": Row(
            *(f"frobenius, {DRAWS} draws", lambda f, w, v: sharpness.frobenius(f, w, draws=DRAWS)),
            {"H": DRAWS},
        ),
        "diagonal": Row(
            *(f"diagonal, {DRAWS} draws", lambda f, w, v: sharpness.diagonal(f, w, draws=DRAWS)),
            {"H": DRAWS},
        ),
        "moments": Row(
            *(f"moments, 4 of {DRAWS} draws", lambda f, w, v: sharpness.moments(f, w, draws=DRAWS)),
            {"H": 2 * DRAWS},
        ),
        "density": Row(f"density, {found}, 2 draws", density, {"H": 2 * many}),
        "worst_case": Row(
            *(f"worst_case, {STEPS} steps, {RESTARTS} restarts", worst),
            *({"G": STEPS * RESTARTS + 1}, STEPS),
        ),
        "average_case": Row(
            f"average_case, {DRAWS} draws",
            lambda f, w, v: sharpness.average_case(f, w, 0.1, draws=DRAWS),
            {"F": DRAWS + 1},
        ),
        "smoothed": Row(
            f"smoothed, {DRAWS} draws",
            lambda f, w, v: sharpness.smoothed(f, w, 0.1, draws=DRAWS),
            {"F": 2 * DRAWS + 1},
        ),
        "first_order": Row(
            "first_order", lambda f, w, v: sharpness.first_order(f, w, ball), {"G": 1, "F": 1}
        ),
        "m_sharpness": Row(f"m_sharpness, {SHARDS} shards", shards, {"G": 1, "F": 1}),
        "exact_sam_gradient": Row(
            "exact_sam_gradient",
            lambda f, w, v: sharpness.exact_sam_gradient(f, w, ball),
            {"G": 2, "H": 1},
        ),
        "directional": Row("directional", lambda f, w, v: sharpness.directional(f, w, v), {"H": 1}),
        "relative_flatness": Row(f"relative_flatness, last layer, {DRAWS} draws", flatness, {}),
        "slice_1d": Row(
            f"slice_1d, {POINTS} points",
            lambda f, w, v: sharpness.slice_1d(f, w, v, steps),
            {"F": POINTS},
        ),
        "slice_2d": Row(
            f"slice_2d, {len(few)} x {len(few)} points",
            lambda f, w, v: sharpness.slice_2d(f, w, (v, w), few, few),
            {"F": len(few) ** 2},
        ),
        "barrier": Row(
            f"barrier, {POINTS} points",
            lambda f, w, v: sharpness.barrier(f, w, v, points=POINTS),
            {"F": POINTS},
        ),
    }


def is_last(path: Any, leaf: Any) -> bool:
    del path
    return leaf.ndim == 2 and leaf.shape[-1] == CLASSES


def net(layers: int, width: int, examples: int, has_values: bool) -> Net:
    """Return a net with hidden layers of one width; without values there are shapes only."""

    def make():
        sizes = [width] * (layers + 1) + [CLASSES]
        keys = jax.random.split(jax.random.key(0), layers + 1)
        return {
            f"layer{i:03d}": {
                "kernel": jax.random.normal(key, (n, m)) / n**0.5,
                "bias": jnp.zeros(m),
            }
            for i, (key, (n, m)) in enumerate(zip(keys, itertools.pairwise(sizes), strict=True))
        }

    def apply_fn(params, batch):
        *hidden, last = params.values()
        x = batch["x"]
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        return x @ last["kernel"] + last["bias"][None]

    def loss_on_logits(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def inputs():
        x = jax.random.normal(jax.random.key(1), (examples, width))
        return {"x": x, "y": jnp.arange(examples) % CLASSES}

    params = make() if has_values else jax.eval_shape(make)
    f = sharpness.objective(apply_fn=apply_fn, loss_on_logits=loss_on_logits, batch=inputs())
    vector = jax.tree.map(lambda x: x + 1, params) if has_values else params
    return Net(params, f, vector)


def lower(row: Row, net: Net, **jit: Any) -> Any:
    return jax.jit(row.measure, **jit).lower(*net.arguments)


def compile_all(tasks: dict[Any, Callable[[], Any]]) -> tuple[dict[Any, Any], dict[Any, str]]:
    """Return the programs, and the reasons of those that failed; one for each core at a time."""
    programs, failed = {}, {}
    bar = tqdm(total=len(tasks), desc="compile", unit="program", disable=None)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            waiting = {
                key: pool.submit(lambda task=task: task().compile()) for key, task in tasks.items()
            }
            for key, future in waiting.items():
                try:
                    programs[key] = future.result()
                except Exception as error:
                    failed[key] = described(error)
                bar.update()
        finally:  # an interrupt does not wait for the programs that have not begun
            pool.shutdown(cancel_futures=True)
    return programs, failed


def count(names: list[str], large: Net, small: Net) -> tuple[list[dict], dict[str, Any]]:
    """Return what is counted for each row, and the programs of the small net."""
    print(f"memory: {large.copy / 4e6:.1f} million parameters", flush=True)
    rows, rows_of_large = rows_of(small.examples), rows_of(large.examples)
    tasks = {}
    for name in names:
        options = {"compiler_options": OPTIONS}
        tasks["memory", name] = partial(lower, rows_of_large[name], large, **options)
        tasks["flops", name] = partial(lower, rows[name], small)
    programs, failed = compile_all(tasks)
    found = []
    for name in names:
        row = rows[name]
        result: dict[str, Any] = {"row": name, "title": row.title, "passes": row.passes}
        if trouble := failed.get(("memory", name)) or failed.get(("flops", name)):
            found.append(result | {"failed": trouble})
            continue
        memory, program = programs["memory", name], programs["flops", name]
        sizes = memory.memory_analysis()
        result |= {"flops": product_flops(program, row.rounds)}
        result |= {"peak": peak_bytes(memory) / large.copy}
        result |= {"results": sizes.output_size_in_bytes / large.copy}
        found.append(result | {"temporary": sizes.temp_size_in_bytes / large.copy})
    timed = {r["row"]: programs["flops", r["row"]] for r in found if "failed" not in r}
    return found, timed


def relate(results: list[dict]) -> None:
    """Divide the flops by those of a gradient, and compare them with those of the passes."""
    flops = {result["row"]: result.get("flops") for result in results}
    of_pass = dict(zip("FGHN", (flops[name] for name in ALWAYS), strict=True))
    for result in results:
        passes = result["passes"]
        result["said"] = result["gradients"] = None
        if result.get("flops") is not None and of_pass["G"]:
            result["gradients"] = result["flops"] / of_pass["G"]
        if passes and all(of_pass[name] for name in passes) and of_pass["G"]:
            total = sum(number * of_pass[name] for name, number in passes.items())
            result["said"] = total / of_pass["G"]


def measure_times(results: list[dict], programs: dict[str, Any], small: Net, rounds: int) -> None:
    """Add the time of each row, relative to a gradient in the same round."""

    def runner(program):
        return lambda: Runner(lambda: program(*small.arguments), LEAST)

    bar = tqdm(total=rounds * len(programs), desc="time", unit="measurement", disable=None)

    def timed(runner):
        def seconds():
            bar.update()
            return runner.seconds()

        return seconds

    runners, failed = started({name: runner(program) for name, program in programs.items()})
    with bar:
        found, others = in_rounds({name: timed(run) for name, run in runners.items()}, rounds)
    reference = found.get("gradient")
    for result in results:
        name = result["row"]
        if name in found:
            result |= time_of(found[name], reference)
        elif trouble := (failed | others).get(name):
            result["failed"] = trouble


def passes_of(result: dict[str, Any]) -> str:
    """Return the passes as a sum, and what they cost in gradients."""
    parts = [f"{n if n > 1 else ''}{name}" for name, n in result["passes"].items()]
    return " + ".join(parts)


def table(results: list[dict]) -> str:
    """Format one line per row."""
    grid = [["", "flops", "passes", "of passes", "time", "[quartiles]", "memory", "results"]]
    for result in results:
        line = [result["title"], number(result["gradients"]), passes_of(result)]
        line.append(number(result["said"]))
        low, middle, high = result.get("ratio") or (None,) * 3
        line += [number(middle), f"[{number(low)}, {number(high)}]" if low else ""]
        line += [number(result.get("peak")), number(result.get("results"))]
        grid.append(line)
    lines = aligned(grid)
    notes = [
        f"{result['title'].strip()}: {result['failed']}" for result in results if "failed" in result
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *notes])


def number(x: float | None) -> str:
    return "" if x is None else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"


def draw(results: list[dict], path: Path, caption: str) -> None:
    """Draw the gradients that each row costs, counted and timed, and its memory."""
    rows = [result for result in reversed(results) if result.get("gradients") is not None]
    figure = figures.make_figure(2.6, [figures.height_of(len(rows)), 0.6])
    cost, memory = figure.subplots(1, 2, width_ratios=[1.2, 1])
    for place, result in enumerate(rows):
        if result.get("ratio"):
            cost.plot(result["ratio"][1], place, "o", color=figures.ORANGE, ms=6)
        if result["gradients"]:
            cost.plot(result["gradients"], place, "d", color=figures.BLUE, ms=5)
        memory.barh(place, result["peak"], 0.55, color=figures.SKY)
        memory.annotate(
            number(result["peak"]),
            (result["peak"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    cost.set_xscale("log")
    cost.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    cost.xaxis.set_major_formatter("{x:g}")
    cost.xaxis.set_minor_formatter(NullFormatter())
    cost.axvline(1, color=figures.GREY, linewidth=1, zorder=0)
    cost.set_yticks(range(len(rows)), [result["title"] for result in rows])
    memory.set_yticks(range(len(rows)), [""] * len(rows))
    for axes in (cost, memory):
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.grid(axis="x", alpha=0.3)
    memory.set_xlim(0, 1.12 * max(result["peak"] for result in rows))
    cost.set_xlabel("gradients of the same examples")
    memory.set_xlabel("copies of the parameters, with them and the results")
    cost.set_title("work")
    memory.set_title("peak memory")
    handles = [
        Line2D([], [], color=figures.BLUE, marker="d", linestyle="", label="flops, counted"),
        Line2D([], [], color=figures.ORANGE, marker="o", linestyle="", label="time, measured"),
    ]
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=2,
        title=textwrap.fill(caption, int(12 * figure.get_figwidth())),
        alignment="left",
    )
    figures.save(figure, path, title_of(results))


def title_of(results: list[dict]) -> str:
    """Return what a product costs, and what eigenvalues and the other measures hold."""
    of = {r["row"]: r for r in results if r.get("gradients") is not None}
    found = []
    if "hvp" in of:
        found.append(f"A product with the Hessian costs {number(of['hvp']['gradients'])} gradients")
    if "eigenvalues" in of:
        found.append(f"eigenvalues hold {number(of['eigenvalues']['peak'])} copies")
    if "extreme" in of:
        found.append(f"an extreme eigenvalue {number(of['extreme']['peak'])}")
    return ", ".join(found) or "What measures of sharpness cost"


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    choose_folder(args, "sharpness_cost")
    report = Report(args)
    large = net(args.layers, args.width, FEW, has_values=False)
    small = net(args.small_layers, args.small_width, args.examples, has_values=True)
    results, programs = count(args.rows, large, small)
    relate(results)
    measure_times(results, programs, small, args.rounds)
    print(f"\n{table(results)}\n{NOTES}")

    report.save(results=results)
    caption = CAPTION.format(
        **{"examples": args.examples, "small": small.copy // 4, "large": large.copy / 4e6},
        layers=args.layers,
    )
    draw(results, args.folder / "sharpness_cost.png", caption)
    report.end("sharpness_cost.png")
    return results


if __name__ == "__main__":
    main()
