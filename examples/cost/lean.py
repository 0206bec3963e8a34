"""Compare a step of samx with the same step written by hand: bytes, memory, time and compile time.

    python examples/cost/lean.py
    python examples/cost/lean.py --tables bytes time --models embedding
    python examples/cost/lean.py --before ../older        # and with another version of samx

The step written by hand is SAM in ten lines, on the same base optimizer (SGD with momentum). Bytes
and memory are the compiler's counts for the whole step, with parameters and state donated, in
copies P of the parameters. Nothing is drawn for them: 100 million parameters are counted from
their shapes alone.

bytes   memory traffic, temporary memory and peak of SAM, for models and dtypes
peak    peak memory of variants on a stack of dense layers, 100 million parameters by default
sent    on eight simulated devices: bytes that a step sends, and flops of each device
time    the steps in turn, several rounds; each is divided by the hand-written step of its round
trace   seconds to trace, lower and compile a step, and Python's time to call it, by leaves

`--before FOLDER` names a folder that holds another version of samx, such as a clone at an older
commit. Both versions run in this process, in the same rounds. On a CPU, bfloat16 is computed in
float32: its rows say little about an accelerator.
"""

import argparse
import contextlib
import gc
import importlib
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments
from examples.common.choices import BATCHES

TABLES = ("bytes", "peak", "sent", "time", "trace")
MODELS = ("dense 16", "dense 128", "dense 512", "embedding", "conv", "transformer")
VARIANTS = (
    *("sam", "looksam", "vsam", "gsam", "wsam", "friendly_sam", "fisher_sparse_sam"),
    *("dynamic_sparse_sam", "momentum_sam", "async_sam", "msam", "sampa", "lets"),
)
DTYPES = ("float32", "bfloat16")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    many = {"nargs": "+"}
    arguments.add_names(parser, "--tables", [*TABLES], "; default: all", default=TABLES, **many)
    arguments.add_names(parser, "--models", [*MODELS], "; default: all", default=MODELS, **many)
    arguments.add_names(
        parser, "--variants", [*VARIANTS], " for `peak`; default: all", default=VARIANTS, **many
    )
    add = parser.add_argument
    add("--before", type=Path, metavar="FOLDER", help="a folder that holds another samx")
    add("--rounds", type=int, default=15, help="rounds of the times (default 15)")
    add("--width", type=int, default=1024, help="width of the dense net (default 1024)")
    add("--rows", type=int, default=200_000, help="rows of the embedding table (default 200000)")
    add("--layers", type=int, default=24, help="layers for `peak`, 2 widths wide (default 24)")
    text = "numbers of parameter arrays for `trace` (default 10 100 1000)"
    add("--leaves", type=int, nargs="+", default=[10, 100, 1000], metavar="N", help=text)
    text = "compile programs of at most this many arrays (default 100)"
    add("--compiled", type=int, default=100, metavar="N", help=text)
    arguments.add_out(parser, "lean")
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "rounds", "width", "rows", "layers", "leaves", "compiled")
    if args.before is not None and not (args.before / "samx" / "__init__.py").exists():
        parser.error(f"--before must be a folder that holds samx/, got {args.before}")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

import samx
from examples.common import figures, files
from examples.common.models import CLASSES, as_problem
from examples.common.models import MODELS as NETS
from examples.common.output import choose_folder
from examples.common.programs import communicated_bytes, peak_bytes
from examples.common.report import Report
from examples.cost.passes import Forks
from examples.cost.step_cost import flops_of

RHO, LEARNING_RATE, MOMENTUM = 0.05, 0.1, 0.9
TIMED = ("dense 16", "dense 128", "embedding")
SECONDS = 0.2  # of each measurement of a time


