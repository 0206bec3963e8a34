"""Train a GPT on Python's own sources, with any variant of samx by name.

    python examples/train/language_model.py --variant sam
    python examples/train/language_model.py --variant base             # AdamW alone
    python examples/train/language_model.py --devices 8 --parallel fsdp --steps 20
    python examples/train/language_model.py --resume runs/language-001
    python examples/train/language_model.py --abstract                 # memory of large models

The text is the standard library of the Python that runs, byte by byte; a tenth of its files is held
out. The loss is in nats per byte. A trigram model, counted on the same text, is printed for
comparison. The defaults take about three minutes on two CPU cores.

The batch is sharded over all devices. With --parallel fsdp the parameters and everything that is
shaped like them are sharded too. Each run has its own folder, --out: config.json, metrics.jsonl (a
line for each step and each evaluation), tensorboard/, checkpoints/ and, at the end, results.json
and curves.png. If a run was killed, --resume FOLDER continues it from its newest checkpoint. On the
same number of devices it ends with the same numbers as an uninterrupted run, to the last bit; on
another number they differ by rounding.

--abstract trains nothing. It compiles a step of configurations with up to 7 billion parameters from
their shapes alone, and prints what each device computes, sends and holds. With --adapt lora,
low-rank adapters alone are trained; the frozen weights are held once.
"""

import argparse
import contextlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from examples.common import arguments, choices
from examples.common.resume import resumed

ABSTRACT = ("abstract", "sizes", "adapt", "variants", "examples")  # arguments of --abstract
NOT_SETTINGS = ("out", "resume", "devices", *ABSTRACT)  # what --resume does not keep
CHANGEABLE = ("parallel", "remat")  # where and when the same numbers are computed
# What --abstract compiles by default: one variant of each kind.
KINDS = (
    *("sam", "looksam", "sampa", "sampa-separate", "momentum-sam", "async-sam", "gsam"),
    *("friendly-sam", "esam", "msam", "fisher-sparse-sam", "adasam"),
)
SIZES = ("100M", "1B", "7B")
ADAPT = ("whole", "lora", "lora-data")  # the adaptations of shapes.py


def make_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    names = choices.VARIANTS
    arguments.add_names(parser, "--variant", names, "; default: sam", default="sam")
    add("--rho", type=float, help="default: the paper's value, in registry.py")
    add("--width", type=int, default=128, help="features; default: 128")
    add("--depth", type=int, default=4, help="layers; default: 4")
    add("--length", type=int, default=64, help="bytes of an example; default: 64")
    add("--learning-rate", type=float, default=4e-3, help="of AdamW; default: 4e-3")
    add("--weight-decay", type=float, default=0.1, help="default: 0.1")
    add("--schedule", choices=["cosine", "step", "constant"], default="cosine")
    add("--warmup", type=float, default=0.05, metavar="SHARE", help="fraction of all steps")
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=16, help="examples per step, all devices together")
    add("--accumulate", type=int, default=1, metavar="K", help="microbatches on each device")
    add(
        "--precision",
        choices=["float32", "bfloat16", "float16", "float64"],
        help="of the computation; default: bfloat16, on a CPU float32. Parameters are float32, but "
        "float64 with float64; float16 scales the loss",
    )
    add("--remat", action="store_true", help="compute each layer again in the backward pass")
    add(
        "--parallel",
        choices=["data", "fsdp"],
        default="data",
        help="what a device holds of the parameters: data, all of them; fsdp, a part",
    )
    add(
        "--devices",
        type=int,
        nargs="+",
        help="a number; default: all; if too few, simulated on the CPU. --abstract takes several "
        "numbers; default: 1 8 64",
    )
    add("--seed", type=int, default=0)
    add("--evaluate-every", type=int, default=100, metavar="STEPS")
    add("--checkpoint-every", type=int, default=0, metavar="STEPS", help="default: as --evaluate")
    arguments.add_monitor(parser, "on the batch of the step")
    arguments.add_out(parser, "language")
    add("--resume", metavar="FOLDER", help="continue this run, with its settings")
    add("--abstract", action="store_true", help="compile steps of large models; train nothing")
    arguments.add_names(parser, "--sizes", SIZES, " for --abstract; default: all", nargs="+")
    add(
        "--adapt",
        nargs="+",
        choices=ADAPT,
        metavar="WHAT",
        help="for --abstract, what is trained: whole, the model; lora, adapters of rank 8 alone, "
        "under FSDP; lora-data, the same with all weights on every device; default: whole",
    )
    add(
        "--variants",
        nargs="+",
        choices=[*names, "all"],
        metavar="NAME",
        help=f"for --abstract: names as of --variant, or all; default: {' '.join(KINDS)}",
    )
    add("--examples", type=int, help="for --abstract: examples on each device; default: 4")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments; --resume takes them from the run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume is not None:
        args, config = resumed(
            parser,
            argv,
            "language_model.py",
            not_settings=NOT_SETTINGS,
            changeable=CHANGEABLE,
        )
        args.data_sha256 = config.get("data_sha256")
    arguments.check_range(parser, args, "devices")
    if args.abstract:
        if args.resume is not None:
            parser.error("--abstract and --resume exclude each other: nothing is trained")
        args.devices = sorted(set(args.devices or (1, 8, 64)))
        args.sizes = args.sizes or SIZES
        args.adapt = args.adapt or ADAPT[:1]
        args.variants = args.variants or KINDS
        args.examples = 4 if args.examples is None else args.examples
        arguments.check_range(parser, args, "examples")
        return args
    for name in ABSTRACT:
        if getattr(args, name):
            parser.error(f"--{name} is for --abstract only")
    if args.devices is not None and len(args.devices) > 1:
        parser.error(f"--devices must be one number without --abstract, got {args.devices}")
    sizes = ("width", "depth", "length", "steps", "batch", "accumulate", "evaluate_every")
    arguments.check_range(parser, args, *sizes)
    arguments.check_range(parser, args, "checkpoint_every", "monitor", low=0)
    arguments.check_range(parser, args, "seed", low=0, high=2**31 - 1)
    arguments.check_range(parser, args, "rho", "learning_rate", "weight_decay", low=0, high=1e6)
    arguments.check_range(parser, args, "warmup", low=0, high=1)
    if args.width % 2 or (args.width > 64 and args.width % 64):
        parser.error(f"--width must be even, and above 64 a multiple of 64, got {args.width}")
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax

