"""The table and the figure of the overparameterization study, from its results alone."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from examples.common import figures
from examples.common.digits_task import describe
from examples.common.intervals import mean_interval
from examples.common.report import marked
from examples.compare.overparameterization_claims import (
    LEARNS,
    RATE,
    SIZE,
    Result,
    Results,
    better_baseline,
    depths_of,
    gain_of,
    measured,
    name_of,
    of_sparsity,
    pruned_of,
    rank_correlation,
    rates_of,
    ratio_of,
    shown,
    slope_of,
    typical,
    widths_of,
)
from examples.compare.overparameterization_training import PRUNINGS, Setting

COLORS = {0.0: figures.BLUE, 0.3: figures.RED}
PRUNED = {"": figures.GREY, "random": figures.GREEN, "magnitude": figures.PINK}
TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30)  # of gains, in points
RHOS = (0, 0.01, 0.1, 1)


# The table

HEAD = (
    *("network", "parameters", "labels", "baseline", "its accuracy, %", "SAM's gain"),
    *("rho", "train accuracy, %", "SAM's", "top eigenvalue", "SAM's", "s2", "SAM's"),
    *("from linear", "SAM's"),
)


def network_of(setting: Setting) -> str:
    """Describe the network of a setting."""
    layers = f"{setting.width} x {setting.depth}"
    if setting.pruning:
        return f"{layers}, {setting.sparsity:.0%} pruned, {setting.pruning}"
    return f"{layers}, rate {setting.learning_rate:g}" if setting.learning_rate else layers


def cells_of(setting: Setting, result: Result) -> list[str]:
    """Return the cells of one line of the table."""
    base = better_baseline(result)
    cells = [network_of(setting), f"{setting.parameters:,}", f"{setting.noise:.0%} wrong"]
    cells += [base, *gain_cells(result)]
    cells += [f"{100 * measured(result, r, 'train_accuracy').mean():.1f}" for r in (base, "sam")]
    for name in ("top_eigenvalue", "s2", "linearization"):
        numbers = [typical(result, row, name) for row in (base, "sam")]
        cells += ["" if math.isnan(number) else f"{number:.3g}" for number in numbers]
    return cells


def table_of(results: Results) -> list[list[str]]:
    """Return the table, its head first."""
    return [[*HEAD], *(cells_of(setting, result) for setting, result in results.items())]


def gains_table(results: Results) -> list[list[str]]:
    """Return accuracies, gains and radii with one line for each network, the head first."""
    noises = sorted({setting.noise for setting in results})
    head = ["network", "parameters"]
    for noise in noises:
        head += [f"SGD, %, {name_of(noise)}", "SAM's gain", "rho"]
    lines = []
    for setting in dict.fromkeys(setting._replace(noise=0.0) for setting in results):
        line = [network_of(setting), f"{setting.parameters:,}"]
        for noise in noises:
            result = results.get(setting._replace(noise=noise))
            line += ["", "", ""] if result is None else gain_cells(result)
        lines.append(line)
    return [head, *lines]


def gain_cells(result: Result) -> list[str]:
    """Return the accuracy of the better baseline, SAM's gain, and its rho."""
    accuracy = 100 * measured(result, better_baseline(result), "test_accuracy").mean()
    gain = shown(mean_interval(gain_of(result)))
    return [f"{accuracy:.2f}", gain, marked(result["rows"]["sam"], "rho")]


# The figure

Chooser = Callable[[Iterable[Setting], float], list[Setting]]


def draw(results: Results, path: Path, title: str) -> None:
    """Draw the gains, the radii, and what was measured at the end, over the parameters."""
    figure = figures.make_figure(3, [figures.height_of()] * 3)
    panels = iter(figure.subplots(3, 3).ravel())
    noises = sorted({setting.noise for setting in results})
    for name, choose in (
        ("learning rate tuned", widths_of),
        (f"learning rate {RATE:g}", rates_of),
        ("depths", depths_of),
    ):
        draw_gains(next(panels), results, noises, choose, name)
    for noise in COLORS:
        draw_sparse(next(panels), results, noise)
    draw_radii(next(panels), results, noises)
    for name, text in (
        ("top_eigenvalue", "top eigenvalue"),
        ("s2", "non-uniformity s₂"),
        ("linearization", "distance from the linearization"),
    ):
        draw_measure(next(panels), results, noises, name, text)
    figures.save(figure, path, title)