class Problem(NamedTuple):
    """`losses_fn(params, batch) -> [B]` with the shapes of its arguments."""

    losses_fn: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any

    @property
    def copy(self) -> int:
        """Bytes of the parameters."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.params))


def dense(sizes: list[int], batch: int) -> Problem:
    """Return a net of dense layers with these widths."""
    params = {
        f"layer{i:03d}": {"kernel": jnp.ones((n, m)) / n, "bias": jnp.zeros(m)}
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    }

    def losses_fn(params, batch):
        *hidden, last = params.values()
        x = batch["image"].astype(last["kernel"].dtype)
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"][None])
        return cross_entropy(x @ last["kernel"] + last["bias"][None], batch)

    return Problem(losses_fn, params, {"image": jnp.ones((batch, sizes[0])), **labels(batch)})


def embedding(rows: int, batch: int = 128, width: int = 64) -> Problem:
    """Return a large table and a small net: the mean of four rows, one hidden layer."""
    params = {"table": jnp.ones((rows, width)), "hidden": jnp.eye(width)}
    params |= {"head": jnp.ones((width, CLASSES)) / width}

    def losses_fn(params, batch):
        x = params["table"][batch["index"]].mean(axis=1)
        return cross_entropy(jax.nn.relu(x @ params["hidden"]) @ params["head"], batch)

    index = jnp.arange(4 * batch).reshape(batch, 4) * 37 % rows
    return Problem(losses_fn, params, {"index": index, **labels(batch)})


def net(name: str, batch: int) -> Problem:
    """Return one of the models of step_cost.py."""
    losses_fn, params, data = as_problem(NETS[name], batch)

    def cast(params, batch):
        dtype = jax.tree.leaves(params)[0].dtype
        return losses_fn(params, {**batch, "image": batch["image"].astype(dtype)})

    return Problem(cast, params, data)


def cross_entropy(logits: jax.Array, batch: Any) -> jax.Array:
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def labels(batch: int) -> dict[str, jax.Array]:
    return {"label": jnp.arange(batch) % CLASSES}


def problem(name: str, args: argparse.Namespace) -> Problem:
    kind, _, batch = name.partition(" ")
    if kind == "dense":
        return dense([784, args.width, args.width, CLASSES], int(batch))
    return embedding(args.rows) if kind == "embedding" else net(kind, BATCHES[kind])


def base() -> optax.GradientTransformation:
    return optax.sgd(LEARNING_RATE, momentum=MOMENTUM)


def by_hand(losses_fn: Callable) -> Callable:
    """Return a step of SAM without samx; half-precision parameters are perturbed in float32."""

    def step(params, state, batch):
        def loss(params):
            return losses_fn(params, batch).mean()

        value, g = jax.value_and_grad(loss)(params)
        squares = [jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(g)]
        scale = RHO / (jnp.sqrt(sum(squares)) + 1e-12)
        point = jax.tree.map(lambda w, x: w.astype(jnp.float32) + scale * x, params, g)
        g_s = jax.tree.map(lambda x, w: x.astype(w.dtype), jax.grad(loss)(point), params)
        updates, state = base().update(g_s, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def with_samx(losses_fn: Callable, tx: Any) -> Callable:
    """Return a step of any variant, with every closure."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, batch):
        def loss(params):
            return losses_fn(params, batch).mean()

        value, g = jax.value_and_grad(loss)(params)
        closures = dict(value_fn=loss, losses_fn=losses_fn, batch=batch)
        closures |= dict(training_fn=loss, validation_fn=loss)
        updates, state = tx.update(g, state, params, value=value, **closures)
        # Not `value`: it would keep a forward pass alive where the variant does not use it.
        return optax.apply_updates(params, updates), state, optax.tree.get(state, "loss", value)

    return step


def transformations(samx: Any, batch_like: Any) -> dict[str, Callable[[], Any]]:
    """Return how each variant is made, base included."""
    mask = {"sparsity": 0.5, "period": 100}
    first = {
        "sam": lambda: samx.sam(RHO),
        "looksam": lambda: samx.looksam(RHO, period=5),
        "vsam": lambda: samx.vsam(RHO),
        "gsam": lambda: samx.gsam(RHO, 0.4),
        "friendly_sam": lambda: samx.friendly_sam(RHO),
        "fisher_sparse_sam": lambda: samx.fisher_sparse_sam(RHO, **mask),
        "dynamic_sparse_sam": lambda: samx.dynamic_sparse_sam(RHO, **mask),
        "async_sam": lambda: samx.async_sam(RHO),
        "msam": lambda: samx.msam(RHO, 4),
    }

    def in_front(make):
        return lambda: optax.chain(make(), base())

    return {name: in_front(make) for name, make in first.items()} | {
        "wsam": lambda: samx.wsam(base(), LEARNING_RATE, RHO),
        "momentum_sam": lambda: samx.momentum_sam(base(), RHO),
        "sampa": lambda: samx.sampa(base(), RHO, batch_like=batch_like),
        "lets": lambda: samx.lets(base(), RHO),
    }


@contextlib.contextmanager
def version_in(folder: Path) -> Iterator[Any]:
    """Import the samx of another folder; it stays usable, and this process keeps its own."""

    def take():
        names = [name for name in sys.modules if name.split(".")[0] == "samx"]
        return {name: sys.modules.pop(name) for name in names}

    mine = take()
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("samx")
    finally:
        sys.path.remove(str(folder))
        take()
        sys.modules.update(mine)


