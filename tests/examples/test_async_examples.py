"""The AsyncSAM examples: what they climb, what they time, and what they report."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samx
from examples import digits
from examples.asynchronous import async_cost, async_digits
from examples.common.registry import VARIANTS, Setting

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_tiny_run_of_digits(in_empty_folder, monkeypatch, capsys):
    """Every stage has the same number of runs, which saves compilation."""
    monkeypatch.setattr(digits, "TUNING_SEEDS", range(1000, 1001))
    monkeypatch.setattr(digits, "LEARNING_RATES", {"momentum": (0.3, 1e-4)})  # only 0.3 learns
    monkeypatch.setattr(digits, "seconds_per_step", lambda *args: 0.001)
    for name in ("base", "sam"):
        monkeypatch.setitem(async_digits.ROWS, name, async_digits.ROWS[name]._replace(radii=(0.1,)))
    kept = {"base", "sam", "async-sam, b/2"}
    rows = {name: row for name, row in async_digits.ROWS.items() if name in kept}
    monkeypatch.setattr(async_digits, "ROWS", rows)
    monkeypatch.setattr(async_digits, "SHARES", {"async-sam, b/2": 0.5})
    arguments = "--seeds 2 --epochs 2 --width 8 --noise 0.2 --rho 0.1 --out results"
    measured = async_digits.main(arguments.split())
    report = json.loads((in_empty_folder / "results" / "results.json").read_text())
    assert report["results"] == measured["results"]
    assert {"seeds": 2, "noise": 0.2, "rho": [0.1]}.items() <= report["settings"].items()
    assert (in_empty_folder / "results" / "async_digits.png").stat().st_size > 20_000

    results = measured["results"]
    assert {(r["row"], r["noise"]) for r in results} == {*itertools.product(rows, (0.2, 0.0))}
    for result in results:
        assert result["gradients"] == pytest.approx(20 * rows[result["row"]].gradients)
        assert result["learning_rate"] == 0.3
        assert np.shape(result["test_accuracy"]) == (2,)
    of = {(r["row"], r["noise"]): 100 * np.array(r["test_accuracy"]) for r in results}
    for found in measured["comparisons"]:
        difference = of[found["row"], found["noise"]] - of[found["other"], found["noise"]]
        assert found["difference"] == pytest.approx(difference.mean())
        assert found["error"] == pytest.approx(abs(difference[0] - difference[1]) / 2)
    repeated = measured["two_devices"]
    assert repeated["steps"] == 20
    assert len(set(repeated["devices"])) == 2
    assert repeated["difference"] < 1e-10
    assert repeated["moved"] > 0.01
    printed = capsys.readouterr().out
    for text in ("async-sam, b/2 - sam:", "one standard error", "ascent batch for", "Plot:"):
        assert text in printed


@pytest.mark.parametrize("share", [None, 1.0, 0.25])
def test_the_ascent_batch_is_a_part_of_the_batch(share):
    """Two steps by hand; `ascent_fn`, which the examples pass for BiSAM, is not climbed."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)

    def losses_fn(w, batch):
        return (batch["x"] @ w - 1) ** 2

    def gradient(w, size=8):
        part = np.asarray(x)[:size]
        return 2 * part.T @ (part @ w - 1) / size

    variant = VARIANTS["async-sam"] if share is None else async_digits.with_share(share)
    share = share or 1.0
    assert variant.gradients == 1 + share
    tx = variant.make(0.3, optax.sgd(0.1), Setting({"x": x}, batch_size=8, num_examples=8))

    @jax.jit
    def step(w, state):
        closures = {"losses_fn": losses_fn, "batch": {"x": x}}
        g = jax.grad(lambda w: losses_fn(w, {"x": x}).mean())(w)
        updates, state = tx.update(g, state, w, ascent_fn=lambda w: (w**4).sum(), **closures)
        return optax.apply_updates(w, updates), state

    w = np.array([1.0, -2.0, 0.5], np.float32)
    found, state, eps = w, tx.init(w), 0.0
    for _ in range(2):
        found, state = step(found, state)
        a = gradient(w, int(8 * share))
        w = w - 0.1 * gradient(w + eps)
        eps = 0.3 * a / np.linalg.norm(a)
    np.testing.assert_allclose(found, w, rtol=1e-5)
    assert float(optax.tree.get(state, "gradients_spent")) == 2 * (1 + share)


def test_the_verdict_is_that_of_the_paired_difference():
    sam, others = [0.5, 0.7, 0.9], {"async-sam, b": 0.01, "async-sam, b/2": -0.2}
    results = [{"row": "sam", "noise": 0.0, "test_accuracy": sam}]
    results += [{"row": "base", "noise": 0.0, "test_accuracy": [0.5, 0.5, 0.5]}]
    for row, lead in others.items():
        paired = [sam[0] + lead, sam[1] + lead + 0.03, sam[2] + lead - 0.03]
        results.append({"row": row, "noise": 0.0, "test_accuracy": paired})
    results.append({"row": "async-sam, b/4", "noise": 0.0, "test_accuracy": sam})
    lines = [async_digits.describe(found) for found in async_digits.compare(results, 0.0)]
    assert lines[0] == "async-sam, b - sam: +1.00 ± 1.73 points, within one standard error"
    assert lines[2] == "async-sam, b/2 - sam: -20.00 ± 1.73 points, not within one standard error"
    assert lines[5].startswith("async-sam, b/4 - base: +20.00 ± ")
    assert lines[5].endswith(" points")


