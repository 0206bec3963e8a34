"""The preference example: its pairs, DPO's loss, its methods, what it writes, that it continues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.train import preference, text

TINY = "--seeds 2 --steps 2 --batch 4 --pairs 8 --pretrain 2 --width 8 --prompt 3 --continuation 3"


@pytest.fixture
def tiny(in_empty_folder, monkeypatch):
    """Run the example on small files, with one candidate of each row."""
    rng, around = np.random.default_rng(0), preference.around
    files = [rng.integers(97, 100, 400).astype(np.uint8) for _ in range(4)]
    monkeypatch.setattr(text, "load_files", lambda: (files[:2], files[2:]))
    monkeypatch.setattr(
        preference, "around", lambda *of, **more: around(*of, **more)._replace(reach=0)
    )
    for name, value in (("HELD_OUT_PAIRS", 4), ("PART", 4), ("LEAST", 1e-3), ("RATE", 0.1)):
        monkeypatch.setattr(preference, name, value)
    return lambda arguments: preference.main(arguments.split())


def bigrams(params, x, method):
    """Stand in for the GPT, which takes long to compile: the logits follow from the last byte."""
    return params[x] if method == "features" else x @ params.T


def test_a_tiny_run(tiny, in_empty_folder, capsys, read_report, monkeypatch):
    names = "adamw", "logits-sam"
    monkeypatch.setattr(preference, "METHODS", {k: preference.METHODS[k] for k in names})
    embedding = jax.random.normal(jax.random.key(0), (text.VOCABULARY, 4))
    monkeypatch.setattr(preference, "pretrain", lambda *of, **settings: (bigrams, embedding))

    def no_times(task, results, batch, rounds):
        for result in results:
            result |= {"ms": 1.0, "time_ratio": [1.0, 1.5, 2.0]}

    monkeypatch.setattr(preference, "time_steps", no_times)
    results = tiny(f"{TINY} --out results")
    assert read_report(in_empty_folder / "results")["results"] == results
    assert [result["method"] for result in results] == ["adamw", "logits-sam"]
    adamw, ours = results
    assert adamw["gradients"] == [2, 2]
    assert 2 < ours["gradients"][0] < 4
    assert len(set(adamw["loss"] + ours["loss"])) == 4
    assert (in_empty_folder / "results" / "preference.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for words in ("2 steps of 4 pairs, 2 seeds", "logits-sam", "2603.18258", "1.50"):
        assert words in printed

    monkeypatch.setattr(preference, "take_step", None)  # nothing is trained again
    assert tiny("--resume results") == results


@pytest.mark.slow
def test_every_method(tiny):
    results = tiny(f"{TINY} --rounds 1 --out results")
    spent = {result["method"]: result["gradients"][0] for result in results}
    assert [*spent] == [*preference.METHODS]
    assert spent["adamw2x"] == spent["sam"] == spent["functional-sam"] == 2 * spent["adamw"]
    assert all(result["time_ratio"][1] > 0 for result in results)


def test_pairs_come_from_one_file_each():
    sources = [np.arange(i, i + 50, dtype=np.uint8) for i in (0, 50, 100)]
    pairs = preference.draw_pairs(sources, 200, prompt=4, continuation=3, seed=0)
    chosen, rejected = pairs[:, 0], pairs[:, 1]
    np.testing.assert_array_equal(np.diff(chosen), 1)  # as in the file
    np.testing.assert_array_equal(chosen[:, :4], rejected[:, :4])
    np.testing.assert_array_equal(np.diff(rejected[:, 4:]), 1)
    assert (chosen[:, 4] != rejected[:, 4]).all()
    np.testing.assert_array_equal(rejected[:, 4:] // 50 == chosen[:, :1] // 50, True)
    assert set(chosen[:, 0] // 50) == {0, 1, 2}
    again = preference.draw_pairs(sources, 200, prompt=4, continuation=3, seed=1)
    assert (again != pairs).any()


def test_the_loss_by_hand():
    logits = jax.random.normal(jax.random.key(0), (5, 2, 3, 7))
    tokens = jax.random.randint(jax.random.key(1), (5, 2, 6), 0, 7)
    reference = jax.random.normal(jax.random.key(2), (5, 2))
    found = preference.loss_on_logits(logits, {"tokens": tokens, "reference": reference})
    logits, tokens, reference, found = map(np.asarray, (logits, tokens, reference, found))
    log_p = np.log(np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True))
    for pair, loss in enumerate(found):
        chosen, rejected = (
            sum(log_p[pair, side, at, tokens[pair, side, 3 + at]] for at in range(3))
            - reference[pair, side]
            for side in (0, 1)
        )
        assert loss == pytest.approx(np.log1p(np.exp(-0.1 * (chosen - rejected))), rel=1e-5)


def test_the_features_are_those_before_each_byte_of_a_continuation():
    def apply_fn(params, x, method):
        return {"features": x[..., None] * params, "head": x}[method]  # a feature is its byte

    model = preference.Model(apply_fn, 10, continuation=2)
    batch = {"tokens": jnp.array([[[1, 2, 3, 4, 5], [1, 2, 3, 6, 7]]])}
    found = model.logits(10, batch)
    np.testing.assert_array_equal(found[..., 0], [[[30, 40], [30, 60]]])


def test_the_better_base_is_by_measure():
    rows = [
        {"method": "adamw", "accuracy": [70.0, 72.0], "loss": [0.5, 0.5]},
        {"method": "adamw2x", "accuracy": [69.0, 72.5], "loss": [0.4, 0.4]},
        {"method": "sam", "accuracy": [72.0, 73.0], "loss": [0.45, 0.55]},
    ]
    assert preference.better_base(rows, "accuracy")["method"] == "adamw"
    assert preference.better_base(rows, "loss")["method"] == "adamw2x"
    assert preference.lead_of(rows[2], rows[0], "accuracy") == "+1.50 ± 0.50"
    assert preference.lead_of(rows[2], rows[1], "loss") == "+0.1000 ± 0.0500"
    assert preference.lead_of(rows[0], rows[0], "accuracy") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--pairs 3 --batch 4 --out taken", "--pairs must be at least 4, got 3"),
        ("--width 100 --out taken", "--width must be even, and above 64 a multiple of 64, got 100"),
        ("--seeds 0 --out taken", "--seeds must be at least 1, got 0"),
        ("--out taken", "taken is not empty"),
        ("--resume taken", "there is no run to continue"),
    ],
)
def test_refusals(arguments, message, refusal):
    assert message in refusal(preference.main, arguments)
