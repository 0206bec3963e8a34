"""What the results of the overparameterization study say about the claims of the paper.

A result is what the file of one setting holds. All differences are paired by seed.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from examples.common.intervals import Interval, mean_interval
from examples.compare.overparameterization_training import PRUNINGS, Setting

BASELINES = ("base", "base2x")
Result = dict[str, Any]
Results = dict[Setting, Result]
LEARNS = 16  # from this width on, all rows learn the task
RATE = 0.1  # where it is not tuned
LEAST = 1e-6  # what stands for a smaller number before its logarithm is taken


def shown(interval: Interval, digits: int = 2, sign: str = "+") -> str:
    """Format a number with its interval."""
    value, low, high = (f"{number:{sign}.{digits}f}" for number in interval)
    return f"{value} [{low}, {high}]"


def name_of(noise: float) -> str:
    """Name the labels of a line."""
    return f"{noise:.0%} wrong" if noise else "clean"


# Numbers of one setting


def measured(result: Result, row: str, name: str) -> np.ndarray:
    """Return a measure of a row for each seed; what is missing is NaN."""
    return np.array(result["rows"][row]["measures"][name], float)


def better_baseline(result: Result) -> str:
    """Return the baseline with the higher mean test accuracy."""
    return max(BASELINES, key=lambda row: measured(result, row, "test_accuracy").mean())


def gain_of(result: Result) -> np.ndarray:
    """Return SAM's lead over the better baseline for each seed, in points."""
    return lead_over(better_baseline(result), result)


def lead_over(baseline: str, result: Result) -> np.ndarray:
    """Return SAM's lead over a baseline for each seed, in points."""
    sam, base = (measured(result, row, "test_accuracy") for row in ("sam", baseline))
    return 100 * (sam - base)


def ratio_of(result: Result, name: str) -> np.ndarray:
    """Return log10 of a measure of SAM over that of the better baseline, for each seed."""
    sam, base = (measured(result, row, name) for row in ("sam", better_baseline(result)))
    is_there = np.isfinite(sam) & np.isfinite(base)
    return np.log10(np.maximum(sam[is_there], LEAST) / np.maximum(base[is_there], LEAST))


def typical(result: Result, row: str, name: str) -> float:
    """Return the median of a measure over the seeds for which it was taken, or NaN."""
    values = measured(result, row, name)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


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
GAINS: dict[str, Callable[[Result], np.ndarray]] = {
    "{}": gain_of,
    "{}; over SGD with as many steps": functools.partial(lead_over, "base"),
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
    found = []
    for text, gain in GAINS.items():
        for part in series:
            slope = mean_interval(slope_of(results, part.settings, gain))
            found.append(Claim(text.format(GROWS), part.title, part.noise, slope))
    return found


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
            for (claim, pairs), (text, gain) in itertools.product(rivals.items(), GAINS.items()):
                leads = [gain(results[one]) - gain(results[other]) for one, other in pairs]
                if leads:
                    number = mean_interval(np.mean(leads, axis=0))
                    where = f"pruned, {pruning}"
                    found.append(Claim(text.format(claim), where, noise, number))
    return found


def of_radius(results: Results, series: Sequence[Series]) -> list[Claim]:
    """The best rho grows with the number of parameters.

    Without a relation, a rank correlation is outside ±1.96 / sqrt(n − 1) in about 5 of 100 cases.
    With four networks or fewer no correlation is, so nothing is claimed.
    """
    found = []
    for part in series:
        if len(part.settings) <= 4:
            continue
        rhos = [results[setting]["rows"]["sam"]["rho"] for setting in part.settings]
        sizes = [setting.parameters for setting in part.settings]
        value, error = rank_correlation(sizes, rhos), 1.96 / math.sqrt(len(sizes) - 1)
        number = Interval(value, max(-1.0, value - error), min(1.0, value + error))
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
