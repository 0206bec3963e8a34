"""What papers say about convergence, and which numbers would agree: the table of convergence.py."""

import math

from examples.claims.claim import Claim

ROUNDING = 1e-6
SLOW = -0.1  # the power of a fall so slow that nobody would wait for it
LIGHT_RATE = -0.5 + math.log10(5 / 3) / 2  # of ln T / √T, between 10³ and 10⁵ steps

FALLING = "power of the steps with which the gradient falls, rate ~ 1/√t"
STAYS = "distance from the minimum relative to SAM's, mean over constant rates 0.01 to 0.3; |x|²"
SQUARES = (
    "power of T with which the mean squared gradient of T steps falls, from 10³ to 10⁵ steps; the "
    "largest of nine pairs of rate and radius, 0.01 to 10; logistic regression, batches of 5"
)
PART = "test accuracy over {}'s at equal epochs, both tuned, points; digits, {}"
LEFT = "share of starts that leave the saddle of x² − y² + y⁴/4, minus SAM's, mean of three radii"


def on_digits(labels: str) -> dict[str, Claim]:
    """Return the claims on the digits."""
    readings = {
        "optsam": "the last descent is climbed",
        "optsam-next": "the gradient of the next batch at the same point is climbed",
    }
    found = {}
    for name, how in readings.items():
        found[f"{name}-digits, {labels}"] = Claim(
            ("sampa",),
            "OptSAM is less accurate than SGD.",
            "secondary source, of a table in the appendix",
            f"{PART.format('SGD', labels)}; reading: {how}",
            high=0.0,
        )
        found[f"{name}-below-sam, {labels}"] = Claim(
            ("sampa",),
            "OptSAM is less accurate than SAM.",
            "secondary source, of a table in the appendix",
            f"{PART.format('SAM', labels)}; reading: {how}",
            high=0.0,
        )
    found[f"sampa-digits, {labels}"] = Claim(
        ("sampa",),
        "SAMPa is more accurate than SAM.",
        "abstract",
        PART.format("SAM", labels),
        low=0.0,
    )
    return found


