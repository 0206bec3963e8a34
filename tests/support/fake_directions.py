"""Measures of claims/gradient_directions.py without a training: random numbers, right shapes."""

import numpy as np

STEPS, EXAMPLES = 10, 6  # of an epoch; of a batch
BATCHES, SEARCHED, RADII = 4, 3, 2
OF_STEPS = ("norm", "change", "ratio")
OF_PAIRS = ("successive", "same", "other")
OF_BATCHES = (
    *("rise", "slope", "norm_at", "change_at", "carry_rise", "carry_change", "le_change"),
    *("curvature", "le_along_norm", "sam_along_norm", "sam_error", "log_error", "tanh_error"),
    *("logit_share", "along_top"),
)
OF_SEARCHED = (
    *("to_top_g", "to_top_1", "to_top_many", "to_top_far", "to_wide_1", "to_wide_many"),
    *("to_top_xsam", "at_limit", "at_limit_by_default", "one_step_share", "along_own_top"),
)
OF_CHECKPOINTS = (
    *("top", "gap", "highest", "loss", "central_variance", "central_relative"),
    *("tilted_bend", "largest_bend", "sam_bend"),
)
BALLS = ("kl_ball", "kl_default", "kl_strong", "kl_examples")
PARTS = ("sam", "full", "batch", "ema")


def measured(seed, checkpoints):
    """Return what `of_seed` returns, for a training whose last checkpoint is the last epoch."""
    rng, points, steps = np.random.default_rng(seed), len(checkpoints), STEPS * checkpoints[-1]

    def some(names, *shape):
        return {name: rng.uniform(0.3, 0.9, shape).astype(np.float32) for name in names}

    def training():
        return {
            **some(OF_STEPS, steps),
            **some(OF_PAIRS, steps - 1),
            **some(("lag_g", "lag_part"), 10),
            **some(OF_BATCHES, points, BATCHES),
            **some(OF_SEARCHED, points, SEARCHED),
            **some(OF_CHECKPOINTS, points),
            **some(("example_changes", "example_norms"), points, BATCHES, EXAMPLES),
            **some(BALLS),
        }

    parts = [*PARTS, *(f"{part}_small" for part in PARTS), "ema_cosine", "batch_cosine"]
    return {
        "sgd": training(),
        "sam": training(),
        "friendly": some(parts, points, BATCHES),
        "sampa": some(["cosine"], steps - 1),
        "momentum": some(["cosine", "rise", "slope"], steps - 1),
    }


def of_language(seed, checkpoints):
    """Return what `language_paths.of_seed` returns."""
    return np.random.default_rng(seed).uniform(0.3, 0.9, (len(checkpoints), RADII))
