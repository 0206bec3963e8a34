"""The example on the batch of the ascent: what each arm climbs, and what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.claims import claim, climbing, which_batch
from examples.common import training, tuning
from examples.common.registry import VARIANTS, Setting

SIZE, STEPS, RHO, RATE = 4, 4, 0.3, 0.1
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3 * SIZE, 3)).astype(np.float32)
START = np.array([1.0, -2.0, 0.5], np.float32)
ORDER = [np.arange(0, 4), np.arange(4, 8), np.arange(8, 12), np.array([1, 5, 7, 10])]


def losses_fn(w, batch):
    return (batch["x"] @ w - 1) ** 2


def gradient(w, rows):
    part = X.astype(float)[rows]
    return 2 * part.T @ (part @ w - 1) / len(rows)


def by_hand(direction):
    """Train without momentum; `direction` gets the points, the rows and the last descents."""
    points, descents = [START.astype(float)], [np.zeros(3)]
    for step, rows in enumerate(ORDER):
        d = direction(step, points, descents)
        norm = np.linalg.norm(d)
        g = gradient(points[-1] + (RHO * d / norm if norm > 1e-9 else 0), rows)
        descents.append(g)
        points.append(points[-1] - RATE * g)
    return points[-1]


def seen(step):
    return np.unique(np.concatenate(ORDER[: step + 1]))


def later(function):
    """Climb nothing in the first step."""
    return lambda step, points, descents: function(step, points, descents) if step else np.zeros(3)


def another(step, points, descents):
    rows = (ORDER[step] + 1 + (climbing.STRIDE * step) % (len(X) - 1)) % len(X)
    rows = np.intersect1d(rows, seen(step))
    return gradient(points[-1], rows) if len(rows) else np.zeros(3)


WANTED = {
    "sam": lambda step, points, descents: gradient(points[-1], ORDER[step]),
    "previous batch": later(lambda step, points, _: gradient(points[-1], ORDER[step - 1])),
    "older point": later(lambda step, points, _: gradient(points[-2], ORDER[step])),
    "async-sam": later(lambda step, points, _: gradient(points[-2], ORDER[step - 1])),
    "another batch": later(another),
    "last descent": later(lambda step, points, descents: descents[-1]),
    "all examples": lambda step, points, descents: gradient(points[-1], seen(step)),
    "batch - all": later(
        lambda step, points, _: gradient(points[-1], ORDER[step]) - gradient(points[-1], seen(step))
    ),
}


@pytest.fixture(scope="module")
def trained():
    """Where each arm ends, all in one program; and AsyncSAM's direction in the form of the arms."""
    batch = {"x": jax.ShapeDtypeStruct((SIZE, 3), jnp.float32)}
    batch["index"] = jax.ShapeDtypeStruct((SIZE,), jnp.int32)
    arms = {name: climbing.ARMS[name] for name in WANTED}
    arms["both"] = climbing.arm(climbing.both, 2)

    def train(arm):
        tx = arm.make(RHO, optax.sgd(RATE), Setting(batch, SIZE, len(X)))

        def step(carry, rows):
            w, state = carry
            batch = {"x": jnp.asarray(X)[rows], "index": rows}
            g = jax.grad(lambda w: losses_fn(w, batch).mean())(w)
            updates, state = tx.update(g, state, w, losses_fn=losses_fn, batch=batch)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.asarray(START)
        return jax.lax.scan(step, (w, tx.init(w)), jnp.array(ORDER, jnp.int32))[0][0]

    return jax.jit(lambda: {name: train(arm) for name, arm in arms.items()})()


@pytest.mark.parametrize("name", WANTED)
def test_what_an_arm_climbs(name, trained):
    np.testing.assert_allclose(trained[name], by_hand(WANTED[name]), rtol=1e-4)


def test_the_arm_between_is_async_sam(trained):
    np.testing.assert_allclose(trained["both"], trained["async-sam"], rtol=1e-5)


