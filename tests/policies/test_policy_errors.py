"""Wrong arguments of policies and of gated variants get an error that names the argument."""

import jax.numpy as jnp
import optax
import pytest

import samx
from samx import policies
from samx.combinations import decaying, mix
from samx.perturbations import layer_steps

MOMENTUM = optax.sgd(0.1, momentum=0.9)
ERRORS = {
    "period 0": (lambda: policies.every(0), ValueError, "`period` must be at least 1, got 0"),
    "period 1.5": (
        lambda: policies.every(1.5),
        TypeError,
        "`period` must be a Python int, got 1.5",
    ),
    "first": (lambda: policies.every(2, -1), ValueError, "`first` must be at least 0, got -1"),
    "period of looksam": (
        lambda: samx.looksam(period=0),
        ValueError,
        "`period` must be at least 1, got 0",
    ),
    "start": (lambda: policies.between(-1), ValueError, "`start` must be at least 0, got -1"),
    "stop before start": (
        lambda: policies.between(5, 4),
        ValueError,
        "`stop` must be at least 5, got 4",
    ),
    "policy of between": (
        lambda: policies.between(policy=3),
        TypeError,
        "between: `policy` must be a samx.policies.Policy.*got int",
    ),
    "one policy in no list": (
        lambda: policies.join_policies(policies.every(2), []),
        ValueError,
        "join_policies: `policies` must be a list of policies, got one that is not in a list",
    ),
    "a number among policies": (
        lambda: policies.join_policies([policies.every(2), 3], [4]),
        TypeError,
        r"join_policies: `policies\[1\]` must be a samx.policies.Policy.*got int",
    ),
    "too many boundaries": (
        lambda: policies.join_policies([policies.every(2), policies.every(1)], [4, 8]),
        ValueError,
        "`boundaries` must have one step fewer than `policies`, got 2 for 2 policies",
    ),
    "boundaries that do not ascend": (
        lambda: policies.join_policies([policies.every(2)] * 3, [8, 4]),
        ValueError,
        "`boundaries` must be at least 8, got 4",
    ),
    "probability 1.5": (
        lambda: policies.random(1.5),
        ValueError,
        r"`probability` must be in \[0, 1\], got 1.5",
    ),
    "negative probability": (
        lambda: policies.random(-0.1),
        ValueError,
        r"`probability` must be in \[0, 1\], got -0.1",
    ),
    "probability of no number": (
        lambda: policies.random("half"),
        TypeError,
        "`probability` must be a number or a schedule, got 'half'",
    ),
    "key": (
        lambda: policies.random(0.5, 1.5).init(jnp.ones(2)),
        TypeError,
        r"`key` must be a seed or a key from jax.random.key, got 1.5",
    ),
    "key of quota": (
        lambda: policies.quota(key=1.5).init(jnp.ones(2)),
        TypeError,
        r"`key` must be a seed or a key.*got 1.5",
    ),
    "decay 2": (
        lambda: policies.squared_norm(decay=2),
        ValueError,
        r"`decay` must be in \[0, 1\], got 2",
    ),
    "decay of ae_sam": (lambda: samx.ae_sam(decay=2), ValueError, r"`decay` must be in \[0, 1\]"),
    "threshold": (lambda: samx.ae_sam(threshold="c"), TypeError, "`threshold` must be a number"),
    "blocks that do not divide": (
        lambda: policies.quota(10, num_blocks=4),
        ValueError,
        "`num_blocks` must cut `window`.*num_blocks=4 for window=10",
    ),
    "blocks of one": (
        lambda: policies.quota(window=10, num_blocks=10),
        ValueError,
        "`num_blocks`.*two or more.*num_blocks=10 for window=10",
    ),
    "inner of mix": (
        lambda: mix(0.05, 2.0),
        TypeError,
        "mix: `inner` must be an optax transformation, got float",
    ),
    "base of momentum_sam": (
        lambda: samx.momentum_sam(0.1),
        TypeError,
        "momentum_sam: `base` must be an optax transformation, got float",
    ),
    "reuse_steps": (
        lambda: samx.vsam(reuse_steps=-1),
        ValueError,
        "`reuse_steps` must be at least 0, got -1",
    ),
    "window 1": (lambda: policies.quota(1), ValueError, "`window` must be at least 2, got 1"),
    "max_fraction": (
        lambda: policies.quota(max_fraction=1.2),
        ValueError,
        r"`max_fraction` must be in \[0.02, 1\], got 1.2",
    ),
    "gain": (lambda: policies.quota(ratio_gain=-1), ValueError, "`ratio_gain`.*-1"),
    "no leaf measured": (
        lambda: (policy := policies.quota(is_measured=lambda path, leaf: False)).observe(
            jnp.ones(2), jnp.ones(2), policy.init(jnp.ones(2))
        ),
        ValueError,
        "quota: `is_measured` chooses none of the leaves",
    ),
    "policy": (
        lambda: samx.perturb_if(0.5, samx.sam()),
        TypeError,
        "perturb_if: `policy` must be a samx.policies.Policy.*got float",
    ),
    "policy of arsam": (
        lambda: samx.arsam(policy="every"),
        TypeError,
        "arsam: `policy` must be a samx.policies.Policy.*got str",
    ),
    "inner": (
        lambda: samx.perturb_if(policies.every(2), 0.05),
        TypeError,
        "perturb_if: `inner` must be an optax transformation, got float",
    ),
    "mixing": (
        lambda: samx.arsam(mixing=0.5),
        TypeError,
        r"`mixing` must be a function, got 0.5",
    ),
    "decay of a mixing": (lambda: decaying(1.1), ValueError, r"`decay` must be in \[0, 1\]"),
    "last age": (lambda: decaying(last=-1), ValueError, "`last` must be at least 0, got -1"),
    "weight": (lambda: mix(samx.sam(), -1), ValueError, "`weight` must be at least 0, got -1"),
    "scaling": (
        lambda: layer_steps(0.1, scaling=2.0),
        TypeError,
        "`scaling` must be a function, got 2.0",
    ),
    "negative alpha": (
        lambda: samx.looksam(alpha=-0.1),
        ValueError,
        "`alpha` must be at least 0, got -0.1",
    ),
    "alpha of ae_looksam": (
        lambda: samx.ae_looksam(alpha=None),
        TypeError,
        "`alpha` must be a number or a schedule, got None",
    ),
    "no momentum": (
        lambda: samx.momentum_sam(optax.sgd(0.1)).init(jnp.ones(2)),
        ValueError,
        "momentum_sam: `base` must have one momentum.*found none.*`momentum=`",
    ),
    "two momenta": (
        lambda: samx.momentum_sam(optax.chain(optax.trace(0.9), optax.adam(0.1))).init(jnp.ones(2)),
        ValueError,
        r"momentum_sam: `base` must have one momentum.*trace.*mu",
    ),
    "momentum of another shape": (
        lambda: samx.momentum_sam(MOMENTUM, momentum=lambda state: jnp.ones(3)).init(jnp.ones(2)),
        ValueError,
        r"`momentum` must be shaped like the parameters, got \(3,\) for \(2,\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    make, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        make()
