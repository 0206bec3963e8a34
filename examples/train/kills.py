"""Kill training scripts at random moments, resume them, and see whether anything is lost.

    python examples/train/kills.py
    python examples/train/kills.py --targets cifar async --kills 20
    python examples/train/kills.py --train-async FOLDER

Every target is trained twice: undisturbed, and with --kills SIGKILLs. After each kill the run is
resumed. Kills come at three kinds of moments: "start", until the first checkpoint would be there;
"training", up to a second after a new checkpoint; "saving", while a checkpoint is being written.
The moments are random, from --seed. The targets, all small and on the CPU:

- cifar: cifar.py on digits. The final state must be the same to the last bit, and metrics.jsonl
  must have the same rows.
- threads, ray: lsam_digits.py. All exchanges must be made, and the accuracy may differ by noise
  only, because such runs are not reproducible. Nothing of Ray may be left: no process, no folder.
- async: AsyncSAM on two simulated devices. Parameters and losses must be the same to the last bit.
  --train-async is this training alone; it continues the run in FOLDER.

Every resumed run must start at the newest complete checkpoint. The script prints a table and writes
results.json and the output of all runs to --out. If something is lost, the exit code is 1. It takes
about eight minutes on two CPU cores.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from examples.common import arguments

NAMES = ("cifar", "async", "threads", "ray")  # of `TARGETS`


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    add("--targets", nargs="+", choices=NAMES, default=[*NAMES])
    add("--kills", type=int, default=5, help="of each target; default: 5")
    add("--seed", type=int, default=0, help="of the moments")
    add("--train-async", metavar="FOLDER", help="only train, start or continue in this folder")
    arguments.add_out(parser, "kills")
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "kills", high=1000)
    arguments.check_range(parser, args, "seed", low=0)
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
from examples.common import files, output
from examples.common.checkpoints import CheckpointError, Checkpoints, fingerprint, newest
from examples.common.digits_task import graph_of, initialize, split
from examples.common.files import SaveError
from examples.common.processes import folders_of_ray
from examples.common.report import Report

KINDS = ("saving", "training", "start")
PATIENCE = 600  # seconds for a run
RAY_PATIENCE = 60  # seconds until nothing of Ray is left
NOISE = 0.1  # accuracies of two runs of lsam_digits.py that differ less are equal
SAVED_EVERY, STEPS_PER_KILL = 5, 50  # of AsyncSAM
STEP_SECONDS = 0.02  # of AsyncSAM, so that there is time to kill
EXAMPLES = Path(__file__).parents[1]


class Target(NamedTuple):
    """A training that is killed."""

    command: Callable[[int], str]  # number of kills -> script and arguments
    compare: Callable[[Path, Path], tuple[str, list[str]]]  # undisturbed, killed -> text, losses


class Run(NamedTuple):
    """What a process did before it ended or was killed."""

    code: int
    seconds: float
    seconds_to_save: float  # until its first checkpoint
    output: str


def compare_cifar(undisturbed: Path, killed: Path) -> tuple[str, list[str]]:
    """Compare states to the last bit, and the rows of metrics.jsonl."""
    one, other = (files.read_json(folder / "results.json") for folder in (undisturbed, killed))
    lost = [] if one["state_sha256"] == other["state_sha256"] else ["the final states differ"]
    rows, others = (
        [
            {name: value for name, value in json.loads(line).items() if name != "images_per_second"}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (undisturbed, killed)
    )
    if rows != others:
        lost.append("metrics.jsonl differs")
    return f"sha256 {other['state_sha256'][:8]}, {len(others)} equal rows", lost


def compare_async(undisturbed: Path, killed: Path) -> tuple[str, list[str]]:
    """Compare parameters and losses to the last bit."""
    one, other = (files.read_json(folder / "results.json") for folder in (undisturbed, killed))
    lost = [f"{name} differ" for name in ("params_sha256", "losses") if one[name] != other[name]]
    return f"sha256 {other['params_sha256'][:8]}, {len(other['losses'])} equal losses", lost


def compare_lsam(undisturbed: Path, killed: Path) -> tuple[str, list[str]]:
    """Compare the number of exchanges, and the accuracies within noise."""
    rows = []
    for folder in (undisturbed, killed):
        results = files.read_json(folder / "results.json")["results"]
        rows.append(next(row for row in results if row["row"] == "lsam"))
    (one, other), lost = rows, []
    if one["exchanges"] != other["exchanges"]:
        lost.append(f"{other['exchanges']} of {one['exchanges']} exchanges were made")
    accuracies = one["test_accuracy"][0], other["test_accuracy"][0]
    if abs(accuracies[0] - accuracies[1]) > NOISE:
        lost.append(f"the accuracies {accuracies[0]:.3f} and {accuracies[1]:.3f} differ")
    text = f"{other['exchanges']} exchanges, accuracy {accuracies[1]:.2f} ({accuracies[0]:.2f})"
    return text, lost


def lsam(engine: str) -> Target:
    """Return the training of lsam_digits.py in an engine."""
    arguments = (
        f"claims/lsam_digits.py --engine {engine} --workers 2 --slow 2 --period 2 --batch 50 "
        "--width 16 --learning-rate 0.1 --rho 0.1 --step-seconds 0.01 --save-every 0.2 --gradients "
    )
    return Target(lambda kills: arguments + str(800 + 400 * kills), compare_lsam)


TARGETS = {
    "cifar": Target(
        lambda kills: (
            "train/cifar.py --digits --images 100 --model vit --width 8 --depth 1 --batch 8 "
            "--dropout 0.1 --label-noise 0.2 --imbalance 10 --variant looksam --base momentum "
            f"--devices 2 --checkpoint-every 3 --epochs {4 * kills}"
        ),
        compare_cifar,
    ),
    "async": Target(lambda kills: f"train/kills.py --kills {kills} --train-async", compare_async),
    "threads": lsam("threads"),
    "ray": lsam("ray"),
}


class Process:
    """A process that trains in `folder`: it starts, or continues what is there.

    A target of its own can say how it is continued: --train-async takes the folder itself.
    """

    def __init__(self, command: str, folder: Path, environment: dict[str, str]):
        script, *words = command.split()
        if words[-1] != "--train-async":
            words.append("--resume" if (folder / "config.json").exists() else "--out")
        self.checkpoints, self.log = folder / "checkpoints", folder.with_suffix(".log")
        self.before = newest(self.checkpoints)
        self._begin, self._size = time.monotonic(), 0
        if self.log.exists():
            self._size = self.log.stat().st_size
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(EXAMPLES / script), *words, str(folder)],
                cwd=folder.parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must reach this script only
            )

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def wait_for(self, happened: Callable[[], Any]) -> bool:
        """Wait until something has happened; False if the process ended before."""
        while not happened():
            if self.process.poll() is not None:
                return False
            if self.seconds > PATIENCE:
                self.end()
                sys.exit(f"kills.py: error: {self.log}: no end after {PATIENCE} s")
            time.sleep(0.004)  # a checkpoint takes longer
        return True

    def is_saving(self) -> bool:
        """Tell whether a checkpoint is being written."""
        return any(self.checkpoints.glob("*.orbax-checkpoint-tmp*"))

    def has_saved(self) -> bool:
        """Tell whether this process has written a checkpoint."""
        return newest(self.checkpoints) != self.before

    def end(self, number: int = signal.SIGKILL) -> tuple[int, str]:
        """Send a signal to the process if it runs; return its exit code and what it printed."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait()
        with self.log.open("rb") as log:
            log.seek(self._size)
            return code, log.read().decode(errors="replace")


