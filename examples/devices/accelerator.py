"""Measure on one accelerator whether samx is right there, and what it costs.

    python examples/devices/accelerator.py --out results
    python examples/devices/accelerator.py --smoke        # the same code, tiny, on a CPU

It needs jax, flax, optax, numpy and matplotlib, and this repository on PYTHONPATH: no extras. It
prints a plan with estimates and works through its parts. After each part it writes results.json and
table.txt, at the end accelerator.png. A part that no longer fits in the time is left. The same
command goes on with what is left. After an interruption it does so too: the part that was running
is run again, after the others. A row that fails holds the reason, and the others go on.

fidelity   twelve recorded trajectories in float32: at the highest precision of matrix products they
           must stay within 1e-5 of the recording; at the default precision the difference is shown
memory     a step of the language model, in bfloat16 on AdamW: what language_model.py --abstract
           predicts, what the device's compiler needs, and what was allocated. It comes second,
           because the allocator knows only its largest use so far.
steps      times of the plain step, of SAM without samx (by hand and with optax.contrib.sam), and of
           one variant of each kind, in float32 at the default precision and in bfloat16. Parameters
           are float32. In each round every row is timed, in random order, and divided by the plain
           step.
SAMPa      its two gradients in one vectorized call, and one by one, over batch sizes
AsyncSAM   the device descends, the CPU ascends; with the calibrated ascent batch
images     images per second through ResNet-18, with bytes from the host in every step

JAX must see the CPU too: leave JAX_PLATFORMS unset, or set it to cuda,cpu. The estimates are
guesses, made without a GPU. If parts take longer, the estimates of the others grow.
"""

import argparse
import time

from examples.common import arguments


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    text = "end before this time has passed, if the estimates are right (default 8)"
    parser.add_argument("--minutes", type=float, default=8.0, help=text)
    text = "run the parts again in which something failed"
    parser.add_argument("--retry", action="store_true", help=text)
    text = "print the plan of a full run, and stop; works on every machine"
    parser.add_argument("--plan", action="store_true", help=text)
    text = "tiny models and few rows, to see on a CPU that everything runs (75 s on two cores)"
    parser.add_argument("--smoke", action="store_true", help=text)
    text = (
        "a new or empty folder, or that of an earlier call, which is continued "
        "(default runs/accelerator)"
    )
    parser.add_argument("--out", metavar="FOLDER", default="runs/accelerator", help=text)
    args = parser.parse_args(argv)
    arguments.check_finite(parser, args, "minutes", above_zero=True)
    return args


STARTED = None
if __name__ == "__main__":
    STARTED = time.perf_counter()  # --minutes include the imports
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import contextlib
import gc
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

from examples.common import files
from examples.common.gpt import SIZES, Size
from examples.common.measuring import described
from examples.common.report import Report, describe_device, without_nans
from examples.common.versions import versions
from examples.common.vision import ResNet18, ViT
from examples.devices import accelerator_parts as parts
from examples.devices import accelerator_report as report
from examples.devices.accelerator_parts import Scale, Steps
from examples.devices.accelerator_report import Shown

SCRIPT = "accelerator.py"

REFERENCES = ("plain", "sam by hand", "optax.contrib.sam")
# One of each kind: two gradients, both in one call, one by one, a branch, no further gradient,
# chosen examples, microbatches, and further arrays in the state (two rows).
KINDS = (
    *(*REFERENCES, "sam", "sampa", "sampa-separate", "looksam", "momentum-sam", "esam", "msam"),
    *("friendly-sam", "async-sam"),
)
GPT, SHORT = "language model", "language model, 128 tokens"
SHORT_SIZE = SIZES["100M"]._replace(length=128)

FULL = Scale(
    least_seconds=0.08,
    rounds=7,
    trajectories=tuple(parts.TRAJECTORIES),
    models={
        "dense": (partial(parts.dense_problem, 1024), 512),
        GPT: (partial(parts.language_problem, SIZES["100M"]), 8),
        SHORT: (partial(parts.language_problem, SHORT_SIZE), 64),
        "ResNet-18": (partial(parts.vision_problem, ResNet18), 512),
        "ViT": (partial(parts.vision_problem, ViT), 512),
    },
    steps=(
        Steps("dense", "float32", KINDS),
        Steps(GPT, "float32", KINDS),
        Steps("ResNet-18", "float32", KINDS),
        Steps("ViT", "float32", KINDS),
        Steps("dense", "bfloat16", KINDS),
        Steps(GPT, "bfloat16", KINDS),
        Steps("ResNet-18", "bfloat16", KINDS),
        Steps("ViT", "bfloat16", KINDS),
    ),
    language=(SIZES["100M"], 4),
    held=(
        *("adamw", "momentum-sam", "looksam", "sam in a branch", "sam by hand", "sam"),
        *("async-sam", "sampa"),
    ),
    sizes={"dense": (1, 4, 16, 64, 256, 1024, 4096), SHORT: (1, 4, 16, 64)},
    async_sam=("dense", 4096, 10),
    images=(ResNet18, (512,)),
    image_dtypes=("float32", "bfloat16"),
    seconds={
        "fidelity": 25,
        "memory": 40,
        "dense float32": 12,
        f"{GPT} float32": 45,
        "ResNet-18 float32": 55,
        "ViT float32": 40,
        "dense bfloat16": 12,
        f"{GPT} bfloat16": 45,
        "ResNet-18 bfloat16": 55,
        "ViT bfloat16": 40,
        "SAMPa dense": 20,
        f"SAMPa {SHORT}": 25,
        "AsyncSAM": 20,
        "images": 30,
    },
)

