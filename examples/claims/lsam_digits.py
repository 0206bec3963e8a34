"""LSAM against data-parallel SAM: elastic averaging of SAM workers that never wait.

    python examples/claims/lsam_digits.py
    python examples/claims/lsam_digits.py --workers 4 --slow 1 --gradients 1600
    python examples/claims/lsam_digits.py --engine threads
    python examples/claims/lsam_digits.py --engine ray --workers 4
    python examples/claims/lsam_digits.py --resume runs/lsam-digits-001

A small network learns scikit-learn's digits (8x8 pixels) with 30% wrong training labels. There are
several workers; the last one is four times slower. Every row except "same time" computes the same
number of gradients. Each gradient is a pass over the batch of one worker. The rows:

- Data-parallel SAM uses the batches of all workers together, at the pace of the slowest worker.
- LSAM uses one batch per worker and step.
- EASGD is LSAM without sharpness.
- SAM on a single worker is slow, and takes many steps on the small batch.
- "same time" is data-parallel SAM with as many steps as fit into the time of LSAM.

Learning rates fall by a cosine over each worker's own steps.

--engine simulate, the default, is deterministic. The clock is simulated; its unit of time is one
gradient of a fast worker. Learning rate and rho of each row are chosen on validation images, with
tuning seeds that are not reported. The test images are used with the chosen values only. All seeds
and candidates train at once, vmapped. It takes about two minutes on two CPU cores.

--engine threads and --engine ray train one seed with workers that really run at the same time: a
thread per device, or a process per worker. If there are too few accelerators, the devices are
simulated on the CPU, and each step sleeps until --step-seconds have passed, as if each device had
its own processor. Data-parallel SAM runs afterwards on the devices of this process; each of its
steps takes as long as a step of the slowest worker. Learning rates and radii are those that the
simulation chooses by default, unless others are given. The center is evaluated during the run. It
is saved every --save-every seconds, at the end, and on Ctrl-C; --resume continues from there.

The script prints a table and the differences. It writes results.json and lsam_digits.png to --out.
"""

import argparse
import contextlib
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments
from examples.common.choices import TRAIN
from examples.common.resume import resumed

NOT_SETTINGS = ("out", "resume")
CHANGEABLE = ("engine", "gradients", "slow", "step_seconds", "save_every")


def make_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    add("--engine", choices=["simulate", "threads", "ray"], default="simulate")
    add("--workers", type=int, default=8)
    add("--slow", type=float, default=4.0, help="slowdown factor of the last worker")
    add("--batch", type=int, default=100, help="images per step of one worker")
    add("--gradients", type=int, default=3200, help="of each row; one worker's batch each")
    add("--period", type=int, default=4, help="local steps between two exchanges of a worker")
    add("--beta", type=float, default=0.9, help="how strongly the workers move the center")
    add("--learning-rate", type=float, nargs="+", help="candidates; one value for an engine")
    add("--rho", type=float, nargs="+", help="candidates; one value for an engine")
    add("--noise", type=float, default=0.3, help="fraction of flipped labels")
    add("--width", type=int, default=64, help="units of each hidden layer")
    arguments.add_out(parser, "lsam-digits")
    group = parser.add_argument_group("--engine simulate")
    group.add_argument("--seeds", type=int, default=10)
    group.add_argument("--latency", type=float, default=0.1, help="one way, in gradients")
    group = parser.add_argument_group("--engine threads and ray")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument(
        "--step-seconds",
        type=float,
        default=0.02,
        help="least time for a step of a fast worker; 0: no limit",
    )
    group.add_argument("--save-every", type=float, default=60.0, metavar="SECONDS")
    group.add_argument("--resume", metavar="FOLDER", help="continue this run")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments; --resume takes them from the run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume is not None:
        args, _ = resumed(
            parser, argv, "lsam_digits.py", not_settings=NOT_SETTINGS, changeable=CHANGEABLE
        )
        if args.engine == "simulate":
            parser.error("--resume is for --engine threads and ray, got simulate")
    arguments.check_range(parser, args, "period", "width", "seeds")
    arguments.check_range(parser, args, "workers", low=2)
    arguments.check_range(parser, args, "batch", high=TRAIN)
    arguments.check_range(parser, args, "slow", high=1e6)
    arguments.check_range(parser, args, "seed", low=0, high=999)
    arguments.check_range(parser, args, "beta", low=0, high=1)
    arguments.check_range(parser, args, "latency", "step_seconds", low=0, high=1e6)
    arguments.check_range(parser, args, "save_every", low=0, high=1e9)
    arguments.check_share(parser, args, "noise")
    arguments.check_finite(parser, args, "learning_rate", "rho")
    for name in ("learning_rate", "rho"):
        option, values = f"--{name.replace('_', '-')}", getattr(args, name)
        if values and len(values) > 1 and args.engine != "simulate":
            parser.error(f"{option} must be one number for --engine {args.engine}, got {values}")
    unit = 2 * args.workers * args.period  # whole steps of all workers, and whole exchanges
    if args.gradients < unit:
        parser.error(
            f"--gradients must be at least {unit} (2 x workers x period), got {args.gradients}"
        )
    args.gradients -= args.gradients % unit
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import samx
from examples.common import figures
from examples.common.checkpoints import CheckpointError, Checkpoints, kept, newest
from examples.common.digits_task import describe, graph_of, initialize, rows_of, split
from examples.common.files import SaveError
from examples.common.output import choose_folder
from examples.common.report import MARK, Report, marked, mean_and_error
from examples.common.resume import write_config
from examples.common.tuning import TUNING_SEEDS, Runs, edges, runs_of, scores_of
from samx import elastic

