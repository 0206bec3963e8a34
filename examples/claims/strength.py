"""Strength: what does a method do when more of it is on, and is it flatter than SAM?

    python examples/claims/strength.py
    python examples/claims/strength.py --seeds 5 --noise 0

Many methods add something to SAM, and a number says how much of it. This script gives that number
several values. It asks two things: is the test accuracy better than SAM's, and is the top
eigenvalue of the Hessian smaller?

The task is that of digits.py: a small network learns 1000 of scikit-learn's digits, a share of
them with wrong labels. All arms train for equal epochs, that is for equal steps, because papers
compare like that. The gradients of a step are not equal: the table shows them.

Each arm has its own learning rate and rho, chosen on a validation split, with seeds that are not
reported. Where a method has several values, the one with the best validation accuracy stands for
it in the claims on accuracy. A tuned rho hides what the number itself does. So some arms train a
second time, with the learning rate and rho that were chosen for SAM: the rows "as sam".

The top eigenvalue is that of the loss on all training images at the end of training. It depends on
how far training got. So the table shows the training accuracy too, and a star where it differs from
SAM's by more than a point. Differences are paired by seed; slopes are fitted for each seed.

The script prints the arms and each claim with its number and the verdict, and writes results.json,
strength.json and strength.png to --out. It takes about nine minutes on two CPU cores.
"""

import argparse

from examples.common import arguments

NAME = "strength"


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

import jax
import numpy as np
import optax

import samx
from examples.claims.arms import AS_SAM, as_chosen, points, train_arms
from examples.claims.arms import of as result_of
from examples.claims.claim import ANY, HOLDS, Claim, Found, found_of, print_claims, rounded, save
from examples.common import figures, files
from examples.common.digits_task import describe
from examples.common.intervals import mean_interval
from examples.common.output import choose_folder
from examples.common.registry import (
    PERIOD,
    RADIUS,
    VARIANTS,
    Make,
    Variant,
    in_front,
    of,
)
from examples.common.report import MARK, Report, aligned, marked
from examples.common.training import axes_of
from examples.common.tuning import Axis

SMOOTHING = 0.1  # of the labels, in the loss that BiSAM's authors descend
X_SAM_ALPHA = 0.2

# The numbers of the methods
GSAM, WSAM, GNP = (0.1, 0.2, 0.4), (0.5, 0.8, 0.9, 0.95), (0.2, 0.5, 0.8)
TILTS, QUANTILES = (0, 100), (0, 0.5, 0.95)
SPARSITIES, SHARDS, CLIMBS = (0.5, 0.95), (2, 5, 20), (2, 5)
BATCH = 100


def wsam(gamma: float) -> Make:
    """Build WSAM, which takes the learning rate."""
    return lambda rho, base, setting: samx.wsam(base, setting.learning_rate, rho, gamma)


def tsam(tilt: float, radius: float | None = None) -> Make:
    """Build TSAM, whose noise is as long as the ascent, or has another length."""
    return in_front(lambda rho: samx.tsam(rho, tilt, radius=rho if radius is None else radius))


def fisher_sparse(sparsity: float) -> Make:
    """Build Sparse SAM with a mask from the Fisher information."""
    return of("fisher_sparse_sam", sparsity=sparsity, period=PERIOD, num_microbatches=2)


def random_sparse(sparsity: float) -> Make:
    """Build Sparse SAM with a random mask: a random half of its entries changes."""
    return of("dynamic_sparse_sam", sparsity=sparsity, period=PERIOD, drop="random", grow="random")


def msam(shards: int) -> Make:
    """Build SAM that climbs for each part of the batch."""
    return in_front(lambda rho: samx.msam(rho, shards))


def lookbehind(steps: int) -> Make:
    """Build Lookbehind-SAM with so many climbs."""
    return of("lookbehind_sam", steps=steps)


def turned_x_sam(alpha: float) -> Make:
    """Build X-SAM for which the sign of v does not matter: ⟨u, v⟩ v is taken alpha times away."""

    def make(rho):
        tx = samx.x_sam(rho, 0.0)

        def update_fn(g, state, params, **extra: Any):
            u, state = tx.update(g, state, params, **extra)
            v = optax.tree.get(state, "eigenvector")
            return optax.tree.add_scale(u, -alpha * optax.tree.vdot(u, v), v), state

        return samx.closure_transformation(tx.init, update_fn, name="x_sam")

    return in_front(make)


