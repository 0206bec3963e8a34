"""The loop of a training run: steps, evaluations, metrics, checkpoints.

A run may be killed at any time. Continued from its newest checkpoint, it ends with the same bits as
an uninterrupted run.
"""

import argparse
import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import samx
from examples.common import arguments, figures, monitoring
from examples.common.checkpoints import CheckpointError, Checkpoints, fingerprint, kept
from examples.common.files import SaveError
from examples.common.output import choose_folder
from examples.common.registry import VARIANTS, Setting
from examples.common.resume import write_config
from examples.train.metrics import Log

State = TypeVar("State")
Data = TypeVar("Data")

IN_FLIGHT = 2  # steps that may be dispatched before the first one has ended


def train(
    folder: Path,
    of: str,
    state: State,
    step_fn: Callable[[State, Any], tuple[State, dict[str, jax.Array]]],
    batches: grain.DatasetIterator,
    place: Callable[[Any], Any],
    evaluate: Callable[[State, int, float, float], tuple[dict[str, Any], str]],
    finish: Callable[[State, Log], dict[str, Any]],
    *,
    steps: int,
    evaluate_every: int,
    checkpoint_every: int,
    schedule: optax.Schedule,
    unit: str,
    units: int,
) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in the run's folder or from `state`.

    Args:
        folder: Folder of the run.
        of: Name of the script.
        state: The state at step 0, with the shardings of the run.
        step_fn: `(state, batch) -> (state, readings)`.
        batches: Iterator over the data, whose position is saved with the state.
        place: Puts a batch on the devices.
        evaluate: `(state, step, loss, rate) -> (values, line)`, called after each epoch and at the
            end, with the epoch's mean training loss and its units per second. The values go to the
            metrics, the line to the terminal.
        finish: `(state, log) -> results`, called at the end, also if the last checkpoint could not
            be written.
        steps: All steps of the run.
        evaluate_every: Steps in an epoch.
        checkpoint_every: Steps between two checkpoints.
        schedule: The learning rate, for the metrics.
        unit: What is counted, such as "images".
        units: How many of them a step takes.

    Returns:
        What `finish` returns.

    Raises:
        CheckpointError: If the newest checkpoint or the metrics cannot be used.
        SaveError: If the last checkpoint could not be written.
    """
    with Checkpoints(folder / "checkpoints", of) as checkpoints:
        state, start_step = checkpoints.restore(state, batches)
        if start_step:
            print(f"resumed at step {start_step} of {steps}")
        log = Log(folder, start_step)
        running: deque[tuple[int, dict]] = deque()
        shown: dict[str, str] = {}  # of what was measured last

        def finish_one():
            step, readings = running.popleft()
            values = {name: float(x) for name, x in jax.device_get(readings).items()}
            if not values.get("is_sharp", True):
                del values["sharp_loss"]  # this step did not measure it
            if not values.pop("is_measured", True):
                values = {name: x for name, x in values.items() if name not in monitoring.NAMES}
            if "top_eigenvalue" in values:
                shown["top eigenvalue"] = f"{values['top_eigenvalue']:.3g}"
            rate = float(np.asarray(schedule(step - 1)))
            log.write("step", step, **values, learning_rate=rate)
            bar.update(units)
            bar.set_postfix({"loss": f"{values['loss']:.3f}", **shown}, refresh=False)

        with tqdm(
            total=steps * units,
            initial=start_step * units,
            unit=f" {unit}",
            unit_scale=True,
            smoothing=0.1,
            disable=None,
        ) as bar:
            epoch_start, epoch_first = time.perf_counter(), start_step
            for step in range(start_step + 1, steps + 1):
                state, readings = step_fn(state, place(next(batches)))
                running.append((step, readings))
                is_epoch = step % evaluate_every == 0 or step == steps
                is_saved = step % checkpoint_every == 0 or step == steps
                while len(running) > (0 if is_epoch or is_saved else IN_FLIGHT):
                    finish_one()
                if is_epoch:
                    rate = (step - epoch_first) * units / (time.perf_counter() - epoch_start)
                    since = step % evaluate_every or evaluate_every
                    losses = [row["loss"] for row in log.of("step")[-since:]]
                    values, line = evaluate(state, step, float(np.mean(losses)), rate)
                    log.write("epoch", step, **values)
                    bar.write("  ".join([line, *map(" ".join, shown.items())]))
                    epoch_start, epoch_first = time.perf_counter(), step
                if is_saved:
                    try:
                        log.flush()
                    except SaveError as error:  # a checkpoint must have the rows before it
                        checkpoints.fail(step, error)
                    else:
                        checkpoints.save(step, state, batches)
        return finish(state, log)


def make_schedule(args: argparse.Namespace, steps: int) -> optax.Schedule:
    """Return a schedule over `steps` steps: linear warm-up from 0, then --schedule."""
    warmup = round(args.warmup * steps)
    rate, rest = args.learning_rate, steps - warmup
    after = {
        "cosine": optax.cosine_decay_schedule(rate, max(rest, 1)),
        "step": optax.piecewise_constant_schedule(rate, {rest // 2: 0.1, 3 * rest // 4: 0.1}),
        "constant": optax.constant_schedule(rate),
    }[args.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def make_optimizer(
    args: argparse.Namespace, base: optax.GradientTransformation, setting: Setting
) -> optax.GradientTransformation:
    """Return the variant with its base, wrapped for --accumulate, float16 and --monitor."""
    variant = VARIANTS[args.variant]
    try:
        tx = variant.make(args.rho, base, setting)
    except ValueError as error:  # a base without momentum, a table that is too large
        arguments.refuse(str(error))
    if args.accumulate > 1:
        tx = samx.accumulate(
            tx, args.accumulate, aux_like=None if variant.keeps_aux else setting.aux
        )
    if args.precision == "float16":
        tx = samx.scale_loss(tx)
    return monitoring.monitored(tx, args.monitor, args.accumulate)


def begin(
    args: argparse.Namespace,
    script: str,
    name: str,
    load: Callable[[], Data],
    *,
    data_name: str,
    not_settings: Sequence[str],
) -> Data:
    """Load the data, choose the folder of the run, and write config.json if the run is new.

    A run is continued with the data with which it began, or the script ends.

    Args:
        args: The arguments; a resumed run has `data_sha256` from config.json.
        script: Name of the script.
        name: First part of the name of a chosen folder.
        load: Returns the data, a pytree; its NumPy arrays are what a run must find again.
        data_name: What a message calls the data.
        not_settings: Arguments that config.json does not hold.
    """
    try:
        data = load()
        arrays = [leaf for leaf in jax.tree.leaves(data) if isinstance(leaf, np.ndarray)]
        sha256 = fingerprint(arrays)
        if args.resume is not None and sha256 != args.data_sha256:
            raise ValueError(f"{data_name} is not the data of the run in {args.resume}")
        left_out = (*not_settings, "data_sha256")
        settings = {key: value for key, value in vars(args).items() if key not in left_out}
        choose_folder(args, name)
        if args.resume is None:
            write_config(args.folder, script, settings, data_sha256=sha256)
    except (OSError, ValueError) as error:
        sys.exit(f"{script}: error: {error}")
    return data


def choose_devices(number: int | None) -> list[Any]:
    """Return `number` devices, or all; if there are too few, simulated ones of the CPU."""
    if number is not None:
        with contextlib.suppress(RuntimeError):  # a running backend cannot be changed
            jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices()
    if number is not None and len(devices) < number:
        devices = jax.devices("cpu")
    devices = devices[:number]
    if number is not None and len(devices) < number:
        arguments.refuse(f"--devices must be at most {len(devices)} here, got {number}")
    return devices


def check_batch(args: argparse.Namespace, devices: list[Any]) -> None:
    """Refuse a batch that the devices and their microbatches cannot share equally."""
    shares = len(devices) * args.accumulate
    if args.batch % shares:
        arguments.refuse(
            f"--batch must be a multiple of {shares} ({len(devices)} devices, {args.accumulate} "
            f"microbatches each), got {args.batch}"
        )


def counts_of(state: Any, log: Log, unit: str) -> dict[str, Any]:
    """Return what a run counted: steps, gradients, skipped steps, and units per second.

    With --monitor also what was measured last.
    """
    spent = optax.tree.get(state.opt_state, "gradients_spent")
    skipped = optax.tree.get(state.opt_state, "skipped_steps")
    rates = [row[f"{unit}_per_second"] for row in log.of("epoch")]
    counts = {
        "steps": int(state.step),
        "gradients": float(state.step if spent is None else spent),
        "skipped_steps": 0 if skipped is None else int(skipped),
        f"{unit}_per_second": float(np.median(rates)),
    }
    if rows := measured_rows(log):
        counts["monitored"] = {name: rows[-1][name] for name in ("step", *monitoring.NAMES)}
    return counts


def measured_rows(log: Log) -> list[dict]:
    """Return the lines of the steps that --monitor measured."""
    return [row for row in log.of("step") if "top_eigenvalue" in row]


def describe_monitored(results: dict[str, Any]) -> str:
    """Return a line about what was measured last; nothing if nothing was."""
    if "monitored" not in results:
        return ""
    last = results["monitored"]
    return (
        f"step {last['step']}: top eigenvalue {last['top_eigenvalue']:.4g} (error at most "
        f"{last['top_eigenvalue_error']:.1g}), the loss rises by {last['rise']:.4f} at radius "
        f"{monitoring.RADIUS}\n"
    )


def make_panels(log: Log) -> tuple[Figure, list[Axes]]:
    """Return a figure with two empty panels; if --monitor measured, the third has its curve."""
    rows = measured_rows(log)
    count = 3 if rows else 2
    figure = figures.make_figure(count)
    panels = [*figure.subplots(1, count)]
    if rows:
        draw_top_eigenvalue(panels[-1], rows)
    return figure, panels


def draw_top_eigenvalue(axes: Axes, rows: list[dict]) -> None:
    """Plot the top eigenvalue over the steps, and its error as a band."""
    steps, values, errors = np.transpose(
        [[row["step"], row["top_eigenvalue"], row["top_eigenvalue_error"]] for row in rows]
    )
    axes.plot(steps, values, "o-", markersize=3)
    title = f"top eigenvalue of the Hessian: {values[-1]:.3g} in step {steps[-1]:.0f}"
    axes.set(xlabel="step", ylabel="top eigenvalue ± error", title=title)
    axes.set_yscale(figures.scale_of(values))
    limits = axes.get_ylim()
    axes.fill_between(steps, values - errors, values + errors, alpha=0.2, linewidth=0)
    axes.set_ylim(limits)


def draw_losses(axes: Any, log: Log) -> None:
    """Plot the losses of all steps."""
    for name in ("loss", "sharp_loss"):
        points = [(row["step"], row[name]) for row in log.of("step") if name in row]
        if points:
            style = {"label": name.replace("_", " "), "linewidth": 0.8}
            axes.plot(*zip(*points, strict=True), marker="." if len(points) == 1 else None, **style)


@contextlib.contextmanager
def ends_in_one_line(script: str, folder: Path) -> Iterator[None]:
    """End the script with one line if the run cannot go on, or if it is interrupted."""
    try:
        yield
    except SaveError as error:
        sys.exit(f"{script}: error: {error}; kept: {kept(folder / 'checkpoints')}")
    except (OSError, CheckpointError) as error:
        sys.exit(f"{script}: error: {error}")
    except KeyboardInterrupt:
        print(f"\ninterrupted; continue with --resume {folder}", file=sys.stderr)
        sys.exit(130)