LEARNING_RATES = (0.03, 0.1, 0.3)  # no row is better with 0.01 or 1
RADII = (0.1, 0.2, 0.5)
MOMENTUM = 0.9
EVALUATIONS = 20
EVALUATE_EVERY = 0.25  # seconds, in an engine
TIMED_STEPS = 30
LSAM, DATA_PARALLEL, SAME_TIME = "lsam", "dp-sam", "dp-sam, same time"


class Row(NamedTuple):
    """A line of the table."""

    kind: str  # "elastic"; "together": synchronous workers; "alone": one worker
    front: Callable[[Any, int], Any]  # rho, number of workers -> tx before the base
    gradients: int = 2  # per local step
    radii: tuple[float, ...] = RADII
    rounds: int = 2  # all-reduces per synchronous step


def sam(rho: Any, num_workers: int) -> Any:
    """Return SAM, the same for all rows that use it."""
    del num_workers
    return samx.sam(rho)


ROWS = {
    DATA_PARALLEL: Row("together", sam),
    SAME_TIME: Row("together", sam),
    # Each worker computes its perturbation from the gradient of its own batch.
    "dp-sam, own ascent": Row("together", lambda rho, n: samx.msam(rho, n), rounds=1),
    LSAM: Row("elastic", sam),
    "easgd": Row("elastic", lambda rho, n: optax.identity(), 1, (0.0,)),
    "sam, one worker": Row("alone", sam),
}
# For the engines: learning rate and rho that the simulation chooses by default.
CHOSEN = {LSAM: (0.3, 0.2), DATA_PARALLEL: (0.1, 0.2), SAME_TIME: (0.3, 0.1)}


class Functions(NamedTuple):
    """Compiled functions over a vector of runs; runs are the leading axis of all arrays."""

    init: Callable[..., Any]  # params -> state
    step: Callable[..., Any]  # params, state, batch -> params, state, losses
    accuracy: Callable[..., Any]  # params, one part of the data -> [runs]


class Curve(NamedTuple):
    """Measurements during training and at the end."""

    time: list[float]
    gradients: list[int]
    validation: list[np.ndarray]  # accuracies [runs]
    test: list[np.ndarray]
    facts: dict[str, Any]  # further results


@functools.cache
def make_functions(front: Callable[[Any, int], Any], num_workers: int, width: int) -> Functions:
    """Return the functions of rows that share `front`; they are compiled once.

    Learning rate and rho differ by run, so the batch has them.
    """
    graph = graph_of(width)

    def logits(params, x):
        return nnx.merge(graph, params)(x)

    def losses_fn(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, batch["x"]), batch["y"]
        )

    def accuracy(params, data):
        return jnp.mean(logits(params, data["x"]).argmax(-1) == data["y"])

    def optimizer(rho):
        tx = optax.chain(front(rho, num_workers), optax.trace(MOMENTUM))
        return optax.with_extra_args_support(tx)

    def init(params):
        return optimizer(RADII[0]).init(params)

    def step(params, state, batch):
        images = {"x": batch["x"], "y": batch["y"]}
        value, grads = jax.value_and_grad(lambda p: losses_fn(p, images).mean())(params)
        updates, state = optimizer(batch["rho"]).update(
            grads, state, params, value=value, grad=grads, losses_fn=losses_fn, batch=images
        )
        updates = jax.tree.map(lambda u: -batch["learning_rate"] * u, updates)
        return optax.apply_updates(params, updates), state, value

    return Functions(*(jax.jit(jax.vmap(function)) for function in (init, step, accuracy)))


