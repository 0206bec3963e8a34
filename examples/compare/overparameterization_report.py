"""The table, the claims and the figure of the overparameterization study, from its results alone.

A result is what the file of one setting holds. All differences are paired by seed.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from examples.common import figures
from examples.common.digits_task import describe
from examples.common.report import marked
from examples.compare.intervals import Interval, mean_interval
from examples.compare.overparameterization_training import PRUNINGS, Setting

BASELINES = ("base", "base2x")
Result = dict[str, Any]
Results = dict[Setting, Result]
LEARNS = 16  # from this width on, all rows learn the task
COLORS = {0.0: figures.BLUE, 0.3: figures.RED}
PRUNED = {"": figures.GREY, "random": figures.GREEN, "magnitude": figures.PINK}
RATE = 0.1  # where it is not tuned
TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30)  # of gains, in points
RHOS = (0, 0.01, 0.1, 1)
LEAST = 1e-6  # what is drawn for a number that is not above 0 on a logarithmic axis


def shown(interval: Interval, digits: int = 2, sign: str = "+") -> str:
    """Format a number with its interval."""
    value, low, high = (f"{number:{sign}.{digits}f}" for number in interval)
    return f"{value} [{low}, {high}]"


# Numbers of one setting


def measured(result: Result, row: str, name: str) -> np.ndarray:
    """Return a measure of a row for each seed; what is missing is NaN."""
    return np.array(result["rows"][row]["measures"][name], float)


def better_baseline(result: Result) -> str:
    """Return the baseline with the higher mean test accuracy."""
    return max(BASELINES, key=lambda row: measured(result, row, "test_accuracy").mean())


def gain_of(result: Result) -> np.ndarray:
    """Return SAM's lead over the better baseline for each seed, in points."""
    sam, base = (measured(result, row, "test_accuracy") for row in ("sam", better_baseline(result)))
    return 100 * (sam - base)


def ratio_of(result: Result, name: str) -> np.ndarray:
    """Return log10 of a measure of SAM over that of the better baseline, for each seed."""
    sam, base = (measured(result, row, name) for row in ("sam", better_baseline(result)))
    is_there = np.isfinite(sam) & np.isfinite(base)
    return np.log10(np.maximum(sam[is_there], LEAST) / np.maximum(base[is_there], LEAST))


# Series of settings


def chosen(results: Iterable[Setting], noise: float, **wanted: Any) -> list[Setting]:
    """Return the settings with these labels whose fields have the wanted values, by size."""
    wanted = {"sparsity": 0.0, "learning_rate": 0.0, **wanted}
    found = [
        s
        for s in results
        if s.noise == noise and all(getattr(s, name) == value for name, value in wanted.items())
    ]
    return sorted(found, key=lambda setting: setting.parameters)


def widths_of(results: Iterable[Setting], noise: float) -> list[Setting]:
    """Return the dense networks with two hidden layers, by size."""
    return chosen(results, noise, depth=2)


def depths_of(results: Iterable[Setting], noise: float, width: int = 64) -> list[Setting]:
    """Return the networks of one width, by depth."""
    return chosen(results, noise, width=width)


def rates_of(results: Iterable[Setting], noise: float) -> list[Setting]:
    """Return the networks whose learning rate is given, by size."""
    results = list(results)
    rates = {setting.learning_rate for setting in results if setting.learning_rate}
    return [s for rate in sorted(rates) for s in chosen(results, noise, learning_rate=rate)]


def pruned_of(results: Iterable[Setting], noise: float, pruning: str) -> list[Setting]:
    """Return the pruned networks, by size."""
    found = [s for s in results if s.noise == noise and s.pruning == pruning]
    return sorted(found, key=lambda setting: setting.parameters)


def as_large_as(setting: Setting, results: Iterable[Setting]) -> Setting | None:
    """Return the dense network with the same labels whose size is nearest, if it is within 5%."""
    dense = widths_of(results, setting.noise)
    if not dense:
        return None
    nearest = min(dense, key=lambda s: abs(math.log(s.parameters / setting.parameters)))
    is_near = abs(nearest.parameters / setting.parameters - 1) <= 0.05
    return nearest if is_near else None


