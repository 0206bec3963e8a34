"""Inject faults into asynchronous training, and check that nothing hangs and nothing is lost.

    python examples/asynchronous/faults.py                        # every fault
    python examples/asynchronous/faults.py --engine threads       # without Ray
    python examples/asynchronous/faults.py --only NaN hang

Two workers train a small linear model around a center, with threads and with Ray. In each run one
thing goes wrong: a worker sends NaN, infinity, huge values, another shape, structure or dtype; it
raises an exception of any class; its stream ends; it hangs; its process is killed; a save finds no
space left; the process of the center, a process of Ray or the driver itself is killed. For each
fault the script checks that

- training ends within --limit seconds, and the other worker makes the exchanges that are left;
- the center at the end and all checkpoints are finite, and the center has learned;
- the record, the warning or the error names the fault;
- no process, listening socket or file is left behind.

A thread that hangs cannot be ended from outside. It counts as left behind only if it still runs
after the script has released it.

The script prints a line for each fault, and at the end how many runs hung, lost the center, or did
not name the fault. It writes results.json and faults.png to --out. Its exit code is 1 if any did.
"""

import argparse
import contextlib
import ctypes
import itertools
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments

ENGINES = ("threads", "ray")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    add("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--only", nargs="+", metavar="TEXT", help="faults with one of these texts in their names")
    add("--every", type=int, default=1, metavar="N", help="only every N-th fault")
    add("--limit", type=float, default=90.0, metavar="SECONDS", help="of each run; default: 90")
    arguments.add_out(parser, "faults")
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "every")
    arguments.check_finite(parser, args, "limit", above_zero=True)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
from tqdm import tqdm

import samx
from examples.common import figures, files
from examples.common.output import choose_folder
from examples.common.processes import folders_of_ray, is_alive
from examples.common.report import Report
from samx import elastic

EXCHANGES, PERIOD, FAULTY = 40, 2, 1
GRACE = 1.0  # seconds, `grace` of the engines
# Seconds that a worker may be silent where it hangs: a process takes longer to start than a thread.
SILENCE = {"threads": 4.0, "ray": 20.0}
CHILD = "import sys; from examples.asynchronous import faults; faults.run_child(*sys.argv[1:])"
SILENT = "TimeoutError: no exchange for "
RELEASED = "SAMX_FAULTS_RELEASED"  # in the environment while threads that hang may end
KINDS = (
    "values",
    "layout",
    "exceptions",
    "results",
    "streams",
    "hangs",
    "kills",
    "saves",
    "driver",
)


@jax.jit
def losses_of(params: Any, inputs: jax.Array) -> jax.Array:
    """Return the losses of the model; at the minimum all weights are 1 and the bias is 0."""
    return ((inputs @ params["weights"] + params["bias"] - inputs.sum(-1)) ** 2).mean()


def start() -> dict[str, jax.Array]:
    """Return the parameters at the start."""
    return {"weights": jnp.zeros(4), "bias": jnp.zeros(())}


TX = optax.chain(samx.sam(rho=0.01), optax.sgd(0.1))


@jax.jit
def move(params: Any, state: Any, inputs: jax.Array) -> tuple[Any, Any, jax.Array]:
    """Take a step of SAM."""
    value_fn = partial(losses_of, inputs=inputs)
    value, grads = jax.value_and_grad(value_fn)(params)
    updates, state = TX.update(grads, state, params, value=value, value_fn=value_fn)
    return optax.apply_updates(params, updates), state, value


def make_worker(index: int) -> elastic.Worker:
    """Return a worker without faults."""

    def step(*args):
        time.sleep(0.005)
        return move(*args)

    def batches(first):
        return (inputs_of(index, number) for number in itertools.count(first))

    return elastic.Worker(start(), TX.init, step, batches)


def inputs_of(index: int, number: int) -> jax.Array:
    """Return a batch of a worker's stream."""
    return jax.random.normal(jax.random.key(1000 * index + number), (8, 4))


class Fault(NamedTuple):
    """Something that goes wrong in a worker, or around it."""

    kind: str
    name: str
    change: Callable[[elastic.Worker], elastic.Worker]  # applied where the worker runs
    expected: str  # a pattern of the record's error or reason
    engines: tuple[str, ...] = ENGINES
    once: bool = False  # only in the worker's first life; the worker is restarted
    options: tuple[tuple[str, Any], ...] = ()  # other arguments of `train`


