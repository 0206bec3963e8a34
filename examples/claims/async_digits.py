"""AsyncSAM: does it keep SAM's accuracy, with ascent batches of all, half or a quarter?

    python examples/claims/async_digits.py
    python examples/claims/async_digits.py --seeds 20 --noise 0.5
    python examples/claims/async_digits.py --base adamw --rho 0.1 0.2

This script does for AsyncSAM what digits.py does for every variant. The ascent batches hold all,
half or a quarter of the examples. A small network trains with a fraction of wrong labels, and with
clean labels, for equal epochs. Learning rate and rho of each method are chosen on a validation
split, with tuning seeds that are not reported; the test split is used once. The question: how much
accuracy is lost if the ascent gradient is one step old, and comes from fewer examples? The answer
is the difference to SAM, paired by seed. which_batch.py says where it comes from.

For the accuracies, every run trains on one device. On two devices the numbers are the same. The
script shows this for one seed: `samx.asynchronous.pipelined` repeats its training run in float64,
with descent and ascent on a device each. It also measures which ascent batch these two devices
would hide; for a network as small as this one, most of the time goes into copies. async_cost.py
shows what two devices save.

The script prints a table, and each claim with its number and the verdict. It writes results.json
and async_digits.png to --out. It takes about two minutes on two CPU cores.
"""

import argparse
import contextlib
from functools import partial
from typing import Any

from examples.common import arguments

NAME = "async_digits"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    arguments.add_settings(parser, seeds=20, name=NAME)
    args = parser.parse_args(argv)
    arguments.check_settings(parser, args)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import samx
from examples import digits
from examples.claims.arms import points
from examples.claims.claim import Claim, found_of, print_claims, save
from examples.common import files
from examples.common.async_steps import describe_ascent_batch
from examples.common.digits_task import (
    BATCH,
    STEPS_PER_EPOCH,
    graph_of,
    initialize,
    rows_of,
    shuffled,
    split,
)
from examples.common.output import choose_folder
from examples.common.registry import BASES, RADIUS, VARIANTS, Setting, Variant
from examples.common.report import Report
from examples.common.training import PLANNED, axes_of, measure, runs_to_try

SHARES = {"async-sam, b": 1.0, "async-sam, b/2": 0.5, "async-sam, b/4": 0.25}
LABELS = {"wrong labels": "a share --noise of wrong labels (30%)", "clean labels": "clean labels"}
MARGIN = 0.5  # points; less than that below SAM is level with it
OTHERS = {
    "sam": (-MARGIN, "SAM's accuracy, with an ascent gradient of the step before.", "abstract"),
    "base": (0.0, "More accurate than SGD.", "abstract of the journal's version"),
}
CLAIMS = {
    f"{row} - {other}, {labels}": Claim(
        ("async_sam",),
        f"{text} Ascent batch b′ = {row.removeprefix('async-sam, ')}.",
        source,
        f"test accuracy over {other}'s, both tuned, points; digits, {where}, 40 epochs, b = 100",
        low=low,
        published="1 to 4% over SGD, slightly above SAM (CIFAR, Flowers-102)",
    )
    for labels, where in LABELS.items()
    for row in SHARES
    for other, (low, text, source) in OTHERS.items()
}


def with_share(share: float) -> Variant:
    """Return AsyncSAM whose ascent batch is the first `share` of the batch."""

    def make(rho: Any, base: optax.GradientTransformation, setting: Setting):
        tx = samx.async_sam(rho, ascent_share=share)
        size = ascent_size(share, setting.batch_size)

        def update_fn(g, state, params, *, losses_fn, batch, **keywords):
            part = first_of(batch, size)
            keywords |= {"losses_fn": losses_fn, "batch": batch}
            keywords["ascent_fn"] = lambda params: losses_fn(params, part).mean()
            return tx.update(g, state, params, **keywords)

        return optax.chain(samx.closure_transformation(tx.init, update_fn), base)

    return Variant(make, RADIUS, 1 + share, 0.05)


def ascent_size(share: float, batch_size: int = BATCH) -> int:
    """Return b′, the number of examples in the ascent batch."""
    return round(share * batch_size)


def first_of(batch: dict[str, jax.Array], size: int) -> dict[str, jax.Array]:
    """Return the first `size` examples of a batch."""
    return {name: leaf[:size] for name, leaf in batch.items()}


ROWS = {"base": VARIANTS["base"], "sam": VARIANTS["sam"]}
ROWS |= {name: with_share(share) for name, share in SHARES.items()}


def work_of(row: str, runs: int) -> float:
    """Return the number of gradients in one epoch of `runs` runs."""
    return STEPS_PER_EPOCH * runs * ROWS[row].gradients


def values_of(results: list[dict], noise: float) -> dict[str, list[float]]:
    """Return the numbers of each claim: paired differences, in percentage points."""
    return {
        f"{row} - {other}, {labels}": (
            points(results, row, share) - points(results, other, share)
        ).tolist()
        for labels, share in labels_of(noise).items()
        for row in SHARES
        for other in OTHERS
    }


def labels_of(noise: float) -> dict[str, float]:
    """Return the share of wrong labels for each of `LABELS`; without wrong labels only one."""
    return dict(zip(LABELS, (noise, 0.0), strict=True)) if noise else {[*LABELS][-1]: 0.0}


