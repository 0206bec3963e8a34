"""Share of SAM: with which share of SAM's gradients is SAM's accuracy kept?

    python examples/claims/share_of_sam.py
    python examples/claims/share_of_sam.py --seeds 5 --noise 0

Many methods take SAM's sharp gradient on some steps, on some examples or for some layers, or not at
all. Most of them have a number that says how often or how much. This script gives that number
several values and draws a curve for each method: the gradients spent, as a share of SAM's, and how
far the test accuracy is behind SAM's. The base optimizer has half of SAM's gradients.

The task is that of digits.py: a small network learns 1000 of scikit-learn's digits, a share of
them with wrong labels. All arms train for equal epochs, because papers compare like that. Each arm
has its own learning rate and rho, chosen on a validation split, with seeds that are not reported.
Differences are paired by seed. Gradients are counted, in passes over one batch: a gradient of half
of a batch is half a gradient, and a forward pass without a gradient is a third of one.

A tuned rho makes up for rare sharp steps. So some arms train a second time, with the learning rate
and rho that were chosen for SAM: the claims say "with SAM's learning rate and rho".

"AE-SAM, random" is a control: it takes as many sharp steps as AE-SAM, drawn at random, with one
probability or with AE-SAM's own share in each epoch.

The script prints the curves and each claim with its number and the verdict, and writes
results.json, share_of_sam.json and share_of_sam.png to --out. It takes about eight minutes on two
CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "share_of_sam"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments.new_parser(__doc__)
    arguments.add_settings(parser, 20, NAME)
    args = parser.parse_args(argv)
    arguments.check_settings(parser, args)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import samx
from examples.claims.arms import AS_SAM, as_chosen, points, train_arms
from examples.claims.arms import of as result_of
from examples.claims.claim import Claim, Found, found_of, print_claims, rounded, save
from examples.common import figures, files
from examples.common.digits_task import STEPS_PER_EPOCH, describe
from examples.common.intervals import Interval, mean_interval
from examples.common.output import choose_folder
from examples.common.registry import RADIUS, VARIANTS, Make, Variant, by_setting, in_front, of
from examples.common.report import MARK, Report, aligned, marked
from samx import policies

MARGIN = 0.5  # points behind SAM that still count as SAM's accuracy
SPEED_UP = 0.43  # share of sharp steps with which training is 40% faster: 2 / (1 + 0.43) = 1.4
SHORT_WINDOW = 10  # steps, so that 400 steps have as many windows as the authors' first 2000

PERIODS, SHARES = (2, 5, 10), (0.5, 0.2, 0.1)  # steps from one sharp step to the next, and 1 / that

LOWEST = -8.5  # points over SAM in the figure

Knob = Any  # a number, or a pair of numbers


class Curve(NamedTuple):
    """A method, and the values of its own number.

    Attributes:
        make: `knob -> Make`.
        knobs: The values.
        start: Where the search for rho begins.
    """

    make: Callable[[Knob], Make]
    knobs: tuple[Knob, ...]
    start: float = RADIUS


def on_steps(policy: policies.Policy) -> Make:
    """Return SAM on the steps that a policy chooses."""
    return in_front(lambda rho: samx.perturb_if(policy, samx.sam(rho)))


def periodic(period: int) -> Make:
    """Build SAM on every so many steps."""
    return on_steps(policies.every(period))


def rst(probability: Any) -> Make:
    """Build RST with a probability, a number or a schedule."""
    return on_steps(policies.random(probability))


def g_rst(probability: float) -> Make:
    """Build G-RST: the sharp gradient's weight is 1 / probability."""

    def mixed(rho):
        both = samx.combinations.mix(samx.sam(rho), 1 / probability)
        return samx.perturb_if(policies.random(probability), both)

    return in_front(mixed)


def falling(name: str, steps: int, ends: tuple[float, float]) -> Make:
    """Build AE-SAM or AE-LookSAM with a threshold that falls in a line."""
    return of(name, threshold=optax.linear_schedule(*ends, steps))


def windows(name: str, window: int) -> Make:
    """Build vSAM or ARSAM with vSAM's quota; the warm-up is one window."""
    return of(name, policy=policies.quota(window, warmup_steps=window))


