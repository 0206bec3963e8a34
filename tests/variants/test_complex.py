"""Complex parameters: the caller conjugates the gradient, as everywhere in optax.

Each row's twin has real parameters w. The complex parameters are z = exp(-iθ) w, with another angle
for every number, and the loss sees the real part of exp(iθ) z. So every step of z must be
exp(-iθ) times the step of w, whatever norms, magnitudes and masks the row takes. What the row draws
is turned too. Rows that add or multiply the entries of a kernel need one angle for each leaf.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
from cases import VARIANTS

import samx

pytestmark = pytest.mark.usefixtures("float64")

# Every shape, and every way to take the ascent gradient, is fast.
FAST = {
    *("sam", "wsam", "momentum_sam", "lightsam_norm", "lets", "sampa", "sl_sam", "fisher_sam"),
    *("ae_sam", "async_sam", "bisam", "ksam"),
}
# SASSHA has one curvature for both parts, Bi-LoRA a pair. The others take the model, which has no
# twin here.
OTHERWISE = {"sassha", "msassha", "bi_lora", "saf", "mesa", "functional_sam", "logits_sam"}
ROWS = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in VARIANTS
    if name not in OTHERWISE
]


BY_LEAF = {"gcsam", "zsharp", "spectral_sam"}  # means of filters and leaves, matrices
WRAPPED = {
    "accumulate": lambda tx: samx.accumulate(tx, 2),
    "scale_loss": samx.scale_loss,
    "skip_nonfinite": samx.skip_nonfinite,
    "perturb_if": lambda tx: optax.chain(
        samx.perturb_if(samx.policies.every(2, 1), samx.friendly_sam(0.3)), tx
    ),
    "gradient_gap": lambda tx: optax.chain(samx.gsam(0.3, descend="clean"), optax.scale(-0.1)),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_takes_the_steps_of_its_real_twin(name):
    case, (data, _) = VARIANTS[name], problem.make()
    is_common = name in BY_LEAF
    check_twin(lambda: case.build(batch_like=problem.batch_at(data, 0)), is_common)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper_takes_the_steps_of_its_real_twin(name):
    sam = optax.chain(samx.sam(0.3), optax.sgd(0.1, momentum=0.9))
    check_twin(lambda: WRAPPED[name](sam))


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_a_distance_falls(rho):
    """|z - (1 + 2i)|^2, 25 steps; without the conjugation the loss grows to 3e6."""
    tx = optax.chain(samx.sam(rho), optax.sgd(0.1, momentum=0.5))

    def loss(z):
        return jnp.abs(z - (1 + 2j)) ** 2

    @jax.jit
    def step(z, state):
        g = jnp.conj(jax.grad(loss)(z))
        updates, state = tx.update(g, state, z, value_fn=loss)
        return optax.apply_updates(z, updates), state

    z = jnp.zeros((), complex)
    carry = z, tx.init(z)
    for _ in range(25):
        carry = step(*carry)
    assert loss(carry[0]) < 0.01


def check_twin(make_tx, is_common=False):
    data, params = problem.make()
    rng = np.random.default_rng(0)
    turn = jax.tree.map(
        lambda w: jnp.exp(1j * rng.uniform(0, 2 * np.pi, () if is_common else w.shape)), params
    )
    normal_like = samx.core.draws.normal_like

    def turned(key, step, like, draw=0):
        real = normal_like(key, step, jax.tree.map(jnp.real, like), draw)
        is_turned = jnp.iscomplexobj(like["W1"])
        return jax.tree.map(lambda n, c: n / c, real, turn) if is_turned else real

    def as_real(z):
        return jax.tree.map(lambda z, c: (c * z).real, z, turn)

    def complex_losses(z, batch):
        return problem.losses_fn(as_real(z), batch)

    batches = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[problem.batch_at(data, t) for t in range(3)]
    )

    def steps(losses_fn, start):
        tx = make_tx()
        step = problem.make_step(tx, losses_fn)
        (end, state), _ = jax.lax.scan(
            lambda carry, batch: (step(*carry, batch), None), (start, tx.init(start)), batches
        )
        return end, [r for _, r in optax.tree.get_all_with_path(state, "readings")]

    @jax.jit
    def both(params):
        z, readings = steps(complex_losses, jax.tree.map(lambda w, c: w / c, params, turn))
        return (as_real(z), readings), steps(problem.losses_fn, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samx.core.draws, "normal_like", turned)
        results = both(params)
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
