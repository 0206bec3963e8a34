"""Parameters may have the names of fields of states."""

import itertools

import jax
import numpy as np
import optax
import problem
import pytest
from cases import VARIANTS

import samx
from samx import policies

pytestmark = pytest.mark.usefixtures("float64")
MOMENTUM = optax.sgd(0.1, momentum=0.9)
MADE = {
    "friendly_sam": lambda: VARIANTS["friendly_sam"].build(),
    "friendly_sam, sometimes": lambda: optax.chain(
        samx.perturb_if(policies.every(2), samx.friendly_sam()), MOMENTUM
    ),
    "momentum_sam": lambda: VARIANTS["momentum_sam"].build(),
    "fisher_sparse_sam": lambda: VARIANTS["fisher_sparse_sam"].build(),
    "lsam": lambda: VARIANTS["lsam"].build(),
    "async_sam": lambda: VARIANTS["async_sam"].build(),
}
NAMES = [
    dict(zip(("W1", "b1", "W2", "b2"), names.split(), strict=True))
    for names in ("extra_gradients readings trace mu", "perturbation aux base step")
]


# By turns.
PAIRS = zip(MADE, itertools.cycle(NAMES))


@pytest.mark.parametrize(
    ("name", "names"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1]['W1']}") for pair in PAIRS]
)
def test_a_parameter_with_the_name_of_a_field(name, names):
    """Every step and its readings are those with ordinary names."""
    tx, (data, params) = MADE[name](), problem.make()
    batch = problem.batch_at(data, 0)

    def renamed(params):
        return {names[key]: leaf for key, leaf in params.items()}

    def losses_fn(renamed, batch):
        return problem.losses_fn({key: renamed[names[key]] for key in names}, batch)

    @jax.jit
    def both(mine, theirs):
        return (
            problem.make_step(tx)(*mine, batch),
            problem.make_step(tx, losses_fn)(*theirs, batch),
        )

    mine = params, tx.init(params)
    theirs = renamed(params), tx.init(renamed(params))
    for _ in range(2):
        mine, theirs = both(mine, theirs)
    for key, leaf in renamed(mine[0]).items():
        np.testing.assert_allclose(theirs[0][key], leaf, rtol=1e-12)
    expected, found = (
        optax.tree.get(state, "readings", filtering=lambda path, x: isinstance(x, samx.Readings))
        for _, state in (mine, theirs)
    )
    np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(expected), rtol=1e-12)