def sampled(name: str, probability: float) -> Make:
    """Build vSAM or ARSAM with sharp steps that are drawn at random."""
    return of(name, policy=policies.random(probability))


def ausam(fraction: float) -> Make:
    """Build AUSAM on a part of each batch."""
    return by_setting(lambda rho, here: samx.ausam(rho, fraction, here.num_examples))


def ksam(fraction: float) -> Make:
    """Build K-SAM on the examples with the largest losses."""
    return by_setting(lambda rho, here: samx.ksam(rho, round(fraction * here.batch_size)))


def esam(fraction: float) -> Make:
    """Build ESAM that descends on a part of the batch; 0.6 of the tensors are perturbed."""
    return in_front(lambda rho: samx.esam(rho, 0.6, fraction))


def sl_sam(groups: int) -> Make:
    """Build SL-SAM that trains one of so many groups of layers in a step."""
    return lambda rho, base, setting: samx.sl_sam(base, rho, groups)


def single(row: str) -> Curve:
    """Return the curve of one point: a row of the registry as it is."""
    return Curve(lambda knob: VARIANTS[row].make, ("",), VARIANTS[row].start)


def curves_of(steps: int) -> dict[str, Curve]:
    """Return the curves of a training of so many steps."""
    return {
        "base": single("base"),
        "sam": single("sam"),
        "periodic": Curve(periodic, PERIODS),
        "looksam": Curve(lambda k: of("looksam", period=k), PERIODS),
        "looksam-0.7": Curve(lambda k: of("looksam", period=k, alpha=0.7), (5,)),
        "look-layer-sam": Curve(lambda k: of("look_layer_sam", period=k), (5,), 0.005),
        "rst": Curve(rst, (*SHARES, 0.75)),
        "g-rst": Curve(g_rst, (0.2, 0.5)),
        "ae-sam": Curve(partial(falling, "ae_sam", steps), ((2.0, 0.0), (1.0, -1.0), (0.0, -2.0))),
        "ae-looksam": Curve(partial(falling, "ae_looksam", steps), ((2.0, 0.5), (1.0, -1.0))),
        "vsam": Curve(partial(windows, "vsam"), (50, SHORT_WINDOW)),
        "vsam, random": Curve(partial(sampled, "vsam"), (0.2, SPEED_UP)),
        "arsam": Curve(partial(windows, "arsam"), (50, SHORT_WINDOW)),
        "arsam, random": Curve(partial(sampled, "arsam"), (0.2, SPEED_UP)),
        "ausam": Curve(ausam, (0.25, 0.5, 0.75)),
        "ksam": Curve(ksam, (0.25, 0.5)),
        "esam": Curve(esam, (0.1, 0.5)),
        "sl-sam": Curve(sl_sam, (2, 3)),
        "momentum-sam": single("momentum-sam"),
        "saf": single("saf"),
        "mesa": single("mesa"),
    }


CONTROL = "ae-sam, random"
PAPERS_THRESHOLD = "ae-sam 1 to -1"
# Arms that train a second time, with SAM's learning rate and rho
ALIKE = ("periodic 5", "looksam 5", "rst 0.2", "vsam, random 0.2")
CLEAN = ("base", "ksam 0.5")  # arms that are trained with clean labels too
PANELS = {
    "A clock chooses the steps": ("periodic", "looksam", "looksam-0.7", "look-layer-sam"),
    "A coin chooses the steps": ("rst", "g-rst"),
    "The length of the gradient chooses": ("ae-sam", CONTROL, "ae-looksam"),
    "A quota or a coin; the rest is reused": ("vsam", "vsam, random", "arsam", "arsam, random"),
    "Part of the examples or layers": ("ausam", "ksam", "esam", "sl-sam"),
    "No sharp gradient": ("momentum-sam", "saf", "mesa"),
}
METHODS = ("base", "sam", *(method for methods in PANELS.values() for method in methods))

