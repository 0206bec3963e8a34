"""Tables, results in a few words, and the figure of accelerator.py, from the rows of its parts."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.common import figures
from examples.common.report import aligned
from examples.common.steps import CHEAP
from examples.devices.accelerator_parts import TOLERANCE

MEGABYTE = 1e-6
DTYPES = {"float32": figures.BLUE, "bfloat16": figures.ORANGE}
COLUMNS = 3  # panels side by side
FLOOR = 1e-9  # smaller differences are drawn here


def whole(rows: Iterable[dict]) -> list[dict]:
    """Return the rows that did not fail."""
    return [row for row in rows if "failed" not in row]


def number(name: str, form: str, factor: float = 1.0) -> Callable[[dict], str]:
    """Return a column of a number; it is empty where a row has none."""
    return lambda row: "" if row.get(name) is None else format(factor * row[name], form)


def text(name: str) -> Callable[[dict], str]:
    return lambda row: str(row.get(name, ""))


def ratio(row: dict) -> str:
    """Return the median and the quartiles of the ratio."""
    three = row.get("ratio")
    return "{1:.2f} [{0:.2f}, {2:.2f}]".format(*three) if three else ""


def rate(row: dict) -> str:
    return f"{1e3 / row['ms']:.1f}"


def note_fidelity(rows: list[dict]) -> str:
    passed = sum(row.get("passed", False) for row in rows)
    return (
        f"{passed} of {len(rows)} trajectories within {TOLERANCE:g} at the highest "
        f"precision; largest difference {worst(rows, 'highest'):.1e}, at the default precision "
        f"{worst(rows, 'default'):.1e}"
    )


def worst(rows: list[dict], precision: str) -> float:
    """Return the largest difference of the rows that did not fail; results.json has no NaN."""
    differences = [row[precision] for row in whole(rows)]
    return max([math.inf if x is None else x for x in differences], default=math.nan)


def note_memory(rows: list[dict]) -> str:
    if not whole(rows):
        return "nothing was counted"
    low, high = predicted_shares(whole(rows))
    return (
        f"language model: the CPU's compiler predicts {low:.2f} to {high:.2f} times what the "
        "device's compiler needs"
    )


def predicted_shares(rows: list[dict]) -> tuple[float, float]:
    """Return the least and the largest prediction, relative to the device's compiler."""
    shares = [row["predicted_bytes"] / row["compiled_bytes"] for row in rows]
    return min(shares), max(shares)


def note_steps(rows: list[dict]) -> str:
    found = [f"{row['row']} {row['ratio'][1]:.2f}" for row in whole(rows) if row["ratio"]]
    return f"relative to the plain step: {', '.join(found[1:]) or 'nothing was measured'}"


def note_sampa(rows: list[dict]) -> str:
    return (
        f"largest batch at which vectorized SAMPa takes below {CHEAP:g} x plain: "
        f"{cheap_until(rows)}"
    )


def cheap_until(rows: list[dict]) -> int | str:
    """Return the largest batch size at which SAMPa in one call costs about one gradient."""
    ours = [row for row in whole(rows) if row["row"] == "sampa" and row["ratio"]]
    cheap = [row["batch"] for row in ours if row["ratio"][1] < CHEAP]
    return max(cheap, default="none")


def note_async(rows: list[dict]) -> str:
    return next((row["text"] for row in rows if "text" in row), "no calibration")


def note_images(rows: list[dict]) -> str:
    rates = [
        f"{row['row']} {row['dtype']} {row['images_per_second']:.0f}"
        for row in whole(rows)
        if row["batch"] == max(row["batch"] for row in rows)
    ]
    return f"images per second: {', '.join(rates) or 'nothing was measured'}"


class Shown(NamedTuple):
    """How the rows of a kind of part are shown.

    Attributes:
        columns: For each title of the table, `row -> text`.
        note: `rows -> text`: the result in a few words.
    """

    columns: dict[str, Callable[[dict], str]]
    note: Callable[[list[dict]], str]