def test_the_other_sign_goes_back():
    """A loss whose gradient shows where it is taken: w + 1."""

    def second_gradient(make):
        tx = make(0.5, optax.sgd(0.1, momentum=0.9), Setting(None, 1, 1))
        w, state, found = jnp.ones(()), tx.init(jnp.ones(())), []
        for _ in range(2):
            _, state = tx.update(w, state, w, value_fn=lambda w: w + w**2 / 2)
            found.append(float(optax.tree.get(state, "trace")))
        return found[1] - 0.9 * found[0]

    ahead = VARIANTS["momentum-sam"].make
    assert second_gradient(ahead) == pytest.approx(2 - 0.5)
    assert second_gradient(climbing.against_momentum) == pytest.approx(2 + 0.5)


def test_cosines_of_a_training_that_stands_still():
    args = which_batch.parse(["--seeds", "2", "--epochs", "1", "--width", "8"])
    found = which_batch.cosines(args, (0.0, 0.1))
    np.testing.assert_allclose(found["older point"], 1, rtol=1e-5)
    np.testing.assert_allclose(found["previous batch"], found["async-sam"], rtol=1e-5)
    assert np.shape(found["all examples"]) == (2, 1)
    assert (np.array(found["previous batch"]) < np.array(found["all examples"])).all()
    assert (np.array(found["all examples"]) < 1).all()


def test_values_are_paired_differences_and_means_over_a_training(monkeypatch):
    """Two seeds; the cosines of the first one's training are 0, 0 and 0.9."""
    monkeypatch.setattr(which_batch, "SAID", {"async": which_batch.SAID["async"]})
    said, along = which_batch.SAID["async"], [[0.0, 0.0, 0.9], [0.3, 0.3, 0.3]]
    points = {(said.row, setting): [90.0, 80.0] for setting in said.settings}
    points |= {(said.other, setting): [91.0, 79.5] for setting in said.settings}
    found = which_batch.values_of(
        which_batch.Measured([], points, dict.fromkeys(which_batch.ARMS, along))
    )
    assert all(found[f"async, {setting}"] == [-1.0, 0.5] for setting in said.settings)
    for name in which_batch.COSINE_CLAIMS:
        assert found[name] == pytest.approx([0.3, 0.3])


def test_a_tiny_run(in_empty_folder, monkeypatch, capsys, read_report):
    """Most arms are SAM, which is compiled once."""
    arms = {name: VARIANTS["sam"] for name in climbing.ARMS}
    arms["async-sam"] = climbing.arm(climbing.both, 2)
    monkeypatch.setattr(which_batch, "ARMS", arms)
    monkeypatch.setattr(training, "SEARCH_SEEDS", range(1000, 1001))
    monkeypatch.setattr(training, "around", lambda *of, **more: tuning.fixed([0.1]))
    monkeypatch.setattr(training, "from_zero", lambda axis: axis)
    arguments = "--seeds 2 --epochs 1 --width 8 --out results"
    found = which_batch.main(arguments.split())
    assert {one.name for one in found} == set(which_batch.CLAIMS)
    report = read_report(in_empty_folder / "results")
    values = report["values"]
    assert set(values) == set(which_batch.CLAIMS)
    assert all(len(each) == 2 for each in values.values())
    assert values["sam-db, wrong labels"] == [0, 0]  # here both are SAM
    one, other = (report["points"][f"{row}, wrong labels"] for row in ("async-sam", "sam"))
    assert one != other
    np.testing.assert_allclose(values["async, wrong labels"], np.subtract(one, other), atol=1e-4)
    np.testing.assert_allclose(report["points"][f"sam, {which_batch.SAME}"], other, rtol=1e-6)
    assert (in_empty_folder / "results" / "which_batch.json").exists()
    assert (in_empty_folder / "results" / "which_batch.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    for text in ("points over sam", "cosine of the batch's gradient", "friendly_sam:"):
        assert text in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--seeds 0", "--seeds must be at least 1"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--out taken", "--out: taken is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert message in refusal(which_batch.main, arguments)


def test_committed_numbers_are_those_of_the_claims():
    assert set(claim.read(which_batch.NAME)) == set(which_batch.CLAIMS)