def steps_of(it: Problem, older: Any) -> dict[str, tuple[Callable, Any]]:
    """Return the rows that are compared, with their transformations."""
    rows = {"by hand": (by_hand(it.losses_fn), base())}
    txs = {"sam": optax.chain(samx.sam(RHO), base())}
    txs["sam, all readings"] = samx.all_readings(txs["sam"])
    if older is not None:
        txs["sam before"] = optax.chain(older.sam(RHO), base())
    return rows | {name: (with_samx(it.losses_fn, tx), tx) for name, tx in txs.items()}


def compile_step(step: Callable, tx: Any, params: Any, batch: Any, **jit: Any) -> Any:
    """Compile a step from shapes; parameters and state are donated."""
    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1), **jit).lower(params, state, batch).compile()


def count_bytes(args: argparse.Namespace, older: Any) -> list[dict]:
    """Count traffic and memory of SAM for every model and dtype."""
    found = []
    for dtype in DTYPES:
        for name in args.models:
            it = problem(name, args)
            params = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), it.params)
            copy = it._replace(params=params).copy
            for row, (step, tx) in steps_of(it, older).items():
                program = compile_step(step, tx, params, it.batch)
                found.append({"model": name, "dtype": dtype, "row": row} | counts(program, copy))
    return found


def counts(program: Any, copy: int) -> dict[str, float]:
    """Return what the compiler counts, in copies of the parameters."""
    return {
        "bytes": program.cost_analysis()["bytes accessed"] / copy,
        "temporary": program.memory_analysis().temp_size_in_bytes / copy,
        "peak": peak_bytes(program) / copy,
    }


def count_peaks(args: argparse.Namespace, older: Any) -> list[dict]:
    """Count the peak memory of variants where parameters outweigh everything else."""
    small = dense([8, *[8] * args.layers, CLASSES], 8)
    wide = 2 * args.width

    def widened(x):
        return jax.ShapeDtypeStruct([wide if n == 8 else n for n in x.shape], x.dtype)

    params = jax.tree.map(widened, small.params)
    batch = small.batch | {"image": jax.ShapeDtypeStruct((8, wide), jnp.float32)}
    it = Problem(small.losses_fn, params, batch)
    print(f"peak: {it.copy / 4e6:.1f} million parameters in {args.layers} layers, batch 8")
    programs: dict[str, Any] = {"plain": (with_samx(it.losses_fn, base()), base())}
    programs["by hand"] = by_hand(it.losses_fn), base()
    for when, version in (("", samx), (" before", older)):
        if version is not None:
            makes = transformations(version, batch)
            txs = {name + when: makes[name]() for name in args.variants}
            programs |= {name: (with_samx(it.losses_fn, tx), tx) for name, tx in txs.items()}
    found = []
    for row, (step, tx) in tqdm(programs.items(), desc="peak", unit="step", disable=None):
        found.append({"row": row} | counts(compile_step(step, tx, params, batch), it.copy))
        if row == "looksam":  # what the branch costs: each of its sides alone
            forks = Forks()
            for choice, side in enumerate(("other side alone", "sharp side alone")):
                alone = with_samx(forks.watch(it.losses_fn), tx)
                with forks.only(choice):
                    program = compile_step(alone, tx, params, batch)
                found.append({"row": f"{row}, {side}"} | counts(program, it.copy))
    return found


def count_sent(args: argparse.Namespace, older: Any) -> list[dict]:
    """Count bytes sent inside `data_parallel`, and flops of selections under a sharded jit."""
    it = dense([64, args.width, args.width, CLASSES], 128)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.tree.map(lambda x: jax.device_put(x, spread), it.batch)
    found = []
    for when, version in (("", samx), (" before", older)):
        if version is None:
            continue
        makes = transformations(version, it.batch) | {
            "msam, scan": lambda v=version: optax.chain(v.msam(RHO, 4), base()),
            "msam, vmap": lambda v=version: optax.chain(v.msam(RHO, 4, how="vmap"), base()),
        }
        cases = [("sam", "global"), ("msam, vmap", "global"), ("msam, vmap", "local")]
        for name, ascent in [*cases, ("lets", "global")]:
            tx = version.data_parallel(makes[name](), "data", ascent=ascent)
            state = jax.eval_shape(tx.init, it.params)
            mapped = jax.shard_map(
                with_samx(it.losses_fn, tx),
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("data")),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
            program = jax.jit(mapped).lower(it.params, state, batch).compile()
            sent = sum(communicated_bytes(program).values()) / it.copy
            found.append({"row": f"{name}, {ascent}{when}", "sent": sent})
        selections = {
            "plain": base(),
            "sam": makes["sam"](),
            "ksam": optax.chain(version.ksam(RHO, 64), base()),
            "esam": optax.chain(version.esam(RHO, 0.6, 0.5), base()),
        }
        for name, tx in selections.items():
            program = compile_step(with_samx(it.losses_fn, tx), tx, it.params, batch)
            found.append({"row": f"{name}, jit{when}", "megaflops": flops_of(program) / 1e6})
    return found


