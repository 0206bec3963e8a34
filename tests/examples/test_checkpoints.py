"""Any training run resumes from a checkpoint as if it had not stopped, to the last bit."""

import functools
import os
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problem
import pytest
import regimes
from cases import VARIANTS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import samx
from examples.common.checkpoints import CheckpointError, Checkpoints, kept, newest
from examples.common.files import SaveError

STEPS, SAVED = 6, 3


def data_iterator(data):
    data = jax.tree.map(np.asarray, data)
    order = grain.MapDataset.range(64).seed(0).shuffle().repeat().batch(problem.BATCH_SIZE)
    batches = order.map(lambda i: jax.tree.map(lambda x: x[i], data))
    # Prefetch a few batches; the default prefetches hundreds.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


@functools.cache
def optimizer_and_step(name):
    schedule = optax.cosine_decay_schedule(0.1, 2 * STEPS)
    tx = samx.skip_nonfinite(VARIANTS[name].build(optax.sgd(schedule, momentum=0.9)))
    return jax.jit(tx.init), jax.jit(problem.make_step(tx))


class Training:
    """A training run with all that a checkpoint must hold: data, keys, moments, a schedule."""

    def __init__(self, name):
        self.init, self.step = optimizer_and_step(name)
        data, params = problem.make(np.float32)
        # placed as orbax will place them, so that the step is compiled once
        self.params = jax.device_put(params, jax.devices()[0])
        self.batches = data_iterator(data)
        self.state = jax.device_put(self.init(self.params), jax.devices()[0])

    @property
    def kept(self):
        return {"params": self.params, "state": self.state, "key": jax.random.key(7)}

    def run(self, steps):
        for _ in range(steps):
            self.params, self.state = self.step(self.params, self.state, next(self.batches))
        return self.kept


@pytest.fixture(scope="module")
def saved_sam(tmp_path_factory):
    """A checkpoint of SAM, and the state that it holds."""
    folder = tmp_path_factory.mktemp("sam")
    training = Training("sam")
    kept = training.run(SAVED)
    with Checkpoints(folder, "test") as checkpoints:
        checkpoints.save(SAVED, kept, training.batches)
    return folder, kept


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("sam", "looksam", "sl_sam", "async_sam", "vsam", "saf", "mesa")
]


@pytest.mark.parametrize("name", ["sampa", "ausam", "dynamic_sparse_sam", *SLOW])
def test_restored_from_nothing_but_the_disk(name, tmp_path):
    undisturbed = Training(name).run(STEPS)

    training = Training(name)
    training.run(SAVED)
    with Checkpoints(tmp_path, "test") as checkpoints:
        checkpoints.save(SAVED, training.kept, training.batches)
    del training

    training = Training(name)
    with Checkpoints(tmp_path, "test") as checkpoints:
        kept, step = checkpoints.restore(training.kept, training.batches)
    assert step == SAVED
    training.params, training.state = kept["params"], kept["state"]
    assert_same(training.run(STEPS - SAVED), undisturbed)