def in_step(number: int, do: Callable[[Any], Any]) -> Callable[[elastic.Worker], elastic.Worker]:
    """Change what a call of the step returns: call 0 is the warm-up, then come the local steps."""

    def change(worker):
        calls = itertools.count()

        def step(*args):
            result = worker.step(*args)
            return do(result) if next(calls) == number else result

        return worker._replace(step=step)

    return change


def with_params(do: Callable[[Any], Any], number: int = 5):
    """Change the parameters that a step returns."""
    return in_step(number, lambda result: (do(result[0]), *result[1:]))


def raising(error: BaseException | type[BaseException]) -> Callable[..., Any]:
    """Return a function that raises."""

    def do(*_):
        raise error

    return do


def hanging(*_: Any) -> Any:
    """Hang until the script releases its threads; a process hangs for ever."""
    while RELEASED not in os.environ:
        time.sleep(0.05)
    raise RuntimeError("released")


def iterating(do: Callable[[int], Any]) -> Callable[[elastic.Worker], elastic.Worker]:
    """Run `do` when the stream is asked for its sixth batch."""

    def change(worker):
        def batches(first):
            for number, batch in enumerate(worker.batches(first)):
                if number == 5:
                    do(number)
                yield batch

        return worker._replace(batches=batches)

    return change


def ending(after: int) -> Callable[[elastic.Worker], elastic.Worker]:
    """Let the stream end after so many batches."""
    return lambda worker: worker._replace(
        batches=lambda first: itertools.islice(worker.batches(first), after)
    )


def kill(number: int) -> Callable[..., Any]:
    """Return a function that sends a signal to its own process, and waits for its effect."""

    def do(*_):
        os.kill(os.getpid(), number)
        time.sleep(1000)

    return do


class Unprintable(Exception):
    """An exception without a text."""

    def __str__(self):
        raise BaseException("no text")


class Unpicklable(Exception):
    """An exception that no process can send."""

    def __init__(self):
        super().__init__("has a lock")
        self.lock = threading.Lock()


class Strange(BaseException):
    """An exception that `except Exception` does not catch."""


