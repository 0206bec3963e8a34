"""Train on several devices: jit, pmap and shard_map give the same curve.

    python examples/devices/data_parallel.py
    python examples/devices/data_parallel.py --strategy pmap shard_map --ascent local --float64
    python examples/devices/data_parallel.py --variant sampa --pair --devices 4
    python examples/devices/multi_process.py                    # the same in two processes

A small Flax network learns scikit-learn's digits. Every batch is sharded over the devices. Each
strategy starts from the same parameters and sees the same batches, so the loss curves differ only
by rounding. With fewer than two accelerators, simulated CPU devices are used.

    jit         the batch is sharded; nothing from samx is needed
    pmap        samx.data_parallel around the optimizer, samx.value_and_grad for the gradient
    shard_map   the same; samx.state_specs gives the sharding of the state

With `--pair`, two groups of devices compute SAMPa's two gradients, one gradient each. The process
with `--process-id` I is one of `--num-processes` N processes. All processes get the same other
arguments.

The script prints the curves, their largest difference and the steps per second. It writes
results.json, the final parameters (params.npz) and data_parallel.png to --out.
"""

import argparse
import contextlib
import io
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments, choices

SIMULATED = 8
STRATEGIES = ("jit", "pmap", "shard_map")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments; `check_devices` checks what depends on the devices."""
    parser = arguments.new_parser(__doc__)
    parser.add_argument(
        "--strategy",
        nargs="+",
        choices=STRATEGIES,
        help="default: all strategies that the other arguments allow",
    )
    names = choices.VARIANTS
    arguments.add_names(parser, "--variant", names, "; default: sam", default="sam")
    parser.add_argument("--base", choices=choices.BASES, default="momentum")
    parser.add_argument(
        "--rho",
        type=float,
        help="default: half the radius with which its search begins in registry.py",
    )
    parser.add_argument("--learning-rate", type=float, help="default: one that suits the base")
    parser.add_argument(
        "--ascent",
        choices=["global", "local"],
        default="global",
        help="ascent gradient: the mean over all devices (default), or that of each device alone",
    )
    parser.add_argument(
        "--pair", action="store_true", help="for sampa: two groups of devices, one gradient each"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=120, help="examples over all devices together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--devices",
        type=int,
        help="number of devices in each process; simulated CPU devices if there are fewer. "
        f"Default: all, or {SIMULATED} simulated devices if there is only one",
    )
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    parser.add_argument("--num-processes", type=int, metavar="N")
    parser.add_argument("--process-id", type=int, metavar="I", help="0 to N-1")
    arguments.add_out(parser, "data_parallel")
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "epochs", "devices", "num_processes")
    arguments.check_range(parser, args, "batch", high=choices.TRAIN)
    arguments.check_range(parser, args, "seed", low=0, high=2**31 - 1)
    arguments.check_finite(parser, args, "rho")
    arguments.check_finite(parser, args, "learning_rate", above_zero=True)
    if args.pair and args.variant != "sampa":
        parser.error(f"--pair is for --variant sampa, which has two gradients, not {args.variant}")
    processes = (args.coordinator, args.num_processes, args.process_id)
    if any(value is not None for value in processes):
        if None in processes:
            parser.error("--coordinator, --num-processes and --process-id go together")
        if not re.fullmatch(r".+:\d+", args.coordinator):
            parser.error(f"--coordinator must be HOST:PORT, got {args.coordinator}")
        if not 0 <= args.process_id < args.num_processes:
            parser.error(
                f"--process-id must be 0 to {args.num_processes - 1}, got {args.process_id}"
            )
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import samx
from examples.common import figures, files
from examples.common.digits_task import TRAIN, graph_of, initialize, split
from examples.common.output import free_folder
from examples.common.registry import BASES, VARIANTS, Setting, check_base
from examples.common.report import Report

WIDTH = 64
GRAPH = graph_of(WIDTH)
LEARNING_RATES = {"sgd": 0.3, "momentum": 0.03, "adamw": 1e-3}
# Seconds after which a process ends by itself. DEAD_TIMEOUT: a peer has died. WAIT_TIMEOUT: a peer
# does not reach the start or the end. At the end the others wait until process 0 has written the
# results.
DEAD_TIMEOUT, WAIT_TIMEOUT = 10, 60
NO_PMAP = f"jax {jax.__version__} has no jax.pmap"


class Trainer(NamedTuple):
    """One strategy: initial values, the step, and how data goes to and from the devices."""

    params: Any
    state: Any
    step: Callable[[Any, Any, Any], tuple[Any, Any, jax.Array]]  # takes a batch; last is loss
    spread: Callable[[Any], Any]  # a batch in host memory -> sharded over the devices
    fetch: Callable[[Any], Any]  # a replicated value -> host memory


def logits(params: Any, x: Any) -> jax.Array:
    return nnx.merge(GRAPH, params)(x)


def features_fn(params: Any, batch: Any) -> jax.Array:
    return nnx.merge(GRAPH, params).features(batch["x"])


def head_fn(params: Any, features: jax.Array) -> jax.Array:
    return nnx.merge(GRAPH, params).head(features)


def loss_on_logits(logits: jax.Array, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def losses_fn(params: Any, batch: Any) -> jax.Array:
    return loss_on_logits(logits(params, batch["x"]), batch)


@jax.jit
def accuracy(params: Any, data: Any) -> jax.Array:
    return (logits(params, data["x"]).argmax(-1) == data["y"]).mean()


def make_step(tx: optax.GradientTransformationExtraArgs, value_and_grad: Callable[..., Any]):
    """Build the step, the same for every strategy except where the mean over devices is taken."""

    def step(params, state, batch):
        def value_fn(params):
            return losses_fn(params, batch).mean()

        def ascent_fn(params):
            return samx.losses.log_lower_bound(logits(params, batch["x"]), batch["y"]).mean()

        value, grads = value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grads,
            state,
            params,
            value=value,
            grad=grads,
            value_fn=value_fn,
            losses_fn=losses_fn,
            features_fn=features_fn,
            head_fn=head_fn,
            loss_on_logits=loss_on_logits,
            batch=batch,
            index=batch["index"],
            ascent_fn=ascent_fn,
        )
        # The base optimizer without a variant has no readings.
        return optax.apply_updates(params, updates), state, optax.tree.get(state, "loss", value)

    return step


def make_optimizer(
    args: argparse.Namespace, devices: list[Any], batch_size: int, pair: P | NamedSharding
):
    """Build the variant with its base; `pair` is the sharding of SAMPa's two groups, if any."""
    batch_like = {
        "x": jax.ShapeDtypeStruct((batch_size, 64), args.dtype),
        "y": jax.ShapeDtypeStruct((batch_size,), np.int32),
        "index": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }
    base = BASES[args.base](args.learning_rate)
    if args.pair:
        return samx.sampa(base, args.rho, batch_like=batch_like, pair_sharding=pair)
    setting = Setting(
        batch_like, args.batch, TRAIN, num_groups=len(devices), learning_rate=args.learning_rate
    )
    tx = VARIANTS[args.variant].make(args.rho, base, setting)
    return optax.with_extra_args_support(tx)