def assert_same(a, b):
    """Compare to the last bit: both are results of one compiled step, with equal placements."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))
        np.testing.assert_array_equal(x, y)


def test_no_checkpoint_is_the_start(tmp_path):
    training = Training("sam")
    next(training.batches)
    with Checkpoints(tmp_path / "new", "test") as checkpoints:
        state, step = checkpoints.restore(training.kept, training.batches)
    assert step == 0
    assert_same(state, training.kept)
    assert training.batches.get_state()["next_index"] == 1


def test_the_newest_stay(tmp_path):
    training = Training("sam")
    with Checkpoints(tmp_path, "test", keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, training.kept, training.batches)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["2", "3"]


def test_a_layout_over_devices_is_restored(tmp_path):
    mesh = regimes.mesh_of()
    spread = NamedSharding(mesh, P("data"))
    x = jax.device_put(jnp.arange(16.0), spread)
    batches = data_iterator(problem.make(np.float32)[0])
    with Checkpoints(tmp_path, "test") as checkpoints:
        checkpoints.save(1, {"x": x}, batches)
        (state, _) = checkpoints.restore({"x": jnp.zeros_like(x, device=spread)}, batches)
    assert state["x"].sharding == spread
    np.testing.assert_array_equal(state["x"], x)


OTHERS = {
    "another variant": (
        lambda: Training("sampa"),
        r"inner\.0\.perturbation.*wanted nothing",
    ),
    "another shape": (lambda: wider(Training("sam")), r"saved \(\(10, 16\).*wanted \(\(10, 32\)"),
    "another dtype": (lambda: halved(Training("sam")), r"'float32'\), wanted \(\(10, 16\), 'bfl"),
}


def wider(training):
    training.params = training.params | {"W1": jnp.zeros((10, 32))}
    training.state = training.init(training.params)
    return training


def halved(training):
    training.params = training.params | {"W1": jnp.zeros((10, 16), jnp.bfloat16)}
    return training


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_something_else_is_refused(name, saved_sam):
    folder, kept = saved_sam
    make, message = OTHERS[name]
    training = make()
    with (
        Checkpoints(folder, "test") as checkpoints,
        pytest.raises(CheckpointError, match="another model, variant.*" + message),
    ):
        checkpoints.restore(training.kept, training.batches)
    assert training.batches.get_state()["next_index"] == 0
    training = Training("sam")
    with Checkpoints(folder, "test") as checkpoints:
        assert_same(checkpoints.restore(training.kept, training.batches)[0], kept)


@pytest.mark.parametrize("part", ["state", "state/_METADATA", "data/process_0-of-1.json"])
def test_a_broken_checkpoint_is_named_and_left_alone(part, saved_sam, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved_sam[0], folder)
    victim = folder / str(SAVED) / part
    if victim.is_dir():
        shutil.rmtree(victim)
    else:
        victim.write_text(victim.read_text()[:20])
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    training = Training("sam")
    with (
        Checkpoints(folder, "test") as checkpoints,
        pytest.raises(CheckpointError, match=rf"copy/{SAVED} cannot be read.*Delete that folder"),
    ):
        checkpoints.restore(training.kept, training.batches)
    assert training.batches.get_state()["next_index"] == 0
    assert files == {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file" / "checkpoints", "test")
    assert (tmp_path / "file").read_text() == "precious"


STATE = {f"x{i}": np.arange(i, i + 20_000, dtype=np.float32) for i in range(10)}
LIKE = jax.tree.map(np.zeros_like, STATE)


def test_a_training_without_an_iterator(tmp_path):
    with Checkpoints(tmp_path, "test") as checkpoints:
        checkpoints.save(4, STATE)
        state, step = checkpoints.restore(LIKE)
    assert step == 4
    assert_same(state, STATE)


@pytest.fixture(scope="module")
def saved_state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    with Checkpoints(folder, "test") as checkpoints:
        checkpoints.save(4, STATE)
    return folder


def with_sparse_file(folder):
    with (folder / "4" / "state" / "_METADATA").open("r+b") as file:
        file.truncate(2**40)  # takes no space


@pytest.mark.parametrize(
    ("damage", "of", "message"),
    [
        (lambda folder: None, "other", r"/4 is of test, this is other"),
        (lambda folder: shutil.rmtree(folder / "4" / "about"), "test", "does not say what it is"),
        (lambda folder: (folder / "4/about/metadata").write_text("[1]"), "test", "cannot be read"),
        (lambda folder: (folder / "4/about/metadata").write_text("{}"), "test", "cannot be read"),
        (with_sparse_file, "test", r"1,099,\S+ bytes are more than the \S+ that the state needs"),
        (lambda folder: (folder / "9").mkdir(), "test", "/9 cannot be read"),
    ],
)
def test_a_foreign_or_damaged_checkpoint_is_refused(damage, of, message, saved_state, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(saved_state, folder)
    damage(folder)
    with (
        Checkpoints(folder, of) as checkpoints,
        pytest.raises(CheckpointError, match=message) as caught,
    ):
        checkpoints.restore(LIKE)
    assert "\n" not in str(caught.value)


def test_versions_are_named_when_they_differ(tmp_path, monkeypatch):
    with monkeypatch.context() as then:
        then.setattr(samx, "__version__", "0.0.1")
        with Checkpoints(tmp_path, "test") as checkpoints:
            checkpoints.save(4, STATE)
    with Checkpoints(tmp_path, "test") as checkpoints:
        assert checkpoints.restore(LIKE)[1] == 4  # the state fits
        named = rf"saved by samx 0\.0\.1; this is samx {samx.__version__}"
        with pytest.raises(CheckpointError, match="another model.*" + named):
            checkpoints.restore({"y": LIKE["x1"]})
        shutil.rmtree(tmp_path / "4" / "state" / "d")
        with pytest.raises(CheckpointError, match="cannot be read.*" + named):
            checkpoints.restore(LIKE)


def test_a_save_that_fails_is_told_once_and_tried_again(tmp_path, capfd, caplog, file_size_limit):
    with Checkpoints(tmp_path, "test") as checkpoints:
        checkpoints.save(1, STATE)
        assert kept(tmp_path) in ("no checkpoint", "the checkpoint of step 1")
        checkpoints.restore(LIKE)  # waits
        with file_size_limit(100_000):
            for step in (2, 3):
                checkpoints.save(step, changed(step))
                assert checkpoints.restore(LIKE)[1] == 1
        told = capfd.readouterr().err
        assert len(told.splitlines()) == 1  # no traceback of a library
        assert "step 2 could not be written" in told
        assert "(File too large); kept: the checkpoint of step 1; training goes on" in told
        assert not [
            record for record in caplog.records if "orbax" in record.pathname + record.getMessage()
        ]
        assert os.listdir(tmp_path) == ["1"]  # nothing of the others fills the disk
        checkpoints.save(3, changed(3))
        state, step = checkpoints.restore(LIKE)
        assert step == 3
        assert_same(state, changed(3))
        with file_size_limit(100_000):
            checkpoints.save(5, STATE)
            checkpoints.restore(LIKE)
        assert "step 5 could not be written" in capfd.readouterr().err  # it is told again
        checkpoints.save(6, STATE)
    assert newest(tmp_path) == 6


def test_the_checkpoint_of_step_0_is_one_too(tmp_path, file_size_limit):
    with Checkpoints(tmp_path, "test") as checkpoints:
        with file_size_limit(100_000):
            checkpoints.save(0, changed(0))
            checkpoints.restore(LIKE)
        checkpoints.save(0, changed(0))
    assert kept(tmp_path) == "the checkpoint of step 0"


def changed(step):
    rng = np.random.default_rng(step)  # these numbers cannot be compressed
    return {name: rng.normal(size=20_000).astype(np.float32) for name in STATE}


def test_a_last_save_that_fails_ends_the_run_with_an_error(tmp_path, file_size_limit):
    def train(error=None):
        with Checkpoints(tmp_path, "test") as checkpoints:
            checkpoints.save(1, STATE)
            checkpoints.restore(LIKE)
            with file_size_limit(100_000):
                checkpoints.save(2, changed(2))
                checkpoints._wait()
            if error is not None:
                raise error

    with pytest.raises(SaveError, match=r"step 2 could not be written to .* \(File too large\)"):
        train()
    assert newest(tmp_path) == 1
    with pytest.raises(KeyError):  # the error that is there already is not hidden
        train(KeyError())