def with_losses(
    variant: Callable[[Any], Any],
    bound: Callable[..., Any] = samx.losses.log_lower_bound,
    smoothing: float = 0.0,
) -> Make:
    """Build a variant that climbs a bound of the error, and descends with smoothed labels."""

    def make(rho):
        tx = variant(rho)

        def update_fn(g, state, params, *, value_fn, value, features_fn, head_fn, batch, **others):
            del others

            def logits(params):
                return head_fn(params, features_fn(params, batch))

            def ascent_fn(params):
                return bound(logits(params), batch["y"]).mean()

            def smoothed(params):
                found = logits(params)
                labels = jax.nn.one_hot(batch["y"], found.shape[-1])
                smooth = optax.smooth_labels(labels, smoothing)
                return optax.softmax_cross_entropy(found, smooth).mean()

            if smoothing:
                value_fn = smoothed
                value, g = jax.value_and_grad(smoothed)(params)
            extra = {} if variant is samx.sam else {"ascent_fn": ascent_fn}
            return tx.update(g, state, params, value_fn=value_fn, value=value, **extra)

        return samx.closure_transformation(tx.init, update_fn, name="bisam")

    return in_front(make)


def family(name: str, make: Callable[[Any], Make], knobs: Sequence[Any]) -> dict[str, Make]:
    """Return an arm for each value of a method's number."""
    return {f"{name} {knob}": make(knob) for knob in knobs}


METHODS = {
    "gsam": family("gsam", lambda alpha: of("gsam", alpha=alpha), GSAM),
    "wsam": family("wsam", wsam, WSAM),
    "gnp": family("gnp", lambda alpha: of("gnp", alpha=alpha), GNP),
    "gnp unit": {"gnp unit": of("gnp", alpha=0.8, clean="unit")},
    "tsam": family("tsam", tsam, TILTS),
    "tsam wide": family("tsam wide", partial(tsam, radius=1.0), TILTS),
    "zsharp": family("zsharp", lambda quantile: of("zsharp", quantile=quantile), QUANTILES),
    "msam": family("msam", msam, SHARDS),
    "fisher-sparse": family("fisher-sparse", fisher_sparse, SPARSITIES),
    "dynamic-sparse": family(
        "dynamic-sparse",
        lambda sparsity: of("dynamic_sparse_sam", sparsity=sparsity, period=PERIOD),
        SPARSITIES,
    ),
    "random-sparse": family("random-sparse", random_sparse, SPARSITIES),
    "cr-sam": {"cr-sam": VARIANTS["cr-sam"].make},
    "gam": {"gam": VARIANTS["gam"].make},
    "eigen-sam": {"eigen-sam": of("eigen_sam", every=20)},
    "x-sam": {
        "x-sam": of("x_sam", alpha=X_SAM_ALPHA),
        "x-sam away from v": turned_x_sam(X_SAM_ALPHA),
        "x-sam along v": turned_x_sam(-X_SAM_ALPHA),
        "x-sam uncorrected": turned_x_sam(0.0),
    },
    "lookbehind": family("lookbehind", lookbehind, CLIMBS),
    "bisam": {
        "bisam log": with_losses(samx.bisam),
        "bisam tanh": with_losses(samx.bisam, samx.losses.tanh_lower_bound),
        "bisam log, smoothed": with_losses(samx.bisam, smoothing=SMOOTHING),
        "sam, smoothed": with_losses(samx.sam, smoothing=SMOOTHING),
    },
}
BASELINES = ("sam", "base")
START = {"lookbehind": 0.05}  # of the search for rho, where it is not that of SAM
GRADIENTS = {
    "tsam": 6,
    "tsam wide": 6,
    "cr-sam": 3,
    "gam": 4,
    "eigen-sam": 2.5,
    "x-sam": 4,
    "lookbehind": 4.5,
}
LIKE_SAM = ("base", "gsam", "gnp", "tsam", "tsam wide", "msam", "cr-sam", "eigen-sam")
NOT_TUNED = ("tsam wide",)  # trains as SAM only

PANELS = {
    "Gradients are mixed": ("gsam", "wsam", "gnp", "gnp unit"),
    "Large entries climb, or small groups": ("zsharp", "msam"),
    "Some weights climb": ("fisher-sparse", "dynamic-sparse", "random-sparse"),
    "Curvature is looked at": ("cr-sam", "gam", "eigen-sam", "x-sam"),
    "Several climbs": ("tsam", "lookbehind"),
    "Another loss": ("bisam",),
}