def with_jit(args: argparse.Namespace, devices: list[Any], params: Any) -> Trainer:
    mesh = make_mesh(args, devices)
    tx = make_optimizer(
        args, devices, args.batch, NamedSharding(mesh, P("pair")) if args.pair else P()
    )
    return on_mesh(mesh, tx, make_step(tx, jax.value_and_grad), params)


def with_shard_map(args: argparse.Namespace, devices: list[Any], params: Any) -> Trainer:
    mesh = make_mesh(args, devices)
    tx = samx.data_parallel(
        make_optimizer(args, devices, args.batch, P("pair")), "data", args.ascent
    )
    specs = samx.state_specs(tx, params, batch_specs=P("data"))
    step = jax.shard_map(
        make_step(tx, partial(samx.value_and_grad, axis_name="data")),
        mesh=mesh,
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs, P()),
    )
    return on_mesh(mesh, tx, step, params)


def make_mesh(args: argparse.Namespace, devices: list[Any]) -> Mesh:
    """Build a mesh of all devices along "data"; with --pair, of two groups along "pair"."""
    shape, names = ((2, len(devices) // 2), ("pair", "data")) if args.pair else ((-1,), ("data",))
    return Mesh(np.reshape(devices, shape), names, axis_types=(AxisType.Auto,) * len(names))


def on_mesh(mesh: Mesh, tx: optax.GradientTransformation, step: Any, params: Any) -> Trainer:
    """Build a step on global arrays: parameters replicated, examples sharded over "data"."""
    everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    state_shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), samx.state_specs(tx, params, batch_specs=P("data"))
    )
    params = place(params, everywhere)
    return Trainer(
        params,
        jax.jit(tx.init, out_shardings=state_shardings)(params),
        jax.jit(step, out_shardings=(everywhere, state_shardings, everywhere)),
        spread=lambda batch: place(batch, spread),
        fetch=fetch,
    )


