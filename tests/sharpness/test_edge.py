"""The edge of stability: exact on quadratics, and where training ends up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from examples.measure import edge_training
from examples.measure.edge_training import Case
from samx.sharpness import edge

SETTINGS = [  # eigenvalue, radius, momentum, weight, and the largest stable learning rate
    (3.0, 0.1, 0.0, 1.0, 0.5128205128),
    (3.0, 0.1, 0.5, 1.0, 0.7692307692),
    (5.0, 0.3, 0.9, 1.0, 0.3040000000),
    (3.0, 0.1, 0.0, 0.5, None),
    (2.0, 0.7, 0.6, 0.2, None),
    (2.0, 0.7, 0.6, 3.0, None),
    (4.0, 0.0, 0.8, 1.0, None),
    (4.0, 0.3, 0.8, 0.0, None),
]


def largest_learning_rate(eigenvalue, radius, momentum, weight):
    """Bisect the spectral radius of (w, buffer) -> a step of the mixture with heavy-ball momentum.

    On f = λ w² / 2 the gradient is λ w, and the sharp gradient λ (w + r λ w).
    """
    gradient, sharp = eigenvalue, eigenvalue * (1 + radius * eigenvalue)
    slope = (1 - weight) * gradient + weight * sharp
    low, high = 0.0, 10.0
    for _ in range(100):
        eta = (low + high) / 2
        step = np.array([[1 - eta * slope, -eta * momentum], [slope, momentum]])
        is_stable = max(abs(np.linalg.eigvals(step))) <= 1
        low, high = (eta, high) if is_stable else (low, eta)
    return low


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("eigenvalue", "radius", "momentum", "weight", "known"), SETTINGS)
def test_it_is_the_edge_of_a_quadratic(eigenvalue, radius, momentum, weight, known):
    eta = largest_learning_rate(eigenvalue, radius, momentum, weight)
    if known is not None:
        np.testing.assert_allclose(eta, known, rtol=0, atol=1e-10)
    found = edge(eta, radius=radius, momentum=momentum, weight=weight)
    np.testing.assert_allclose(found, eigenvalue, rtol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "weight"), [("base", 0), ("sam", 1), ("usam", 1), ("mix", 0.3), ("coupled_wsam", 9)]
)
def test_at_the_edge_an_optimizer_of_samx_swings_without_end(name, weight):
    """One step turns the point, and the buffer of the momentum, into their opposites."""
    learning_rate, radius, momentum = 0.3, 0.4, 0.6
    eigenvalue = edge(learning_rate, radius=radius, momentum=momentum, weight=weight)
    w = jnp.array(1.7)
    rho = radius * eigenvalue * w  # of a perturbation with a norm of its own
    sharp = {
        "base": optax.identity(),
        "sam": samx.sam(rho),
        "usam": samx.usam(radius),
        "mix": samx.combinations.mix(samx.sam(rho), weight),
        "coupled_wsam": samx.coupled_wsam(rho, gamma=0.9),
    }[name]
    base = optax.sgd(learning_rate, momentum=momentum)
    tx = optax.with_extra_args_support(optax.chain(sharp, base))
    buffer = -2 * w / learning_rate  # that of the step from -w to w

    def loss(w):
        return eigenvalue * w**2 / 2

    state = optax.tree.set(tx.init(w), trace=buffer)
    updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
    np.testing.assert_allclose(w + updates, -w, rtol=1e-12)
    np.testing.assert_allclose(optax.tree.get(state, "trace"), -buffer, rtol=1e-12)


def test_without_a_perturbation_it_is_that_of_the_base():
    assert edge(0.25, radius=0) == 8
    assert edge(0.25, radius=0.0, momentum=0.5) == 12
    assert edge(0.25, radius=3.0, weight=0.0) == 8
    slope = jax.grad(lambda r: edge(0.25, radius=r))(0.0)
    assert slope == -64  # from λ + r λ² = 8
    np.testing.assert_allclose(edge(0.25, radius=1e-12), 8, rtol=1e-6)  # no cancellation


def test_it_takes_arrays_and_traced_numbers():
    radius, eta = jnp.array([0.0, 0.5, 2.0]), jnp.array([[0.1], [0.2]])
    with jax.numpy_rank_promotion("allow"):
        found = edge(eta, radius=radius, momentum=0.5, weight=2)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(
        found * (1 + 2 * radius[None] * found), [[30] * 3, [15] * 3], rtol=1e-6
    )
    mapped = jax.jit(jax.vmap(lambda r: edge(0.1, radius=r, momentum=0.5, weight=2)))(radius)
    np.testing.assert_allclose(mapped, found[0], rtol=1e-6)
    assert jax.jit(lambda b: edge(0.1, radius=0.0, momentum=b))(0.5) == 30


def test_it_computes_in_float32_or_wider():
    half = edge(jnp.array(0.1, "bfloat16"), radius=jnp.array(0.5, "float16"))
    assert half.dtype == "float32"
    assert edge(1, radius=0).dtype == "float32"
    with jax.enable_x64(True):
        assert edge(0.1, radius=np.float32(0.5)).dtype == "float64"
    assert edge(0.1, radius=jnp.array(jnp.inf)) == 0  # SAM without a gradient


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, "`learning_rate` must be above 0, got 0"),
        ({"learning_rate": -0.1}, "`learning_rate` must be above 0"),
        ({"radius": -1.0}, "`radius` must be at least 0, got -1.0"),
        ({"radius": float("nan")}, "`radius` must be at least 0, got nan"),
        ({"radius": float("inf")}, "`radius` must be at least 0 and finite"),
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"`momentum` must be in \[0, 1\)"),
        ({"weight": -0.5}, "`weight` must be at least 0, got -0.5"),
    ],
)
def test_wrong_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        edge(**{"learning_rate": 0.1, "radius": 0.1} | arguments)


@pytest.mark.parametrize("wrong", ["0.1", None, True, 1j, [0.1], jnp.ones(2, bool)])
@pytest.mark.parametrize("name", ["learning_rate", "radius", "momentum", "weight"])
def test_wrong_types(name, wrong):
    with pytest.raises(TypeError, match=f"`{name}` must be a number"):
        edge(**{"learning_rate": 0.1, "radius": 0.1} | {name: wrong})


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("SAM", 0.05),
        Case("SAM with momentum", 0.05, momentum=0.5),
        Case("mixture", 0.05, weight=0.5),
        Case("USAM", 0.05, is_normalized=False),
        Case("gradient descent"),
    ],
    ids=lambda case: case.title,
)
def test_training_ends_up_there(case):
    """Independent of samx: 1.04 with SAM; 0.80 if its perturbation is doubled, 1.32 if halved.

    1.92 if it is not normalized, and 2.75 if it is absent.
    """
    run = edge_training.train(case, learning_rate=0.2, steps=2000)
    ratios = edge_training.ratios(run, 1100)
    assert len(ratios) == 10
    assert 0.93 < ratios.mean() < 1.12