CLAIMS = {
    "sampa-converges": Claim(
        ("sampa",),
        "It converges on convex functions, with a fixed radius.",
        "abstract",
        f"{FALLING}; the largest for radii 0.001 to 1, λ 0 and 0.5, |x|², a quadratic with "
        "condition 30, and logistic regression",
        high=-0.25,
    ),
    "sampa-like-sam": Claim(
        ("sampa",),
        "On |x|² it converges as SAM does.",
        "secondary source, of a figure",
        "power of a constant rate with which the distance falls that remains, the smallest of four "
        "radii, the larger of λ 0 and 0.5; it is 1.1 for SAM",
        low=0.75,
        high=1.25,
    ),
    "sam-stays": Claim(
        ("sam",),
        "At a constant rate it does not reach the minimum of |x|²: it stays at a distance of "
        "ηρ / (1 − η).",
        "derived here",
        "largest relative difference of the distance, ten dimensions, rates 0.01 to 0.3, radii "
        "0.001 to 1",
        high=ROUNDING,
        why="there a step changes the sign of x and nothing else",
    ),
    "optsam-above-sam": Claim(
        ("sampa",),
        "OptSAM does not converge on |x|², where SAM does.",
        "secondary source, of a figure",
        STAYS,
        low=1.0,
        why="none of them reaches the minimum at a constant rate; OptSAM stays further away",
    ),
    "optsam-stays": Claim(
        ("sampa",),
        "OptSAM turns around the minimum of |x|² at a distance of √(2η) ρ.",
        "found here",
        "largest relative difference of the distance, as for SAM above",
        high=ROUNDING,
    ),
    "optsam-falling": Claim(
        ("sampa",),
        "OptSAM does not converge on |x|².",
        "secondary source, of a figure",
        f"{FALLING}; mean of radii 0.001 to 1, ten dimensions",
        low=SLOW,
        why="it turns at √(2η) ρ, so with a rate that falls it converges, at half of SAM's power",
    ),
    "optsam-falling-line": Claim(
        ("sampa",),
        "The same in one dimension.",
        "secondary source, of a figure",
        f"{FALLING}; x², radius 1",
        low=SLOW,
        why="there is no room to turn: the perturbed point goes to the minimum, and x stays at ρ",
    ),
    "optsam-falling-hard": Claim(
        ("sampa",),
        "The same on functions that are steeper in one direction than in others.",
        "secondary source, of a figure",
        f"{FALLING}; radius 1, mean of a quadratic with condition 30 and logistic regression",
        low=SLOW,
    ),
    "randsam-above-sam": Claim(
        ("sampa",),
        "RandSAM, which climbs a random direction, does not converge on |x|².",
        "secondary source, of a figure",
        STAYS,
        low=1.0,
    ),
    "randsam-falling": Claim(
        ("sampa",),
        "The same with a learning rate that falls.",
        "secondary source, of a figure",
        f"{FALLING}; mean of radii 0.001 to 1, |x|², ten dimensions",
        low=SLOW,
        why="its distance is about √η ρ, and falls with the rate",
    ),
    "async-neighbourhood": Claim(
        ("async_sam",),
        "It converges to a neighbourhood of the minimum.",
        "abstract",
        "power of a constant rate with which the distance falls that remains, the smallest of four "
        "radii; |x|²",
        low=0.5,
        why="the neighbourhood shrinks with the rate, as SAM's does",
    ),
    "light-norm-falls": Claim(
        ("lightsam_norm",),
        "It converges with any radius and rate, like ln T / √T.",
        "abstract; the rate: secondary source",
        SQUARES,
        high=LIGHT_RATE,
    ),
    "light-adagrad-falls": Claim(
        ("lightsam_adagrad",),
        "It converges with any radius and rate, like ln T / √T.",
        "abstract; the rate: secondary source",
        SQUARES,
        high=LIGHT_RATE,
    ),
    "light-adam-falls": Claim(
        ("lightsam_adam",),
        "It converges with any radius and rate, like ln T / √T.",
        "abstract; the rate: secondary source",
        SQUARES,
        high=LIGHT_RATE,
        why="with constant numbers neither the radius nor the step shrinks, see the lines below",
    ),
    "light-adam, rate-falls": Claim(
        ("lightsam_adam",),
        "The same with a rate ~ 1/√T and b2 = 1 − 1/T, for each number T of steps.",
        "a usual condition for Adam",
        SQUARES,
        high=LIGHT_RATE,
        why="the radius is still constant",
    ),
    "light-adam, both-falls": Claim(
        ("lightsam_adam",),
        "The same, and a radius ~ 1/√T too.",
        "a usual condition for Adam",
        SQUARES,
        high=LIGHT_RATE,
    ),
    "sam-falls": Claim(
        ("sam",),
        "SAM with SGD converges with any radius and rate.",
        "the contrast of the abstract: this is not so",
        SQUARES,
        high=LIGHT_RATE,
    ),
    "unified-constant": Claim(
        ("unified_sam",),
        "It converges to a neighbourhood on functions that are not convex.",
        "abstract",
        "f at the end / f at the start, the largest of λ = 0, 1/2, 1 and 1 − 1/t; x² + 3 sin²x, "
        "constant rate 0.06, radius 0.05",
        high=0.01,
    ),
    "unified-falling": Claim(
        ("unified_sam",),
        "With a rate that falls it converges on functions that are not convex.",
        "abstract",
        "power of the steps with which f falls, the largest of the same λ; x² + 3 sin²x, rate ~ "
        "1/t, radius 0.05",
        high=-0.5,
    ),
    "unified-random": Claim(
        ("unified_sam",),
        "The same with random examples, whose gradients need not have a bounded variance.",
        "abstract",
        "power of the steps with which f − min f falls, the largest of the same λ; least squares "
        "with noise, one example in each step",
        high=-0.5,
        why="a fixed radius around the minimum of one example moves the minimum of the mean",
    ),
    "unified-random-shrinking": Claim(
        ("unified_sam",),
        "The same, with a radius ~ 1/√t.",
        "found here",
        "the same number",
        high=-0.5,
    ),
    "polyak-strong": Claim(
        ("sam_polyak",),
        "The rate is linear on strongly convex functions.",
        "abstract",
        "fall of ln f in the second half of the steps relative to the first, 1 if linear; "
        "quadratic with condition 10, SAM's ball with radius 0.1",
        low=0.5,
        why="with a fixed ball the step becomes 0 at a distance of about ρ, where the linear model "
        "of the loss is below its minimum; see the next lines",
    ),
    "polyak-strong-unnormalized": Claim(
        ("sam_polyak",),
        "The same, with the un-normalized perturbation (lam = 0).",
        "abstract",
        "the same number",
        low=0.5,
    ),
    "polyak-strong-shrinking": Claim(
        ("sam_polyak",),
        "The same, with SAM's ball and a radius of 0.1 / t.",
        "found here",
        "the same number",
        low=0.5,
        why="f then falls like the squared radius",
    ),
    "polyak-convex": Claim(
        ("sam_polyak",),
        "The rate is O(1/T) on convex functions.",
        "abstract",
        "power of the steps with which f falls; quadratic with eigenvalues 1/i², SAM's ball with "
        "radius 0.1",
        high=-0.9,
        why="a fixed ball stops it, as on the strongly convex function",
    ),
    "polyak-convex-unnormalized": Claim(
        ("sam_polyak",),
        "The same, with the un-normalized perturbation (lam = 0).",
        "abstract",
        "the same number",
        high=-0.9,
    ),
    "polyak-convex-shrinking": Claim(
        ("sam_polyak",),
        "The same, with SAM's ball and a radius of 0.1 / t.",
        "found here",
        "the same number",
        high=-0.9,
    ),
    "adasam-small": Claim(
        ("adasam",),
        "Larger batches need proportionally fewer steps.",
        "abstract",
        "power of the batch, 1 to 64, with which the steps fall until the mean squared gradient of "
        "their last fifth is below 0.015²; logistic regression, rate chosen for each batch",
        low=-1.2,
        high=-0.8,
    ),
    "adasam-large": Claim(
        ("adasam",),
        "The same for a limit that is soon reached, 0.05².",
        "found here",
        "the same number",
        low=-1.2,
        high=-0.8,
        why="before the noise of the batches decides, the length of the way does",
    ),
    "stable-limit": Claim(
        ("stable_sam",),
        "It is stable at larger learning rates than SAM.",
        "abstract",
        "largest rate at which a quadratic with top eigenvalue 1 stays bounded, relative to that "
        "of un-normalized SAM, ρ = 1; ten dimensions",
        low=1.0,
        why="with the length of the gradient its limit is SGD's, 2/λ, for any ρ; un-normalized SAM "
        "has 2 / (λ (1 + ρλ))",
    ),
    "usam-limit": Claim(
        ("usam",),
        "SAM is stable at a limited range of learning rates only.",
        "abstract of Stable SAM",
        "largest rate of un-normalized SAM relative to SGD's, ρ = 1",
        high=0.95,
    ),
    "stable-ball-limit": Claim(
        ("stable_sam",),
        "It is stable at larger learning rates than SAM, both with a ball of fixed length.",
        "abstract",
        "the same number, relative to SAM",
        low=1.05,
        why="a perturbation of fixed length shifts the point where it ends, and not the limit",
    ),
    "stable-map": Claim(
        ("stable_sam",),
        "It is good at more learning rates than un-normalized SAM.",
        "abstract",
        "share of 28 pairs of learning rate and radius within 2 points of the best, minus USAM's; "
        "digits, 30% wrong labels",
        low=0.0,
    ),
    "stable-map-learns": Claim(
        ("stable_sam",),
        "It learns at more learning rates than un-normalized SAM.",
        "abstract",
        "share of the same pairs with a test accuracy above 50%, minus USAM's",
        low=0.0,
        why="this measure was added when the map was seen",
    ),
    "stable-ball-map": Claim(
        ("stable_sam",),
        "It is good at more learning rates than SAM, both with a ball of fixed length.",
        "abstract",
        "share of 28 pairs within 2 points of the best, minus SAM's",
        low=0.0,
    ),
    "stable-ball-map-learns": Claim(
        ("stable_sam",),
        "It learns at more learning rates than SAM, both with a ball of fixed length.",
        "abstract",
        "share of the same pairs with a test accuracy above 50%, minus SAM's",
        low=0.0,
        why="this measure was added when the map was seen",
    ),
    "stable-saddle": Claim(
        ("stable_sam",),
        "It stops at saddles less often than SAM.",
        "abstract of the journal's version",
        LEFT,
        low=0.0,
        why="SAM's perturbation reaches over the saddle however near it is, and pulls back; one "
        "that shrinks with the gradient does not, with or without renormalization (next lines)",
    ),
    "usam-saddle": Claim(
        ("usam",),
        "So does SAM without normalization.",
        "found here",
        LEFT,
        low=0.0,
    ),
    "stable-ball-saddle": Claim(
        ("stable_sam",),
        "The same, with a ball of fixed length.",
        "abstract of the journal's version",
        LEFT,
        low=0.0,
        why="the renormalization changes the length of the step, not where it goes",
    ),
    "stable-saddle-steep": Claim(
        ("stable_sam",),
        "The same as in the first line, where the loss is 30 times as steep.",
        "abstract of the journal's version",
        LEFT,
        low=0.0,
        why="ρ times the curvature is above 1 there, and the perturbation reaches over the saddle",
    ),
    "monge-saddle": Claim(
        ("monge_sam",),
        "It is less attracted to saddles than SAM.",
        "abstract",
        LEFT,
        low=0.0,
        why="near a saddle the gradient is short, and there its ball is SAM's",
    ),
    "monge-saddle-steep": Claim(
        ("monge_sam",),
        "The same where the loss is 30 times as steep.",
        "abstract",
        LEFT,
        low=0.0,
        why="it needs gradients that are long near the saddle",
    ),
    **on_digits("30% wrong labels"),
    **on_digits("clean labels"),
}