def over_parameters(axes: Axes, label: str) -> None:
    """Let the axes show something over the number of parameters."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="parameters", ylabel=label)
    axes.grid(alpha=0.25)


def over_gains(axes: Axes) -> None:
    """Let the axes show gains of several sizes, below and above 0."""
    axes.set_yscale("symlog", linthresh=1)
    low, high = axes.get_ylim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.axhline(0, color=figures.INK, linewidth=0.8)
    over_parameters(axes, "SAM's gain, points")


def draw_line(
    axes: Axes, results: Results, settings: Sequence[Setting], color: str, label: str
) -> None:
    """Draw the gains of some settings with their intervals, over the parameters."""
    if not settings:
        return
    x = [setting.parameters for setting in settings]
    gains = [mean_interval(gain_of(results[setting])) for setting in settings]
    y = [gain.value for gain in gains]
    ends = [[g.value - g.low for g in gains], [g.high - g.value for g in gains]]
    axes.errorbar(x, y, ends, fmt="none", color=color, linewidth=1, capsize=2)
    axes.plot(x, y, "o-", color=color, markersize=4, linewidth=1.5, label=label)


def draw_gains(
    axes: Axes, results: Results, noises: Sequence[float], choose: Chooser, name: str
) -> None:
    """Draw SAM's gain over the parameters, with a line for each kind of labels."""
    slopes = []
    for noise in noises:
        settings = choose(results, noise)
        draw_line(axes, results, settings, COLORS[noise], name_of(noise))
        learn = [setting for setting in settings if setting.width >= LEARNS]
        if len(learn) > 1:
            slope = mean_interval(slope_of(results, learn, gain_of))
            slopes.append(f"{name_of(noise)} {slope.value:+.1f}")
    if not axes.lines:
        axes.set_axis_off()  # nothing of this kind was trained
        return
    over_gains(axes)
    text = f": {', '.join(slopes)} per tenfold from {LEARNS} units on" if slopes else ""
    axes.set_title(f"Gain, {name}{text}")
    figures.label_ends(axes)


def draw_sparse(axes: Axes, results: Results, noise: float) -> None:
    """Draw SAM's gain in pruned networks beside that in dense ones."""
    dense = widths_of(results, noise)
    lines = {pruning: pruned_of(results, noise, pruning) for pruning in PRUNINGS}
    sizes = [s.parameters for settings in lines.values() for s in settings]
    if sizes:
        dense = [s for s in dense if min(sizes) / 2 <= s.parameters <= 4 * max(sizes)]
    draw_line(axes, results, dense, PRUNED[""], "dense")
    for pruning, settings in lines.items():
        draw_line(axes, results, settings, PRUNED[pruning], pruning)
    leads = {
        claim.where.split(", ")[1]: claim.number.value
        for claim in of_sparsity(results, [noise])
        if claim.text == SIZE
    }
    text = ", ".join(f"{pruning} {lead:+.1f}" for pruning, lead in leads.items())
    over_gains(axes)
    axes.set_title(f"Sparse, {describe(noise)}{': over dense ' * bool(text)}{text}")
    figures.label_ends(axes)


def draw_radii(axes: Axes, results: Results, noises: Sequence[float]) -> None:
    """Draw the chosen rho over the parameters."""
    found = []
    for noise in noises:
        settings = widths_of(results, noise)
        if not settings:
            continue
        rhos = [results[setting]["rows"]["sam"]["rho"] for setting in settings]
        sizes = [setting.parameters for setting in settings]
        axes.plot(sizes, rhos, "o-", color=COLORS[noise], markersize=4, label=name_of(noise))
        if len(settings) > 1:
            found.append(f"{name_of(noise)} {rank_correlation(sizes, rhos):+.2f}")
    if not axes.lines:
        axes.set_axis_off()
        return
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_yticks(RHOS, [f"{rho:g}" for rho in RHOS])
    over_parameters(axes, "chosen ρ")
    axes.set_ylim(bottom=-0.002)
    axes.set_title(f"Chosen ρ{': rank correlation ' * bool(found)}{', '.join(found)}")
    figures.label_ends(axes)


def draw_measure(
    axes: Axes, results: Results, noises: Sequence[float], name: str, text: str
) -> None:
    """Draw the median of a measure over the parameters, for the baseline and for SAM."""
    ratios = []
    for noise in noises:
        settings = [s for s in widths_of(results, noise) if s.width >= LEARNS]
        for is_sam, style in ((False, "o:"), (True, "o-")):
            rows = ["sam" if is_sam else better_baseline(results[s]) for s in settings]
            y = [typical(results[s], row, name) for s, row in zip(settings, rows, strict=True)]
            label = f"{'SAM' if is_sam else 'SGD'}, {name_of(noise)}"
            x = [setting.parameters for setting in settings]
            if np.isfinite(y).any():
                axes.plot(x, y, style, color=COLORS[noise], markersize=4, label=label)
        means = [np.mean(ratio_of(results[s], name)) for s in settings]
        if means:
            ratios.append(f"{name_of(noise)} {10 ** np.mean(means):.2g}")
    if not axes.lines:
        axes.set_axis_off()
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    over_parameters(axes, text)
    axes.set_title(f"{text[0].upper()}{text[1:]}: SAM's over SGD's, {', '.join(ratios)}")
    figures.label_ends(axes)