# What the papers say.
OVER_SAM = "test accuracy over SAM's, points; digits with wrong labels, equal epochs"
BEST = f"{OVER_SAM}; the value with the best validation accuracy"
FLATTER = "log10 of the top eigenvalue relative to SAM's; equal epochs, both tuned"
SAME = "log10 of the top eigenvalue relative to SAM's; SAM's learning rate and rho"
LEVEL = -0.5  # points, a third of what SAM gains on this task

CLAIMS = {
    "gsam-gap": Claim(
        ("gsam",),
        "A larger alpha lowers the surrogate gap, the rise of the loss inside of the ball.",
        "abstract",
        "slope of log10 of the rise at radius 0.2 over alpha = 0, 0.1, 0.2, 0.4; SAM's learning "
        "rate and rho",
        high=0.0,
    ),
    "gsam-flatter": Claim(
        ("gsam",),
        "Minima are flatter than SAM's.",
        "abstract",
        f"{SAME}; alpha = 0.4",
        high=0.0,
    ),
    "gsam-better": Claim(
        ("gsam",),
        "Better than SAM.",
        "abstract",
        f"{BEST} of alpha",
        low=0.0,
        published="ViT-S/32 70.5 to 73.8, ResNet-50 76.9 to 77.2",
    ),
    "wsam-better": Claim(
        ("wsam",),
        "Better than SAM, or level with it.",
        "secondary source",
        f"{BEST} of gamma = 0.8, 0.9, 0.95",
        low=LEVEL,
    ),
    "wsam-gamma": Claim(
        ("wsam",),
        "Good values of gamma are 0.8 to 0.95, above SAM's 0.5.",
        "secondary source",
        "test accuracy of the best of gamma = 0.8, 0.9, 0.95 over that of 0.5, points",
        low=0.0,
    ),
    "gnp-flatter": Claim(
        ("gnp",),
        "A penalty on the gradient norm finds flatter minima.",
        "abstract",
        "slope of log10 of the top eigenvalue over alpha = 0 (base) ... 1 (SAM); SAM's learning "
        "rate and rho",
        high=0.0,
    ),
    "gnp-better": Claim(
        ("gnp",),
        "SAM is the special case alpha = 1, and not the best one.",
        "abstract",
        f"{BEST} of alpha below 1",
        low=0.0,
        why="none of 0.2, 0.5 and 0.8 is better than SAM",
    ),
    "gnp-unit-better": Claim(
        ("gnp",),
        "Better than SAM, as in the published runs, whose clean gradient has length 1.",
        "authors' code",
        f"{OVER_SAM}; alpha = 0.8",
        low=0.0,
    ),
    "tsam-tilt": Claim(
        ("tsam",),
        "The larger the tilt t, the flatter the minimum.",
        "abstract",
        "log10 of the top eigenvalue at t = 100, relative to t = 0; noise as long as rho, 0.2; "
        "SAM's learning rate and rho",
        high=0.0,
        why="so near to each other, the three points may have nearly the same loss; with longer "
        "noise see the next line",
    ),
    "tsam-tilt-wide": Claim(
        ("tsam",),
        "The same, with noise of the authors' length 1.",
        "abstract and authors' code",
        "log10 of the top eigenvalue at t = 100, relative to t = 0; SAM's learning rate and rho",
        high=0.0,
    ),
    "tsam-flatter": Claim(
        ("tsam",), "Flatter minima than SAM's.", "abstract", f"{FLATTER}; best t", high=0.0
    ),
    "tsam-better": Claim(("tsam",), "Better than SAM.", "abstract", f"{BEST} of t", low=0.0),
    "zsharp-better": Claim(
        ("zsharp",), "Better than SAM.", "abstract", f"{BEST} of the quantile", low=0.0
    ),
    "zsharp-filter": Claim(
        ("zsharp",),
        "To climb only with the largest entries of each layer is better.",
        "abstract",
        "test accuracy at quantile 0.95 over that at 0, points; equal epochs",
        low=0.0,
    ),
    "fisher-half": Claim(
        ("fisher_sparse_sam",),
        "A mask of half of the weights keeps SAM's accuracy.",
        "abstract",
        f"{OVER_SAM}; sparsity 0.5",
        low=LEVEL,
    ),
    "dynamic-half": Claim(
        ("dynamic_sparse_sam",),
        "A mask of half of the weights keeps SAM's accuracy.",
        "abstract",
        f"{OVER_SAM}; sparsity 0.5",
        low=LEVEL,
    ),
    "fisher-mask": Claim(
        ("fisher_sparse_sam",),
        "The Fisher information tells which weights to perturb.",
        "abstract",
        "test accuracy over that of random masks, points; sparsity 0.95",
        low=0.0,
        why="random masks with a rho of their own do as well",
    ),
    "dynamic-mask": Claim(
        ("dynamic_sparse_sam",),
        "Gradients tell which weights to perturb.",
        "abstract",
        "test accuracy over that of random masks, points; sparsity 0.95",
        low=0.0,
        why="random masks with a rho of their own do as well",
    ),
    "msam-better": Claim(
        ("msam",), "Better than SAM.", "abstract", f"{BEST} of the number of groups", low=0.0
    ),
    "msam-slope": Claim(
        ("msam",),
        "The smaller the groups that climb, the better the accuracy.",
        "abstract",
        "slope of the test accuracy over log10 of the group's size 5, 20, 50, 100, points; "
        "each tuned",
        high=0.0,
        published="ResNet-18, CIFAR-10: error 5.1% with the whole batch, 4.3% with groups of 128",
    ),
    "msam-flatter": Claim(
        ("msam",),
        "The smaller the groups that climb, the flatter the minimum.",
        "secondary source",
        "slope of log10 of the top eigenvalue over log10 of the group's size; SAM's learning rate "
        "and rho",
        low=0.0,
    ),
    "cr-sam-flatter": Claim(
        ("cr_sam",), "Lower curvature than SAM.", "abstract", FLATTER, high=0.0
    ),
    "cr-sam-flatter-same": Claim(
        ("cr_sam",), "Lower curvature than SAM.", "abstract", SAME, high=0.0
    ),
    "cr-sam-better": Claim(("cr_sam",), "Better than SAM.", "abstract", OVER_SAM, low=0.0),
    "gam-flatter": Claim(
        ("gam",), "First-order flatness bounds the top eigenvalue.", "abstract", FLATTER, high=0.0
    ),
    "gam-better": Claim(("gam",), "Better than SAM.", "abstract", OVER_SAM, low=0.0),
    "eigen-sam-flatter": Claim(
        ("eigen_sam",),
        "The top eigenvalue gets lower than SAM's at the same rho.",
        "abstract",
        f"{SAME}; alpha = 0.2, v refreshed every 20 steps",
        high=0.0,
    ),
    "eigen-sam-better": Claim(
        ("eigen_sam",),
        "Better than SAM.",
        "abstract",
        f"{OVER_SAM}; alpha = 0.2, v refreshed every 20 steps",
        low=0.0,
    ),
    "x-sam-flatter": Claim(
        ("x_sam",),
        "The top eigenvalue gets lower than SAM's.",
        "abstract",
        f"{FLATTER}; as published, with the sign of v that power iteration finds",
        high=0.0,
        why="the steps have length 1; with such steps the correction changes nothing, see the next "
        "line",
    ),
    "x-sam-correction": Claim(
        ("x_sam",),
        "The correction lowers the top eigenvalue.",
        "abstract",
        "log10 of the top eigenvalue as published, relative to alpha = 0, which leaves SAM's "
        "gradient in length 1; equal epochs, both tuned",
        high=0.0,
        why="it always points to -v, whatever the sign of v: it may take away on one step what it "
        "adds on another; both alone are in the lines below",
    ),
    "x-sam-better": Claim(
        ("x_sam",), "Better than SAM.", "abstract", f"{OVER_SAM}; as published", low=0.0
    ),
    "x-sam-away": Claim(
        ("x_sam",),
        "The top eigenvalue gets lower than SAM's.",
        "abstract",
        f"{FLATTER}; the part of the step along v is always made smaller",
        high=0.0,
    ),
    "x-sam-along": Claim(
        ("x_sam",),
        "The top eigenvalue gets lower than SAM's.",
        "abstract",
        f"{FLATTER}; the part of the step along v is always made larger",
        high=0.0,
    ),
    "x-sam-sign": Claim(
        ("x_sam",),
        "To take the part along v away lowers the top eigenvalue more than to add to it.",
        "abstract",
        "log10 of the top eigenvalue with a smaller part along v, relative to a larger one",
        high=0.0,
    ),
    "lookbehind-flatter": Claim(
        ("lookbehind_sam",),
        "A better trade-off of loss and sharpness than SAM's.",
        "abstract",
        f"{FLATTER}; 5 climbs",
        high=0.0,
    ),
    "lookbehind-better": Claim(
        ("lookbehind_sam",), "Better than SAM.", "abstract", f"{BEST} of 2 and 5 climbs", low=0.0
    ),
    "bisam-better": Claim(
        ("bisam",),
        "Better than SAM.",
        "abstract",
        f"{OVER_SAM}; the logarithmic bound",
        low=0.0,
        why="the tanh bound, and label smoothing, come nearer to SAM, see the next lines",
    ),
    "bisam-tanh-better": Claim(
        ("bisam",), "Better than SAM.", "abstract", f"{OVER_SAM}; the tanh bound, mu = 10", low=0.0
    ),
    "bisam-smoothed-better": Claim(
        ("bisam",),
        "Better than SAM, both with label smoothing of 0.1, as the authors train.",
        "abstract and authors' code",
        f"{OVER_SAM}; the logarithmic bound",
        low=0.0,
    ),
}
LEADS = {  # of arms over others: their difference is the number of a claim
    "gnp-unit-better": ("gnp unit", "sam"),
    "zsharp-filter": ("zsharp 0.95", "zsharp 0"),
    "fisher-half": ("fisher-sparse 0.5", "sam"),
    "dynamic-half": ("dynamic-sparse 0.5", "sam"),
    "fisher-mask": ("fisher-sparse 0.95", "random-sparse 0.95"),
    "dynamic-mask": ("dynamic-sparse 0.95", "random-sparse 0.95"),
    "cr-sam-better": ("cr-sam", "sam"),
    "gam-better": ("gam", "sam"),
    "eigen-sam-better": ("eigen-sam", "sam"),
    "x-sam-better": ("x-sam", "sam"),
    "bisam-better": ("bisam log", "sam"),
    "bisam-tanh-better": ("bisam tanh", "sam"),
    "bisam-smoothed-better": ("bisam log, smoothed", "sam, smoothed"),
}
BETTER = ("gsam", "wsam", "gnp", "tsam", "zsharp", "msam", "lookbehind")  # at their best value
RATIOS = {  # of arms to others: the logarithm of the ratio of their eigenvalues is the number
    "gsam-flatter": (f"gsam 0.4{AS_SAM}", "sam"),
    "tsam-tilt": (f"tsam 100{AS_SAM}", f"tsam 0{AS_SAM}"),
    "tsam-tilt-wide": (f"tsam wide 100{AS_SAM}", f"tsam wide 0{AS_SAM}"),
    "cr-sam-flatter": ("cr-sam", "sam"),
    "cr-sam-flatter-same": (f"cr-sam{AS_SAM}", "sam"),
    "gam-flatter": ("gam", "sam"),
    "eigen-sam-flatter": (f"eigen-sam{AS_SAM}", "sam"),
    "x-sam-flatter": ("x-sam", "sam"),
    "x-sam-correction": ("x-sam", "x-sam uncorrected"),
    "x-sam-away": ("x-sam away from v", "sam"),
    "x-sam-along": ("x-sam along v", "sam"),
    "x-sam-sign": ("x-sam away from v", "x-sam along v"),
    "lookbehind-flatter": ("lookbehind 5", "sam"),
}