@partial(jax.jit, static_argnames="batch")
def epoch_of(images: Any, seeds: jax.Array, worker: int, epoch: int, batch: int) -> list[Any]:
    """Return the batches of one worker in one of its epochs; each seed has its own shuffle."""
    steps = TRAIN // batch

    def of_seed(images, seed):
        key = jax.random.key(2)
        for number in (seed, worker, epoch):
            key = jax.random.fold_in(key, number)
        rows = jax.random.permutation(key, TRAIN)[: steps * batch].reshape(steps, batch)
        return rows_of({name: images[name] for name in ("x", "y")}, rows)

    stacked = jax.vmap(of_seed)(images, seeds)
    return [jax.tree.map(lambda leaf, k=k: leaf[:, k], stacked) for k in range(steps)]


def stream(images: Any, runs: Runs, args: argparse.Namespace, worker: int, step: int = 0):
    """Yield the batches of a worker from local step `step` on, without end."""
    steps = TRAIN // args.batch
    for epoch in itertools.count(step // steps):
        yield from epoch_of(images, runs.seed, worker, epoch, args.batch)[step % steps :]
        step = 0


def with_rates(batches: Iterator[Any], runs: Runs, horizon: float, step: int = 0):
    """Add learning rate and rho to each batch; the rate falls by a cosine until the horizon."""
    for at, batch in enumerate(batches, step):
        fallen = 0.5 + 0.5 * math.cos(math.pi * min(at / horizon, 1.0))
        learning_rate = (fallen * runs.learning_rate).astype(np.float32)
        yield batch | {"learning_rate": learning_rate, "rho": runs.rho}


def batches_together(images: Any, runs: Runs, args: argparse.Namespace, num_workers: int):
    """Return the batches of several workers as one, [runs, examples, ...].

    The examples of the workers alternate, so that mSAM's strided microbatches are the batches of
    the workers.
    """
    streams = [stream(images, runs, args, worker) for worker in range(num_workers)]
    return map(joined, zip(*streams, strict=True))


@jax.jit
def joined(batches: tuple[Any, ...]) -> Any:
    """Join batches [runs, examples, ...] into one."""
    return jax.tree.map(
        lambda *x: jnp.stack(x, 2).reshape(len(x[0]), -1, *x[0].shape[2:]), *batches
    )


def load(runs: Runs, args: argparse.Namespace) -> tuple[Any, Any]:
    """Return training, validation and test images of the runs, and their initial parameters."""
    seeds = jnp.asarray(runs.seed)
    return split(seeds, args.noise), initialize(seeds, args.width)


def make_worker(
    functions: Functions, runs: Runs, args: argparse.Namespace, seconds: list[float], index: int
) -> elastic.Worker:
    """Return a worker of LSAM for an engine; each step takes at least `seconds[index]`."""
    functions = functions._replace(step=paced(functions.step, seconds[index]))
    return worker_of(LSAM, functions, *load(runs, args), runs, args, index)


def worker_of(
    name: str,
    functions: Functions,
    data: Any,
    params: Any,
    runs: Runs,
    args: argparse.Namespace,
    index: int,
) -> elastic.Worker:
    """Return a worker of a row, with its own stream; its horizon is its part of all steps."""
    speeds = 1 / slowness(args)
    horizon = args.gradients / ROWS[name].gradients * speeds[index] / speeds.sum()

    def batches(step):
        return with_rates(stream(data[0], runs, args, index, step), runs, horizon, step)

    return elastic.Worker(params, functions.init, functions.step, batches)


def paced(step: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Return the step, made to take at least `seconds`."""

    def paced_step(*args):
        begin = time.perf_counter()
        result = jax.block_until_ready(step(*args))
        time.sleep(max(0.0, begin + seconds - time.perf_counter()))
        return result

    return paced_step


def slowness(args: argparse.Namespace) -> np.ndarray:
    """Return the time of a step of each worker, relative to a fast worker."""
    return np.array([1.0] * (args.workers - 1) + [args.slow])


def events_of(name: str, args: argparse.Namespace) -> Iterator[elastic.Event]:
    """Yield the events of an elastic row until its gradients are used up."""
    row = ROWS[name]
    steps = args.gradients // row.gradients
    events = elastic.timeline(
        (row.gradients * slowness(args)).tolist(),
        period=args.period,
        num_exchanges=steps,  # an upper bound
        latency=args.latency,
    )
    for event in events:
        yield event
        steps -= event.kind == "finish"
        if not steps:
            return


def seconds_together(name: str, args: argparse.Namespace) -> float:
    """Return the simulated time of a step: the slowest worker's, plus all-reduces both ways."""
    row = ROWS[name]
    if row.kind == "alone":
        return row.gradients
    return row.gradients * args.slow + row.rounds * 2 * args.latency


def num_steps(name: str, args: argparse.Namespace) -> int:
    """Return the simulated steps of a row with synchronous workers or a single worker."""
    if name == SAME_TIME:
        *_, last = events_of(LSAM, args)
        return max(1, int(last.time / seconds_together(name, args)))
    workers = args.workers if ROWS[name].kind == "together" else 1
    return args.gradients // (ROWS[name].gradients * workers)


def gradients_of(name: str, args: argparse.Namespace) -> int:
    """Return the number of gradients of a row."""
    if name == SAME_TIME:
        return num_steps(name, args) * ROWS[name].gradients * args.workers
    return args.gradients


def simulate(
    name: str,
    runs: Runs,
    args: argparse.Namespace,
    evaluations: int,
    advance: Callable[[float], Any],
) -> Curve:
    """Train the runs of a row on the simulated clock."""
    row, curve = ROWS[name], Curve([], [], [], [], {})
    data, params = load(runs, args)
    functions = make_functions(row.front, args.workers, args.width)

    def evaluate(params, time, gradients):
        curve.time.append(float(time))
        curve.gradients.append(gradients)
        for accuracies, part in ((curve.validation, data[1]), (curve.test, data[2])):
            accuracies.append(np.asarray(functions.accuracy(params, part)))

    if row.kind == "elastic":
        rule = elastic.Rule(beta=args.beta, period=args.period)
        workers = [
            worker_of(name, functions, data, params, runs, args, index)
            for index in range(args.workers)
        ]
        simulation = elastic.Simulation(workers, params, rule)
        marks, done = marks_of(args.gradients // row.gradients, evaluations), 0
        staleness: list[list[int]] = [[] for _ in workers]
        for event in events_of(name, args):
            simulation.apply(event)
            if event.kind == "exchange":
                staleness[event.worker].append(event.staleness)
            if event.kind == "finish":
                done += 1
                advance(row.gradients * len(runs.seed))
                if done in marks:
                    evaluate(simulation.center, event.time, done * row.gradients)
        curve.facts["steps"] = [local.steps for local in simulation.workers]
        curve.facts["exchanges"] = simulation.exchanges
        curve.facts["mean_staleness"] = [float(np.mean(seen or [0])) for seen in staleness]
        curve.facts["largest_staleness"] = max(max(seen, default=0) for seen in staleness)
        return curve

    num_workers = args.workers if row.kind == "together" else 1
    steps, seconds = num_steps(name, args), seconds_together(name, args)
    marks, state = marks_of(steps, evaluations), functions.init(params)
    batches = with_rates(batches_together(data[0], runs, args, num_workers), runs, steps)
    for done, batch in enumerate(itertools.islice(batches, steps), 1):
        params, state, _ = functions.step(params, state, batch)
        advance(row.gradients * num_workers * len(runs.seed))
        if done in marks:
            evaluate(params, done * seconds, done * row.gradients * num_workers)
    return curve


def marks_of(steps: int, evaluations: int) -> set[int]:
    """Return the steps after which to evaluate; the last step is always among them."""
    return {math.ceil(steps * (k + 1) / evaluations) for k in range(evaluations)}


def candidates_of(name: str, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Return the candidates (learning rate, rho); EASGD has no rho."""
    radii = ROWS[name].radii if 0.0 in ROWS[name].radii else args.rho or ROWS[name].radii
    return [(rate, rho) for rate in args.learning_rate or LEARNING_RATES for rho in radii]


def measure(name: str, args: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Tune and train a row on the simulated clock."""
    bar.set_description(name)
    candidates, validation = candidates_of(name, args), None
    chosen = candidates[0]
    if len(candidates) > 1:
        tuned = simulate(name, Runs(*runs_of(TUNING_SEEDS, candidates)), args, 1, bar.update)
        accuracies = scores_of(tuned.validation[-1], candidates)
        chosen, validation = candidates[accuracies.argmax()], float(accuracies.max())
    runs = Runs(*runs_of(range(args.seeds), [chosen]))
    curve = simulate(name, runs, args, EVALUATIONS, bar.update)
    speeds = 1 / slowness(args)
    result = result_of(name, chosen, curve, speeds.sum())
    return result | {"validation_accuracy": validation, "edges": edges(chosen, candidates)}


def result_of(name: str, chosen: tuple[float, float], curve: Curve, speed: float) -> dict[str, Any]:
    """Return a row of results.json; `speed` is the gradients per time of all workers together."""
    return {
        "row": name,
        "learning_rate": chosen[0],
        "rho": chosen[1],
        "edges": [],
        "test_accuracy": curve.test[-1].tolist(),
        "gradients": curve.gradients[-1],
        "time": curve.time[-1],
        "share_of_speed": curve.gradients[-1] / curve.time[-1] / speed,
        "curve": {
            "time": curve.time,
            "gradients": curve.gradients,
            "test_accuracy": np.asarray(curve.test).tolist(),  # [evaluations, seeds]
        },
        **curve.facts,
    }


def run_simulation(args: argparse.Namespace) -> list[dict]:
    """Tune and train all rows on the simulated clock."""
    total = sum(
        gradients_of(name, args) * (args.seeds + tuning * (tuning > len(TUNING_SEEDS)))
        for name in ROWS
        for tuning in [len(candidates_of(name, args)) * len(TUNING_SEEDS)]
    )
    with tqdm(total=total, unit=" gradients", unit_scale=True, smoothing=0.1, disable=None) as bar:
        return [measure(name, args, bar) for name in ROWS]


class Bars:
    """Progress bars: one for all exchanges, and one for each worker."""

    def __init__(self, args: argparse.Namespace, exchanges: int):
        self.period, self.is_started = args.period, False
        total = num_exchanges(args)
        self.all = tqdm(total=total, initial=exchanges, unit="", desc="workers start", disable=None)
        self.workers = [
            tqdm(desc=f"worker {i}", unit=" steps", position=i + 1, disable=None)
            for i in range(args.workers)
        ]

    def show(self, progress: elastic.Progress, accuracy: float) -> None:
        """Show the newest numbers."""
        counts = [progress.exchanges, *(r.exchanges * self.period for r in progress.workers)]
        texts = [f"center: test accuracy {100 * accuracy:.1f} %"] + [
            f"staleness {record.staleness}, loss {record.loss:.3f}, {record.status}"
            for record in progress.workers
        ]
        bars = [self.all, *self.workers]
        if progress.seconds > 0 and not self.is_started:  # rates and remaining time count from here
            self.is_started = True
            self.all.set_description("exchanges", refresh=False)
            for bar, count in zip(bars, counts, strict=True):
                bar.initial = bar.n = bar.last_print_n = count
                bar.start_t = bar.last_print_t = time.time()
        for bar, count, text in zip(bars, counts, texts, strict=True):
            bar.set_postfix_str(text, refresh=False)
            bar.update(count - bar.n)
            bar.refresh()

    def close(self) -> None:
        """Close the bars; their lines stay on the screen."""
        for bar in (self.all, *self.workers):
            bar.close()


def restored(
    checkpoints: Checkpoints, params: Any, num_workers: int
) -> tuple[elastic.Checkpoint | None, float]:
    """Return the newest checkpoint, or `None`, and the seconds of training before it.

    Raises:
        CheckpointError: If the checkpoint cannot be used.
    """
    like = {"params": params, "exchanges": np.zeros(num_workers, np.int64)}
    item, step = checkpoints.restore(like | {"seconds": np.float64(0)})
    if not step:
        return None, 0.0
    where = f"checkpoint {checkpoints.folder / str(step)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(item["params"]):
        if bad := int((~np.isfinite(leaf)).sum()):
            name = jax.tree_util.keystr(path)
            raise CheckpointError(
                f"{where} is of a center that has diverged: params{name} holds {bad} numbers that "
                "are not finite"
            )
    exchanges = np.asarray(item["exchanges"])
    if exchanges.min() < 0 or exchanges.sum() != step:
        raise CheckpointError(f"{where} must hold {step} exchanges, got {exchanges.tolist()}")
    return elastic.Checkpoint(item["params"], exchanges), float(item["seconds"])


def num_exchanges(args: argparse.Namespace) -> int:
    """Return the number of exchanges of LSAM in an engine."""
    return args.gradients // (ROWS[LSAM].gradients * args.period)


def choose_devices(args: argparse.Namespace) -> list[Any]:
    """Return a device for each worker: accelerators if there are enough, else simulated ones."""
    with contextlib.suppress(RuntimeError):  # a running backend cannot be changed
        jax.config.update("jax_num_cpu_devices", args.workers)
    devices = jax.local_devices()
    if len(devices) < args.workers:
        devices = jax.local_devices(backend="cpu")
    return devices[: args.workers]


def seconds_alone(functions: Functions, runs: Runs, args: argparse.Namespace) -> float:
    """Measure the mean seconds per step of a fast worker that runs alone."""
    worker = make_worker(functions, runs, args, [args.step_seconds] * args.workers, 0)
    params, state, batches = worker.params, worker.init(worker.params), iter(worker.batches(0))
    worker.step(params, state, next(batches))  # compiles
    begin = time.perf_counter()
    for batch in itertools.islice(batches, TIMED_STEPS):
        params, state, _ = worker.step(params, state, batch)
    return (time.perf_counter() - begin) / TIMED_STEPS


def train_elastic(
    functions: Functions,
    runs: Runs,
    args: argparse.Namespace,
    devices: list[Any],
    seconds: list[float],
    checkpoints: Checkpoints,
) -> Curve:
    """Train LSAM with the workers of an engine."""
    curve = Curve([], [], [], [], {})
    data, params = load(runs, args)
    start, seconds_before = restored(checkpoints, params, args.workers)
    before = 0 if start is None else int(start.exchanges.sum())
    if start is not None:
        print(f"continues after exchange {before} of {num_exchanges(args)}")
    trained_for, bars = seconds_before, Bars(args, before)

    def monitor(progress):
        nonlocal trained_for
        trained_for = seconds_before + progress.seconds
        center = progress.pull()
        curve.time.append(trained_for)
        curve.gradients.append(progress.exchanges * args.period * ROWS[LSAM].gradients)
        curve.validation.append(np.asarray(functions.accuracy(center, data[1])))
        curve.test.append(np.asarray(functions.accuracy(center, data[2])))
        bars.show(progress, float(curve.test[-1][0]))

    def save(checkpoint):
        step = int(checkpoint.exchanges.sum())
        checkpoints.save(step, checkpoint._asdict() | {"seconds": np.float64(trained_for)})

    engine = elastic.Threads(devices) if args.engine == "threads" else elastic.Ray()
    try:
        trained = elastic.train(
            partial(make_worker, functions, runs, args, seconds),
            params,
            num_workers=args.workers,
            num_exchanges=num_exchanges(args),
            rule=elastic.Rule(beta=args.beta, period=args.period),
            engine=engine,
            monitor=monitor,
            monitor_every=EVALUATE_EVERY,
            save=save,
            save_every=args.save_every,
            resume=start,
        )
    finally:
        bars.close()
    records = trained.progress.workers
    curve.facts["steps"] = [record.exchanges * args.period for record in records]
    curve.facts["exchanges"] = trained.progress.exchanges
    # Staleness: the exchanges of other workers between two of a worker.
    curve.facts["mean_staleness"] = [record.mean_staleness for record in records]
    curve.facts["largest_staleness"] = max(record.largest_staleness for record in records)
    curve.facts["died"] = {r.index: r.error.strip() for r in records if r.status == "died"}
    curve.facts["shortfall"] = trained.shortfall
    return curve


def train_together(
    name: str,
    functions: Functions,
    runs: Runs,
    args: argparse.Namespace,
    devices: list[Any],
    seconds: float,
    steps: int,
) -> Curve:
    """Train data-parallel SAM, sharded over the devices; a step takes at least `seconds`."""
    curve, per_step = Curve([], [], [], [], {}), ROWS[name].gradients * args.workers
    data, params = load(runs, args)
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))

    def place(batch):
        return {
            key: jax.device_put(leaf, spread if key in ("x", "y") else everywhere)
            for key, leaf in batch.items()
        }

    params, state = jax.device_put((params, functions.init(params)), everywhere)
    batches = with_rates(batches_together(data[0], runs, args, args.workers), runs, steps)
    step = paced(lambda batch: functions.step(params, state, place(batch)), seconds)
    first = batches_together(data[0], runs, args, args.workers)
    step(next(with_rates(first, runs, steps)))  # compiles before the clock starts
    marks, spent = marks_of(steps, EVALUATIONS), 0.0
    for done, batch in enumerate(
        tqdm(itertools.islice(batches, steps), name, steps, disable=None), 1
    ):
        begin = time.perf_counter()
        params, state, _ = step(batch)
        spent += time.perf_counter() - begin
        if done in marks:
            curve.time.append(spent)
            curve.gradients.append(done * per_step)
            for accuracies, part in ((curve.validation, data[1]), (curve.test, data[2])):
                accuracies.append(np.asarray(functions.accuracy(jax.device_get(params), part)))
    return curve


def run_engine(
    args: argparse.Namespace, devices: list[Any], checkpoints: Checkpoints
) -> list[dict]:
    """Train LSAM in an engine, then data-parallel SAM."""
    print(
        f"workers: {args.workers}, "
        + (
            "a process each"
            if args.engine == "ray"
            else f"a thread each on {len(devices)} devices ({devices[0].device_kind})"
        )
    )
    chosen = {
        name: ((args.learning_rate or [rate])[0], (args.rho or [rho])[0])
        for name, (rate, rho) in CHOSEN.items()
    }
    runs = {name: Runs(*runs_of([args.seed], [numbers])) for name, numbers in chosen.items()}
    functions = make_functions(sam, args.workers, args.width)  # the same step for all rows
    fast = seconds_alone(functions, runs[LSAM], args)
    seconds = (fast * slowness(args)).tolist()
    speed = ROWS[LSAM].gradients * sum(1 / s for s in seconds)
    pace = [args.step_seconds] * args.workers
    if args.slow > 1:
        pace[-1] = seconds[-1]
    print(
        f"a step alone: {1e3 * fast:.1f} ms, of the last worker {1e3 * seconds[-1]:.1f} ms; all "
        f"together {speed:.0f} gradients/s"
    )
    curves = {LSAM: train_elastic(functions, runs[LSAM], args, devices, pace, checkpoints)}
    steps = num_steps(DATA_PARALLEL, args)
    curves[DATA_PARALLEL] = curve = train_together(
        DATA_PARALLEL, functions, runs[DATA_PARALLEL], args, devices, seconds[-1], steps
    )
    steps = max(1, int(steps * curves[LSAM].time[-1] / curve.time[-1]))
    curves[SAME_TIME] = train_together(
        SAME_TIME, functions, runs[SAME_TIME], args, devices, seconds[-1], steps
    )
    return [result_of(name, chosen[name], curves[name], speed) for name in CHOSEN]


def differences_of(results: list[dict]) -> list[dict]:
    """Return LSAM minus each other row in percentage points, paired by seed."""
    accuracies = {result["row"]: 100 * np.array(result["test_accuracy"]) for result in results}
    return [
        {"row": name, "difference": difference, "error": error}
        for name in accuracies
        if name != LSAM
        for paired in [accuracies[LSAM] - accuracies[name]]
        for difference, error in [mean_and_error(paired.tolist())]
    ]


def table(results: list[dict], unit: str) -> str:
    """Format one line per row."""
    width = max(len(result["row"]) for result in results)
    head = f"{'row':<{width}} {'test acc. %':>14} {'gradients':>10} {f'time, {unit}':>10}"
    head += f" {'gradients/time':>15} {'of all speeds':>14} {'lr':>6} {'rho':>5}"
    lines = [head, "-" * len(head)]
    for result in results:
        accuracy = with_error(*mean_and_error([100 * a for a in result["test_accuracy"]]))
        rate = result["gradients"] / result["time"]
        lines.append(
            f"{result['row']:<{width}} {accuracy:>14} {result['gradients']:>10}"
            f" {result['time']:>10.1f} {rate:>15.2f}"
            f" {result['share_of_speed']:>13.0%} {marked(result, 'learning_rate'):>7}"
            f" {marked(result, 'rho'):>5}"
        )
    if any(result["edges"] for result in results):
        lines.append(MARK)
    return "\n".join(lines)


def with_error(mean: float, error: float, form: str = ".2f") -> str:
    """Format a mean with its standard error, if it is finite."""
    return f"{mean:{form}}" + (f" ± {error:.2f}" if math.isfinite(error) else "")


def verdict(results: list[dict], args: argparse.Namespace) -> str:
    """Describe what the workers did, and compare LSAM with the other rows."""
    lsam = next(result for result in results if result["row"] == LSAM)
    *fast, slow = lsam["mean_staleness"]
    lines = [
        f"lsam: {lsam['exchanges']} exchanges; between two of a worker {np.mean(fast):.1f} of "
        f"others, of the last worker {slow:.1f}, at most {lsam['largest_staleness']}"
    ]
    for found in differences_of(results):
        at = {DATA_PARALLEL: ", equal gradients", SAME_TIME: ", equal time"}.get(found["row"], "")
        error = found["error"]
        sigma = f" ({found['difference'] / error:+.1f} standard errors)" if error > 0 else ""
        points = with_error(found["difference"], error, "+.2f")
        lines.append(f"lsam - {found['row']}{at}: {points} points{sigma}")
    for index, error in lsam.get("died", {}).items():
        lines.append(f"worker {index} died: {error.splitlines()[0]}")
    if lsam.get("shortfall"):
        lines.append(f"lsam did not train to its end: {lsam['shortfall']}")
    if args.engine != "simulate":
        lines.append(
            "dp-sam: on the devices of this process, each step as long as one of the slowest worker"
        )
    return "\n".join(lines)


def draw(results: list[dict], path: Path, title: str, unit: str, is_marked: bool) -> None:
    """Plot accuracy against time (left) and against gradients (right)."""
    figure = figures.make_figure(2.4)
    panels = figure.subplots(1, 2, sharey=True)
    best = max(100 * np.mean(a) for r in results for a in r["curve"]["test_accuracy"])
    panels[0].set_ylim(max(0.0, best - 20), best + 1)
    for axes, by, label in zip(
        panels,
        ("time", "gradients"),
        (f"time, {unit}", "gradients of all workers, each of one worker's batch"),
        strict=True,
    ):
        for result in results:
            curve = result["curve"]
            accuracy = 100 * np.asarray(curve["test_accuracy"])
            mean, seeds = accuracy.mean(axis=1), accuracy.shape[1]
            error = accuracy.std(axis=1, ddof=1) / np.sqrt(seeds) if seeds > 1 else 0 * mean
            marker = "o" if is_marked else None
            [line] = axes.plot(curve[by], mean, marker=marker, ms=3, label=result["row"])
            axes.fill_between(
                curve[by], mean - error, mean + error, alpha=0.2, color=line.get_color(), lw=0
            )
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
        figures.label_ends(axes)
    panels[0].set_title(claim(results))
    panels[0].set_ylabel("test accuracy of the center, %")
    figures.save(figure, path, title)


def claim(results: list[dict]) -> str:
    """State how far LSAM is ahead of data-parallel SAM in the same time, or what it reaches."""
    for found in differences_of(results):
        if found["row"] == SAME_TIME:
            points = with_error(found["difference"], found["error"], "+.2f")
            return f"LSAM - data-parallel SAM in the same time: {points} points"
    lsam = next(result for result in results if result["row"] == LSAM)
    return f"LSAM: {100 * np.mean(lsam['test_accuracy']):.2f} %"


def run(args: argparse.Namespace) -> list[dict]:
    """Train all rows; save and print the results."""
    if args.engine == "simulate":
        report = Report(args, left_out=["resume"])
        return conclude(args, report, run_simulation(args))
    devices = choose_devices(args)
    report = Report(args, left_out=["resume"])
    write_config(args.folder, "lsam_digits.py", report.settings)
    with Checkpoints(args.folder / "checkpoints", "lsam_digits.py") as checkpoints:
        return conclude(args, report, run_engine(args, devices, checkpoints))


def conclude(args: argparse.Namespace, report: Report, results: list[dict]) -> list[dict]:
    """Print, save and draw the results; return them."""
    is_simulated = args.engine == "simulate"
    unit = "g" if is_simulated else "s"
    what = f"{args.seeds} seeds" if is_simulated else f"seed {args.seed}, {args.engine}"
    subject = f"{describe(args.noise)}, {args.workers} workers, {what}"
    print(f"\n{subject}\n{table(results, unit)}")
    if is_simulated:
        print("time in g: gradients of a fast worker")
    print(f"\n{verdict(results, args)}")
    report.save(results=results, differences=differences_of(results))
    long_unit = "gradients of a fast worker" if is_simulated else "seconds"
    title = f"LSAM on digits, {subject}, the last {args.slow:g} times slower"
    draw(results, args.folder / "lsam_digits.png", title, long_unit, not is_simulated)
    report.end("lsam_digits.png")
    return results


def check_run(args: argparse.Namespace) -> None:
    """Refuse to continue a finished run, and --engine ray without Ray."""
    if args.resume is not None:
        folder = Path(args.resume)
        is_done = (newest(folder / "checkpoints") or 0) >= num_exchanges(args)
        if is_done and (folder / "results.json").exists():
            arguments.refuse(f"--resume {args.resume}: the run is finished; raise --gradients")
    if args.engine == "ray":
        try:
            elastic.Ray()  # only checks that Ray is installed
        except ImportError as error:
            arguments.refuse(f"--engine ray: {error}")


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    check_run(args)
    choose_folder(args, "lsam-digits")
    is_simulated = args.engine == "simulate"
    try:
        return run(args)
    except KeyboardInterrupt:
        after = "" if is_simulated else f"; continue with --resume {args.folder}"
        print(f"\ninterrupted{after}", file=sys.stderr)
        sys.exit(130)
    except elastic.CenterLost as error:
        sys.exit(f"lsam_digits.py: {error}\ncontinue with --resume {args.folder}")
    except SaveError as error:
        after = "" if is_simulated else f"; kept: {kept(args.folder / 'checkpoints')}"
        sys.exit(f"lsam_digits.py: error: {error}{after}")
    except (OSError, CheckpointError) as error:
        sys.exit(f"lsam_digits.py: error: {error}")


if __name__ == "__main__":
    main()