# What the papers say.
OVER = "test accuracy over {}'s, points; digits with wrong labels, equal epochs"
OVER_SAM, OVER_BASE = OVER.format("SAM"), OVER.format("the base optimizer")
CLAIMS = {
    "sam-base": Claim(
        ("sam",),
        "Better than the base optimizer, wrong labels included.",
        "Tables 1 and 4",
        OVER_BASE,
        low=0.0,
        why="the gain that the other methods are to keep",
    ),
    "looksam-share": Claim(
        ("looksam",),
        "SAM's accuracy, although little more than the base's gradients are spent.",
        "abstract",
        f"{OVER_SAM}; one step in 5 is sharp",
        low=-MARGIN,
    ),
    "looksam-periodic": Claim(
        ("looksam", "periodic"),
        "Reusing a part of the sharp gradient is clearly better than SAM on every k-th step alone.",
        "secondary source",
        "mean difference of LookSAM and periodic SAM for k = 2, 5 and 10, points; equal epochs",
        low=0.0,
    ),
    "looksam-periodic-as-sam": Claim(
        ("looksam", "periodic"),
        "The same, without a radius of its own for each.",
        "secondary source",
        "difference for k = 5, points; both with SAM's learning rate and rho",
        low=0.0,
    ),
    "looksam-alpha": Claim(
        ("looksam",),
        "0.7 is a good length of the reused part, as in vision transformers.",
        "secondary source",
        "test accuracy with alpha 0.7 over that with 0.1, points; one step in 5 is sharp",
        low=-MARGIN,
        why="the authors of Momentum-SAM found no use of more than 0.3 either, on CIFAR-100",
    ),
    "look-layer-share": Claim(
        ("look_layer_sam",),
        "As accurate as SAM at large batches, for much less time.",
        "abstract",
        f"{OVER_SAM}; one step in 5 is sharp",
        low=-MARGIN,
        why="batches are small here, and the scaling of the layers is a reconstruction",
    ),
    "rst-share": Claim(
        ("rst",),
        "SAM's performance for fewer gradients.",
        "abstract",
        f"{OVER_SAM}; each step is sharp with probability 0.5",
        low=-MARGIN,
    ),
    "g-rst-share": Claim(
        ("g_rst",),
        "SAM's performance, while half of its extra cost is saved.",
        "abstract",
        f"{OVER_SAM}; probability 0.5",
        low=-MARGIN,
    ),
    "g-rst-better": Claim(
        ("g_rst",),
        "Better than SAM in most cases, while half of its extra cost is saved.",
        "abstract",
        f"{OVER_SAM}; probability 0.5",
        low=0.0,
    ),
    "random-periodic": Claim(
        ("rst", "periodic"),
        "Sharp steps at random are better than as many at fixed times.",
        "a question of ours; we know of no paper that says so",
        "mean difference of RST and periodic SAM for 1 step in 2, 5 and 10, points; equal epochs",
        low=0.0,
    ),
    "ae-sam-half": Claim(
        ("ae_sam",),
        "About half of the steps are sharp.",
        "recalled; the paper's threshold falls from 1 to -1",
        "share of sharp steps",
        low=0.4,
        high=0.6,
    ),
    "ae-sam-share": Claim(
        ("ae_sam",),
        "SAM's accuracy for about half of its extra cost.",
        "abstract",
        f"{OVER_SAM}; the threshold falls from 1 to -1",
        low=-MARGIN,
    ),
    "ae-sam-policy": Claim(
        ("ae_sam",),
        "Random or periodic use is not geometry-aware, and therefore worse.",
        "introduction",
        "test accuracy over that of as many sharp steps drawn at random, points",
        low=0.0,
    ),
    "ae-sam-steps": Claim(
        ("ae_sam",),
        "The same, beyond the time in training at which it takes them.",
        "introduction",
        "test accuracy over that of random sharp steps, as many in each epoch, points",
        low=0.0,
    ),
    "ae-looksam-share": Claim(
        ("ae_looksam",),
        "SAM's accuracy with far fewer sharp steps than SAM.",
        "abstract",
        f"{OVER_SAM}; the threshold falls from 2 to 0.5",
        low=-MARGIN,
        why="our reconstruction; we recall that the paper's run has a fifth of the steps sharp",
    ),
    "vsam-share": Claim(
        ("vsam",),
        "SAM's accuracy, 40% faster.",
        "abstract",
        f"{OVER_SAM}; published quota, windows of 50 steps",
        low=-MARGIN,
        why="a training of 400 steps has only 7 windows, and the quota stays near 1 step in 50; "
        "for more windows see the next line",
    ),
    "vsam-window": Claim(
        ("vsam",),
        "The same, with more windows.",
        "abstract",
        f"{OVER_SAM}; windows of {SHORT_WINDOW} steps",
        low=-MARGIN,
        why="the quota grows to 43% of the steps; as many random steps do as well, see the next "
        "line",
    ),
    "vsam-reuse": Claim(
        ("vsam",),
        "The same, whatever its quota does, at the share of sharp steps that 40% faster means.",
        "abstract",
        f"{OVER_SAM}; each step is sharp with probability {SPEED_UP}",
        low=-MARGIN,
    ),
    "vsam-reuse-gain": Claim(
        ("vsam",),
        "The reused second-order part makes up for the sharp steps that are left out.",
        "abstract",
        "test accuracy over RST's, which reuses nothing, points; probability 0.2 in both",
        low=0.0,
        why="RST's rho is tuned too, and becomes larger than SAM's; for the same rho see the next "
        "line",
    ),
    "vsam-reuse-as-sam": Claim(
        ("vsam",),
        "The same, without a radius of its own for each.",
        "abstract",
        "the same difference, both with SAM's learning rate and rho",
        low=0.0,
    ),
    "arsam-share": Claim(
        ("arsam",),
        "SAM's accuracy, about 40% faster.",
        "abstract",
        f"{OVER_SAM}; vSAM's quota, windows of 50 steps; of our reconstruction",
        low=-MARGIN,
        why="the quota stays near 1 step in 50, as for vSAM",
    ),
    "arsam-window": Claim(
        ("arsam",),
        "The same, with more windows.",
        "abstract",
        f"{OVER_SAM}; windows of {SHORT_WINDOW} steps; of our reconstruction",
        low=-MARGIN,
    ),
    "arsam-reuse": Claim(
        ("arsam",),
        "The same, whatever the quota does, at the share of sharp steps that 40% faster means.",
        "abstract",
        f"{OVER_SAM}; each step is sharp with probability {SPEED_UP}; of our reconstruction",
        low=-MARGIN,
    ),
    "ausam-share": Claim(
        ("ausam",),
        "SAM's accuracy, more than 70% faster.",
        "abstract",
        f"{OVER_SAM}; half of each batch",
        low=-MARGIN,
        why="the interval ends at the bar of half a point",
    ),
    "ausam-base": Claim(
        ("ausam",),
        "Much more accurate than the base optimizer at its speed.",
        "abstract",
        f"{OVER_BASE}; half of each batch",
        low=0.0,
    ),
    "ksam-base": Claim(
        ("ksam",),
        "Clearly better than SGD at little or no extra cost.",
        "abstract",
        f"{OVER_BASE}; half of each batch",
        low=0.0,
        why="the examples with the largest losses are those with wrong labels; with right labels "
        "see the next line",
    ),
    "ksam-clean-base": Claim(
        ("ksam",),
        "The same, with right labels.",
        "abstract",
        "test accuracy over the base optimizer's, points; digits with clean labels, equal epochs; "
        "half of each batch",
        low=0.0,
    ),
    "esam-share": Claim(
        ("esam",),
        "SAM's accuracy or better, for less of its extra cost.",
        "abstract",
        f"{OVER_SAM}; half of the batch, 0.6 of the tensors",
        low=-MARGIN,
    ),
    "esam-cost": Claim(
        ("esam",),
        "SAM's extra cost of 100% falls to about 40%.",
        "abstract",
        "gradients beyond one per step, %; half of the batch, 0.6 of the tensors",
        high=50.0,
        published="the paper measures time",
        why="gradients are counted: half a gradient for half of the batch, and a third for the "
        "forward pass that chooses it; tensors drawn at run time save nothing in compiled code",
    ),
    "sl-sam-share": Claim(
        ("sl_sam",),
        "Comparable with SAM in fine-tuning, with 21% to 47% of the parameters active.",
        "abstract",
        f"{OVER_SAM}; one of 2 groups of layers; of our reconstruction",
        low=-MARGIN,
        why="nothing is fine-tuned here: all layers begin with random weights",
    ),
    "momentum-sam-base": Claim(
        ("momentum_sam",),
        "Better than the base optimizer at its cost.",
        "abstract",
        OVER_BASE,
        low=0.0,
    ),
    "momentum-sam-share": Claim(
        ("momentum_sam",),
        "Near SAM's accuracy without its extra cost.",
        "Table 1",
        OVER_SAM,
        low=-MARGIN,
        published="CIFAR-100, WRN-28-10: SAM 84.16, Momentum-SAM 83.21, base 81.51",
    ),
    "saf-better": Claim(
        ("saf",),
        "Better than SAM at the base optimizer's cost.",
        "abstract",
        OVER_SAM,
        low=0.0,
        why="with wrong labels; with clean labels see committed.py",
    ),
    "mesa-base": Claim(
        ("mesa",),
        "Better than the base optimizer, at little more memory.",
        "abstract",
        OVER_BASE,
        low=0.0,
        why="its teacher averages one epoch of 10 steps here, 5000 steps in the paper",
    ),
}
PAIRS = {  # of arms whose difference is the number of a claim
    "sam-base": ("sam", "base"),
    "looksam-share": ("looksam 5", "sam"),
    "looksam-alpha": ("looksam-0.7 5", "looksam 5"),
    "looksam-periodic-as-sam": (f"looksam 5{AS_SAM}", f"periodic 5{AS_SAM}"),
    "look-layer-share": ("look-layer-sam 5", "sam"),
    "rst-share": ("rst 0.5", "sam"),
    "g-rst-share": ("g-rst 0.5", "sam"),
    "g-rst-better": ("g-rst 0.5", "sam"),
    "ae-sam-share": (PAPERS_THRESHOLD, "sam"),
    "ae-sam-policy": (PAPERS_THRESHOLD, f"{CONTROL} overall"),
    "ae-sam-steps": (PAPERS_THRESHOLD, f"{CONTROL} by epoch"),
    "ae-looksam-share": ("ae-looksam 2 to 0.5", "sam"),
    "vsam-share": ("vsam 50", "sam"),
    "vsam-window": (f"vsam {SHORT_WINDOW}", "sam"),
    "vsam-reuse": (f"vsam, random {SPEED_UP}", "sam"),
    "vsam-reuse-gain": ("vsam, random 0.2", "rst 0.2"),
    "vsam-reuse-as-sam": (f"vsam, random 0.2{AS_SAM}", f"rst 0.2{AS_SAM}"),
    "arsam-share": ("arsam 50", "sam"),
    "arsam-window": (f"arsam {SHORT_WINDOW}", "sam"),
    "arsam-reuse": (f"arsam, random {SPEED_UP}", "sam"),
    "ausam-share": ("ausam 0.5", "sam"),
    "ausam-base": ("ausam 0.5", "base"),
    "ksam-base": ("ksam 0.5", "base"),
    "esam-share": ("esam 0.5", "sam"),
    "sl-sam-share": ("sl-sam 2", "sam"),
    "momentum-sam-base": ("momentum-sam", "base"),
    "momentum-sam-share": ("momentum-sam", "sam"),
    "saf-better": ("saf", "sam"),
    "mesa-base": ("mesa", "base"),
}