def measure_times(args: argparse.Namespace, older: Any) -> list[dict]:
    """Time the rows of a model in turn; return the quartiles of their ratios."""
    found, order = [], random.Random(0)
    for name in [model for model in args.models if model in TIMED]:
        it = problem(name, args)
        runs = {row: Run(step, tx, it) for row, (step, tx) in steps_of(it, older).items()}
        rounds = tqdm(range(args.rounds), desc=f"time: {name}", unit="round", disable=None)
        seconds = {row: [] for row in runs}
        for _ in rounds:
            for row in order.sample(list(runs), len(runs)):
                seconds[row].append(runs[row].seconds())
        for row, times in seconds.items():
            ratios = np.divide(times, seconds["by hand"])
            quartiles = np.percentile(ratios, [25, 50, 75]).tolist()
            milliseconds = 1e3 * float(np.median(times))
            found.append({"model": name, "row": row, "ratio": quartiles, "ms": milliseconds})
    return found


class Run:
    """A compiled step that goes on from where its last call ended."""

    def __init__(self, step: Callable, tx: Any, it: Problem):
        self.program = compile_step(step, tx, it.params, it.batch)
        self.carry = jax.tree.map(jnp.copy, (it.params, tx.init(it.params)))
        self.batch, self.calls = it.batch, 1
        self.calls = max(1, math.ceil(SECONDS / self.seconds()))

    def seconds(self) -> float:
        """Return the seconds per call."""
        start = time.perf_counter()
        for _ in range(self.calls):
            *carry, _ = self.program(*self.carry, self.batch)
            self.carry = tuple(carry)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / self.calls


def measure_traces(args: argparse.Namespace, older: Any) -> list[dict]:
    """Measure the processor seconds to trace, lower and compile, and to call from Python."""
    found = []
    for leaves in args.leaves:
        it = dense([8] * (leaves + 1), 4)
        it = it._replace(
            params={f"w{i:04d}": jnp.eye(8) for i in range(leaves)}, losses_fn=chain_of_layers
        )
        txs = {"plain": base()}
        for when, version in (("", samx), (" before", older)):
            if version is not None:
                makes = transformations(version, it.batch)
                txs |= {name + when: makes[name]() for name in ("sam", "looksam")}
        rows = {"by hand": (by_hand(it.losses_fn), base())}
        rows |= {name: (with_samx(it.losses_fn, tx), tx) for name, tx in txs.items()}
        times = {row: [] for row in rows}
        rounds = 3 if leaves <= args.compiled else 1
        for _ in tqdm(range(rounds), desc=f"trace: {leaves} arrays", unit="round", disable=None):
            for row, (step, tx) in rows.items():
                times[row].append(stages(step, tx, it, leaves <= args.compiled))
        for row, measured in times.items():
            found.append({"leaves": leaves, "row": row} | mean_of(measured))
    return found


def chain_of_layers(params: Any, batch: Any) -> jax.Array:
    x = batch["image"]
    for kernel in params.values():
        x = jnp.tanh(x @ kernel)
    return cross_entropy(x, {"label": batch["label"] % x.shape[-1]})


def mean_of(measured: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([one[name] for one in measured])) for name in measured[0]}


def stages(step: Callable, tx: Any, it: Problem, is_compiled: bool) -> dict[str, float]:
    """Return the seconds of each stage, with all of Python's garbage collected before."""
    state = jax.eval_shape(tx.init, it.params)
    jitted = jax.jit(partial(step), donate_argnums=(0, 1))
    gc.collect()
    gc.disable()
    clock = [time.process_time()]
    traced = jitted.trace(it.params, state, it.batch)
    clock.append(time.process_time())
    lowered = traced.lower()
    clock.append(time.process_time())
    result = {}
    if is_compiled:
        program = lowered.compile()
        clock.append(time.process_time())
        result = {"call, ms": 1e3 * seconds_to_call(program, it, tx)}
    gc.enable()
    names = ("trace", "lower", "compile")
    return dict(zip(names, np.diff(clock).tolist(), strict=False)) | result