def faults() -> list[Fault]:
    """Return all faults of workers."""
    first, later = 2, 7  # calls of the step: around the first exchange, and after several
    found = []

    def add(kind, name, change, expected, **options):
        found.append(Fault(kind, name, change, expected, **options))

    def weights(do):
        return with_params(lambda params: params | {"weights": do(params["weights"])})

    refused = "ExchangeRefused: the worker would send "
    for name, value in (("NaN", np.nan), ("infinity", np.inf), ("-infinity", -np.inf)):
        change = weights(lambda w, value=value: w.at[2].set(value))
        add("values", f"{name} in one weight", change, f"{refused}values that are not finite")
    every_nan = partial(jax.tree.map, lambda w: w * jnp.nan)
    add("values", "NaN in all parameters", with_params(every_nan), f"{refused}values that are not")
    add("values", "NaN before the first exchange", with_params(every_nan, 1), f"{refused}values")
    add("values", "NaN once, then a restart", with_params(every_nan), "values that are", once=True)
    for huge in (1e8, 1e30, 3e38):  # a step from there may give NaN
        change = weights(lambda w, huge=huge: w + huge)
        add("values", f"weights of {huge:g}", change, refused)
    for name, loss in (("NaN", np.nan), ("infinity", np.inf)):
        change = in_step(5, lambda result, loss=loss: (*result[:2], loss))
        add("values", f"a loss of {name}, finite parameters", change, "no work is left")

    layout = "ExchangeRefused: the step has changed the parameters: .*"
    add("layout", "weights of another shape", weights(lambda w: w[:3]), layout + r"\[3\].*\[4\]")
    add("layout", "weights of shape [1]", weights(lambda w: w[:1]), layout + r"\[1\]")
    add("layout", "weights of shape [2, 2]", weights(lambda w: w.reshape(2, 2)), layout)
    add("layout", "weights in half precision", weights(lambda w: w.astype("float16")), layout)
    add("layout", "integer weights", weights(lambda w: w.astype(int)), layout + "int")
    add("layout", "a leaf is missing", with_params(lambda p: {"weights": p["weights"]}), layout)
    add("layout", "a leaf too many", with_params(lambda p: p | {"c": p["bias"]}), layout)
    add("layout", "parameters in a list", with_params(jax.tree.leaves), layout)
    add("layout", "no parameters", with_params(lambda p: None), layout + "no leaf")
    like = "ValueError: `params` of the Worker must be like those of the center"
    for name, params in (
        ("another shape", {"weights": jnp.zeros(5), "bias": jnp.zeros(())}),
        ("another structure of the same size", [jnp.zeros(4), jnp.zeros(())]),
        ("another dtype", {"weights": jnp.zeros(4, jnp.float16), "bias": jnp.zeros(())}),
    ):
        change = lambda worker, params=params: worker._replace(params=params)  # noqa: E731
        add("layout", f"a worker with {name}", change, like)

    for error, expected in (
        (ValueError("out of cheese"), "ValueError: out of cheese"),
        (ValueError(), "ValueError"),
        (ValueError("\n\nfar below"), "ValueError: $"),
        (SystemExit(0), "SystemExit: 0"),
        (SystemExit(), "SystemExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(), "StopIteration"),
        (StopAsyncIteration(), "StopAsyncIteration"),
        (MemoryError(), "MemoryError"),
        (BaseException("base"), "BaseException: base"),
        (ExceptionGroup("group", [ValueError()]), "ExceptionGroup: group"),
        (Strange("odd"), "Strange: odd"),
        (Unprintable(), "Unprintable"),
    ):
        add(
            "exceptions",
            f"{type(error).__name__}({str_of(error)!r})",
            in_step(later, raising(error)),
            expected,
        )
    unpicklable = in_step(later, lambda _: raising(Unpicklable())())
    add("exceptions", "one that cannot be pickled", unpicklable, "Unpicklable: has a lock")
    boom = raising(RuntimeError("boom"))
    add("exceptions", "in the warm-up", in_step(0, boom), "RuntimeError: boom")
    add("exceptions", "in the first step", in_step(1, boom), "RuntimeError: boom")
    add("exceptions", "in init", lambda w: w._replace(init=boom), "RuntimeError: boom")
    add("exceptions", "in batches", lambda w: w._replace(batches=boom), "RuntimeError: boom")
    add("exceptions", "in the stream", iterating(boom), "RuntimeError: boom")
    add("exceptions", "in make_worker", boom, "RuntimeError: boom")
    add("exceptions", "once, then a restart", in_step(later, boom), "boom", once=True)
    leave = raising(SystemExit(3))
    add("exceptions", "SystemExit in make_worker", leave, "SystemExit: 3")

    three = r"TypeError: `step` of a Worker must return \(params, opt_state, loss\), got "
    add("results", "two results", in_step(5, lambda result: result[:2]), three + "2 results")
    add("results", "no result", in_step(5, lambda result: None), three + "NoneType")
    for name, loss in (("None", None), ("text", "0.1"), ("complex", 1j)):
        change = in_step(5, lambda result, loss=loss: (*result[:2], loss))
        add("results", f"a loss that is {name}", change, "TypeError: .* a real number as its loss")
    add(
        "results", "no worker", lambda worker: None, "TypeError: `make_worker` must return a Worker"
    )

    ended = "its stream of batches has ended after "
    add("streams", "empty", ending(0), ended + "0 local steps")
    add("streams", "of one batch", ending(1), ended + "1 local steps")
    add("streams", "short", ending(7), ended + "7 local steps")
    add("streams", "None", lambda w: w._replace(batches=lambda n: None), "TypeError: 'NoneType'")

    not_ready = f"{SILENT}|no work was left before it was ready"
    add("hangs", "in make_worker", hanging, not_ready)
    add("hangs", "in init", lambda w: w._replace(init=hanging), not_ready)
    add("hangs", "in batches", lambda w: w._replace(batches=hanging), not_ready)
    add("hangs", "in the warm-up", in_step(0, hanging), not_ready)
    add("hangs", "during the first exchange", in_step(1, hanging), SILENT)
    add("hangs", "before the second exchange", in_step(first, hanging), SILENT)
    add("hangs", "in a later step", in_step(later, hanging), SILENT)
    add("hangs", "in the stream", iterating(hanging), SILENT)
    add("hangs", "once, then a restart", in_step(later, hanging), SILENT, once=True)
    # The other worker makes all exchanges, because it need not wait for this one.
    patient = (("max_staleness", None),)
    late = "TimeoutError: no end 1 s after the last exchange"
    add("hangs", "until the end", in_step(first, hanging), late, options=patient)

    only = {"engines": ("ray",)}
    gone = "its process has ended"
    add("kills", "SIGKILL in make_worker", kill(signal.SIGKILL), gone, **only)
    add(
        "kills", "SIGKILL before the first exchange", in_step(1, kill(signal.SIGKILL)), gone, **only
    )
    add("kills", "SIGKILL later", in_step(later, kill(signal.SIGKILL)), gone, **only)
    change = in_step(later, kill(signal.SIGKILL))
    add("kills", "SIGKILL once, then a restart", change, gone, once=True, **only)
    add("kills", "SIGTERM", in_step(later, kill(signal.SIGTERM)), "", **only)
    add("kills", "SIGSTOP", in_step(later, kill(signal.SIGSTOP)), SILENT, **only)
    add("kills", "exit without an exception", in_step(later, lambda _: os._exit(0)), gone, **only)
    add("kills", "a crash", in_step(later, lambda _: ctypes.string_at(0)), gone, **only)
    return found


def str_of(error: BaseException) -> str:
    """Return the text of an exception, if it has one."""
    try:
        return str(error)
    except BaseException:
        return "?"


def maker_of(fault: Fault, marker: Path) -> Callable[[int], elastic.Worker]:
    """Return a `make_worker` whose worker `FAULTY` has the fault."""

    def make(index: int) -> elastic.Worker:
        worker = make_worker(index)
        if index != FAULTY or (fault.once and marker.exists()):
            return worker
        marker.touch()
        return fault.change(worker)

    return make


def engine_of(name: str) -> Any:
    return elastic.Threads(grace=GRACE) if name == "threads" else elastic.Ray(grace=GRACE)


def train(make: Callable[[int], elastic.Worker], engine: str, **options: Any) -> elastic.Trained:
    """Train; workers take turns, so that none makes all exchanges before another one fails."""
    options = {"max_staleness": 3, **options}
    return elastic.train(
        make,
        start(),
        num_workers=2,
        num_exchanges=EXCHANGES,
        rule=elastic.Rule(period=PERIOD),
        engine=engine_of(engine),
        **options,
    )


def problems_of(trained: elastic.Trained, saved: list[elastic.Checkpoint]) -> list[str]:
    """Return what is wrong with a center and its checkpoints."""
    found = []
    if trained.progress.exchanges != EXCHANGES:
        found.append(f"{trained.progress.exchanges} exchanges")
    for params in (trained.params, *(checkpoint.params for checkpoint in saved)):
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            found.append("a center that is not finite")
    test = inputs_of(2, 0)
    if not losses_of(trained.params, test) < 0.5 * losses_of(start(), test):
        found.append("a center that has not learned")
    return found


def run_fault(fault: Fault, engine: str, folder: Path) -> list[str]:
    """Train with a fault; return what went wrong beside it."""
    saved: list[elastic.Checkpoint] = []
    make = maker_of(fault, folder / f"{secrets.token_hex(8)}.started")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # `train` reports the fault: see the record
        options = dict(fault.options) | {"max_restarts": int(fault.once)}
        if SILENT in fault.expected:
            options |= {"start_timeout": SILENCE[engine], "worker_timeout": SILENCE[engine]}
        trained = train(make, engine, save=saved.append, save_every=0.2, **options)
    record, found = trained.progress.workers[FAULTY], problems_of(trained, saved)
    said = record.error or record.reason
    first_line = said.splitlines()[0]
    if not re.search(fault.expected, first_line):
        found.append(f"named as {first_line!r}")
    is_refused = "ExchangeRefused" in first_line
    if record.refused != is_refused or record.restarts != fault.once:
        found.append(f"counted as {record.refused} refused, {record.restarts} restarts")
    if fault.once and record.status != "done":
        found.append(f"status {record.status!r} after a restart")
    return found


def run_save(errors: int, engine: str, _: Path) -> list[str]:
    """Train while the first saves, or all, find no space left on the device."""
    saved, counts = [], itertools.count()

    def save(checkpoint):
        if next(counts) < errors:
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"no space")
        saved.append(checkpoint)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trained = train(make_worker, engine, save=save, save_every=0.05)
    found = problems_of(trained, saved)
    texts = [str(warning.message) for warning in warned]
    if not any("`save` has failed" in text and "No space left" in text for text in texts):
        found.append(f"warnings {texts}")
    if not saved and errors < 100:
        found.append("nothing saved")
    return found


