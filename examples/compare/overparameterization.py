"""Does SAM gain more, the more parameters a network has?

    python examples/compare/overparameterization.py
    python examples/compare/overparameterization.py --results my_results
    python examples/compare/overparameterization.py --only-tables

The paper is "Critical Influence of Overparameterization on Sharpness-aware Minimization" (Shin et
al., 2023, https://arxiv.org/abs/2311.17539). The data are scikit-learn's digits: 1000 training
images, 297 for validation, 500 for the test. Every setting is trained with clean labels and with
30% wrong labels.

    width      two hidden layers of 2, 4, 8, ..., 512 units
    depth      1, 2, 4 or 6 hidden layers of 64 units
    sparsity   two hidden layers of 128 units; 50%, 80%, 90% or 95% of the weights are pruned, over
               all kernels together: at random before the training, or by magnitude
    size       dense networks with as many parameters as the sparse ones, within 4%
    rate       the widths again; the learning rate is 0.1 for all rows, as in the paper

Pruning by magnitude is that of lottery tickets: `base` trains the dense network with its learning
rate, the largest weights are kept, and they start again from their first values.

The protocol is the same for every setting and row. The optimizer is SGD with momentum 0.9, weight
decay 5e-4 and a learning rate that falls to 0 as a cosine; batches have 100 images. All rows but
`base` spend 800 gradients:

    base       SGD, 400 steps, as many as SAM takes
    base2x     SGD, 800 steps
    sam        SAM, 400 steps of two gradients

Each row has its own learning rate, and SAM its own rho, for every setting. A search tries at least
12 candidates for each row, and more only while the best one is at the edge of what was tried. It
maximizes the mean validation accuracy of four seeds that are not reported. If the learning rate is
given, only rho is searched, with at least 6 candidates.

SAM's gain is its test accuracy minus that of the better baseline, paired by seed, over 16 seeds.
The baselines compete on the test split itself. If that favours anybody, it favours them.

The script trains the settings that have no file in --results, one JSON file each, by default the
committed ones. An interrupted run goes on where it stopped. Table, claims and figure are made from
these files alone. They are written to --out. With --only-tables nothing is trained. A whole run
takes about 25 minutes on two quiet CPU cores.
"""

import argparse
from pathlib import Path
from typing import Any

from examples.common import arguments

RESULTS = Path(__file__).parent / "results" / "overparameterization"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    text = "folder with one file for each setting; default: the committed results"
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=text)
    parser.add_argument("--only-tables", action="store_true", help="train nothing")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=40, help="of SAM; base2x takes twice as many")
    arguments.add_out(parser, "overparameterization")
    args = parser.parse_args(argv)
    arguments.check_range(parser, args, "epochs")
    arguments.check_range(parser, args, "seeds", low=2)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import json
import time

import jax
import numpy as np
from tqdm import tqdm

from examples.common import files
from examples.common.digits_task import STEPS_PER_EPOCH
from examples.common.output import choose_folder, hold_results
from examples.common.report import MARK, Report, aligned, without_nans
from examples.common.training import data_of, map_runs
from examples.common.tuning import (
    SIXTHS,
    TUNING_SEEDS,
    Runs,
    around,
    best_of,
    edges,
    fixed,
    from_zero,
    runs_of,
    scores_of,
    search,
)
from examples.common.versions import versions
from examples.compare.overparameterization_claims import (
    RATE,
    Claim,
    claims_of,
    claims_table,
    verdicts,
)
from examples.compare.overparameterization_measures import measure, non_uniformity, sample_of
from examples.compare.overparameterization_report import draw, table_of
from examples.compare.overparameterization_training import (
    Setting,
    make_programs,
    mask_of,
    masked,
    start_of,
)

NOISES = (0.0, 0.3)
WIDTHS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
DEPTHS, DEEP_WIDTH = (1, 2, 4, 6), 64
WIDE = 128  # the width of the networks that are pruned
AS_LARGE = {0.5: 82, 0.8: 45, 0.9: 27, 0.95: 16}  # dense widths, by the sparsity of the wide ones
ROWS = ("base", "base2x", "sam")
TRIALS, TRIALS_OF_RHO = 12, 6  # candidates of a search at least, with two numbers and with one
CURVED_SEEDS = 4  # reported seeds for which s_2 is measured
DIGITS = 4  # significant digits in the files

measure_run = jax.jit(measure)
non_uniformity_of_run = jax.jit(non_uniformity)