class Killed(NamedTuple):
    """A kill."""

    kind: str
    seconds: float  # after the start of the process
    step: int  # of the newest complete checkpoint
    is_unfinished: bool  # whether a checkpoint was being written


def kill(process: Process, kind: str, first_save: float, rng: np.random.Generator) -> Killed | None:
    """Kill a process at a moment of a kind; return `None` if it had ended."""
    moment = rng.random()
    if kind == "start":
        process.wait_for(lambda: process.seconds > moment * first_save or process.has_saved())
    elif kind == "training":
        if process.wait_for(process.has_saved):
            now = process.seconds
            process.wait_for(lambda: process.seconds > now + moment / 2)
    elif process.wait_for(process.has_saved) and process.wait_for(process.is_saving):
        time.sleep(0.01 * moment)
    seconds = process.seconds
    code, _ = process.end()
    if code != -signal.SIGKILL:
        return None
    step = newest(process.checkpoints) or 0
    return Killed(kind, seconds, step, process.is_saving())


def resumed_at(text: str) -> int:
    """Return the step at which a run continued, as it says."""
    found = re.search(r"(?:resumed at step|continues after exchange) (\d+)", text)
    return int(found[1]) if found else 0


def measure(name: str, args: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Train a target undisturbed, then with kills; return what happened and what was lost."""
    target, rng = TARGETS[name], np.random.default_rng([args.seed, *name.encode()])
    command = target.command(args.kills)
    undisturbed, killed = args.folder / f"{name}-undisturbed", args.folder / f"{name}-killed"
    kinds = rng.permutation([KINDS[index % len(KINDS)] for index in range(args.kills)])
    begin, lost = time.monotonic(), []
    with surroundings() as (environment, left_behind):
        bar.set_description(f"{name}, undisturbed")
        first_save = run_to_the_end(Process(command, undisturbed, environment))
        bar.update()
        kills: list[Killed] = []
        for kind in kinds:
            bar.set_description(f"{name}, killed")
            process = Process(command, killed, environment)
            done = kill(process, kind, first_save, rng)
            said = process.end()[1]
            lost += lost_by(process, said, is_whole=False)
            bar.update()
            if done is None:
                lost.append(f"a run ended before it was killed: see {process.log}")
                break
            kills.append(done)
            lost += left_behind()
        process = Process(command, killed, environment)
        run_to_the_end(process)
        lost += lost_by(process, process.end()[1], is_whole=True)
        bar.update()
        lost += left_behind()
    text, differences = target.compare(undisturbed, killed)
    return {
        "target": name,
        "kills": [kill._asdict() for kill in kills],
        "seconds": time.monotonic() - begin,
        "result": text,
        "lost": lost + differences,
    }


def run_to_the_end(process: Process) -> float:
    """Wait for the end; return the seconds to the first checkpoint."""
    process.wait_for(process.has_saved)
    first_save = process.seconds
    process.wait_for(lambda: False)
    code, text = process.end()
    if code:
        last = text.strip().splitlines()[-1:]
        sys.exit(f"kills.py: error: {process.log}: exit code {code}: {''.join(last)}")
    return first_save


def lost_by(process: Process, said: str, is_whole: bool) -> list[str]:
    """Return what is wrong with the start of a resumed process, as far as it came."""
    at, before = resumed_at(said), process.before or 0
    if at == before or (not at and not is_whole and not process.has_saved()):
        return []
    return [f"a run continued at step {at} instead of {before}"]


@contextlib.contextmanager
def surroundings() -> Iterator[tuple[dict[str, str], Callable[[], list[str]]]]:
    """Yield an environment for processes, and a function that returns what is left of them."""
    mark, folders = uuid.uuid4().hex, set[str]()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    environment["SAMX_KILLS"] = mark

    def left() -> list[str]:
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SAMX_KILLS") == mark:
                    folders.update(folders_of_ray(process))
                    processes.append(f"process {process.pid} is left: {process.name()}")
        return processes + [
            f"folder {folder} is left" for folder in folders if Path(folder).exists()
        ]

    def left_behind() -> list[str]:
        deadline = time.monotonic() + RAY_PATIENCE
        while (found := left()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    with tempfile.TemporaryDirectory() as programs:
        environment["JAX_COMPILATION_CACHE_DIR"] = programs
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        yield environment, left_behind


def train_async(folder: Path, steps: int) -> None:
    """Train a small network by AsyncSAM on two devices; continue a run that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    output.lock(folder)
    jax.config.update("jax_num_cpu_devices", 2)
    one, other = jax.devices("cpu")[:2]
    images = jax.tree.map(lambda leaf: np.asarray(leaf[0]), split(jnp.arange(1), 0.0)[0])
    params = jax.tree.map(lambda leaf: leaf[0], initialize(jnp.arange(1), 16))
    tx = optax.chain(samx.async_sam(0.05), optax.sgd(0.1, momentum=0.9))
    loss = loss_of_network()

    def descend(params, opt_state, batch, ascent_grad):
        def value_fn(params):
            return loss(params, batch)

        value = value_fn(params)
        updates, opt_state = tx.update(ascent_grad, opt_state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), opt_state, value

    def batches(step):
        while True:
            rows = np.random.default_rng([1, step]).choice(len(images["y"]), 50, replace=False)
            batch = {name: images[name][rows] for name in ("x", "y")}
            yield batch, {name: leaf[:25] for name, leaf in batch.items()}
            step += 1

    kept = jax.device_get((params, tx.init(params), np.zeros(steps, np.float32)))
    with Checkpoints(folder / "checkpoints", "kills.py --train-async") as checkpoints:
        (params, opt_state, losses), start = checkpoints.restore(kept)
        if start:
            print(f"resumed at step {start}", flush=True)
        losses = np.array(losses)
        training = samx.asynchronous.pipelined(
            descend,
            jax.grad(loss),
            params,
            opt_state,
            batches(start),
            descent_device=one,
            ascent_device=other,
        )
        for step in range(start + 1, steps + 1):
            params, opt_state, losses[step - 1] = next(training)
            if step % SAVED_EVERY == 0 or step == steps:
                kept = jax.device_get((params, opt_state, losses))
                checkpoints.save(step, jax.tree.map(np.copy, kept))
            time.sleep(STEP_SECONDS)
    results = {"params_sha256": fingerprint(params), "losses": losses.tolist()}
    files.write(folder / "results.json", json.dumps(results))


def loss_of_network() -> Callable[[Any, Any], jax.Array]:
    """Return the mean loss of the digits task's network."""
    from flax import nnx

    graph = graph_of(16)

    def loss(params, batch):
        logits = nnx.merge(graph, params)(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    return loss


HEADER = ("target", *KINDS, "unfinished", "from steps", "seconds", "result")


def table(rows: list[dict[str, Any]]) -> str:
    """Format one line per target."""
    grid: list[tuple[str, ...]] = [HEADER]
    for row in rows:
        counts = Counter(kill["kind"] for kill in row["kills"])
        steps = " ".join(str(kill["step"]) for kill in row["kills"])
        unfinished = sum(kill["is_unfinished"] for kill in row["kills"])
        numbers = [str(number) for number in (*(counts[kind] for kind in KINDS), unfinished)]
        result = row["result"] if not row["lost"] else "LOST: " + "; ".join(row["lost"])
        grid.append((row["target"], *numbers, steps, f"{row['seconds']:.0f}", result))
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in grid)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    if args.train_async is not None:
        try:
            train_async(Path(args.train_async), STEPS_PER_KILL * args.kills)
        except (OSError, CheckpointError) as error:
            raise SaveError(str(error)) from error
        return []
    output.choose_folder(args, "kills")
    args.folder = args.folder.absolute()
    report = Report(args, left_out=["train_async"])
    targets = list(dict.fromkeys(args.targets))
    with tqdm(total=len(targets) * (args.kills + 2), unit=" runs", disable=None) as bar:
        rows = [measure(name, args, bar) for name in targets]
    print(f"\n{table(rows)}")
    report.save(results=rows)
    report.end()
    lost = [text for row in rows for text in row["lost"]]
    if lost:
        sys.exit(f"kills.py: {len(lost)} losses")
    return rows


if __name__ == "__main__":
    main()