import samx
from examples.common import figures, files
from examples.common.checkpoints import fingerprint
from examples.common.gpt import Size, losses_of
from examples.common.language_task import Task, batch_like, logits_like, make_task
from examples.common.programs import peak_bytes
from examples.common.registry import VARIANTS, Setting
from examples.train import abstract, loop, text
from examples.train.metrics import Log

HELD_OUT_EXAMPLES = 1024
SAMPLE = 200  # bytes
CLIP = 1.0  # the largest norm of a gradient that AdamW sees


def make_base(schedule: Any, weight_decay: float) -> optax.GradientTransformation:
    """Return AdamW as language models are trained with: clipped gradients, no decay of scales."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in str(path), params)

    adamw = optax.adamw(schedule, b2=0.95, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(CLIP), adamw)


def task_of(
    args: argparse.Namespace, schedule: optax.Schedule, examples: int, devices: list[Any]
) -> Task:
    """Return the task of a run."""
    size = Size(args.width, args.depth, text.VOCABULARY, args.length)
    setting = Setting(
        batch_like(size, args.batch),
        batch_size=args.batch,
        num_examples=examples,
        logits=logits_like(size),
        learning_rate=schedule,
    )
    return make_task(
        size,
        loop.make_optimizer(args, make_base(schedule, args.weight_decay), setting),
        devices=devices,
        parallel=args.parallel,
        remat=args.remat,
        dtype=jnp.dtype(args.precision),
        param_dtype=jnp.float64 if args.precision == "float64" else jnp.float32,
    )


def mean_loss(state: Any, batches: list[jax.Array]) -> float:
    """Return the mean loss on batches of equal size, in nats per byte.

    Each loss is waited for: simulated devices of a CPU share its threads, and many programs at once
    could wait for one another for ever.
    """
    losses = [float(loss_of(state.apply_fn, state.params, batch)) for batch in batches]
    return float(np.mean(losses))


@partial(jax.jit, static_argnums=0)
def loss_of(apply_fn: Any, params: Any, tokens: jax.Array) -> jax.Array:
    return losses_of(apply_fn(params, tokens[:, :-1]), tokens[:, 1:]).mean()


@partial(jax.jit, static_argnums=0)
def continued(apply_fn: Any, params: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
    """Return `SAMPLE` bytes that the model draws after `tokens`, int[T]."""

    def draw(tokens, key):
        token = jax.random.categorical(key, apply_fn(params, tokens[None])[0, -1])
        return jnp.append(tokens[1:], token.astype(tokens.dtype)), token

    return jax.lax.scan(draw, tokens, jax.random.split(key, SAMPLE))[1]


def train(args: argparse.Namespace, data: text.Text, devices: list[Any]) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in the run's folder or from scratch."""
    schedule = loop.make_schedule(args, args.steps)
    batches = text.train_batches(data.train, args.length, args.batch, seed=args.seed)
    task = task_of(args, schedule, text.examples_in(data.train, args.length), devices)
    place = partial(jax.device_put, device=task.batch_sharding)
    state = task.init(jax.random.key(args.seed))
    start = time.perf_counter()
    batch = text.train_batches(data.train, args.length, args.batch, seed=0, num_threads=0)
    step_fn = task.step.lower(state, place(next(batch))).compile()
    print(
        f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6:.2f} million parameters; "
        f"compiled in {time.perf_counter() - start:.0f} s; a step of {args.variant} at batch "
        f"{args.batch} needs {peak_bytes(step_fn) / 1e9:.2f} GB on each device"
    )

    count = max(1, HELD_OUT_EXAMPLES // args.batch) * args.batch
    starts = text.spread_starts(data.held_out, args.length, count)
    examples = text.windows(data.held_out, args.length, starts)
    held_out = [place(part) for part in np.split(examples, count // args.batch)]
    trigram = text.trigram_loss(data.train, data.held_out, args.length, starts)
    print(f"a trigram model: held-out loss {trigram:.4f}")

    def evaluate(state, step, loss, rate):
        values = {
            "loss": loss,
            "held_out_loss": mean_loss(state, held_out),
            "bytes_per_second": rate,
        }
        line = f"step {step:>{len(str(args.steps))}}/{args.steps}  loss {loss:.4f}  held-out "
        return values, f"{line}{values['held_out_loss']:.4f}  {rate:.0f} bytes/s"

    def finish(state, log):
        key = jax.random.key(args.seed)
        sample = continued(state.apply_fn, state.params, jnp.asarray(examples[0, 1:]), key)
        losses = {"held_out_loss": mean_loss(state, held_out), "trigram_loss": trigram}
        sample = bytes(np.asarray(sample, np.uint8)).decode("ascii", "replace")
        return write_results(args, log, state, losses, sample)

    return loop.train(
        args.folder,
        "language_model.py",
        state,
        step_fn,
        batches,
        place,
        evaluate,
        finish,
        steps=args.steps,
        evaluate_every=args.evaluate_every,
        checkpoint_every=args.checkpoint_every or args.evaluate_every,
        schedule=schedule,
        unit="bytes",
        units=args.batch * args.length,
    )


def write_results(
    args: argparse.Namespace, log: Log, state: Any, losses: dict[str, float], sample: str
) -> dict[str, Any]:
    """Write results.json and curves.png; return the results."""
    results = loop.counts_of(state, log, "bytes") | losses
    results |= {"sample": sample, "state_sha256": fingerprint(state)}
    files.write(args.folder / "results.json", json.dumps(results, indent=1))
    title = f"{args.variant}, width {args.width}, depth {args.depth}, seed {args.seed}"
    draw(log, losses, args.folder / "curves.png", title)
    print(
        f"\n{sample}\n\nheld-out loss {losses['held_out_loss']:.4f} (trigram model: "
        f"{losses['trigram_loss']:.4f}), {results['gradients']:.0f} gradients, "
        f"{results['bytes_per_second']:.0f} bytes/s\n"
        f"{loop.describe_monitored(results)}state sha256 {results['state_sha256']}"
    )
    print(f"Results: {args.folder / 'results.json'}\nPlot: {args.folder / 'curves.png'}")
    print(f"TensorBoard: tensorboard --logdir {args.folder / 'tensorboard'}")
    return results


def draw(log: Log, losses: dict[str, float], path: Path, title: str) -> None:
    """Plot the losses of all steps, training and held-out loss over time, the top eigenvalue."""
    figure, panels = loop.make_panels(log)
    left, right, *_ = panels
    loop.draw_losses(left, log)
    left.set(xlabel="step", title="loss of each batch, nats per byte")
    for name, label in (("loss", "training"), ("held_out_loss", "held-out")):
        points = [(row["step"], row[name]) for row in log.of("epoch")]
        right.plot(*zip(*points, strict=True), "o-", label=label, markersize=3)
    steps, level = [step for step, _ in points], [losses["trigram_loss"]] * len(points)
    right.plot(steps, level, color=figures.GREY, linewidth=1, label="trigram model")
    gain = losses["trigram_loss"] - losses["held_out_loss"]
    told = "below" if gain > 0 else "above"
    right.set(xlabel="step", title=f"held-out loss ends {abs(gain):.2f} {told} a trigram model's")
    for axes in panels:
        axes.grid(alpha=0.3)
        figures.label_ends(axes)
    figures.save(figure, path, title)


def main(argv: list[str] | None = None) -> Any:
    args = parse(argv)
    if args.abstract:
        return abstract.main(args)
    devices = loop.choose_devices(args.devices and args.devices[0])
    loop.check_batch(args, devices)
    args.rho = VARIANTS[args.variant].rho if args.rho is None else args.rho
    if args.precision is None:
        args.precision = "float32" if devices[0].platform == "cpu" else "bfloat16"
    data = loop.begin(
        args,
        "language_model.py",
        "language",
        text.load,
        data_name="the text of this Python",
        not_settings=NOT_SETTINGS,
    )
    print(
        f"device: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
        f"{args.precision}, jax {jax.__version__}, samx {samx.__version__}\n"
        f"{len(data.train):,} bytes to train on, {len(data.held_out):,} bytes held out\n"
        f"run: {args.folder}"
    )
    wide = jax.enable_x64(True) if args.precision == "float64" else contextlib.nullcontext()
    with wide, loop.ends_in_one_line("language_model.py", args.folder):
        return train(args, data, devices)


if __name__ == "__main__":
    main()
