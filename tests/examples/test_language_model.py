"""The language model: text, every variant, FSDP, killed runs, and counts from shapes alone."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec as P

import samx
from examples.common import choices, monitoring
from examples.common.gpt import GPT, Size, losses_of
from examples.common.language_task import batch_like, logits_like, make_task, union
from examples.common.programs import communicated_bytes, peak_bytes, product_flops
from examples.common.registry import VARIANTS, Setting
from examples.common.shapes import ADAPTATIONS, OPTIONS, held_bytes, methods
from examples.train import abstract, language_model, text

SIZE = Size(width=16, depth=2, vocabulary=32, length=8)
TINY = "--width 16 --depth 2 --length 16 --batch 8 --steps 5 --evaluate-every 2"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A small text in the form of a standard library: fast to count and to read."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    for number in range(40):
        (folder / f"module{number}.py").write_bytes(bytes(rng.integers(97, 100, 400, np.uint8)))
    return text.load(folder)


@pytest.fixture
def run(sources, in_empty_folder, monkeypatch):
    """Run the example in an empty folder, in this process."""
    monkeypatch.setattr(text, "load", lambda: sources)
    monkeypatch.setattr(language_model, "draw", lambda *args: None)
    monkeypatch.setattr(language_model, "HELD_OUT_EXAMPLES", 16)
    monkeypatch.setattr(language_model, "SAMPLE", 4)
    return lambda arguments: language_model.main(arguments.split())


def read(folder, kind):
    rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def make(tx, *, devices=8, parallel="fsdp", **keywords):
    return make_task(SIZE, tx, devices=jax.devices()[:devices], parallel=parallel, **keywords)


def shapes(task, examples=8, size=SIZE):
    batch = batch_like(size, examples)
    return jax.tree.map(lambda leaf: leaf.update(sharding=task.batch_sharding), batch)


def batch_at(step, examples=8):
    tokens = jax.random.randint(jax.random.key(step), (examples, SIZE.length + 1), 0, 32)
    return {"tokens": tokens.astype(jnp.int32), "index": jnp.arange(examples, dtype=jnp.int32)}


def optimizer(name, learning_rate=1e-2, examples=8):
    setting = Setting(
        batch_like(SIZE, examples),
        examples,
        num_examples=examples,
        logits=logits_like(SIZE),
        learning_rate=learning_rate,
    )
    return VARIANTS[name].make(0.05, language_model.make_base(learning_rate, 0.1), setting)


# The text.


def test_the_text_is_split_by_file(tmp_path):
    for name in ("a", "b", "test", "site-packages"):
        (tmp_path / name).mkdir()
    for number in range(60):
        (tmp_path / "ab"[number % 2] / f"m{number}.py").write_text(f"<{number}>")
    (tmp_path / "test" / "m.py").write_text("<test>")
    (tmp_path / "site-packages" / "m.py").write_text("<package>")
    parts = [bytes(part).decode() for part in text.load(tmp_path)]
    files = [part.strip("<>").split("><") for part in parts]
    assert sorted(map(int, files[0] + files[1])) == list(range(60))
    assert 1 <= len(files[1]) <= 15
    (tmp_path / "a" / "new.py").write_text("<new>")  # other files stay where they are
    again = bytes(text.load(tmp_path).held_out).decode().strip("<>").split("><")
    assert set(files[1]) <= set(again)


def test_too_little_text(tmp_path):
    with pytest.raises(ValueError, match="too few Python sources"):
        text.load(tmp_path)
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 4\], got 5"):
        text.train_batches(np.zeros(41, np.uint8), 10, 5, seed=0)
    with pytest.raises(ValueError, match="too short for 40 examples"):
        text.spread_starts(np.zeros(41, np.uint8), 10, 40)


def test_batches_are_a_permutation_of_the_text_in_every_epoch():
    data = np.arange(201, dtype=np.uint8)
    batches = text.train_batches(data, 10, 5, seed=3, num_threads=0)
    epochs = [[next(batches) for _ in range(4)] for _ in range(2)]
    for epoch in epochs:
        index = np.concatenate([batch["index"] for batch in epoch])
        assert sorted(index) == list(range(20))
        for batch in epoch:
            wanted = batch["index"][:, None] * 10 + np.arange(11)
            np.testing.assert_array_equal(batch["tokens"], wanted)
    assert any((a["index"] != b["index"]).any() for a, b in zip(*epochs, strict=True))


def test_the_trigram_model_by_hand():
    train = np.frombuffer(b"abcabdabcabc", np.uint8)
    held_out = np.frombuffer(b"zabcd", np.uint8)
    n, size = len(train), text.VOCABULARY
    found = text.trigram_loss(train, held_out, 2, np.array([1]))

    def p1(byte):  # 4 different bytes in 12 places
        return (train.tolist().count(byte) + 4 / size) / (n + 4)

    p2_c = (3 + 2 * p1(ord("c"))) / (4 + 2)  # "b" is followed by c, d, c, c
    p3_c = (3 + 2 * p2_c) / (4 + 2)  # "ab" is followed by the same
    p2_b = (4 + p1(ord("b"))) / (4 + 1)  # "a" is followed by b only; "za" never occurs
    np.testing.assert_allclose(found, -np.log([p2_b, p3_c]).mean(), rtol=1e-5)


# The model.


def test_losses_are_the_cross_entropy_of_each_example():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 7))
    targets = jnp.array([[0, 1, 2, 3, 4], [6, 6, 6, 6, 6]])
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(axis=-1)
    np.testing.assert_allclose(losses_of(logits, targets), wanted, rtol=1e-6)


def test_the_model_sees_the_past_only_and_where_a_token_is():
    model = GPT(SIZE, rngs=nnx.Rngs(0))
    tokens = jnp.array([[1, 2, 3, 4, 5, 6, 7, 8]])
    logits = model(tokens)
    np.testing.assert_array_equal(model.head(model.features(tokens)), logits)
    later = model(tokens.at[0, 5].set(9))
    np.testing.assert_allclose(later[:, :5], logits[:, :5], atol=1e-6)
    assert (abs(later - logits)[:, 5:].max(axis=-1) > 1e-4).all()
    swapped = model(tokens[:, jnp.array([1, 0, 2, 3, 4, 5, 6, 7])])
    assert abs(swapped - logits)[0, -1].max() > 1e-5  # the same bytes in another order
    half = GPT(SIZE, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, remat=True)(tokens)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, logits, atol=0.03)


@pytest.mark.parametrize(
    "name",
    [
        name if name in language_model.KINDS else pytest.param(name, marks=pytest.mark.slow)
        for name in choices.VARIANTS
    ],
)
def test_every_variant_takes_a_step(name):
    task = make(optimizer(name), devices=2)
    state, readings = jax.eval_shape(task.step, task.state, batch_like(SIZE, 8))
    assert jax.tree.structure(state) == jax.tree.structure(task.state)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, task.state)
    assert readings["loss"].shape == ()


# Several devices.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "sampa", "base"])
@pytest.mark.usefixtures("float64")
def test_eight_devices_under_fsdp_are_one(name):
    """With a warm-up from 0 and, on the eight devices, remat and two microbatches."""
    ends = []
    schedule = optax.linear_schedule(0.0, 1e-2, 3)
    for devices, parallel in ((1, "data"), (8, "fsdp")):
        tx = optimizer(name, schedule, examples=16)
        tx = samx.accumulate(tx, 2) if devices > 1 else tx
        task = make(
            tx,
            devices=devices,
            parallel=parallel,
            remat=devices > 1,
            dtype=jnp.float64,
            param_dtype=jnp.float64,
        )
        state, losses = task.init(jax.random.key(0)), []
        for step in range(5):
            batch = jax.device_put(batch_at(step % 2, 16), task.batch_sharding)
            state, readings = task.step(state, batch)
            losses.append(float(readings["loss"]))
        ends.append((jax.device_get(state.params), losses))
    (one, losses), (eight, others) = ends
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), one, eight)
    np.testing.assert_allclose(losses, others, rtol=1e-10)
    if name != "sampa":  # its losses are those of the point to which it looks ahead
        assert losses[0] != losses[2]  # the same batch: a step with learning rate 0, then others
        assert losses[4] < losses[2]


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_what_eight_devices_measure_under_fsdp():
    found = []
    for devices, parallel in ((1, "data"), (8, "fsdp")):
        pieces = 2 if devices == 1 else 1
        tx = monitoring.monitored(samx.accumulate(optimizer("sam"), pieces), 2, pieces)
        task = make(tx, devices=devices, parallel=parallel, dtype=jnp.float64)
        state, rows = task.init(jax.random.key(0)), []
        for step in range(3):
            batch = jax.device_put(batch_at(step, 16), task.batch_sharding)
            state, readings = task.step(state, batch)
            rows.append(jax.device_get(readings))
        assert [bool(row["is_measured"]) for row in rows] == [True, False, True]
        found.append([[row[name] for name in monitoring.NAMES] for row in rows[::2]])
    np.testing.assert_allclose(*found, rtol=1e-3)
    assert np.abs(np.diff(found[0], axis=0)).min() > 1e-6


def test_what_fsdp_shards():
    task = make(monitoring.monitored(optax.chain(samx.looksam(0.05), optax.adamw(1e-3)), 100))
    params = task.state.params
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    vectors = sum(leaf.size for leaf in jax.tree.leaves(params) if "norm" in str(leaf.shape))
    held = held_bytes(params) / 4
    assert whole / 8 <= held - vectors < whole / 8 * 1.2
    assert params["blocks"]["down"]["kernel"].sharding.spec == P(None, "data")
    assert params["embedding"]["embedding"].sharding.spec == P("data")
    for leaf in jax.tree.leaves(optax.tree.get_all_with_path(task.state.opt_state, "mu")):
        if hasattr(leaf, "sharding") and leaf.ndim == 3:
            assert not leaf.sharding.is_fully_replicated
    assert held_bytes(task.state) / 4 == pytest.approx(4 * held, rel=0.01)


@functools.cache
def compiled(name, remat, **keywords):
    task = make(optimizer(name), remat=remat, **keywords)
    return task, task.step.lower(task.state, shapes(task)).compile()


def sent_by(name, remat, **keywords):
    task, program = compiled(name, remat, **keywords)
    return task, communicated_bytes(program)


@pytest.mark.parametrize(
    ("name", "times", "remat"),
    [
        ("sam", 2, True),
        *[
            pytest.param(*values, marks=pytest.mark.slow)
            for values in [
                ("momentum-sam", 1, True),
                ("sam", 2, False),
                ("gsam", 2, True),
                ("looksam", 2, True),
                ("sampa", 2, False),
            ]
        ],
    ],
)
def test_what_a_step_sends_under_fsdp(name, times, remat):
    """Twice what the plain step sends, of the same kinds; the rest are norms and losses."""
    (task, base), (_, ours) = sent_by("base", remat), sent_by(name, remat)
    sent = {"base": base, name: ours}
    assert sent["base"].keys() == sent[name].keys() <= {"all-gather", "all-reduce"}
    assert sent[name]["all-gather"] == times * sent["base"]["all-gather"]
    scalars = sent[name]["all-reduce"] - times * sent["base"]["all-reduce"]
    assert 0 <= scalars <= 128
    params = 4 * sum(leaf.size for leaf in jax.tree.leaves(task.state.params))
    embedding = 4 * task.state.params["embedding"]["embedding"].size
    layers = params - embedding
    # Forward and backward each gather the layers; the embedding, used twice, is gathered once.
    assert sent["base"]["all-gather"] == pytest.approx(2 * layers + embedding, rel=0.1)


def test_what_logits_sam_computes_and_sends():
    """Two thirds of the head's share more than AdamW; the perturbed head, and its gradient."""
    (task, base), (_, ours) = compiled("base", True), compiled("logits-sam", True)
    head = 6 * SIZE.length * SIZE.width * SIZE.vocabulary  # flops of one example's pass
    share = (product_flops(ours) - product_flops(base)) / head
    print(f"logits-SAM computes {share:.4f} of the head's share more")
    assert share == pytest.approx(2 / 3, rel=1e-9)
    embedding = 4 * task.state.params["embedding"]["embedding"].size
    (_, base), (_, ours) = sent_by("base", True), sent_by("logits-sam", True)
    assert ours["all-gather"] - base["all-gather"] == 2 * embedding
    assert 0 <= ours["all-reduce"] - base["all-reduce"] - embedding <= 128


