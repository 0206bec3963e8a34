"""The counts of `language_model.py --abstract`, from shapes alone, as tables and a plot."""

import argparse
import contextlib
import gc
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from examples.common import arguments, figures, files
from examples.common.gpt import SIZES
from examples.common.output import choose_folder
from examples.common.registry import VARIANTS
from examples.common.report import Report, aligned
from examples.common.shapes import ADAPTATIONS, WHOLE, count, methods, task_of

SENT = ("gather", "reduce", "other", ""), ("GB", "GB", "GB", "/adamw")  # titles of columns
NOTE = """
On each of n devices, under FSDP if nothing else is said, as the CPU's compiler says. An
accelerator's may differ, above all in bfloat16 and remat. Held: weights and optimizer, in copies P
of the float32 weights. Temporary: activations, gradients, workspace. Flops and bytes sent:"""
ABOUT = {  # in a heading
    WHOLE: "",
    "lora": "; adapters of rank {rank} alone are trained, {trained:,.0f} million",
    "lora-data": "; the same adapters alone are trained, and every device holds all weights",
}


def relate(rows: list[dict]) -> None:
    """Add, to each row, its copies of the parameters, and what it is to AdamW."""
    plain = {setting_of(row): row for row in rows if row["method"] == "adamw"}
    for row in compiled(rows):
        adamw = plain[setting_of(row)]
        row["copies"] = row["state_bytes"] / row["parameter_bytes"]
        row["peak_to_adamw"] = row["peak_bytes"] / adamw["peak_bytes"]
        row["flops_to_adamw"] = row["flops"] / adamw["flops"]
        row["sent_to_adamw"] = row["sent_bytes"] / max(adamw["sent_bytes"], 1)


def table_of(row: dict) -> tuple:
    return row["size"], row["adapt"], row["remat"]


def compiled(rows: list[dict]) -> list[dict]:
    """Return the rows that a variant did not refuse."""
    return [row for row in rows if "refused" not in row]


def setting_of(row: dict) -> tuple:
    return row["size"], row["remat"], row["devices"], row["adapt"]


def table(rows: list[dict]) -> str:
    """Return the table of one size, with or without remat.

    Flops and bytes sent are those on the largest number of devices.
    """
    numbers = sorted({row["devices"] for row in rows})
    grid = [
        ["", "copies", *(f"n = {n}: GB" for n in numbers), "Tflop", "", *SENT[0]],
        ["", "P", *["held + temporary"] * len(numbers), "", "/adamw", *SENT[1]],
    ]
    for name in dict.fromkeys(row["method"] for row in compiled(rows)):
        mine = {row["devices"]: row for row in compiled(rows) if row["method"] == name}
        line = [name, f"{next(iter(mine.values()))['copies']:.2f}"]
        line += [held_and_temporary(mine[n]) if n in mine else "refused" for n in numbers]
        last = mine.get(numbers[-1])
        line += [""] * 6 if last is None else flops_and_sent(last)
        grid.append(line)
    refused = {row["method"]: row["refused"] for row in rows if "refused" in row}
    return "\n".join([*aligned(grid), *(f"{name}: {reason}" for name, reason in refused.items())])


def held_and_temporary(row: dict) -> str:
    return f"{row['state_bytes'] / 1e9:.2f} + {row['temporary_bytes'] / 1e9:6.2f}"


def flops_and_sent(row: dict) -> list[str]:
    """Return the last columns of a row; one device sends nothing."""
    flops = [f"{row['flops'] / 1e12:.2f}", f"{row['flops_to_adamw']:.2f}"]
    if row["devices"] == 1:
        return [*flops, "", "", "", ""]
    sent = dict(row["sent"])
    parts = [sent.pop("all-gather", 0), sent.pop("all-reduce", 0), sum(sent.values())]
    return [*flops, *(f"{part / 1e9:.2f}" for part in parts), f"{row['sent_to_adamw']:.2f}"]


def heading(rows: list[dict], examples: int) -> str:
    first, size = rows[0], SIZES[rows[0]["size"]]
    tokens = f"{examples} examples of {size.length} tokens on each device"
    remat = "with remat" if first["remat"] else "without remat"
    rank, trained = ADAPTATIONS[first["adapt"]].lora_rank, first["trained"] / 1e6
    about = ABOUT[first["adapt"]].format(rank=rank, trained=trained)
    millions = first["parameters"] / 1e6
    return f"{first['size']}: {millions:,.0f} million parameters, {tokens}, {remat}{about}"