def name_of(method: str, knob: Knob) -> str:
    """Return the name of an arm, such as "rst 0.5" or "ae-sam 1 to -1"."""
    text = f"{knob[0]:g} to {knob[1]:g}" if isinstance(knob, tuple) else f"{knob}"
    return f"{method} {text}".strip()


def method_of(arm: str) -> str:
    """Return the method of an arm."""
    return next(method for method in METHODS if f"{arm} ".startswith(f"{method} "))


def arms_of(steps: int) -> dict[str, Variant]:
    """Return the arms of a training of so many steps."""
    return {
        name_of(method, knob): Variant(curve.make(knob), curve.start, 1.5, RADIUS)
        for method, curve in curves_of(steps).items()
        for knob in curve.knobs
    }


def sharp_shares(spent: Sequence[float]) -> np.ndarray:
    """Return the share of sharp steps in each epoch; `spent` counts gradients after each epoch."""
    return np.diff(spent, prepend=0.0) / STEPS_PER_EPOCH - 1


def as_often(shares: np.ndarray) -> dict[str, Any]:
    """Return probabilities that give so many sharp steps: overall, and in each epoch."""
    by_epoch = jnp.asarray(np.clip(shares, 0, 1))
    return {
        "overall": float(by_epoch.mean()),
        "by epoch": lambda step: by_epoch[step // STEPS_PER_EPOCH],
    }


def controls_of(results: Sequence[dict[str, Any]], noise: float) -> dict[str, Variant]:
    """Return arms with random sharp steps, as many as AE-SAM took."""
    shares = sharp_shares(result_of(results, PAPERS_THRESHOLD, noise)["gradients_by_epoch"])
    return {
        f"{CONTROL} {name}": Variant(rst(probability), RADIUS, 1.5, RADIUS)
        for name, probability in as_often(shares).items()
    }


class Point(NamedTuple):
    """An arm on its curve: its share of SAM's gradients, and the lead over SAM in points."""

    arm: str
    method: str
    share: float
    lead: Interval

    @property
    def is_kept(self) -> bool:
        """Return whether the whole interval is less than `MARGIN` behind SAM."""
        return self.lead.low > -MARGIN


def tuned(results: Sequence[dict[str, Any]], noise: float) -> list[dict[str, Any]]:
    """Return the results of the arms that were tuned, with this share of wrong labels."""
    return [r for r in results if r["noise"] == noise and not r["row"].endswith(AS_SAM)]


def points_of(results: Sequence[dict[str, Any]], noise: float) -> list[Point]:
    """Return every arm as a point."""
    whole = result_of(results, "sam", noise)["gradients"]
    found = []
    for result in tuned(results, noise):
        arm = result["row"]
        lead = mean_interval(difference(results, noise, arm, "sam"))
        found.append(Point(arm, method_of(arm), result["gradients"] / whole, lead))
    return found


def smallest_shares(curves: Sequence[Point]) -> dict[str, Point | None]:
    """Return, for each method, its cheapest arm that keeps SAM's accuracy, `None` without one."""
    found: dict[str, Point | None] = {}
    for method in dict.fromkeys(point.method for point in curves):
        kept = [point for point in curves if point.method == method and point.is_kept]
        found[method] = min(kept, key=lambda point: point.share, default=None)
    return found


def difference(results: Sequence[dict[str, Any]], noise: float, arm: str, other: str) -> np.ndarray:
    """Return the difference of two arms' test accuracies for each seed, in points."""
    return np.round(points(results, arm, noise) - points(results, other, noise), 4)


def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Train all arms; return the numbers of each claim, and the results of the arms."""
    noise = args.noise
    arms = arms_of(args.epochs * STEPS_PER_EPOCH)
    results = train_arms(arms, args, [noise])
    results += train_arms(controls_of(results, noise), args, [noise])
    sam = result_of(results, "sam", noise)
    alike = {name + AS_SAM: arms[name] for name in ALIKE}
    results += train_arms(alike, args, [noise], axes=lambda name, arm: as_chosen(sam, arm))
    if noise:
        results += train_arms({name: arms[name] for name in CLEAN}, args, [0.0])
    return values_of(results, noise), results


def values_of(results: Sequence[dict[str, Any]], noise: float) -> dict[str, list[float]]:
    """Return the numbers of each claim, one for each seed."""
    between = partial(difference, results, noise)
    values = {name: between(*pair) for name, pair in PAIRS.items()}
    values["ksam-clean-base"] = difference(results, 0.0, "ksam 0.5", "base")
    for name, method, knobs in (
        ("looksam-periodic", "looksam", PERIODS),
        ("random-periodic", "rst", SHARES),
    ):
        pairs = zip(knobs, PERIODS, strict=True)
        leads = [between(name_of(method, k), name_of("periodic", p)) for k, p in pairs]
        values[name] = np.mean(leads, axis=0)
    steps = result_of(results, "base", noise)["gradients"]
    extra = {
        arm: result_of(results, arm, noise)["gradients"] / steps - 1
        for arm in (PAPERS_THRESHOLD, "esam 0.5")
    }
    values["ae-sam-half"] = np.array([extra[PAPERS_THRESHOLD]])
    values["esam-cost"] = np.array([100 * extra["esam 0.5"]])
    return {name: [rounded(value) for value in values[name]] for name in CLAIMS}


def print_curves(results: Sequence[dict[str, Any]], noise: float) -> None:
    """Print one line per arm, and for each method the smallest share that keeps the accuracy."""
    curves, results = points_of(results, noise), tuned(results, noise)
    print(f"\n{describe(noise)}, {len(results[0]['test_accuracy'])} seeds, mean [95% interval]")
    grid = [["arm", "share of SAM's gradients", "points over SAM", "train acc. %", "lr", "rho"]]
    for point, result in zip(curves, results, strict=True):
        value, low, high = point.lead
        grid.append(
            [
                point.arm,
                f"{point.share:.2f}",
                f"{value:+.2f} [{low:+.2f}, {high:+.2f}]",
                f"{100 * np.mean(result['train_accuracy']):.1f}",
                *(marked(result, number) for number in ("learning_rate", "rho")),
            ]
        )
    print("\n".join(aligned(grid)))
    if any(result["edges"] for result in results):
        print(MARK)
    print(f"\nThe smallest share that keeps SAM's accuracy within {MARGIN} points")
    grid = [["method", "share", "arm"]]
    for method, point in smallest_shares(curves).items():
        grid.append([method, *([f"{point.share:.2f}", point.arm] if point else ["none", ""])])
    print("\n".join(aligned(grid)))


def draw(curves: Sequence[Point], path: Path, title: str) -> None:
    """Draw the curves of all methods: one panel for each way to save gradients."""
    figure = figures.make_figure(2, 3 * [figures.height_of()])
    panels = figure.subplots(3, 2)
    ends = [point for point in curves if point.method in ("base", "sam")]
    for axes, (head, methods) in zip(panels.flat, PANELS.items(), strict=True):
        axes.axhline(0, xmax=0.95, color=figures.GREY, linewidth=1)
        axes.axhline(-MARGIN, color=figures.GREY, linewidth=1, linestyle=":")
        for method, color in zip(methods, figures.COLORS, strict=False):
            draw_curve(axes, [p for p in curves if p.method == method], method, color)
        for point in ends:
            axes.plot(point.share, point.lead.value, "s", color=figures.GREY, label=point.arm)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, LOWEST), high)
        axes.set_title(head)
        figures.label_ends(axes)
    figure.supxlabel("gradients spent, as a share of SAM's; dotted: half a point behind SAM")
    figure.supylabel("points of test accuracy over SAM")
    figures.save(figure, path, title)


def draw_curve(axes: Any, curve: Sequence[Point], method: str, color: str) -> None:
    """Draw the points of a method with their intervals."""
    curve = sorted(curve, key=lambda point: point.share)
    if not curve:
        return
    x = [point.share for point in curve]
    leads = np.array([point.lead for point in curve]).T
    axes.plot(x, leads[0], "o-", color=color, label=method, markersize=4)
    axes.vlines(x, leads[1], leads[2], color=color, linewidth=0.8)


def title_of(curves: Sequence[Point], found: Sequence[Found]) -> str:
    """State the gain of SAM, and how many methods keep it."""
    gain = next(one.number for one in found if one.name == "sam-base")
    others = "base", "sam", CONTROL
    ways = [point for method, point in smallest_shares(curves).items() if method not in others]
    kept = sum(point is not None for point in ways)
    return (
        f"Digits: SAM gains {gain.value:.1f} points over its base. {kept} of {len(ways)} curves "
        f"keep its accuracy within {MARGIN} somewhere below its gradients (95% intervals)"
    )


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    values, results = measure(args)
    found = found_of(CLAIMS, values)
    print_curves(results, args.noise)
    print_claims(found)
    save(report, NAME, found, values, rows=results)
    curves = points_of(results, args.noise)
    draw(curves, args.folder / f"{NAME}.png", title_of(curves, found))
    report.end(f"{NAME}.png")
    return found


if __name__ == "__main__":
    main()