def slope_of(
    results: Results, settings: Sequence[Setting], number: Callable[[Result], np.ndarray]
) -> np.ndarray:
    """Return for each seed the slope of a number over log10 of the parameters (least squares)."""
    x = np.log10([setting.parameters for setting in settings])
    y = np.stack([number(results[setting]) for setting in settings])
    x = x - x.mean()
    return x @ y / (x @ x)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's correlation; equal numbers share the mean of their ranks."""
    first, second = (
        np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])
        for values in map(np.asarray, (one, other))
    )
    if min(np.ptp(first), np.ptp(second)) == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


# Claims


class Claim(NamedTuple):
    """A claim of the paper, and what is measured here.

    Attributes:
        text: The claim; it holds if the number is above 0.
        where: Along which networks it is tested.
        noise: Share of wrong labels; a comparison with clean labels has that of the noisy ones.
        number: The number that decides.
    """

    text: str
    where: str
    noise: float
    number: Interval

    @property
    def verdict(self) -> str:
        """Say whether the interval is on the side of the claim."""
        if self.number.low > 0:
            return HOLDS
        return OPPOSITE if self.number.high < 0 else OPEN


class Series(NamedTuple):
    """Networks with the same labels, by size."""

    title: str
    noise: float
    settings: list[Setting]


HOLDS, OPPOSITE, OPEN = "holds here", "the opposite holds here", "open"
GROWS = "SAM's gain grows with the parameters (points for ten times as many)"
NOISE = "SAM's gain is larger with wrong labels (points)"
NOISE_GROWS = "SAM's gain grows faster with wrong labels (points for ten times the parameters)"
SPARSE = "SAM's gain is larger in sparse networks than in the dense one (points)"
SIZE = "SAM's gain is larger in wide sparse networks than in dense ones of their size (points)"
RADIUS = "The best rho grows with the parameters (rank correlation)"
MINIMA = {
    "top_eigenvalue": "SAM's minima are flatter (top eigenvalue, powers of ten)",
    "s2": "SAM's minima have more uniform Hessian moments (s2, powers of ten)",
}
MORE = "{}, more so with ten times the parameters"


def claims_of(results: Results) -> list[Claim]:
    """Return what the results say about the claims of the paper; what is missing is left out."""
    noises = sorted({setting.noise for setting in results})
    series = [part for noise in noises for part in series_of(results, noise)]
    found = [
        *growth(results, series),
        *of_noise(results, series),
        *of_sparsity(results, noises),
        *of_radius(results, series),
        *of_curvature(results, series),
    ]
    order = list(dict.fromkeys(claim.text for claim in found))
    return sorted(found, key=lambda claim: order.index(claim.text))


def series_of(results: Results, noise: float) -> list[Series]:
    """Return the series along which the number of parameters grows, if they have two networks.

    The smallest networks do not learn the task. Those with at least `LEARNS` units do.
    """
    widths, rates = widths_of(results, noise), rates_of(results, noise)
    large, large_rates = (
        [setting for setting in settings if setting.width >= LEARNS] for settings in (widths, rates)
    )
    found = [
        Series("all widths", noise, widths),
        Series(f"widths from {LEARNS}", noise, large),
        Series(f"widths from {LEARNS}, learning rate {RATE:g}", noise, large_rates),
        Series("depths", noise, depths_of(results, noise)),
    ]
    return [series for series in found if len(series.settings) > 1]


def growth(results: Results, series: Sequence[Series]) -> list[Claim]:
    """SAM's gain grows with the number of parameters."""
    return [
        Claim(
            GROWS, part.title, part.noise, mean_interval(slope_of(results, part.settings, gain_of))
        )
        for part in series
    ]


def of_noise(results: Results, series: Sequence[Series]) -> list[Claim]:
    """Wrong labels make the gain larger, and make it grow faster."""
    found = []
    for noisy in series:
        for clean in series:
            if noisy.title != clean.title or clean.noise >= noisy.noise:
                continue
            pair = [part.settings for part in (clean, noisy)]
            gains = [np.mean([gain_of(results[s]) for s in part], axis=0) for part in pair]
            slopes = [slope_of(results, part, gain_of) for part in pair]
            for text, (less, more) in ((NOISE, gains), (NOISE_GROWS, slopes)):
                found.append(Claim(text, noisy.title, noisy.noise, mean_interval(more - less)))
    return found