def all_settings() -> list[Setting]:
    """Return the settings, the dense one before those that are pruned."""
    shapes = [(width, 2) for width in WIDTHS]
    shapes += [(DEEP_WIDTH, depth) for depth in DEPTHS]
    shapes += [(width, 2) for width in AS_LARGE.values()]
    dense = [Setting(*shape, noise) for shape in dict.fromkeys(shapes) for noise in NOISES]
    sparse = [
        Setting(WIDE, 2, noise, sparsity, pruning)
        for pruning in ("random", "magnitude")
        for sparsity in AS_LARGE
        for noise in NOISES
    ]
    rates = [Setting(width, 2, noise, learning_rate=RATE) for width in WIDTHS for noise in NOISES]
    return [*dense, *sparse, *rates]


def protocol_of(args: argparse.Namespace) -> dict[str, int]:
    """Return what all settings of a results folder have in common."""
    return {"seeds": args.seeds, "epochs": args.epochs, "tuning_seeds": len(TUNING_SEEDS)}


def epochs_of(row: str, args: argparse.Namespace) -> int:
    """Return how many epochs a row trains."""
    return 2 * args.epochs if row == "base2x" else args.epochs


def axes_of(setting: Setting, row: str) -> tuple[list[Any], int]:
    """Return the axes of learning rate and rho of a search, and how many candidates it tries."""
    rhos = from_zero(around(0.1, decades=1)) if row == "sam" else fixed([0.0])
    if setting.learning_rate:
        return [fixed([setting.learning_rate]), rhos], TRIALS_OF_RHO
    return [around(RATE) if row == "sam" else around(RATE, SIXTHS), rhos], TRIALS


def round_to(number: float) -> float:
    """Round a number to a few significant digits."""
    return float(f"{number:.{DIGITS}g}")


def measure_row(
    setting: Setting, row: str, mask_rate: float, args: argparse.Namespace, bar: tqdm
) -> dict[str, Any]:
    """Choose the numbers of a row, train the reported seeds with them, and measure.

    Args:
        setting: The setting.
        row: One of `ROWS`.
        mask_rate: Learning rate of the dense training before a pruning by magnitude.
        args: `seeds` and `epochs` of the command line.
        bar: The progress bar. It expects 12 candidates, and is corrected after the search.
    """
    programs = make_programs(setting.width, setting.depth)
    program, epochs = programs.sam if row == "sam" else programs.base, epochs_of(row, args)

    def trained(run):
        seed = int(run.seed)
        mask = mask_of(setting, mask_rate, args.epochs, seed)
        start = masked(start_of(setting.width, setting.depth, seed), mask)
        train = data_of(seed, setting.noise)[0]
        numbers = seed, run.learning_rate, run.rho
        return program(start, mask, *numbers, train, epochs), mask, start

    def validated(run):
        layers, *_ = trained(run)
        return programs.accuracy(layers, data_of(int(run.seed), setting.noise)[1])

    def measured(run):
        train, _, test = data_of(int(run.seed), setting.noise)
        layers, mask, start = trained(run)
        found = measure_run(layers, mask, start, train, test)
        if setting.pruning or int(run.seed) >= CURVED_SEEDS:
            return found | {"s2": np.float32(np.nan)}
        return found | {"s2": non_uniformity_of_run(layers, mask, sample_of(train))}

    def evaluate(candidates):
        runs = Runs(*runs_of(TUNING_SEEDS, candidates))
        return scores_of(map_runs(validated, runs, advance=bar.update), candidates).tolist()

    axes, trials = axes_of(setting, row)
    tried = search(axes, evaluate, trials)
    best = best_of(tried)
    bar.total += (len(tried) - TRIALS) * len(TUNING_SEEDS)
    measures = map_runs(measured, Runs(*runs_of(range(args.seeds), [best])), advance=bar.update)
    return {
        **dict(zip(("learning_rate", "rho"), best, strict=True)),
        "edges": edges(best, tried),
        "candidates": [[*candidate, round_to(score)] for candidate, score in tried.items()],
        "steps": epochs * STEPS_PER_EPOCH,
        "gradients": epochs * STEPS_PER_EPOCH * (2 if row == "sam" else 1),
        "measures": {name: rounded(values) for name, values in sorted(measures.items())},
    }


def rounded(values: np.ndarray) -> Any:
    """Return an array as nested lists of rounded numbers."""
    if values.ndim > 1:
        return [rounded(part) for part in values]
    return [round_to(float(number)) for number in values]