def arms_of() -> dict[str, Variant]:
    """Return all arms, SAM first; the next one of an arm may be itself with SAM's numbers."""
    found = {name: VARIANTS[name] for name in BASELINES}
    for method, makes in METHODS.items():
        start, gradients = START.get(method, RADIUS), GRADIENTS.get(method, 2)
        found |= {name: Variant(make, start, gradients, RADIUS) for name, make in makes.items()}
    twice = {}
    for name, arm in found.items():
        if method_of(name) not in NOT_TUNED:
            twice[name] = arm
        if method_of(name) in LIKE_SAM:
            twice[name + AS_SAM] = arm
    return twice


def method_of(arm: str) -> str:
    """Return the method of an arm."""
    name = arm.removesuffix(AS_SAM)
    return next((method for method, makes in METHODS.items() if name in makes), name)


def like_sam(sam: dict[str, Any], base: str, rho: Any, name: str, arm: Variant) -> list[Axis]:
    """Return the axes of an arm; those of an arm "as sam" are SAM's own two numbers."""
    return as_chosen(sam, arm) if name.endswith(AS_SAM) else axes_of(arm, base, rho)


def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Train all arms; return the numbers of each claim, and the results of the arms."""
    arms = arms_of()
    results = train_arms({"sam": arms.pop("sam")}, args, [args.noise], is_measured=True)
    axes = partial(like_sam, results[0], args.base, args.rho)
    results += train_arms(arms, args, [args.noise], is_measured=True, axes=axes)
    return values_of(Arms(results, args.noise)), results


class Arms(NamedTuple):
    """The results of all arms."""

    results: list[dict[str, Any]]
    noise: float

    def accuracy(self, arm: str) -> np.ndarray:
        """Return the test accuracy of each seed in percent."""
        return points(self.results, arm, self.noise)

    def flatness(self, arm: str) -> np.ndarray:
        """Return log10 of the top eigenvalue of each seed."""
        monitored = result_of(self.results, arm, self.noise)["monitored"]
        return np.log10(monitored["top_eigenvalue"][-1])

    def rise(self, arm: str) -> np.ndarray:
        """Return log10 of the rise of the loss of each seed."""
        return np.log10(result_of(self.results, arm, self.noise)["loss_increase"])

    def lead(self, arm: str, other: str = "sam") -> np.ndarray:
        """Return the difference of two arms' accuracies, in points."""
        return np.round(self.accuracy(arm) - self.accuracy(other), 4)

    def ratio(self, arm: str, other: str = "sam") -> np.ndarray:
        """Return log10 of the ratio of two arms' top eigenvalues."""
        return self.flatness(arm) - self.flatness(other)

    def best(self, method: str, without: Sequence[str] = ()) -> str:
        """Return the arm of a method with the best accuracy on the validation split."""

        def validation(arm):
            tried = result_of(self.results, arm, self.noise)["candidates"]
            return max(candidate["validation_accuracy"] for candidate in tried)

        return max((arm for arm in METHODS[method] if arm not in without), key=validation)


