"""What a sharpness-aware step costs: time, flops, memory traffic and memory of every variant.

    python examples/step_cost.py                        # what is compared by default, three models
    python examples/step_cost.py --variants sam sampa --models dense --repeats 5
    python examples/step_cost.py --variants sam sampa --batch 1 4 16 64 256
    python examples/step_cost.py --variants sam rst ae-sam vsam --models transformer

Every row of the table is one jitted training step with SGD and momentum; the plain step, without
any perturbation, is what the others are compared with. In each round every row is timed once, in
random order, and times are divided by the plain step's of the same round: what slows the machine
down for a while slows both. The parameters stay where they are, so that every call does the same
work, and each step gets the optimizer state that the call before it returned; the labels change
from call to call, so that policies which look at the gradient see different ones. Variants that
take a sharp gradient on some steps only are timed over whole cycles, behind their warm-up; how
often an adaptive policy (`ae-sam`, `ae-looksam`, `vsam`, `arsam`) takes one here says nothing about
training, for which there is second_order.py.

Two more rows say what SAM costs without samx, written by hand and with optax.contrib.sam. Prints a
table for each model and batch size; results.json and step_cost.png go to --out.

Several batch sizes show from where on a step fills the machine: below, SAMPa's two gradients in one
vmapped call can take about as long as one. Then there is a summary of each model, and sizes.png.
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from output import free_folder
from registry import BASES, VARIANTS
from tqdm import tqdm

import samx

LEARNING_RATE = 0.1
MOMENTUM = 0.9
RHO = 0.05  # of every row: it does not change the cost
# A measurement is long enough for the clock, and covers whole cycles of the variants that do not
# take a sharp gradient on every step.
LEAST_SECONDS = 0.02
LEAST_CALLS = 5
CLASSES = 10  # of labels, and so many batches that follow each other
DEFAULT = ("sam", "asam", "sampa", "sampa-separate", "looksam", "momentum-sam")
CHEAP = 1.2  # "about one gradient": time of a step relative to the plain step
COMPARISONS = {
    "samx SAM vs by hand, readings read": ("sam", "sam by hand"),
    "samx SAM vs by hand, readings unread": ("sam, readings unread", "sam by hand"),
    "samx SAM vs optax.contrib.sam": ("sam", "optax.contrib.sam"),
    "SAMPa vmap vs separate": ("sampa", "sampa-separate"),
    "LookSAM vs samx SAM": ("looksam", "sam"),
    "Momentum-SAM vs plain": ("momentum-sam", "plain"),
}
BY_SIZE = ("plain", "sam", "sampa", "sampa-separate")
HEADER = """\
                     gradients      flops   bytes   memory    steps                 time     time
                                /gradient  /plain  /params  /second               /plain /by hand"""


class Model(NamedTuple):
    """A model to be trained, the shape of one of its inputs, and the default batch size."""

    make: Callable[[nnx.Rngs], nnx.Module]
    shape: tuple[int, ...]
    batch: int


class Row(NamedTuple):
    """A step to be measured: `step(params, state, batch) -> (params, state, loss)`.

    `gradients` is for states that do not count them; `cycle` and `settling` are the variant's.
    """

    step: Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]
    state: Any
    gradients: float
    cycle: int = 1
    settling: int = 0


def dense(rngs: nnx.Rngs) -> nnx.Module:
    layer = functools.partial(nnx.Linear, rngs=rngs)
    return nnx.Sequential(
        *(layer(784, 1024), nnx.relu, layer(1024, 1024), nnx.relu, layer(1024, 10))
    )


def conv(rngs: nnx.Rngs) -> nnx.Module:
    layer = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
    return nnx.Sequential(
        *(layer(3, 32), nnx.relu, layer(32, 64, strides=2), nnx.relu),
        *(layer(64, 128, strides=2), nnx.relu, layer(128, 128, strides=2), nnx.relu),
        *(lambda x: x.mean(axis=(1, 2)), nnx.Linear(128, 10, rngs=rngs)),
    )


class Residual(nnx.Module):
    """`x + branch(x)`, with layer normalization at the start of the branch."""

    def __init__(self, width: int, *layers: Callable, rngs: nnx.Rngs):
        self.branch = nnx.Sequential(nnx.LayerNorm(width, rngs=rngs), *layers)

    def __call__(self, x):  # noqa: D102
        return x + self.branch(x)


def transformer(rngs: nnx.Rngs) -> nnx.Module:
    layer = functools.partial(nnx.Linear, rngs=rngs)

    def block() -> tuple[nnx.Module, nnx.Module]:
        attention = nnx.MultiHeadAttention(4, 128, decode=False, rngs=rngs)
        mlp = layer(128, 512), nnx.gelu, layer(512, 128)
        return Residual(128, attention, rngs=rngs), Residual(128, *mlp, rngs=rngs)

    # The positions of the patches are left out: they would cost next to nothing.
    return nnx.Sequential(
        *(layer(48, 128), *block(), *block(), nnx.LayerNorm(128, rngs=rngs)),
        *(lambda x: x.mean(axis=1), layer(128, 10)),
    )


MODELS = {
    "dense": Model(dense, (784,), 512),
    "conv": Model(conv, (32, 32, 3), 64),
    "transformer": Model(transformer, (64, 48), 16),  # 64 patches of 4 x 4 pixels
}


def problem(model: str, size: int) -> tuple[Callable, Any, dict[str, jax.Array]]:
    """The model as pure functions: `losses_fn(params, batch) -> [B]`, params, and a batch."""
    make, shape, _ = MODELS[model]
    graph, params = nnx.split(make(nnx.Rngs(0)))
    # Every call flattens its arguments, an `nnx.State` several times slower than a dict: for a
    # model of many arrays that would be a good part of a small step's time.
    params = nnx.to_pure_dict(params)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(size, *shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(CLASSES, size=size)),
    }

    def losses_fn(params, batch):
        logits = nnx.merge(graph, params)(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    return losses_fn, params, batch


def reference_rows(losses_fn: Callable, params: Any) -> dict[str, Row]:
    """The gradient, the plain step, and SAM without samx."""
    base = BASES["momentum"](LEARNING_RATE)
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    contrib = optax.contrib.sam(base, adversary, opaque_mode=True)

    def mean_loss(params, batch):
        return losses_fn(params, batch).mean()

    def gradient(params, state, batch):
        del state
        value, g = jax.value_and_grad(mean_loss)(params, batch)
        return params, g, value

    def plain(params, state, batch):
        value, g = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = base.update(g, state, params)
        return optax.apply_updates(params, updates), state, value

    def by_hand(params, velocity, batch):
        value, g = jax.value_and_grad(mean_loss)(params, batch)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g)))
        scale = RHO / (norm + 1e-12)
        point = jax.tree.map(lambda w, d: w + scale * d, params, g)
        g_s = jax.grad(mean_loss)(point, batch)
        velocity = jax.tree.map(lambda v, d: MOMENTUM * v + d, velocity, g_s)
        params = jax.tree.map(lambda w, v: w - LEARNING_RATE * v, params, velocity)
        return params, velocity, value

    def optax_contrib(params, state, batch):
        value, g = jax.value_and_grad(mean_loss)(params, batch)
        grad_fn = jax.grad(lambda p, _: mean_loss(p, batch))
        updates, state = contrib.update(g, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state, value

    zeros = optax.tree.zeros_like(params)
    return {
        "gradient": Row(gradient, zeros, 1),
        "plain": Row(plain, base.init(params), 1),
        "sam by hand": Row(by_hand, zeros, 2),
        "optax.contrib.sam": Row(optax_contrib, contrib.init(params), 2),
    }


def samx_rows(losses_fn: Callable, params: Any, batch: Any, variants: list[str]) -> dict[str, Row]:
    """One row for each variant, and two more where there is something to choose."""
    base = BASES["momentum"](LEARNING_RATE)

    def step(tx, read, params, state, batch):
        def value_fn(p):
            return losses_fn(p, batch).mean()

        value, g = jax.value_and_grad(value_fn)(params)
        closures = dict(value_fn=value_fn, losses_fn=losses_fn, batch=batch)
        updates, new = tx.update(g, state, params, value=value, **closures)
        # Not `value`: for a variant that ignores it, it would keep a forward pass alive.
        loss = optax.tree.get(new, "loss")
        if not read:
            new = optax.tree.set(new, readings=optax.tree.get(state, "readings"))
        return optax.apply_updates(params, updates), new, loss

    def row(tx, name, read=True):
        one_step, known = functools.partial(step, tx, read), VARIANTS[name]
        return Row(one_step, tx.init(params), known.gradients, known.cycle, known.settling)

    rows = {}
    for name in variants:
        tx = VARIANTS[name].make(RHO, base, batch, None)
        rows[name] = row(tx, name)
        if name == "sam":
            rows["sam, readings unread"] = row(tx, name, read=False)
    return rows


def measure(model: str, size: int, variants: list[str], repeats: int) -> dict:
    """Compile every row of one model at one batch size, then time them all in `repeats` rounds."""
    losses_fn, params, batch = problem(model, size)
    batches = [batch | {"label": (batch["label"] + shift) % CLASSES} for shift in range(CLASSES)]
    rows = reference_rows(losses_fn, params) | samx_rows(losses_fn, params, batch, variants)

    compiled, calls, states, results = {}, {}, {}, {}
    made = dict.fromkeys(rows, 0)

    def run(name, times):
        start = time.perf_counter()
        for call in range(made[name], made[name] + times):
            out = compiled[name](params, states[name], batches[call % CLASSES])
            states[name] = out[1]
        jax.block_until_ready(out)
        made[name] += times
        return (time.perf_counter() - start) / times

    def spent(name):
        return float(optax.tree.get(states[name], "gradients_spent", default=0))

    for name, row in tqdm(rows.items(), desc=f"{model}, batch {size}: compile", unit="step"):
        compiled[name] = jax.jit(row.step).lower(params, row.state, batch).compile()
        states[name] = row.state
        run(name, max(1, row.settling))
        least = max(LEAST_CALLS, LEAST_SECONDS / run(name, row.cycle))
        calls[name] = math.ceil(least / row.cycle) * row.cycle
        cost = compiled[name].cost_analysis()
        results[name] = {
            "flops": cost["flops"],
            "bytes": cost["bytes accessed"],
            "temporary_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
            "is_conditional": row.cycle > 1,
            "seconds": [],
        }

    shuffle = random.Random(0)
    rounds = [shuffle.sample(list(rows), len(rows)) for _ in range(repeats)]
    order = [name for names in rounds for name in names]
    before = {name: (spent(name), made[name]) for name in rows}
    for name in tqdm(order, desc=f"{model}, batch {size}: time", unit="measurement"):
        results[name]["seconds"].append(run(name, calls[name]))
    for name, (gradients, steps) in before.items():
        counted = (spent(name) - gradients) / (made[name] - steps)
        results[name]["gradients"] = counted or rows[name].gradients

    leaves = jax.tree.leaves(params)
    copy = sum(leaf.nbytes for leaf in leaves)
    gradient, plain, by_hand = (results[name] for name in ("gradient", "plain", "sam by hand"))
    for result in results.values():
        result["steps_per_second"] = 1 / float(np.median(result["seconds"]))
        result["flops_to_gradient"] = result["flops"] / gradient["flops"]
        result["bytes_to_plain"] = result["bytes"] / plain["bytes"]
        result["memory_copies"] = (result["temporary_bytes"] - plain["temporary_bytes"]) / copy
        result["time_to_plain"] = quartiles(result, plain)
        result["time_to_by_hand"] = quartiles(result, by_hand)
    parameters = sum(leaf.size for leaf in leaves)
    return {"model": model, "batch": size, "parameters": parameters, "rows": results}


def quartiles(result: dict, reference: dict) -> list[float]:
    """Quartiles of the time ratio, taken round by round."""
    ratios = np.divide(result["seconds"], reference["seconds"])
    return np.percentile(ratios, [25, 50, 75]).tolist()


def spread(three: list[float]) -> str:
    return "{1:.2f} [{0:.2f}, {2:.2f}]".format(*three)


def table(rows: dict) -> str:
    lines = [HEADER]
    for name, row in rows.items():
        marked = name + "*" * row["is_conditional"]
        lines.append(
            f"{marked:<21}{row['gradients']:>9.3g}{row['flops_to_gradient']:>11.3f}"
            f"{row['bytes_to_plain']:>8.2f}{row['memory_copies']:>9.2f}"
            f"{row['steps_per_second']:>9.1f}{spread(row['time_to_plain']):>21}"
            f"{row['time_to_by_hand'][1]:>9.2f}"
        )
    lines.append("Time ratios: median [quartiles] of the rounds. Memory: temporary, above plain.")
    if any(row["is_conditional"] for row in rows.values()):
        lines.append(
            "* gradients: counted over the timed steps, which are whole cycles of sharp and plain "
            "ones.\n  flops and bytes: of a sharp step, the dearer of the two."
        )
    lines.append("")
    for title, (name, reference) in COMPARISONS.items():
        if name in rows and reference in rows:
            one, other = rows[name], rows[reference]
            lines.append(
                f"{title:<38}time {spread(quartiles(one, other))}"
                f"   flops {one['flops'] / other['flops']:.3f}"
                f"   bytes {one['bytes'] / other['bytes']:.2f}"
            )
    return "\n".join(lines)


def summary(results: list[dict]) -> str:
    """Steps per second of one model over its batch sizes."""
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
    """One panel for each model (across) and batch size (down): bars for time, ticks for flops."""
    num_sizes, num_rows = len(models[0]), len(models[0][0]["rows"])
    height = 1.4 + 0.35 * num_rows
    figure = Figure(figsize=(2 + 4.5 * len(models), num_sizes * height), layout="constrained")
    panels = figure.subplots(num_sizes, len(models), sharey=True, squeeze=False)
    for axes, result in zip(panels.T.flat, itertools.chain(*models), strict=True):
        rows = result["rows"]
        low, middle, high = np.transpose([row["time_to_plain"] for row in rows.values()])
        flops = [row["flops"] / rows["plain"]["flops"] for row in rows.values()]
        colors = ["skyblue" if name.split(",")[0] in VARIANTS else "0.7" for name in rows]
        axes.barh(list(rows), middle, color=colors, xerr=[middle - low, high - middle], capsize=3)
        axes.plot(flops, list(rows), "|", color="C1", markersize=17, markeredgewidth=2)
        for name, ratio, end in zip(rows, middle, np.maximum(high, flops), strict=True):
            axes.annotate(f"{ratio:.2f}", (end, name), (7, -4), textcoords="offset points")
        axes.axvline(1, color="0.3", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
        axes.set_title(heading(result))
    panels[0, 0].invert_yaxis()
    figure.suptitle("Time of a training step, relative to the plain step")
    figure.supxlabel(
        "Bars: median time with samx (blue) and without (grey); black: quartiles;\n"
        "orange: flops, those of a sharp step where some steps are plain",
        fontsize="medium",
    )
    figure.savefig(path, dpi=150)


def plot_sizes(models: list[list[dict]], path: Path) -> None:
    """One panel for each model: steps per second over the batch size."""
    figure = Figure(figsize=(1 + 4 * len(models), 4), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
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
        axes.set_title(results[0]["model"])
    panels[0].set_ylabel("steps per second (median)")
    panels[0].legend()
    figure.savefig(path, dpi=150)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [name for name in VARIANTS if name != "base"]
    help_text = f"of {', '.join(names)}; default: {', '.join(DEFAULT)}"
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=names,
        default=list(DEFAULT),
        metavar="NAME",
        help=help_text,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=positive, default=15, help="rounds (default 15)")
    defaults = ", ".join(f"{model.batch} for {name}" for name, model in MODELS.items())
    parser.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        metavar="SIZE",
        help=f"one or several sizes (default {defaults})",
    )
    parser.add_argument("--out", help="new or empty folder (default runs/step_cost-NNN)")
    args = parser.parse_args(argv)
    try:
        folder = free_folder(args.out, "step_cost")
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}")

    device = f"{jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)"
    print(f"{device}, jax {jax.__version__}, samx {samx.__version__}")
    models = []
    for model in dict.fromkeys(args.models):
        results = []
        for size in sorted(set(args.batch or [MODELS[model].batch])):
            result = measure(model, size, args.variants, args.repeats)
            print(f"\n{heading(result)}\n\n{table(result['rows'])}\n")
            results.append(result)
        models.append(results)
        if len(results) > 1:
            print(f"\n{model}: steps per second\n\n{summary(results)}\n")

    about = {"device": device, "jax": jax.__version__, "arguments": vars(args)}
    report = about | {"results": list(itertools.chain(*models))}
    (folder / "results.json").write_text(json.dumps(report, indent=1))
    plot(models, folder / "step_cost.png")
    if len(models[0]) > 1:
        plot_sizes(models, folder / "sizes.png")
    print(f"Wrote {', '.join(str(path) for path in sorted(folder.iterdir()))}")


if __name__ == "__main__":
    main()