@pytest.mark.slow
def test_what_adapters_send_under_fsdp():
    """AdamW gathers the frozen layers as in a training of the whole model; SAM in each pass."""
    (task, base), (_, ours) = (sent_by(name, True, lora_rank=2) for name in ("base", "sam"))
    assert ours["all-gather"] == 2 * base["all-gather"]
    adapters = 4 * sum(leaf.size for leaf in jax.tree.leaves(task.state.params))
    assert base["all-gather"] <= sent_by("base", True)[1]["all-gather"] + 2 * adapters
    assert base["all-reduce"] <= adapters + 128  # no gradient of a frozen weight


def test_what_adapters_hold():
    """The frozen weights once: SAM needs the perturbed adapters more than AdamW, nothing else."""
    size, held = Size(width=64, depth=8, vocabulary=64, length=4), []
    for tx in (optax.adamw(1e-3), optax.chain(samx.sam(0.05), optax.adamw(1e-3))):
        task = make_task(size, tx, devices=jax.devices()[:1], remat=True, lora_rank=2)
        lowered = task.step.lower(task.state, shapes(task, 1, size))
        held.append(peak_bytes(lowered.compile(OPTIONS)))
    frozen, adapters = held_bytes(task.state.frozen), held_bytes(task.state.params)
    layer = frozen / size.depth  # the loop copies one
    assert held[1] - held[0] <= 1.01 * adapters
    assert held[1] <= frozen + layer + 7 * adapters
    assert held_bytes(task.state) == pytest.approx(frozen + 3 * adapters, abs=64)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_adapters_alone_are_trained():
    """A new adapter changes nothing. A step of SAM with them is that of the whole model's loss."""
    tx = optax.chain(samx.sam(0.05), optax.sgd(0.1))
    task = make(tx, devices=1, parallel="data", lora_rank=2, param_dtype=jnp.float64)
    state, batch = task.init(jax.random.key(0)), batch_at(0)
    frozen, adapters = jax.device_get((state.frozen, state.params))
    assert set(adapters) == {"blocks"}
    assert {name[-1] for name in traverse_util.flatten_dict(adapters)} == {"lora_a", "lora_b"}
    plain = GPT(SIZE, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    nnx.update(plain, frozen)
    tokens = batch["tokens"][:, :-1]
    logits = state.apply_fn(union(adapters, frozen), tokens)
    np.testing.assert_allclose(logits, plain(tokens), rtol=0, atol=1e-12)

    def loss(adapters):
        logits = state.apply_fn(union(adapters, frozen), tokens)
        return losses_of(logits, batch["tokens"][:, 1:]).mean()

    g = jax.grad(loss)(adapters)
    scale = 0.05 / optax.tree.norm(g)
    g_s = jax.grad(loss)(jax.tree.map(lambda w, x: w + scale * x, adapters, g))
    new, _ = task.step(state, jax.device_put(batch, task.batch_sharding))
    jax.tree.map(
        lambda w, x, y: np.testing.assert_allclose(w - 0.1 * x, y, rtol=0, atol=1e-12),
        *(adapters, g_s, jax.device_get(new.params)),
    )
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(new.frozen))