def draw(rows: list[dict], path: Path) -> None:
    """Plot the memory of each method with remat, on one number of devices.

    A panel for each size and for what is trained.
    """
    rows = compiled(rows)
    kinds = list(dict.fromkeys((row["size"], row["adapt"]) for row in rows))
    numbers = sorted({row["devices"] for row in rows})
    n = numbers[len(numbers) // 2]
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure = figures.make_figure(len(kinds) + 0.3, [figures.height_of(len(names))])
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, (size, adapt) in zip(panels, kinds, strict=True):
        mine = {row["method"]: row for row in rows if setting_of(row) == (size, True, n, adapt)}
        places = [names.index(name) for name in mine]
        state, temporary = (
            np.array([row[f"{kind}_bytes"] / 1e9 for row in mine.values()])
            for kind in ("state", "temporary")
        )
        axes.barh(places, state, 0.75, color=figures.BLUE, label="state")
        axes.barh(places, temporary, 0.75, left=state, color=figures.ORANGE, label="temporary")
        for y, row, end in zip(places, mine.values(), state + temporary, strict=True):
            text = f"{row['peak_to_adamw']:.2f}"
            shift = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (end, y), fontsize=9, **shift)
        axes.margins(x=0.15)
        axes.set_xlabel("GB on each device; numbers: relative to AdamW")
        sharp = [name for name in mine if name not in ("sgd", "adamw")]
        ratio, least = min((mine[name]["peak_to_adamw"], name) for name in sharp)
        what = size if adapt == WHOLE else f"{size}, {adapt}"
        axes.set_title(f"{what}: least with {least}, {ratio:.2f} times AdamW's")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    title = f"Memory of a step on each of {n} devices, with remat: blue state, orange temporary"
    figures.save(figure, path, title)


@files.ends_in_one_line
def main(args: argparse.Namespace) -> list[dict]:
    """Compile every configuration; print tables, write results.json and abstract.png."""
    with contextlib.suppress(RuntimeError):  # a running backend stays unchanged
        jax.config.update("jax_num_cpu_devices", args.devices[-1])
    devices = jax.devices("cpu")
    if len(devices) < args.devices[-1]:
        arguments.refuse(f"--devices must be at most {len(devices)} here, got {args.devices[-1]}")
    choose_folder(args, "language")
    names = [*VARIANTS] if "all" in args.variants else args.variants
    makes = methods(names)
    report = Report(
        argparse.Namespace(
            folder=args.folder,
            sizes=list(args.sizes),
            devices=args.devices,
            variants=list(names),
            examples=args.examples,
            adapt=list(args.adapt),
        ),
        device="simulated devices of the CPU",
    )
    tables = list(itertools.product(args.sizes, args.adapt, (True, False)))
    jobs = [
        {"size": size, "adapt": adapt, "remat": remat, "devices": n, "method": method}
        for size, adapt, remat in tables
        for method in makes
        for n in args.devices
    ]

    def run(job):
        try:
            task, batch = task_of(
                SIZES[job["size"]],
                makes[job["method"]],
                devices=devices[: job["devices"]],
                examples=args.examples,
                remat=job["remat"],
                adaptation=ADAPTATIONS[job["adapt"]],
            )
            return job | count(task, batch)
        except ValueError as error:  # some variants have a largest size
            return job | {"refused": files.reason(error)}

    rows = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(jobs), desc="compile", unit="step", disable=None) as bar,
    ):
        for at in tables:
            mine = []
            for row in pool.map(run, [job for job in jobs if table_of(job) == at]):
                mine.append(row)
                bar.update()
            relate(mine)
            bar.write(f"\n{heading(mine, args.examples)}\n\n{table(mine)}")
            rows += mine
            jax.clear_caches()  # hundreds of programs would be too many for one process
            gc.collect()
    print(f"{NOTE} n = {args.devices[-1]}.")
    report.save(rows=rows)
    draw(rows, args.folder / "abstract.png")
    report.end("abstract.png")
    return rows