BATCH = {"batch": text("batch")}
TIMES = {"ms": number("ms", ".3f"), "/ plain [quartiles]": ratio}
megabytes = partial(number, form=",.1f", factor=MEGABYTE)

FIDELITY = Shown(
    {name: number(name, ".1e") for name in ("highest", "default")},
    note_fidelity,
)
MEMORY = Shown(
    {
        "CPU compiler, MB": megabytes("predicted_bytes"),
        "device compiler, MB": megabytes("compiled_bytes"),
        "allocated, MB": megabytes("allocated_bytes"),
    },
    note_memory,
)
STEPS = Shown(TIMES | {"steps/s": rate, "peak MB": megabytes("peak_bytes")}, note_steps)
SAMPA = Shown(BATCH | TIMES, note_sampa)
ASYNC = Shown(
    {
        "ms": number("ms", ".3f"),
        "/ SGD [quartiles]": ratio,
        "handed out, ms": number("handed_out_ms", ".3f"),
    },
    note_async,
)
IMAGES = Shown(
    {"dtype": text("dtype"), **BATCH, **TIMES, "images/s": number("images_per_second", ",.0f")},
    note_images,
)


def table(name: str, shown: Shown, rows: list[dict]) -> str:
    """Format the rows of a part, and its result in a few words."""
    listed = [row for row in rows if "text" not in row]  # the note says the others
    grid = [["", *shown.columns]]
    for row in listed:
        columns = shown.columns.values()
        grid.append([row["row"], *("" if "failed" in row else column(row) for column in columns)])
    lines = aligned(grid)
    for place, row in enumerate(listed, start=1):
        if "failed" in row:
            where = [str(row[name]) for name in ("dtype", "batch") if name in row]
            lines[place] = "  ".join([lines[place], *where, f"failed: {row['failed']}"])
    return "\n".join([name, *lines, shown.note(rows)])