def of_sparsity(results: Results, noises: Sequence[float]) -> list[Claim]:
    """SAM gains more in sparse networks: than in the dense one, and than in small dense ones."""
    found = []
    for pruning in PRUNINGS:
        for noise in noises:
            settings = pruned_of(results, noise, pruning)
            rivals = {
                SPARSE: [(s, s.dense) for s in settings if s.dense in results],
                SIZE: [(s, other) for s in settings if (other := as_large_as(s, results))],
            }
            for text, pairs in rivals.items():
                leads = [gain_of(results[one]) - gain_of(results[other]) for one, other in pairs]
                if leads:
                    number = mean_interval(np.mean(leads, axis=0))
                    found.append(Claim(text, f"pruned, {pruning}", noise, number))
    return found


def of_radius(results: Results, series: Sequence[Series]) -> list[Claim]:
    """The best rho grows with the number of parameters.

    Without a relation, a rank correlation is outside ±1.96 / sqrt(n − 1) in about 5 of 100 cases.
    """
    found = []
    for part in series:
        rhos = [results[setting]["rows"]["sam"]["rho"] for setting in part.settings]
        sizes = [setting.parameters for setting in part.settings]
        value, error = rank_correlation(sizes, rhos), 1.96 / math.sqrt(len(sizes) - 1)
        number = Interval(value, value - error, value + error)
        found.append(Claim(RADIUS, part.title, part.noise, number))
    return found


def of_curvature(results: Results, series: Sequence[Series]) -> list[Claim]:
    """SAM's minima are flatter, and their Hessian moments more uniform; more so in large nets."""
    found = []
    for name, text in MINIMA.items():
        for part in series:
            if not part.title.startswith(f"widths from {LEARNS}"):
                continue

            def flatter(result, name=name):
                return -ratio_of(result, name)

            means = np.mean([flatter(results[setting]) for setting in part.settings], axis=0)
            slopes = slope_of(results, part.settings, flatter)
            for claim, values in ((text, means), (MORE.format(text), slopes)):
                found.append(Claim(claim, part.title, part.noise, mean_interval(values)))
    return found


def claims_table(claims: Sequence[Claim]) -> list[list[str]]:
    """Return the claims with a column for each kind of labels, the head first."""
    noises = sorted({claim.noise for claim in claims})
    cells = {(c.text, c.where, c.noise): f"{shown(c.number)}: {c.verdict}" for c in claims}
    lines = [
        [text, where, *(cells.get((text, where, noise), "") for noise in noises)]
        for text, where in dict.fromkeys(key[:2] for key in cells)
    ]
    return [["claim", "where", *map(name_of, noises)], *lines]


def verdicts(claims: Sequence[Claim]) -> list[str]:
    """Return a sentence for each claim: how often it holds."""
    found = []
    for text in dict.fromkeys(claim.text for claim in claims):
        mine = [claim.verdict for claim in claims if claim.text == text]
        holds, opposite = mine.count(HOLDS), mine.count(OPPOSITE)
        found.append(f"{text}: holds in {holds} of {len(mine)} tests, the opposite in {opposite}")
    return found


# The table

HEAD = (
    *("network", "parameters", "labels", "baseline", "its accuracy, %", "SAM's gain"),
    *("rho", "train accuracy, %", "SAM's", "top eigenvalue", "SAM's", "s2", "SAM's"),
    *("from linear", "SAM's"),
)


def name_of(noise: float) -> str:
    """Name the labels of a line."""
    return f"{noise:.0%} wrong" if noise else "clean"


def network_of(setting: Setting) -> str:
    """Describe the network of a setting."""
    layers = f"{setting.width} x {setting.depth}"
    if setting.pruning:
        return f"{layers}, {setting.sparsity:.0%} pruned, {setting.pruning}"
    return f"{layers}, rate {setting.learning_rate:g}" if setting.learning_rate else layers


def typical(result: Result, row: str, name: str) -> float:
    """Return the median of a measure over the seeds for which it was taken, or NaN."""
    values = measured(result, row, name)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


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