def seconds_to_call(program: Any, it: Problem, tx: Any, calls: int = 20) -> float:
    """Return Python's seconds for a call, which returns before the step has run."""
    carry, seconds = jax.tree.map(jnp.copy, (it.params, tx.init(it.params))), []
    for _ in range(calls):
        start = time.perf_counter()
        *carry, _ = program(*carry, it.batch)
        seconds.append(time.perf_counter() - start)
        jax.block_until_ready(carry)
    return float(np.median(seconds))


def print_table(title: str, rows: list[dict], keys: tuple[str, ...]) -> None:
    """Print the rows with their columns."""
    names = [
        *keys,
        *(name for name in dict.fromkeys(n for r in rows for n in r) if name not in keys),
    ]
    lines = [names] + [[text_of(row.get(name, "")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        cells = [
            f"{x:<{w}}" if i < len(keys) else f"{x:>{w}}"
            for i, (x, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def text_of(x: Any) -> str:
    if isinstance(x, list):
        return "{1:.3f} [{0:.3f}, {2:.3f}]".format(*x)
    return f"{x:.3f}" if isinstance(x, float) else str(x)


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Draw the bytes of SAM relative to the hand-written step, and the peaks of the variants."""
    panels = [name for name in ("bytes", "peak") if results.get(name)]
    lines = {"bytes": relative_bytes(results.get("bytes", []))}
    lines["peak"] = {(row["row"], ""): row["peak"] for row in results.get("peak", [])}
    height = max(figures.height_of(len({key for key, _ in lines[name]})) for name in panels)
    figure = figures.make_figure(len(panels), [height])
    titles = {
        "bytes": "memory traffic of SAM / by hand",
        "peak": "peak, copies of the parameters",
    }
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_points(axes, lines[name])
        axes.set_xlabel(titles[name])
    figures.save(figure, path, "A step of samx beside the same step written by hand")


def relative_bytes(rows: list[dict]) -> dict[tuple[str, str], float]:
    hand = {(r["model"], r["dtype"]): r["bytes"] for r in rows if r["row"] == "by hand"}
    return {
        (f"{r['model']}, {r['dtype']}", r["row"]): r["bytes"] / hand[r["model"], r["dtype"]]
        for r in rows
        if r["row"] != "by hand"
    }


def draw_points(axes: Any, points: dict[tuple[str, str], float]) -> None:
    """Draw one line of points per key; the points that lie farthest apart get their names."""
    lines: dict[str, dict[str, float]] = {}
    for (key, kind), value in points.items():
        name = next((word for word in ("before", "all readings") if word in key + kind), "today")
        lines.setdefault(key.removesuffix(" before"), {})[name] = value
    colors = {"today": figures.BLUE, "all readings": figures.PINK, "before": figures.RED}
    rows = list(reversed(lines))
    for key, line in lines.items():
        for name, value in line.items():
            axes.plot(value, rows.index(key), "o", color=colors[name], ms=5)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", alpha=0.3)
    low, high = min(points.values()), max(points.values())
    span = max(high - low, 0.5)
    axes.set_xlim(low - 0.08 * span, high + 0.12 * span)
    widest = max(lines, key=lambda key: max(lines[key].values()) - min(lines[key].values()))
    named = [(x, rows.index(widest), name, colors[name]) for name, x in lines[widest].items()]
    if len(named) > 1:
        figures.label_points(axes, named)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    args = parse(argv)
    choose_folder(args, "lean")
    report, results, older = Report(args, left_out=["before"]), {}, None
    if args.before is not None:
        with version_in(args.before) as older:
            pass
        print(f"before: samx {older.__version__} in {args.before}")
    makers = {
        "bytes": (count_bytes, "Counted by the compiler, in copies P of the parameters"),
        "peak": (count_peaks, "Counted by the compiler, in copies P of the parameters"),
        "sent": (count_sent, "Sent, in copies P; flops of each of eight devices, in millions"),
        "time": (measure_times, "Time relative to the step written by hand: median [quartiles]"),
        "trace": (measure_traces, "Seconds of a step by hand and of samx, by parameter arrays"),
    }
    for name in args.tables:
        make, title = makers[name]
        if name == "sent" and jax.device_count() < 8:
            print("\nsent: needs eight devices, for example JAX_NUM_CPU_DEVICES=8")
            continue
        results[name] = make(args, older)
        keys = [key for key in ("leaves", "model", "dtype", "row") if key in results[name][0]]
        print_table(title, results[name], tuple(keys))
        report.save(**results)
    plots = []
    if results.get("bytes") or results.get("peak"):
        draw(results, report.folder / "lean.png")
        plots.append("lean.png")
    report.end(*plots)
    return results


if __name__ == "__main__":
    main()