def loss_of(width: int):
    """Return `(params, batch) -> mean loss` for the network of digits.py."""
    graph = graph_of(width)

    def loss(params, batch):
        logits = nnx.merge(graph, params)(batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    return loss


def two_devices() -> tuple[Any, Any]:
    """Return the fastest device and the CPU, or two simulated CPU devices."""
    with contextlib.suppress(RuntimeError):  # a running backend cannot be changed
        jax.config.update("jax_num_cpu_devices", 2)
    return jax.devices()[0], jax.devices("cpu")[-1]


def on_two_devices(result: dict, args: argparse.Namespace) -> dict[str, Any]:
    """Train the first seed of a row on one device and on two; return the largest difference."""
    loss, share = loss_of(args.width), SHARES[result["row"]]
    size, (one, other) = ascent_size(share), two_devices()
    tx = optax.chain(
        samx.async_sam(result["rho"], ascent_share=share),
        BASES[args.base](result["learning_rate"]),
    )
    seed = jnp.zeros(1, jnp.int32)
    inputs = split(seed, result["noise"])[0], initialize(seed, args.width)
    images, params = jax.tree.map(lambda leaf: np.asarray(leaf)[0], inputs)
    order = [np.asarray(shuffled(jnp.int32(0), epoch)) for epoch in range(args.epochs)]
    batches = [rows_of(images, rows) for epoch in order for rows in epoch]

    def descend(params, state, batch, ascent_grad):
        updates, state = tx.update(ascent_grad, state, params, value_fn=lambda p: loss(p, batch))
        return optax.apply_updates(params, updates), state, optax.tree.get(state, "sharp_loss")

    @jax.jit
    def on_one(params, state, batch):
        return descend(params, state, batch, jax.grad(loss)(params, first_of(batch, size)))

    with jax.enable_x64(True):
        params, batches = jax.tree.map(in_float64, (params, batches))
        single, state = params, tx.init(params)
        for batch in batches:
            single, state, _ = on_one(single, state, batch)
        steps = samx.asynchronous.pipelined(
            descend,
            jax.grad(loss),
            params,
            tx.init(params),
            ((batch, first_of(batch, size)) for batch in batches),
            descent_device=one,
            ascent_device=other,
        )
        for step in steps:
            piped = step.params
        pairs = zip(*map(jax.tree.leaves, (single, piped, params)), strict=True)
        found = [(abs(np.asarray(a) - b).max(), abs(np.asarray(a) - w).max()) for a, b, w in pairs]
    difference, moved = (float(max(values)) for values in zip(*found, strict=True))
    return {
        **{"row": result["row"], "noise": result["noise"], "steps": len(batches)},
        **{"devices": [str(one), str(other)], "difference": difference, "moved": moved},
    }


def in_float64(leaf: np.ndarray) -> np.ndarray:
    return leaf.astype(np.float64) if np.issubdtype(leaf.dtype, np.floating) else leaf


def calibrate(args: argparse.Namespace) -> samx.asynchronous.AscentBatch:
    """Measure which ascent batch these two devices hide."""
    one, other = two_devices()
    seed = jnp.zeros(1, jnp.int32)
    images, params = split(seed, 0.0)[0], initialize(seed, args.width)
    batch, params = jax.tree.map(lambda leaf: leaf[0], (images, params))
    return samx.asynchronous.calibrate_ascent_batch(
        jax.grad(loss_of(args.width)),
        params,
        first_of(batch, BATCH),
        descent_device=one,
        ascent_device=other,
        repeats=21,
    )


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    choose_folder(args, NAME)
    one, other = two_devices()
    report = Report(args)
    noises = list(dict.fromkeys([args.noise, 0.0]))
    total = sum(
        work_of(row, runs_to_try(PLANNED) + args.seeds) * args.epochs * len(noises) for row in ROWS
    )
    with tqdm(total=total, unit=" gradients", unit_scale=True, smoothing=0.1, disable=None) as bar:
        results = []
        for row in ROWS:
            axes, work = axes_of(ROWS[row], args.base, args.rho), partial(work_of, row)
            results += measure(row, ROWS[row], axes, args, args.epochs, noises, bar, work)

    for noise in noises:
        digits.print_table(results, noise, args.seeds)
    print("ms/step: of both gradients on one device, one run")
    values = values_of(results, args.noise)
    found = found_of({name: CLAIMS[name] for name in values}, values)
    print_claims(found)

    half = next(r for r in results if r["row"] == "async-sam, b/2" and r["noise"] == args.noise)
    repeated, batch = on_two_devices(half, args), calibrate(args)
    print(
        f"\nasync-sam, b/2, seed 0, {repeated['steps']} steps in float64 on {one} and {other}:\n"
        f"    largest difference to one device {repeated['difference']:.1e}, of parameters that "
        f"moved by up to {repeated['moved']:.2f}"
    )
    print(describe_ascent_batch(batch))

    measured = {"results": results, "two_devices": repeated, "ascent_batch": batch._asdict()}
    save(report, NAME, found, values, **measured)
    title = f"Digits: AsyncSAM, SAM and {args.base}, {args.seeds} seeds"
    digits.draw(results, noises, args.folder / "async_digits.png", title)
    report.end("async_digits.png")
    return measured | {"values": values}


if __name__ == "__main__":
    main()
