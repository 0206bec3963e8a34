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
from examples.common.report import marked, mean_and_error
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


class Interval(NamedTuple):
    """A mean over seeds, and its interval of 95%."""

    value: float
    low: float
    high: float


def interval_of(values: Any) -> Interval:
    """Return the mean over seeds, and two standard errors on both sides."""
    mean, error = mean_and_error(np.asarray(values, float).tolist())
    return Interval(mean, mean - 2 * error, mean + 2 * error)


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


class Series(NamedTuple):
    """Settings of one kind in the order of their parameters."""

    title: str
    noise: float
    settings: list[Setting]


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
        where: Where it is tested.
        number: The number that decides.
        unit: Its unit.
    """

    text: str
    where: str
    number: Interval
    unit: str

    @property
    def verdict(self) -> str:
        """Say whether the interval is on the side of the claim."""
        if self.number.low > 0:
            return "holds here"
        opposite = self.number.high < 0
        return "does not hold here: the opposite" if opposite else "does not hold here: open"


PER_TENFOLD = "points for ten times the parameters"
POINTS = "points"
FACTORS = "powers of ten"


def claims_of(results: Results) -> list[Claim]:
    """Return what the results say about the claims of the paper; incomplete series are left out."""
    noises = sorted({setting.noise for setting in results})
    return [
        claim
        for part in (growth, of_noise, of_sparsity, of_size, of_radius, of_curvature)
        for claim in part(results, noises)
    ]


def series_of(results: Results, noises: Sequence[float]) -> list[Series]:
    """Return the series along which the number of parameters grows, if they have two settings."""
    found = []
    for noise in noises:
        widths = widths_of(results, noise)
        learn = [setting for setting in widths if setting.width >= LEARNS]
        rates = rates_of(results, noise)
        found += [
            Series("widths", noise, widths),
            Series(f"widths from {LEARNS}", noise, learn),
            Series("depths", noise, depths_of(results, noise)),
            Series("widths, one learning rate", noise, rates),
            Series(
                f"widths from {LEARNS}, one learning rate",
                noise,
                [setting for setting in rates if setting.width >= LEARNS],
            ),
        ]
    return [series for series in found if len(series.settings) > 1]


def growth(results: Results, noises: Sequence[float]) -> list[Claim]:
    """SAM's gain grows with the number of parameters."""
    return [
        Claim(
            "SAM's gain grows with the number of parameters",
            f"{series.title}, {describe(series.noise)}",
            interval_of(slope_of(results, series.settings, gain_of)),
            PER_TENFOLD,
        )
        for series in series_of(results, noises)
    ]


def of_noise(results: Results, noises: Sequence[float]) -> list[Claim]:
    """Wrong labels make the gain larger, and make it grow faster."""
    if len(noises) != 2:
        return []
    found = []
    clean, noisy = ({s.title: s for s in series_of(results, [noise])} for noise in noises)
    for title in clean.keys() & noisy.keys():
        pair = clean[title].settings, noisy[title].settings
        gains = [np.mean([gain_of(results[s]) for s in settings], axis=0) for settings in pair]
        slopes = [slope_of(results, settings, gain_of) for settings in pair]
        for text, (less, more), unit in (
            ("SAM's gain is larger with wrong labels", gains, POINTS),
            ("SAM's gain grows faster with wrong labels", slopes, PER_TENFOLD),
        ):
            found.append(Claim(text, title, interval_of(more - less), unit))
    return sorted(found, key=lambda claim: (claim.text, [*clean].index(claim.where)))


def of_sparsity(results: Results, noises: Sequence[float]) -> list[Claim]:
    """SAM gains more in sparse networks than in the dense network that was pruned."""
    found = []
    for pruning in PRUNINGS:
        for noise in noises:
            settings = pruned_of(results, noise, pruning)
            if not settings or settings[0].dense not in results:
                continue
            sparse = np.mean([gain_of(results[setting]) for setting in settings], axis=0)
            dense = gain_of(results[settings[0].dense])
            where = f"pruned, {pruning}, {describe(noise)}"
            text = "SAM's gain is larger in sparse networks than in the dense one"
            found.append(Claim(text, where, interval_of(sparse - dense), POINTS))
    return found


def of_size(results: Results, noises: Sequence[float]) -> list[Claim]:
    """SAM gains more in wide and sparse networks than in small dense ones."""
    found = []
    for pruning in PRUNINGS:
        for noise in noises:
            pairs = [
                (setting, other)
                for setting in pruned_of(results, noise, pruning)
                if (other := as_large_as(setting, results))
            ]
            if not pairs:
                continue
            leads = [gain_of(results[one]) - gain_of(results[other]) for one, other in pairs]
            where = f"pruned, {pruning}, {describe(noise)}"
            text = "SAM's gain is larger in wide sparse networks than in dense ones of their size"
            found.append(Claim(text, where, interval_of(np.mean(leads, axis=0)), POINTS))
    return found