def slopes(x: Sequence[float] | np.ndarray, of_arms: Sequence[np.ndarray]) -> np.ndarray:
    """Return the slope over x of the line that fits best, for each seed."""
    away = np.asarray(x, float) - np.mean(x)
    return away @ np.asarray(of_arms) / (away @ away)


def values_of(arms: Arms) -> dict[str, list[float]]:
    """Return the numbers of each claim, one for each seed."""
    values = {name: arms.lead(*pair) for name, pair in LEADS.items()}
    values |= {name: arms.ratio(*pair) for name, pair in RATIOS.items()}
    for method in BETTER:
        values[f"{method}-better"] = arms.lead(arms.best(method, without=["wsam 0.5"]))
    values["wsam-gamma"] = arms.lead(arms.best("wsam", without=["wsam 0.5"]), "wsam 0.5")
    values["tsam-flatter"] = arms.ratio(arms.best("tsam"))

    alike = ["sam", *(f"gsam {alpha}{AS_SAM}" for alpha in GSAM)]
    values["gsam-gap"] = slopes([0, *GSAM], [arms.rise(arm) for arm in alike])
    alike = [f"base{AS_SAM}", *(f"gnp {alpha}{AS_SAM}" for alpha in GNP), "sam"]
    values["gnp-flatter"] = slopes([0, *GNP, 1], [arms.flatness(arm) for arm in alike])
    sizes = np.log10([BATCH, *(BATCH / shards for shards in SHARDS)])
    alike = ["sam", *(f"msam {shards}" for shards in SHARDS)]
    values["msam-slope"] = slopes(sizes, [arms.accuracy(arm) for arm in alike])
    alike = ["sam", *(f"msam {shards}{AS_SAM}" for shards in SHARDS)]
    values["msam-flatter"] = slopes(sizes, [arms.flatness(arm) for arm in alike])
    return {name: [rounded(value) for value in values[name]] for name in CLAIMS}