TINY = Size(width=16, depth=2, vocabulary=64, length=8)
SMOKE = Scale(
    least_seconds=0.001,
    rounds=2,
    trajectories=tuple(parts.TRAJECTORIES),
    models={
        "dense": (partial(parts.dense_problem, 16), 16),
        GPT: (partial(parts.language_problem, TINY), 4),
        "ResNet-18": (partial(parts.vision_problem, partial(ResNet18, width=2)), 4),
        "ViT": (partial(parts.vision_problem, partial(ViT, width=16, depth=1)), 4),
    },
    steps=(
        Steps("dense", "float32", KINDS),
        Steps(GPT, "float32", ("plain", "sam")),
        Steps("ResNet-18", "float32", ("plain",)),
        Steps("ViT", "float32", ("plain", "sam")),
        Steps("dense", "bfloat16", ("plain", "sam by hand", "sam")),
    ),
    language=(TINY, 4),
    held=("adamw", "sam"),
    sizes={"dense": (1, 16)},
    async_sam=("dense", 16, 2),
    images=(partial(ResNet18, width=2), (4,)),
    image_dtypes=("float32",),
    seconds={
        "fidelity": 12,
        "memory": 13,
        "dense float32": 10,
        f"{GPT} float32": 5,
        "ResNet-18 float32": 4,
        "ViT float32": 5,
        "dense bfloat16": 2,
        "SAMPa dense": 4,
        "AsyncSAM": 4,
        "images": 12,
    },
)


class Part(NamedTuple):
    """A part of the run: its name, the estimate of its seconds, its function, how it is shown."""

    name: str
    seconds: float
    run: Callable[[Scale], list[dict]]
    shown: Shown


def all_parts(scale: Scale) -> list[Part]:
    """Return the parts in the order in which they are run."""

    def part(name, run, shown):
        return Part(name, scale.seconds[name], run, shown)

    return [
        part("fidelity", parts.fidelity, report.FIDELITY),
        part("memory", parts.memory, report.MEMORY),
        *(
            part(f"{one.model} {one.dtype}", partial(parts.steps, one), report.STEPS)
            for one in scale.steps
        ),
        *(
            part(f"SAMPa {model}", partial(parts.sampa_by_size, model), report.SAMPA)
            for model in scale.sizes
        ),
        part("AsyncSAM", parts.async_on_two, report.ASYNC),
        part("images", parts.images, report.IMAGES),
    ]


class Results:
    """What is in the folder: the rows of each part that has ended, and its seconds."""

    def __init__(self, args: argparse.Namespace):
        self.folder = args.folder = Path(args.out)
        self.about = {
            "script": SCRIPT,
            "versions": versions() | {"jaxlib": metadata.version("jaxlib")},
            "platform": jax.devices()[0].client.platform_version,
        }
        found = self.read()
        fixed = {"device": describe_device(), "settings": {"smoke": args.smoke}, **self.about}
        for name, value in fixed.items():
            if found and found.get(name) != value:
                raise ValueError(
                    f"{self.folder} was measured with {name} {found.get(name)!s:.80}, this is "
                    f"{value!s:.80}; choose another folder"
                )
        self.rows: dict[str, list[dict]] = found.get("parts", {})
        self.seconds: dict[str, float] = found.get("seconds", {})
        self.running: str | None = found.get("running")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.report = Report(args, left_out=("minutes", "plan", "retry"))

    def read(self) -> dict[str, Any]:
        """Return results.json of an earlier call; nothing if the folder is new or empty."""
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return {}
        try:
            found = files.read_json(self.folder / "results.json")
        except (OSError, ValueError):
            found = {}
        if found.get("script") != SCRIPT:
            raise ValueError(f"{self.folder} is not empty, and no results of {SCRIPT} are there")
        return found

    def save(self, all_of: list[Part]) -> None:
        """Write results.json, with the plan and its real times, and table.txt."""
        plan = [
            {"part": p.name, "planned_seconds": p.seconds, "seconds": self.seconds.get(p.name)}
            for p in all_of
        ]
        done = {"parts": self.rows, "seconds": self.seconds, "running": self.running}
        self.report.save(**self.about, plan=plan, **done)
        tables = [
            report.table(part.name, part.shown, self.rows[part.name])
            for part in all_of
            if part.name in self.rows
        ]
        files.write(self.folder / "table.txt", "\n\n".join([*tables, ""]))