def run_driver(number: int, target: str, engine: str, folder: Path) -> list[str]:
    """Kill the driver, or a process that it needs, and resume from what is kept."""
    folder = folder / secrets.token_hex(8)
    folder.mkdir()
    command = [sys.executable, "-c", CHILD, engine, str(number), target, str(folder)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    family: dict[int, psutil.Process] = {}
    folders: set[str] = set()
    while child.poll() is None:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(child.pid).children(recursive=True):
                family[process.pid] = process
                folders |= folders_of_ray(process)
        time.sleep(0.1)
    out, err = child.communicate()
    found = []
    if number == signal.SIGKILL and target == "driver":
        expected, code = "", -signal.SIGKILL
    elif target == "driver":
        expected = "KeyboardInterrupt" if number == signal.SIGINT else ""
        code = -signal.SIGINT if number == signal.SIGINT else 128 + number
    else:
        expected, code = "CenterLost", 3
    if child.returncode != code or expected not in err:
        found.append(f"exit code {child.returncode}, wanted {code}: {(out + err)[-300:]!r}")
    wait_for(lambda: not any(map(is_alive, family.values())), 30)
    found += [f"process {pid} is left" for pid, process in family.items() if is_alive(process)]
    wait_for(lambda: not any(map(os.path.exists, folders)), 10)
    found += [f"folder {folder} is left" for folder in folders if os.path.exists(folder)]
    try:
        with np.load(folder / "saved.npz") as kept:
            params = {name: kept[name] for name in start()}
            checkpoint = elastic.Checkpoint(params, kept["exchanges"])
        found += problems_of(train(make_worker, "threads", resume=checkpoint), [checkpoint])
    except Exception as error:
        found.append(f"no resumption: {type(error).__name__}: {error}")
    return found


def run_child(engine: str, number: str, target: str, out: str) -> None:
    """Train, save often, and send a signal to a target after some exchanges."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    folder = Path(out)
    is_sent = False

    def save(checkpoint):
        unfinished = folder / "unfinished.npz"
        np.savez(unfinished, exchanges=checkpoint.exchanges, **checkpoint.params)
        unfinished.replace(folder / "saved.npz")

    def monitor(progress):
        nonlocal is_sent
        if progress.exchanges >= EXCHANGES // 4 and (folder / "saved.npz").exists() and not is_sent:
            is_sent = True
            os.kill(pid_of(target), int(number))

    def slowly(index):
        worker = make_worker(index)
        return worker._replace(step=lambda *args: (time.sleep(0.05), worker.step(*args))[1])

    options = {"save": save, "save_every": 0.1, "monitor": monitor, "monitor_every": 0.1}
    try:
        train(slowly, engine, **options)
    except elastic.CenterLost as error:
        save(error.checkpoint)
        print(f"CenterLost: {error}", file=sys.stderr)
        sys.exit(3)


def pid_of(target: str) -> int:
    """Return the process of a target: the driver, or one that the driver has started."""
    if target == "driver":
        return os.getpid()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if target in " ".join(process.cmdline()):
                return process.pid
    raise LookupError(f"no process of {target}")


def wait_for(is_true: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is true; return whether it has become so."""
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_true()


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """Run one cluster of Ray for all faults of workers, on the loopback interface alone."""
    os.environ |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed",
    }
    import ray

    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError instead of hanging; if this does not help, end the script."""

    def give_up(*_):
        signal.signal(signal.SIGALRM, lambda *_: os._exit(2))
        signal.alarm(30)
        raise TimeoutError(f"not ended after {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


class Case(NamedTuple):
    """A run: a fault in an engine."""

    kind: str
    name: str
    engine: str
    run: Callable[[Path], list[str]]


def cases_of(engines: list[str]) -> list[Case]:
    """Return all runs, those with Ray at the end."""
    found = []
    for engine in engines:
        for fault in faults():
            if engine in fault.engines:
                run = partial(run_fault, fault, engine)
                found.append(Case(fault.kind, fault.name, engine, run))
        for name, errors in (("no space left, at first", 2), ("no space left, always", 10**9)):
            found.append(Case("saves", name, engine, partial(run_save, errors, engine)))
        signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        targets = [(number, "driver") for number in signals]
        if engine == "ray":
            targets += [(signal.SIGKILL, name) for name in ("ray::Shard", *RAY_PROCESSES)]
        for number, target in targets:
            name = f"{signal.Signals(number).name} to {target}"
            run = partial(run_driver, number, target, engine)
            found.append(Case("driver", name, engine, run))
    return found


RAY_PROCESSES = ("_ray_cluster", "gcs_server", "raylet/raylet")


def measure(case: Case, folder: Path, limit: float) -> dict[str, Any]:
    """Run a case, and look for what it has left behind."""
    begin, before = time.perf_counter(), left_behind()
    try:
        with bounded(limit):
            found = case.run(folder)
    except Exception as error:
        found = [f"{type(error).__name__}: {error}".splitlines()[0]]
    seconds = time.perf_counter() - begin
    os.environ[RELEASED] = "1"
    wait_for(lambda: left_behind() <= before, 20)
    found += [f"{what} is left" for what in left_behind() - before]
    del os.environ[RELEASED]
    return {
        **{"kind": case.kind, "name": case.name, "engine": case.engine},
        "seconds": seconds,
        "problems": found,
    }


def left_behind() -> set[str]:
    """Return threads of workers, processes of workers and centers, and listening sockets."""
    found = {f"thread {t.name}" for t in threading.enumerate() if t.name.startswith("worker ")}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline())
            if re.search(r"ray::(Worker|Shard)Actor|_ray_cluster|faults\.run_child", name):
                found.add(f"process {process.pid} {name[:40]}")
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN and not name.startswith("ray::IDLE"):
                    found.add(f"socket {connection.laddr} of {name[:40]}")
    return found


def line_of(row: dict[str, Any]) -> str:
    verdict = "failed: " + "; ".join(row["problems"]) if row["problems"] else "ok"
    return f"{row['engine']:8} {row['kind']:10} {row['name']:42} {row['seconds']:5.1f} s  {verdict}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot how long each run took, by kind of fault and engine."""
    kinds = [
        (kind, engine)
        for kind in KINDS
        for engine in ENGINES
        if any((row["kind"], row["engine"]) == (kind, engine) for row in rows)
    ]
    figure = figures.make_figure(1.5, [figures.height_of(len(kinds))])
    axes = figure.subplots()
    for row in rows:
        place, is_bad = kinds.index((row["kind"], row["engine"])), bool(row["problems"])
        color = figures.RED if is_bad else figures.BLUE
        axes.plot(row["seconds"], place, "x" if is_bad else "o", color=color, ms=5, alpha=0.7)
    axes.set_yticks(range(len(kinds)), [f"{kind}, {engine}" for kind, engine in kinds])
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set(xlabel="seconds until training has ended", xlim=(0, None))
    axes.grid(alpha=0.3, axis="x")
    failed = sum(bool(row["problems"]) for row in rows)
    slowest = max(row["seconds"] for row in rows)
    title = f"{len(rows)} faults in asynchronous training: {failed or 'none'} failed"
    title += " (crosses)" * bool(failed)
    figures.save(figure, path, f"{title}, the slowest run took {slowest:.0f} s")