def print_arms(arms: Arms) -> None:
    """Print one line per arm."""
    results = arms.results
    print(
        f"\n{describe(arms.noise)}, {len(results[0]['test_accuracy'])} seeds, mean [95% interval]"
    )
    head = ["arm", "points over SAM", "log10 of top eig. over SAM's", "rise", "train acc. %"]
    grid = [[*head, "gradients", "lr", "rho"]]
    whole = 100 * np.mean(result_of(results, "sam", arms.noise)["train_accuracy"])
    for result in results:
        arm = result["row"]
        numbers = [mean_interval(arms.lead(arm)), mean_interval(arms.ratio(arm))]
        train = 100 * np.mean(result["train_accuracy"])
        grid.append(
            [
                arm,
                *(f"{n.value:+.2f} [{n.low:+.2f}, {n.high:+.2f}]" for n in numbers),
                f"{np.mean(result['loss_increase']):.4f}",
                f"{train:.1f}" + "*" * bool(abs(train - whole) > 1),
                f"{result['gradients']:.0f}",
                *(marked(result, number) for number in ("learning_rate", "rho")),
            ]
        )
    print("\n".join(aligned(grid)))
    print("* train acc.: differs from SAM's by more than a point")
    if any(result["edges"] for result in results):
        print(MARK)