def with_pmap(args: argparse.Namespace, devices: list[Any], params: Any) -> Trainer:
    """Build a step on arrays with a leading device axis, which has this process's devices only."""
    axis = "pair" if args.pair else "data"
    own = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]

    def copy(tree):
        return jax.tree.map(lambda x: np.broadcast_to(x, (len(own), *x.shape)), tree)

    def share(batch):
        return jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:])[own], batch)

    if args.pair:  # the two devices are the two groups; each sees the whole batch
        tx, value_and_grad = (
            make_optimizer(args, devices, args.batch, P("pair")),
            jax.value_and_grad,
        )
    else:
        tx = make_optimizer(args, devices, args.batch // len(devices), P())
        tx = samx.data_parallel(tx, axis, args.ascent)
        value_and_grad = partial(samx.value_and_grad, axis_name=axis)
    start = jax.pmap(lambda p: (p, tx.init(p)), axis_name=axis, devices=devices)
    params, state = start(copy(params))
    return Trainer(
        params,
        state,
        jax.pmap(make_step(tx, value_and_grad), axis_name=axis, devices=devices),
        spread=copy if args.pair else share,
        fetch=lambda tree: jax.tree.map(lambda x: x[0], fetch(tree)),
    )


TRAINERS = {"jit": with_jit, "pmap": with_pmap, "shard_map": with_shard_map}


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Make global arrays; each process places the parts of its own devices."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree
    )


def fetch(tree: Any) -> Any:
    """Copy the first device's part to the host; it is the whole array if it is replicated."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data), tree)


def batches_of(epoch: int, train: Any, args: argparse.Namespace):
    """Yield the epoch's batches in host memory; examples that do not fill a batch are dropped."""
    order = np.random.default_rng((args.seed, epoch)).permutation(TRAIN)
    for rows in order[: args.steps * args.batch].reshape(args.steps, args.batch):
        yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], train)


def train(strategy: str, args: argparse.Namespace, devices: list[Any], bar: tqdm) -> dict:
    """Train once; return all losses, the accuracy after each epoch, and the last parameters."""
    params, data, test = problem(args)
    trainer = TRAINERS[strategy](args, devices, params)
    params, state = trainer.params, trainer.state
    # Compile before the clock starts; the results of this step are not used.
    first = trainer.spread(next(batches_of(0, data, args)))
    jax.block_until_ready(trainer.step(params, state, first))

    losses, accuracies, seconds = [], [], 0.0
    for epoch in range(args.epochs):
        for batch in batches_of(epoch, data, args):
            before = time.perf_counter()
            params, state, loss = trainer.step(params, state, trainer.spread(batch))
            jax.block_until_ready((params, state, loss))
            seconds += time.perf_counter() - before
            losses.append(float(trainer.fetch(loss)))
            bar.update()
        accuracies.append(float(accuracy(trainer.fetch(params), test)))
    return {
        "strategy": strategy,
        "loss": losses,
        "loss_by_epoch": np.reshape(losses, (args.epochs, args.steps)).mean(axis=1).tolist(),
        "test_accuracy_by_epoch": accuracies,
        "steps_per_second": args.epochs * args.steps / seconds,
        "params": {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree.leaves_with_path(trainer.fetch(params))
        },
    }