def choose_cases(args: argparse.Namespace) -> list[Case]:
    """Return the runs that --engine, --only and --every leave."""
    cases = cases_of(args.engine)
    if args.only:
        cases = [c for c in cases if any(text in f"{c.kind} {c.name}" for text in args.only)]
    if not cases:
        arguments.refuse(f"--only: no fault has one of {args.only} in its name")
    return cases[:: args.every]


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    cases = choose_cases(args)
    choose_folder(args, "faults")
    report, rows = Report(args), []
    with contextlib.ExitStack() as stack, tqdm(cases, unit=" faults", disable=None) as bar:
        for case in bar:
            bar.set_description(f"{case.engine}, {case.kind}: {case.name}")
            if case.engine == "ray" and case.kind != "driver" and "ray" not in sys.modules:
                stack.enter_context(cluster())
            rows.append(measure(case, args.folder, args.limit))
            bar.write(line_of(rows[-1]))
    failed = sum(bool(row["problems"]) for row in rows)
    slowest = max(row["seconds"] for row in rows)
    print(f"{len(rows)} faults, {failed} failed; the slowest run took {slowest:.1f} s")
    report.save(rows=rows)
    plot(rows, args.folder / "faults.png")
    report.end("faults.png")
    if failed:
        sys.exit(f"faults.py: {failed} of {len(rows)} faults failed")
    return rows


if __name__ == "__main__":
    main()