def measure_setting(setting: Setting, args: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Measure all rows of a setting, and write its file."""
    begin, mask_rate = time.perf_counter(), 0.0
    if setting.pruning == "magnitude":
        dense = read_setting(setting.dense, args)
        mask_rate = dense["rows"]["base"]["learning_rate"]
    rows = {row: measure_row(setting, row, mask_rate, args, bar) for row in ROWS}
    result = {
        "setting": setting._asdict(),
        "parameters": setting.parameters,
        "protocol": protocol_of(args),
        "rows": rows,
        "seconds": round(time.perf_counter() - begin, 1),
        "versions": versions(),
    }
    result = without_nans(result)
    files.write(args.results / f"{setting.name}.json", as_text(result))
    return result


def as_text(result: dict[str, Any]) -> str:
    """Return a result as JSON, with one measure on each line."""
    text, lists = json.dumps(result, indent=1), []
    for row in result["rows"].values():
        lists += [row["candidates"], *row["measures"].values()]
    for values in lists:
        for depth in (4, 5):  # spaces before what is inside of "candidates" and of "measures"
            long = json.dumps(values, indent=1).replace("\n", "\n" + " " * (depth - 1))
            text = text.replace(long, json.dumps(values))
    return text + "\n"


def read_setting(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the file of a setting holds.

    Raises:
        OSError: If there is no file, or if it cannot be opened.
        ValueError: If it does not hold this setting, or another protocol.
    """
    path = args.results / f"{setting.name}.json"
    found = files.read_json(path)
    expected = json.loads(json.dumps([setting._asdict(), protocol_of(args)]))
    if [found.get("setting"), found.get("protocol")] != expected:
        raise ValueError(f"{path} holds another setting, or other seeds or epochs")
    return found


def train_missing(settings: list[Setting], args: argparse.Namespace) -> None:
    """Train the settings that have no file, and tell how much is left."""
    missing = [s for s in settings if not (args.results / f"{s.name}.json").exists()]
    runs = len(ROWS) * (TRIALS * len(TUNING_SEEDS) + args.seeds)
    with tqdm(total=runs * len(missing), unit=" runs", smoothing=0.1, disable=None) as bar:
        for number, setting in enumerate(missing, 1):
            bar.set_description(f"{setting.name}, setting {number} of {len(missing)}")
            measure_setting(setting, args, bar)


def read_all(args: argparse.Namespace) -> dict[Setting, dict[str, Any]]:
    """Return the results of the settings that have a file."""
    paths = {s: args.results / f"{s.name}.json" for s in all_settings()}
    return {s: read_setting(s, args) for s, path in paths.items() if path.exists()}


def claim_row(claim: Claim) -> dict[str, Any]:
    """Return a claim as a row of results.json."""
    return {**claim._asdict(), "number": [*claim.number], "verdict": claim.verdict}


def progress_of(results: dict[Setting, dict[str, Any]]) -> str:
    """Say how many settings are trained."""
    return f"{len(results)} of {len(all_settings())} settings are trained."


def summarize(results: dict[Setting, dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the table and the claims as text."""
    lines = aligned(table_of(results))
    lines += ["", f"{args.seeds} seeds; gains in points, with intervals of 95%", MARK]
    lines += [progress_of(results), ""]
    claims = claims_of(results)
    if claims:
        lines += [*aligned(claims_table(claims)), "", *verdicts(claims)]
    return "\n".join(lines)


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> dict[Setting, dict[str, Any]]:
    args = parse(argv)
    if not args.only_tables:
        hold_results(args)
    try:
        results = read_all(args)  # another protocol is refused before anything is trained
    except (OSError, ValueError) as error:
        arguments.refuse(f"--results: {files.reason(error)}")
    if args.only_tables and not results:
        arguments.refuse(f"--results: {args.results} holds no results")
    choose_folder(args, "overparameterization")
    report = Report(args, left_out=("results", "only_tables"))
    if not args.only_tables:
        train_missing(all_settings(), args)
        results = read_all(args)
    print(summarize(results, args))
    report.save(claims=[claim_row(claim) for claim in claims_of(results)])
    title = f"Digits: what SAM gains over SGD, by the number of parameters; {args.seeds} seeds"
    draw(results, args.folder / "overparameterization.png", title)
    report.end("overparameterization.png")
    return results


if __name__ == "__main__":
    main()