def to_do(all_of: list[Part], results: Results, retry: bool) -> list[Part]:
    """Return the parts to run; one that an earlier call did not end comes last."""
    left = [
        part
        for part in all_of
        if part.name not in results.rows
        or (retry and len(report.whole(results.rows[part.name])) < len(results.rows[part.name]))
    ]
    return sorted(left, key=lambda part: part.name == results.running)


def print_plan(left: list[Part], done: int, minutes: float) -> None:
    before = f", {done} parts are done" if done else ""
    print(f"\nplan for {minutes:g} minutes, in seconds (estimates){before}")
    for part in left:
        print(f"{part.seconds:6.0f}  {part.name}")
    print(f"{sum(part.seconds for part in left):6.0f}  in all", flush=True)


def run_parts(
    left: list[Part], scale: Scale, results: Results, save: Callable[[], None], end: float
) -> list[str]:
    """Run the parts that fit in the time; return the names of the others."""
    planned = spent = 0.0
    skipped = []
    for part in left:
        pace = max(1.0, spent / planned) if planned else 1.0  # parts may take longer than planned
        now = time.perf_counter()
        if now + pace * part.seconds > end:
            skipped.append(part.name)
            continue
        print(f"\n{part.name}: about {pace * part.seconds:.0f} s, {end - now:.0f} s are left")
        results.running = part.name
        save()
        try:
            rows = part.run(scale)
        except Exception as error:
            rows = [{"row": part.name, "failed": described(error)}]
        gc.collect()  # a failed row's traceback holds arrays
        seconds = time.perf_counter() - now
        planned, spent = planned + part.seconds, spent + seconds
        results.rows[part.name] = without_nans(rows)
        results.seconds[part.name] = seconds
        results.running = None
        save()
        print(f"\n{report.table(part.name, part.shown, results.rows[part.name])}")
        print(f"took {seconds:.0f} s, planned {part.seconds:.0f} s", flush=True)
    return skipped


def conclude(all_of: list[Part], results: Results, skipped: list[str]) -> None:
    """Print the results in a few words, what failed and what is left."""
    print("\nin short")
    for part in all_of:
        rows = results.rows.get(part.name)
        if rows is not None:
            failed = len(rows) - len(report.whole(rows))
            print(
                f"{part.name}: {part.shown.note(rows)}" + (f" ({failed} failed)" if failed else "")
            )
    if any(len(report.whole(rows)) < len(rows) for rows in results.rows.values()):
        print("\nthe same command with --retry runs the parts again in which something failed")
    if skipped:
        print(f"\nleft: {', '.join(skipped)}; the same command goes on with them")


@files.ends_in_one_line
def main(argv: list[str] | None = None, started: float | None = None) -> dict[str, list[dict]]:
    args = parse(argv)
    end = (time.perf_counter() if started is None else started) + 60 * args.minutes
    with contextlib.suppress(RuntimeError):  # a running backend cannot be changed
        jax.config.update("jax_num_cpu_devices", 2)
    if args.plan or args.smoke:
        print_plan(all_parts(FULL), 0, args.minutes)
    if args.plan:
        return {}
    if args.smoke:
        print("\nthat is the plan of a full run, on an accelerator; --smoke has a smaller one")
        jax.config.update("jax_disable_most_optimizations", True)
    elif jax.default_backend() == "cpu":
        arguments.refuse("jax sees no accelerator, only the CPU; --smoke runs there")
    try:
        results = Results(args)
    except (OSError, ValueError) as error:
        arguments.refuse(f"--out: {error}")
    scale = SMOKE if args.smoke else FULL
    all_of = all_parts(scale)
    left = to_do(all_of, results, args.retry)
    print_plan(left, len(all_of) - len(left), args.minutes)
    save = partial(results.save, all_of)
    try:
        skipped = run_parts(left, scale, results, save, end)
    except KeyboardInterrupt:
        print(f"\ninterrupted in {results.running}; the same command goes on", file=sys.stderr)
        sys.exit(130)
    conclude(all_of, results, skipped)
    plots = []
    if report.panels_of(results.rows):
        about = f"samx {results.about['versions']['samx']} on {jax.devices()[0].device_kind}"
        report.draw(results.rows, results.folder / "accelerator.png", about)
        plots.append("accelerator.png")
    results.report.end(*plots)
    return results.rows


if __name__ == "__main__":
    main(started=STARTED)
