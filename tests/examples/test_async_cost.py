"""The example that times AsyncSAM: its loop, its rounds, and what it reports."""

import itertools

import jax
import numpy as np
import pytest

import samx
from examples.claims import async_cost, claim
from examples.common import async_steps


def test_a_tiny_run(in_empty_folder, capsys, read_report):
    arguments = "--devices cpu --batch 16 --length 2 --steps 2 --repeats 2 --out results"
    measured = async_cost.main(arguments.split())
    report = read_report(in_empty_folder / "results")
    assert report["results"] == measured["results"]
    assert report["settings"]["length"] == 2
    assert (in_empty_folder / "results" / "async_cost.png").stat().st_size > 10_000
    rows = {result["row"]: result for result in measured["results"]}
    assert {"sgd", "sam", *(f"async-sam, {name}" for name in async_steps.SHARES)} <= set(rows)
    assert {async_cost.ONE_DEVICE, async_cost.BOTH} <= set(rows)
    for result in rows.values():
        assert len(result["seconds"]) == 2
        assert result["handed_out_ms"] > 0
        assert result["ratio"][1] <= result["ratio"][0] <= result["ratio"][2]
    assert rows["sgd"]["ratio"] == [1, 1, 1]
    assert report["ascent_batch"]["size"] in (8, 16)
    assert (in_empty_folder / "results" / "async_cost.json").exists()
    printed = capsys.readouterr().out
    for text in (
        "device: cpu and cpu",
        "handed out",
        "Almost SGD's time",
        "ascent batch for these devices",
        "Plot:",
    ):
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


def test_the_share_that_is_hidden():
    """SGD takes 1, both programs on one device 3: the ascent takes 2, and a half of it 1."""
    times = {"sgd": 1.0, "async-sam, b": 2.0, "async-sam, b/2": 1.0, "async-sam, b/4": 1.5}
    times |= {async_cost.ONE_DEVICE: 3.0, async_cost.BOTH: 1.0625}
    values = async_cost.values_of([{"row": row, "seconds": [t, 2 * t]} for row, t in times.items()])
    assert set(values) == set(async_cost.CLAIMS)
    assert values["hidden, b"] == [0.5, 0.5]
    assert values["hidden, b/2"] == [1, 1]
    assert values["hidden, b/4"] == [0, 0]
    assert values["time, b/4"] == [1.5, 1.5]
    assert values["smaller"] == [0.5, 0.5]
    assert values["condition"] == [1.0625, 1.0625]
    assert values["beside SGD, b"] == pytest.approx([2 / 1.0625] * 2)


def test_without_devices_of_their_own_nothing_is_said_of_time():
    rows = "sgd", *(f"async-sam, {name}" for name in async_cost.SHARES), async_cost.ONE_DEVICE
    results = [{"row": row, "seconds": [1.0, 1.0]} for row in rows[:-1]]
    results += [{"row": row, "seconds": [2.0, 2.0]} for row in (rows[-1], async_cost.BOTH)]
    values = async_cost.values_of(results)
    assert set(values) == set(async_cost.CLAIMS)
    assert {name for name, each in values.items() if each} == {
        "condition",
        *(f"beside SGD, {name}" for name in async_cost.SHARES),
    }
    assert values["beside SGD, b"] == [0.5, 0.5]


def test_the_decision_in_words():
    found = samx.asynchronous.AscentBatch(8, False, 0.01, {8: 0.02, 16: 0.03}, 0.001)
    text = async_cost.describe_ascent_batch(found)
    assert "8 examples, although its gradient takes longer" in text
    assert "descent 10.00 ms; ascent with copies, of so many examples: 8: 20.00, 16: 30.00" in text
    assert "although" not in async_cost.describe_ascent_batch(found._replace(is_hidden=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--repeats 0", "--repeats must be at least 1"),
        ("--steps 0", "--steps must be at least 1"),
        ("--length 0", "--length must be at least 1"),
        ("--batch 6", "--batch must be a multiple of 4, got 6"),
        ("--batch 0", "--batch must be a multiple of 4, got 0"),
        ("--devices tpu", "argument --devices: invalid choice"),
        ("--out taken", "--out: taken is not empty"),
    ],
)
def test_bad_arguments(arguments, message, refusal):
    assert message in refusal(async_cost.main, arguments)


def test_a_gpu_that_is_not_there(in_empty_folder, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(SystemExit):
        async_cost.main(["--devices", "gpu"])
    assert "--devices gpu: jax sees none, only cpu" in capsys.readouterr().err
    assert not [*in_empty_folder.iterdir()]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    args = async_cost.parse([])
    async_cost.choose_devices(args)
    assert args.batch == 4096


def test_committed_numbers_are_those_of_the_claims():
    assert set(claim.read(async_cost.NAME)) == set(async_cost.CLAIMS)