def problem(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the seed's initial parameters, training and test images, in host memory."""
    seed = np.array([args.seed], np.int32)
    everything = jax.device_get((initialize(seed, WIDTH), *split(seed, 0.0)))
    params, data, _, test = jax.tree.map(
        lambda x: x[0].astype(args.dtype if x.dtype == np.float32 else np.int32), everything
    )
    return params, data, test


def largest_difference(results: list[dict]) -> float:
    """Return the largest difference between the losses of two strategies at the same step."""
    return float(np.ptp([result["loss"] for result in results], axis=0).max())


def print_tables(results: list[dict], args: argparse.Namespace) -> None:
    """Print the curves side by side, then one line per strategy."""
    names = [result["strategy"] for result in results]
    width = 12 * len(names)
    print(f"\n{'':5} {'training loss':^{width}}  {'test accuracy, %':^{width}}")
    columns = "".join(f"{name:>12}" for name in names)
    print(f"{'epoch':5} {columns}  {columns}\n{'-' * (8 + 2 * width)}")
    for epoch in range(args.epochs):
        losses = "".join(f"{result['loss_by_epoch'][epoch]:>12.6f}" for result in results)
        accuracies = "".join(
            f"{100 * result['test_accuracy_by_epoch'][epoch]:>12.2f}" for result in results
        )
        print(f"{epoch + 1:5} {losses}  {accuracies}")
    print(f"\n{'strategy':<12} {'steps/second':>12}")
    for result in results:
        print(f"{result['strategy']:<12} {result['steps_per_second']:>12.1f}")
    if len(results) > 1:
        print(
            f"largest difference between the loss curves: {largest_difference(results):.1e}"
            f" ({args.dtype.__name__})"
        )


def draw(results: list[dict], path: Path, title: str) -> None:
    """Draw all curves in the same axes, and the difference of each from the first."""
    panels = 3 if len(results) > 1 else 2
    figure = figures.make_figure(panels)
    axes = figure.subplots(1, panels)
    # Equal curves cover each other, so each is thinner than the one below it.
    styles = [(figures.SKY, "-", 7.0), (figures.RED, "--", 3.0), (figures.INK, ":", 1.5)]
    for result, (color, line, width) in zip(results, styles, strict=False):
        style = {"color": color, "linestyle": line, "linewidth": width}
        style |= {"label": result["strategy"]}
        steps = np.arange(1, len(result["loss"]) + 1)
        epochs = np.arange(1, len(result["test_accuracy_by_epoch"]) + 1)
        axes[0].plot(steps, result["loss"], **style)
        accuracies = 100 * np.asarray(result["test_accuracy_by_epoch"])
        axes[1].plot(epochs, accuracies, marker="." if len(epochs) == 1 else None, **style)
        if panels == 3:
            axes[2].plot(steps, np.subtract(result["loss"], results[0]["loss"]), **style)
    axes[0].set(title="training loss of every step", xlabel="step", yscale="log")
    axes[1].set(title="test accuracy, %", xlabel="epoch")
    if panels == 3:
        first, largest = results[0]["strategy"], largest_difference(results)
        axes[2].set(title=f"training loss, minus {first}'s: at most {largest:.1e}", xlabel="step")
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
        figures.label_ends(panel)
    figures.save(figure, path, title)


def complete(args: argparse.Namespace) -> None:
    """Fill in what the registry knows; refuse a base that the variant does not accept."""
    try:
        check_base(args.variant, args.base)
    except ValueError as error:
        arguments.refuse(str(error))
    if args.rho is None:
        args.rho = VARIANTS[args.variant].start / 2
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.base]
    args.dtype = np.float64 if args.float64 else np.float32
    args.steps = TRAIN // args.batch


def connect(args: argparse.Namespace) -> None:
    """Connect this process to its peers, if there are several processes."""
    if args.coordinator is None:
        return
    # The service would catch SIGTERM as a notice to save a checkpoint; the process would not end.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        initialization_timeout=WAIT_TIMEOUT,
        heartbeat_timeout_seconds=DEAD_TIMEOUT,
        shutdown_timeout_seconds=WAIT_TIMEOUT,
    )