class Point(NamedTuple):
    """A tuned arm in the figure: its top eigenvalue relative to SAM's, its lead in points."""

    arm: str
    method: str
    ratio: float
    lead: float
    error: float


def points_of(arms: Arms) -> list[Point]:
    """Return the tuned arms as points; the error is that of the lead, from the 95% interval."""
    found = []
    for result in arms.results:
        arm = result["row"]
        if not arm.endswith(AS_SAM):
            lead = mean_interval(arms.lead(arm))
            ratio = float(10 ** arms.ratio(arm).mean())
            error = (lead.high - lead.low) / 2
            found.append(Point(arm, method_of(arm), ratio, lead.value, error))
    return found


def draw(found: Sequence[Point], path: Path, title: str) -> None:
    """Draw accuracy over the top eigenvalue: one panel for each kind of change."""
    figure = figures.make_figure(2, 3 * [figures.height_of()])
    panels = figure.subplots(3, 2, sharex=True)
    figure.supxlabel("top eigenvalue of the Hessian at the end, relative to SAM's")
    figure.supylabel("points of test accuracy over SAM")
    labels = []
    for axes, (head, methods) in zip(panels.flat, PANELS.items(), strict=True):
        axes.axhline(0, color=figures.GREY, linewidth=1)
        axes.axvline(1, color=figures.GREY, linewidth=1)
        named = []
        for method, color in zip(methods, figures.COLORS, strict=False):
            mine = [point for point in found if point.method == method]
            draw_method(axes, mine, color)
            names = short_names(method, [point.arm for point in mine])
            named += [(p.ratio, p.lead, n, color) for p, n in zip(mine, names, strict=True)]
        labels.append((axes, named))
        axes.margins(0.2, 0.2)
        axes.set_title(head)
    for axes, named in labels:
        figures.label_points(axes, named)
    figures.save(figure, path, title)


def short_names(method: str, arms: Sequence[str]) -> list[str]:
    """Return what the figure calls the arms of a method: the method only once."""
    return [*arms[:1]] + [arm.removeprefix(method).removeprefix(",").strip() for arm in arms[1:]]


def draw_method(axes: Any, mine: Sequence[Point], color: str) -> None:
    """Draw the arms of a method; a line joins them in the order of its number."""
    x, y, errors = ([getattr(p, name) for p in mine] for name in ("ratio", "lead", "error"))
    is_joined = all(point.arm[-1].isdigit() for point in mine)
    line = "o-" if is_joined else "o"
    axes.errorbar(x, y, yerr=errors, fmt=line, color=color, markersize=4, linewidth=1)


def title_of(found: Sequence[Found]) -> str:
    """State how many of the claims hold."""
    counts = {}
    for end, word in (("-better", "better"), ("-flatter", "flatter")):
        mine = [one for one in found if one.name.endswith(end) and one.claim.low in (0, -ANY)]
        holds = sum(one.verdict == HOLDS for one in mine)
        counts[word] = f"{holds} of {len(mine)} claims of being {word} hold"
    return f"Digits, equal epochs: {counts['better']}, {counts['flatter']}"


@files.ends_in_one_line
def main(argv: list[str] | None = None) -> list[Found]:
    args = parse(argv)
    choose_folder(args, NAME)
    report = Report(args)
    values, results = measure(args)
    arms = Arms(results, args.noise)
    found = found_of(CLAIMS, values)
    print_arms(arms)
    print_claims(found)
    save(report, NAME, found, values, rows=results)
    draw(points_of(arms), args.folder / f"{NAME}.png", title_of(found))
    report.end(f"{NAME}.png")
    return found


if __name__ == "__main__":
    main()