def of_radius(results: Results, noises: Sequence[float]) -> list[Claim]:
    """The best rho grows with the number of parameters."""
    found = []
    for series in series_of(results, noises):
        rhos = [results[setting]["rows"]["sam"]["rho"] for setting in series.settings]
        sizes = [setting.parameters for setting in series.settings]
        value = rank_correlation(sizes, rhos)
        # Without a relation the correlation is above 1.65 / sqrt(n - 1) in about 5 of 100 cases.
        error = 1.65 / math.sqrt(len(sizes) - 1)
        number = Interval(value, value - error, value + error)
        where = f"{series.title}, {describe(series.noise)}"
        text = "The best rho grows with the number of parameters"
        found.append(Claim(text, where, number, "rank correlation"))
    return found


def of_curvature(results: Results, noises: Sequence[float]) -> list[Claim]:
    """SAM's minima are flatter, and their Hessian moments more uniform; more so in large nets."""
    found = []
    names = {
        "top_eigenvalue": "SAM's minima are flatter (top eigenvalue)",
        "s2": "SAM's minima have more uniform Hessian moments (s2)",
    }
    for name, text in names.items():
        for series in series_of(results, noises):
            if series.title not in (f"widths from {LEARNS}", "widths, one learning rate"):
                continue

            def flatter(result, name=name):
                return -ratio_of(result, name)

            where = f"{series.title}, {describe(series.noise)}"
            means = np.mean([flatter(results[setting]) for setting in series.settings], axis=0)
            found.append(Claim(text, where, interval_of(means), FACTORS))
            slopes = slope_of(results, series.settings, flatter)
            more = f"{text}, the more so the more parameters"
            found.append(Claim(more, where, interval_of(slopes), f"{FACTORS} for ten times"))
    return sorted(found, key=lambda claim: claim.text)


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


def typical(result: Result, row: str, name: str) -> float:
    """Return the median of a measure over the seeds for which it was taken, or NaN."""
    values = measured(result, row, name)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def cells_of(setting: Setting, result: Result) -> list[str]:
    """Return the cells of one line of the table."""
    base, sam = better_baseline(result), result["rows"]["sam"]
    accuracy = 100 * measured(result, base, "test_accuracy").mean()
    cells = [network_of(setting), f"{setting.parameters:,}", f"{setting.noise:.0%} wrong"]
    cells += [base, f"{accuracy:.2f}", shown(interval_of(gain_of(result))), marked(sam, "rho")]
    cells += [f"{100 * measured(result, r, 'train_accuracy').mean():.1f}" for r in (base, "sam")]
    for name in ("top_eigenvalue", "s2", "linearization"):
        numbers = [typical(result, row, name) for row in (base, "sam")]
        cells += ["" if math.isnan(number) else f"{number:.3g}" for number in numbers]
    return cells


def table_of(results: Results) -> list[list[str]]:
    """Return the table, its head first."""
    return [[*HEAD], *(cells_of(setting, result) for setting, result in results.items())]


def claims_table(claims: Sequence[Claim]) -> list[list[str]]:
    """Return the claims as a table, its head first."""
    head = ["claim", "where", "measured", "unit", "verdict"]
    return [head, *([c.text, c.where, shown(c.number), c.unit, c.verdict] for c in claims)]


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
    gains = [interval_of(gain_of(results[setting])) for setting in settings]
    y = [gain.value for gain in gains]
    ends = [[g.value - g.low for g in gains], [g.high - g.value for g in gains]]
    axes.errorbar(x, y, ends, fmt="none", color=color, linewidth=1, capsize=2)
    axes.plot(x, y, "o-", color=color, markersize=4, linewidth=1.5, label=label)


def name_of(noise: float) -> str:
    """Name the labels of a line."""
    return f"{noise:.0%} wrong" if noise else "clean"


def draw_gains(
    axes: Axes, results: Results, noises: Sequence[float], choose: Chooser, name: str
) -> None:
    """Draw SAM's gain over the parameters, with a line for each kind of labels."""
    slopes = []
    for noise in noises:
        settings = choose(results, noise)
        draw_line(axes, results, settings, COLORS[noise], name_of(noise))
        if len(settings) > 1:
            slope = interval_of(slope_of(results, settings, gain_of))
            slopes.append(f"{name_of(noise)} {slope.value:+.1f}")
    if not axes.lines:
        axes.set_axis_off()  # nothing of this kind was trained
        return
    over_gains(axes)
    text = f": per tenfold {', '.join(slopes)}" if slopes else ""
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
    leads = {claim.where.split(", ")[1]: claim.number.value for claim in of_size(results, [noise])}
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
        found.append(f"{name_of(noise)} {rank_correlation(sizes, rhos):+.2f}")
    if not axes.lines:
        axes.set_axis_off()
        return
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_yticks(RHOS, [f"{rho:g}" for rho in RHOS])
    over_parameters(axes, "chosen ρ")
    axes.set_ylim(bottom=-0.002)
    axes.set_title(f"Chosen ρ: rank correlation {', '.join(found)}")
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