def choose_devices(args: argparse.Namespace) -> list[Any]:
    """Return the devices of all processes, in the order of the processes."""
    with contextlib.suppress(RuntimeError):  # a running backend stays unchanged
        jax.config.update("jax_num_cpu_devices", args.devices or SIMULATED)
    real, wanted = jax.devices(), args.devices
    is_enough = len(real) > 1 if wanted is None else jax.local_device_count() >= wanted
    platform = real[0].platform if is_enough else "cpu"
    if not is_enough:
        wanted = wanted or SIMULATED
    devices = []
    for process in range(jax.process_count()):
        own = [d for d in jax.devices(platform) if d.process_index == process][:wanted]
        if wanted and len(own) < wanted:
            arguments.refuse(
                f"--devices must be at most {len(own)} in process {process}, got {wanted}"
            )
        devices += own
    return devices


def check_devices(args: argparse.Namespace, devices: list[Any]) -> None:
    """Refuse arguments that do not fit these devices; choose the strategies that do."""
    if args.pair and len(devices) % 2:
        arguments.refuse(
            f"--pair needs an even number of devices for two groups, got {len(devices)}"
        )
    shares = len(devices) // 2 if args.pair else len(devices)
    if args.batch % shares:
        arguments.refuse(
            f"--batch must be a multiple of {shares}, an equal share per device, got {args.batch}"
        )
    refused = {}
    if args.ascent == "local":
        refused["jit"] = (
            "--ascent local needs mapped devices: --strategy pmap or shard_map, not jit"
        )
    if args.pair and len(devices) != 2:
        refused["pmap"] = f"--pair with --strategy pmap needs 2 devices, got {len(devices)}"
    if not hasattr(jax, "pmap"):
        refused["pmap"] = f"--strategy pmap: {NO_PMAP}"
    for strategy in args.strategy or ():
        if strategy in refused:
            arguments.refuse(refused[strategy])
    args.strategy = [name for name in args.strategy or STRATEGIES if name not in refused]
    args.strategy = list(dict.fromkeys(args.strategy))


def create_folder(args: argparse.Namespace) -> None:
    """Set `args.folder`, `None` except in process 0; if that fails, all processes end."""
    args.folder, trouble = None, ""
    if jax.process_index() == 0:
        try:
            args.folder = free_folder(args.out, "data_parallel")
        except (OSError, ValueError) as error:
            trouble = f"--out: {error}"
    if multihost_utils.broadcast_one_to_all(np.array(bool(trouble))):
        arguments.refuse(trouble or "process 0 refused --out")


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    complete(args)
    connect(args)
    devices = choose_devices(args)
    check_devices(args, devices)
    create_folder(args)

    kind = "simulated" if devices[0].platform == "cpu" else devices[0].device_kind
    described = f"{len(devices)} {kind} devices"
    if jax.process_count() > 1:
        described += f" in {jax.process_count()} processes"
    report = Report(args, described, left_out=["dtype"]) if args.folder else None
    if report and not hasattr(jax, "pmap"):
        print(f"pmap is left out: {NO_PMAP}")
    total = len(args.strategy) * args.epochs * args.steps
    own_device = next(d for d in devices if d.process_index == jax.process_index())
    with (
        jax.enable_x64(args.float64),
        jax.default_device(own_device),
        tqdm(
            total=total, unit=" steps", smoothing=0.1, disable=True if report is None else None
        ) as bar,
    ):
        results = []
        for strategy in args.strategy:
            bar.set_description(strategy)
            results.append(train(strategy, args, devices, bar))
    if report is None:
        return results

    print_tables(results, args)
    params = {result["strategy"]: result.pop("params") for result in results}
    archive = io.BytesIO()
    np.savez(
        archive,
        **{f"{name}/{path}": leaf for name, tree in params.items() for path, leaf in tree.items()},
    )
    files.write(report.folder / "params.npz", archive.getvalue())
    report.save(largest_difference=largest_difference(results), results=results)
    draw(results, report.folder / "data_parallel.png", f"{args.variant} on {described}")
    report.end("data_parallel.png")
    return results


if __name__ == "__main__":
    main()