def test_counts_multiply_the_rounds_of_loops():
    def looped(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)

    x = jnp.ones((8, 8))
    once, often = (jax.jit(lambda x, n=n: looped(x, n)).lower(x).compile() for n in (1, 7))
    assert product_flops(once) == 2 * 8**3
    assert product_flops(often) == 7 * 2 * 8**3
    branch = jax.jit(lambda p, x: jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x))
    assert product_flops(branch.lower(True, x).compile()) == 2 * 2 * 8**3
    unknown = jax.jit(looped).lower(x, 7).compile()
    assert product_flops(unknown) == 2 * 8**3
    assert product_flops(unknown, rounds=7) == 7 * 2 * 8**3


# Runs.


def test_a_tiny_run(run, monkeypatch, capsys, cheap_measure):
    monkeypatch.setattr(monitoring, "measure", cheap_measure)
    results = run(f"{TINY} --devices 1 --checkpoint-every 2 --monitor 2 --out run")
    steps, epochs = read("run", "step"), read("run", "epoch")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in epochs] == [2, 4, 5]  # the last one is shorter
    losses = [row["loss"] for row in steps]
    means = [np.mean(losses[:2]), np.mean(losses[2:4]), losses[4]]
    np.testing.assert_allclose([row["loss"] for row in epochs], means, rtol=1e-12)
    assert steps[0]["learning_rate"] == pytest.approx(4e-3)  # 5% of 5 steps are none
    assert results["gradients"] == 10
    measured = {row["step"]: row["top_eigenvalue"] for row in steps if "top_eigenvalue" in row}
    assert measured == pytest.approx({step: losses[step - 1] for step in (1, 3, 5)}, rel=1e-6)
    assert results["monitored"]["top_eigenvalue"] == measured[5]
    assert np.log(3) < results["held_out_loss"] < np.log(256) + 0.5
    assert 1.0 < results["trigram_loss"] < 1.2  # of 3 bytes in random order: log 3
    assert len(results["sample"]) == 4
    assert json.loads(Path("run/results.json").read_text()) == results
    (events,) = Path("run/tensorboard").iterdir()
    assert b"epoch/held_out_loss" in events.read_bytes()
    told = capsys.readouterr()
    for words in ("bytes to train on", "GB on each device", "a trigram model", "Results: run"):
        assert words in told.out
    assert "bytes/s" not in told.err  # the progress line is for terminals

    # As if it had been killed in step 5, while it wrote.
    shutil.copytree("run", "killed")
    shutil.rmtree("killed/checkpoints/5")
    rows = Path("killed/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("killed/metrics.jsonl").write_text("".join(rows[:6]) + rows[6][:10])
    again = run("--resume killed --devices 1")
    assert "resumed at step 4 of 5" in capsys.readouterr().out
    assert again["state_sha256"] == results["state_sha256"]
    assert read("killed", "step") == steps

    with pytest.raises(SystemExit):
        run("--abstract --resume killed")
    assert "--abstract and --resume exclude each other" in capsys.readouterr().err
    monkeypatch.setattr(text, "load", lambda: text.Text(np.ones(99, np.uint8), np.ones(99)))
    with pytest.raises(SystemExit, match="of this Python is not the data of the run in killed"):
        run("--resume killed --devices 1")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(run, monkeypatch):
    """A warm-up from 0 and a cosine, a checkpoint on 8 devices under FSDP, the end on 2 devices."""
    ends = []
    write = language_model.write_results
    monkeypatch.setattr(
        language_model,
        "write_results",
        lambda args, log, state, *rest: (
            ends.append(jax.device_get(state)),
            write(args, log, state, *rest),
        )[1],
    )
    options = f"{TINY} --steps 6 --warmup 0.5 --precision float64 --checkpoint-every 3"
    run(f"{options} --devices 8 --parallel fsdp --remat --out eight")
    shutil.copytree("eight", "two")
    shutil.rmtree("two/checkpoints/6")
    run("--resume two --devices 2 --parallel data")
    eight, two = ends
    assert int(eight.step) == int(two.step) == 6
    rates = [row["learning_rate"] for row in read("eight", "step")]
    np.testing.assert_allclose(rates[:4], 4e-3 * np.arange(4) / 3, rtol=1e-6)
    assert rates[3] > rates[4] > rates[5]
    assert [row["learning_rate"] for row in read("two", "step")] == rates
    for a, b in zip(
        *(jax.tree.leaves((state.params, state.opt_state)) for state in (eight, two)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_warm_up_from_zero_under_fsdp_learns(run):
    """The text is three bytes in random order: log 3 is the least loss, and log 256 the first."""
    results = run(
        "--width 16 --depth 1 --length 16 --batch 16 --steps 60 --evaluate-every 60"
        " --warmup 0.3 --learning-rate 0.03 --devices 8 --parallel fsdp --out run"
    )
    rows = read("run", "step")
    assert rows[0]["learning_rate"] == 0
    assert rows[1]["loss"] > 4.5  # the first step moved nothing
    assert results["held_out_loss"] < 1.3


# Shapes alone.


@pytest.mark.parametrize(
    "names",
    [
        ("adamw", "sam"),
        pytest.param(("sgd", "adamw", "sam", "looksam"), marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_abstract(names, in_empty_folder, monkeypatch, capsys, read_report):
    """Without SAM in other forms, which compile longest."""
    monkeypatch.setitem(abstract.SIZES, "1B", SIZE)
    monkeypatch.setattr(abstract, "draw", lambda rows, path: path.write_bytes(b""))
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests need what they hold
    monkeypatch.setattr(
        abstract, "methods", lambda variants: {name: methods(variants)[name] for name in names}
    )
    arguments = "--abstract --sizes 1B --devices 8 --variants sam looksam --examples 4"
    rows = language_model.main(arguments.split())
    assert len(rows) == 2 * len(names)
    assert tuple(ADAPTATIONS) == language_model.ADAPT
    report = read_report(Path("runs/language-001"))
    assert report["settings"]["devices"] == [8]
    by_name = {(row["method"], row["remat"]): row for row in report["rows"]}
    held = {"sgd": 1, "adamw": 3, "sam": 3, "looksam": 4}  # copies of the parameters
    for remat in (True, False):
        found = {name: by_name[name, remat] for name in names}
        for name, row in found.items():
            assert round(row["copies"], 1) == held[name]
        assert found["sam"]["sent_to_adamw"] == pytest.approx(2, abs=1e-2)
        assert found["sam"]["flops_to_adamw"] == pytest.approx(2, rel=1e-6)
        wanted = pytest.approx(found["adamw"]["state_bytes"], abs=64)
        assert found["sam"]["state_bytes"] == wanted
    assert by_name["adamw", True]["flops"] > by_name["adamw", False]["flops"]
    out = capsys.readouterr().out
    for words in ("with remat", "without remat", "as the CPU's compiler says", "abstract.png"):
        assert words in out


def test_a_variant_that_refuses_a_size():
    """On one of the numbers of devices, and on all of them."""
    counts = {"copies": 3.0, "state_bytes": 12e9, "temporary_bytes": 5e9, "flops": 2e12}
    counts |= {"flops_to_adamw": 1.0, "sent_to_adamw": 1.0, "sent": {"all-gather": 7e9}}
    rows = [{"method": "adamw", "devices": n} | counts for n in (1, 8)]
    rows += [rows[0] | {"method": "sam"}, rows[1] | {"method": "sam", "refused": "too many"}]
    rows += [row | {"method": "other", "refused": "too large"} for row in rows[:2]]
    *_, adamw, sam, sam_refused, other = abstract.table(rows).splitlines()
    words = re.sub(" +", " ", adamw)
    assert words == "adamw 3.00 12.00 + 5.00 12.00 + 5.00 2.00 1.00 7.00 0.00 0.00 1.00"
    assert re.sub(" +", " ", sam) == "sam 3.00 12.00 + 5.00 refused"
    assert (sam_refused, other) == ("sam: too many", "other: too large")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--variant samm --out taken", "samm.*sampa"),
        ("--batch 0 --out taken", "--batch must be at least 1, got 0"),
        ("--batch 9 --devices 2 --out taken", "--batch must be a multiple of 2"),
        ("--width 100 --out taken", "--width must be even, and above 64 a multiple of 64, got 100"),
        ("--sizes 1B --out taken", "--sizes is for --abstract only"),
        ("--devices 1 2 --out taken", "--devices must be one number without --abstract"),
        ("--abstract --examples 0 --out taken", "--examples must be at least 1, got 0"),
        ("--abstract --devices 99 --out taken", "--devices must be at most 8 here, got 99"),
        ("--abstract --devices 1 --out taken", "taken is not empty"),
        ("--warmup 2 --out taken", "--warmup must be 0 to 1, got 2"),
        ("--out taken", "taken is not empty"),
    ],
)
def test_refusals(arguments, message, refusal, sources, monkeypatch):
    monkeypatch.setattr(text, "load", lambda: sources)
    assert re.search(message, refusal(language_model.main, arguments))