def test_a_tiny_run_of_the_cost(in_empty_folder, capsys):
    arguments = "--devices cpu --batch 16 --length 2 --steps 2 --repeats 2 --out results"
    measured = async_cost.main(arguments.split())
    report = json.loads((in_empty_folder / "results" / "results.json").read_text())
    assert report["results"] == measured["results"]
    assert report["settings"]["length"] == 2
    assert (in_empty_folder / "results" / "async_cost.png").stat().st_size > 10_000
    rows = {result["row"]: result for result in measured["results"]}
    assert {"sgd", "sam", *(f"async-sam, {name}" for name in async_cost.SHARES)} <= set(rows)
    assert "async-sam, b, on one device" in rows
    for result in rows.values():
        assert len(result["seconds"]) == 2
        assert result["handed_out_ms"] > 0
        assert result["ratio"][1] <= result["ratio"][0] <= result["ratio"][2]
    assert rows["sgd"]["ratio"] == [1, 1, 1]
    assert report["ascent_batch"]["size"] in (8, 16)
    printed = capsys.readouterr().out
    for text in ("devices: cpu and cpu", "handed out", "ascent batch for these devices", "Plot:"):
        assert text in printed


def test_the_loop_is_differentiable_and_as_long_as_asked():
    """The loss equals that of a loop by hand, with one and with two times the length."""
    for length in (1, 2):
        loss, params, batch = async_cost.elementwise(4, length)
        x = np.asarray(batch["x"], np.float64)
        for _ in range(length * async_cost.DEPTH):
            x = np.tanh(1.5 * x)
        value, g = jax.jit(jax.value_and_grad(loss))(params, batch)
        np.testing.assert_allclose(value, (x**2).mean(), rtol=1e-5)
        assert float(abs(g["scale"]).max()) > 0


def test_times_are_divided_by_those_of_the_same_round(monkeypatch):
    """The ratios stay the same if the machine gets slower from round to round."""
    slow = {"sgd": 1.0, "sam": 2.0}
    rounds = {name: itertools.count(1) for name in slow}

    def timed(steps, count):
        name = next(steps)
        return 0.001, slow[name] * next(rounds[name])

    monkeypatch.setattr(async_cost, "timed", timed)
    rows = {name: itertools.repeat(name) for name in slow}
    plain, sam = async_cost.measure(rows, repeats=3, count=1)
    assert (plain["ratio"], sam["ratio"]) == ([1, 1, 1], [2, 2, 2])
    # the median after the round that compiles; these rounds are 2, 3, 4 times as slow
    assert sam["ms"] == 2000 * 3
    assert sam["handed_out_ms"] == pytest.approx(1)
    assert " 2.00 [2.00, 2.00]" in async_cost.table([plain, sam])


def test_the_decision_in_words():
    found = samx.asynchronous.AscentBatch(8, False, 0.01, {8: 0.02, 16: 0.03}, 0.001)
    text = async_cost.describe_ascent_batch(found)
    assert "8 examples, although its gradient takes longer" in text
    assert "descent 10.00 ms; ascent with copies, of so many examples: 8: 20.00, 16: 30.00" in text
    assert "although" not in async_cost.describe_ascent_batch(found._replace(is_hidden=True))


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        (async_digits, "--seeds 0", "--seeds must be at least 1"),
        (async_digits, "--epochs 0", "--epochs must be at least 1"),
        (async_digits, "--width -1", "--width must be at least 1"),
        (async_digits, "--noise 1", "--noise must be in [0, 1)"),
        (async_digits, "--rho 0.1 -1", "--rho must be finite and at least 0"),
        (async_digits, "--base lamb", "argument --base: invalid choice"),
        (async_digits, "--out full", "--out: full is not empty"),
        (async_cost, "--repeats 0", "--repeats must be at least 1"),
        (async_cost, "--steps 0", "--steps must be at least 1"),
        (async_cost, "--length 0", "--length must be at least 1"),
        (async_cost, "--batch 6", "--batch must be a multiple of 4, got 6"),
        (async_cost, "--batch 0", "--batch must be a multiple of 4, got 0"),
        (async_cost, "--devices tpu", "argument --devices: invalid choice"),
        (async_cost, "--out full", "--out: full is not empty"),
    ],
)
def test_nonsense_is_refused_before_anything_is_done(
    example, arguments, message, in_empty_folder, capsys
):
    (in_empty_folder / "full").mkdir()
    (in_empty_folder / "full" / "file").touch()
    with pytest.raises(SystemExit):
        example.main(arguments.split())
    assert message in capsys.readouterr().err
    assert [path.name for path in in_empty_folder.iterdir()] == ["full"]


def test_a_gpu_that_is_not_there(in_empty_folder, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(SystemExit):
        async_cost.main(["--devices", "gpu"])
    assert "--devices gpu: jax sees none, only cpu" in capsys.readouterr().err
    assert not [*in_empty_folder.iterdir()]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert async_cost.parse([]).batch == 4096