def draw(found: dict[str, list[dict]], path: Path, title: str) -> None:
    """Draw a panel for each model whose steps were timed, and for fidelity, memory and SAMPa."""
    panels = panels_of(found)
    columns = min(COLUMNS, len(panels))
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [figures.height_of(max(rows for rows, _ in line)) for line in lines]
    figure = figures.make_figure(columns, heights)
    axes = figure.subplots(
        len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for place, axis in enumerate(axes.flat):
        if place < len(panels):
            panels[place][1](axis)
        else:
            axis.set_axis_off()
    figures.save(figure, path, f"{title}; times: blue in float32, orange in bfloat16")


def panels_of(found: dict[str, list[dict]]) -> list[tuple[int, Callable[[Any], None]]]:
    """Return the number of rows of each panel, and the function that draws it."""
    panels = []
    if rows := whole(found.get("fidelity", [])):
        panels.append((len(rows), partial(draw_fidelity, rows)))
    if rows := whole(found.get("memory", [])):
        panels.append((2 * len(rows), partial(draw_memory, rows)))
    models: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, rows in found.items():
        model, _, dtype = name.rpartition(" ")
        ratios = {row["row"]: row["ratio"] for row in whole(rows) if row.get("ratio")}
        if dtype in DTYPES and ratios.pop("plain", None):
            models.setdefault(model, {})[dtype] = ratios
    for model, ratios in models.items():
        names = list(dict.fromkeys(name for of in ratios.values() for name in of))
        if names:
            panels.append((2 * len(names), partial(draw_steps, model, names, ratios)))
    sizes = {
        name.removeprefix("SAMPa "): rows
        for name, rows in found.items()
        if name.startswith("SAMPa ") and any(row.get("ratio") for row in whole(rows))
    }
    if sizes:
        panels.append((figures.ROWS, partial(draw_sampa, sizes)))
    return panels


def draw_fidelity(rows: list[dict], axis: Any) -> None:
    """Draw the difference of each trajectory at both precisions."""
    names = [row["row"].partition("__")[0] for row in rows]
    for precision, color in (("default", figures.GREY), ("highest", figures.BLUE)):
        values = [1 if row[precision] is None else max(row[precision], FLOOR) for row in rows]
        axis.plot(values, range(len(rows)), "o", color=color)
    axis.axvline(TOLERANCE, color=figures.INK, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.set_xlabel("difference (blue: highest precision, grey: default)")
    passed = sum(row["passed"] for row in rows)
    axis.set_title(f"fidelity: {passed} of {len(rows)} within {TOLERANCE:g}")


def draw_memory(rows: list[dict], axis: Any) -> None:
    """Draw the memory of each row of the language model, as predicted, compiled and allocated."""
    kinds = {
        "predicted_bytes": ("o", figures.BLUE),
        "compiled_bytes": ("|", figures.INK),
        "allocated_bytes": ("x", figures.ORANGE),
    }
    for name, (marker, color) in kinds.items():
        counted = [(row.get(name), place) for place, row in enumerate(rows)]
        points = [(MEGABYTE * count, place) for count, place in counted if count is not None]
        if points:
            style = {"markersize": 10, "markeredgewidth": 2, "mfc": "none"}
            axis.plot(*zip(*points, strict=True), marker, color=color, **style)
    axis.set_yticks(range(len(rows)), [row["row"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("MB (circle: predicted, bar: compiled, cross: used)")
    low, high = predicted_shares(rows)
    axis.set_title(f"memory: the CPU's compiler predicts {low:.2f} to {high:.2f} of the device's")


def draw_steps(
    model: str, names: list[str], ratios: dict[str, dict[str, list[float]]], axis: Any
) -> None:
    """Draw the times of one model relative to the plain step, for each dtype."""
    height = 0.8 / len(ratios)
    for number, (dtype, of) in enumerate(ratios.items()):
        shift = (number - (len(ratios) - 1) / 2) * height
        place = np.array([names.index(name) for name in of]) + shift
        low, middle, high = np.transpose([*of.values()])
        errors = [middle - low, high - middle]
        axis.barh(place, middle, height, color=DTYPES[dtype], xerr=errors, capsize=2)
        for y, x, value in zip(place, high, middle, strict=True):
            offset = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(f"{value:.2f}", (x, y), fontsize=9, **offset)
    axis.axvline(1, color=figures.INK, linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.margins(x=0.12)
    axis.set_xlabel("time / plain step")
    told = [f"{of['sam'][1]:.2f} in {dtype}" for dtype, of in ratios.items() if "sam" in of]
    axis.set_title(f"{model}: SAM takes {', '.join(told)}" if told else model)


def draw_sampa(found: dict[str, list[dict]], axis: Any) -> None:
    """Draw the time of SAMPa relative to the plain step over batch sizes."""
    names = {"sampa": ("one call", "-"), "sampa-separate": ("one by one", "--")}
    sizes = set()
    for (model, rows), color in zip(found.items(), figures.COLORS, strict=False):
        for name, (label, style) in names.items():
            mine = [row for row in whole(rows) if row["row"] == name and row["ratio"]]
            points = [(row["batch"], row["ratio"][1]) for row in mine]
            sizes.update(size for size, _ in points)
            if points:
                label = f"{model.split(',')[0]}, {label}"
                axis.plot(*zip(*points, strict=True), style, color=color, marker="o", label=label)
    axis.set_xscale("log")
    axis.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
    axis.set_xticks([], minor=True)
    axis.axhline(CHEAP, color=figures.GREY, linewidth=0.8)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("batch size")
    axis.set_ylabel("time / plain step")
    told = [f"{model.split(',')[0]} {cheap_until(rows)}" for model, rows in found.items()]
    axis.set_title(f"SAMPa below {CHEAP:g} x plain in one call, up to batch: {', '.join(told)}")
    figures.label_ends(axis)
