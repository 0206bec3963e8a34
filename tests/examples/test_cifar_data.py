"""The data of the CIFAR examples: exact reading, clear errors, documented batches."""

import gzip
import io
import itertools
import json
import os
import pickle
import struct
import tarfile
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from examples.train import cifar_data
from examples.train.cifar_data import CIFAR10, CIFAR100, Images


def random_rows(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def cifar10_files():
    """Two images per batch, all of them different."""
    rows = random_rows(12)
    members = (*CIFAR10.train, CIFAR10.test)
    files = {
        member: {b"data": rows[2 * i : 2 * i + 2], b"labels": [i, i + 1]}
        for i, member in enumerate(members)
    }
    return files | {"batches.meta": {b"label_names": [b"class %d" % n for n in range(10)]}}


def cifar100_files():
    return {
        "train": {
            b"data": random_rows(5),
            b"fine_labels": [0, 99, 3, 4, 5],
            b"coarse_labels": [1] * 5,
        },
        "test": {b"data": random_rows(3, 1), b"fine_labels": [7, 8, 9], b"coarse_labels": [2] * 3},
        "meta": {
            b"fine_label_names": [b"fine %d" % n for n in range(100)],
            b"coarse_label_names": [b"coarse"] * 20,
        },
    }


def pickled(content):
    return content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)


def pack(path, files, folder="cifar-10-batches-py"):
    """Write the archive of these files; bytes are written as they are, all else is pickled."""
    with tarfile.open(path, "w:gz") as tar:
        for member, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{member}")
            entry.size = len(pickled(content))
            tar.addfile(entry, io.BytesIO(pickled(content)))
    return path


def unpack(folder, files):
    folder.mkdir(parents=True)
    for member, content in files.items():
        (folder / member).write_bytes(pickled(content))
    return folder


def slow_image(row):
    """Decode a row: red, then green, then blue, each row by row from the top."""
    image = np.zeros((32, 32, 3), np.uint8)
    for channel, y, x in itertools.product(range(3), range(32), range(32)):
        image[y, x, channel] = row[1024 * channel + 32 * y + x]
    return image


def assert_cifar10(data):
    rows = random_rows(12)
    expected = np.stack([slow_image(row) for row in rows])
    np.testing.assert_array_equal(data.train.image, expected[:10])
    np.testing.assert_array_equal(data.test.image, expected[10:])
    np.testing.assert_array_equal(data.train.label, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5])
    np.testing.assert_array_equal(data.test.label, [5, 6])
    assert data.classes == tuple(f"class {n}" for n in range(10))
    for part in (data.train, data.test):
        assert (part.image.dtype, part.label.dtype) == (np.uint8, np.int32)
        assert part.image.flags.c_contiguous


def assert_cifar100(data):
    for part, rows, labels in (
        (data.train, random_rows(5), [0, 99, 3, 4, 5]),
        (data.test, random_rows(3, 1), [7, 8, 9]),
    ):
        np.testing.assert_array_equal(part.image, [slow_image(row) for row in rows])
        np.testing.assert_array_equal(part.label, labels)
    assert data.classes == tuple(f"fine {n}" for n in range(100))


def snapshot(folder):
    """Return contents and modification times of a folder's files; reading does not change them."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *sorted(folder.rglob("*"))]
    }


# Reading


@pytest.mark.parametrize(
    ("arrange", "ask"),
    [
        (lambda root: pack(root / "any name", cifar10_files()), "any name"),
        (lambda root: pack(root / CIFAR10.archive, cifar10_files()), "."),
        (lambda root: pack(root / CIFAR10.archive, cifar10_files(), "./other/deep"), "."),
        (lambda root: unpack(root / "renamed", cifar10_files()), "renamed"),
        (lambda root: unpack(root / CIFAR10.folder, cifar10_files()), "."),
    ],
    ids=[
        "archive",
        "folder of archive",
        "odd paths in archive",
        "extracted",
        "folder of extracted",
    ],
)
def test_loads_every_form_and_writes_nothing(arrange, ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrange(tmp_path)
    before = snapshot(tmp_path)
    assert_cifar10(cifar_data.load(tmp_path / ask))
    assert_cifar10(cifar_data.load(ask))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("form", ["archive", "folder"])
def test_loads_cifar100_with_fine_labels(form, tmp_path):
    if form == "archive":
        pack(tmp_path / CIFAR100.archive, cifar100_files(), CIFAR100.folder)
    else:
        unpack(tmp_path / CIFAR100.folder, cifar100_files())
    assert_cifar100(cifar_data.load(tmp_path))


def python2_pickle(content):
    """Pickle `content` as Python 2 with its numpy did, like the original files."""

    def string(text):
        return b"T" + struct.pack("<i", len(text)) + text

    def item(value):
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        if isinstance(value, bytes):
            return string(value)
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b")
        dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
        dtype += b"(K\x03" + string(b"|") + b"NNN" + 2 * item(-1) + b"K\x00tb"
        shape = b"".join(map(item, value.shape)) + b"\x86"
        return array + b"\x87R(K\x01" + shape + dtype + b"\x89" + string(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(item(k) + item(v) for k, v in content.items()) + b"u."


def test_loads_pickles_of_python_2(tmp_path):
    files = {member: python2_pickle(content) for member, content in cifar10_files().items()}
    assert b"numpy.core" in files["test_batch"]
    assert_cifar10(cifar_data.load(pack(tmp_path / "archive", files)))


# Rejecting


def without(member, key=None):
    def edit(files):
        content = files.pop(member)
        if key is not None:
            files[member] = {name: value for name, value in content.items() if name != key}

    return edit


def replaced(member, **values):
    def edit(files):
        new = {key.encode(): value for key, value in values.items()}
        files[member] = files[member] | new

    return edit


def put(member, content):
    return lambda files: files.update({member: content})


class Calls:
    """An object that is pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("data_batch_3"), "has no data_batch_3"),
        (without("batches.meta"), "has no batches.meta"),
        (lambda files: files.clear(), "holds no file of CIFAR-10 or CIFAR-100"),
        (put("test_batch", b"no pickle"), "test_batch is not a pickle of plain data"),
        (put("test_batch", b""), "test_batch is not a pickle of plain data"),
        (put("test_batch", pickled(cifar10_files()["test_batch"])[:3000]), "test_batch is not a p"),
        (put("test_batch", [1, 2]), r"test_batch has no b'data'"),
        (put("test_batch", 5), r"test_batch has no b'data'"),
        (put("data_batch_1", Calls(os.mkdir, "x")), r"data_batch_1 .*mkdir is not allowed"),
        (without("data_batch_2", b"data"), "data_batch_2 has no b'data'"),
        (without("data_batch_2", b"labels"), "data_batch_2 has no b'labels'"),
        (without("batches.meta", b"label_names"), "batches.meta has no b'label_names'"),
        (replaced("batches.meta", label_names=[1]), r"batches.meta: b'label_names' .* \[1\]"),
        (replaced("batches.meta", label_names=b"x"), "batches.meta: b'label_names' .* b'x'"),
        (
            replaced("test_batch", data=np.zeros((2, 3071), np.uint8)),
            r"test_batch: data must be uint8\[N, 3072\], got \(2, 3071\)",
        ),
        (
            replaced("test_batch", data=np.zeros((2, 3, 1024), np.uint8)),
            r"test_batch: data must be uint8\[N, 3072\], got \(2, 3, 1024\)",
        ),
        (
            replaced("test_batch", data=np.zeros(2, np.uint8)),
            r"test_batch: data must .* got \(2,\)",
        ),
        (replaced("test_batch", data=[0]), "test_batch: data must be .* got list"),
        (
            replaced("test_batch", data=np.zeros((2, 3072), np.int16)),
            "test_batch .*arrays must have dtype 'u1', got 'i2'",
        ),
        (
            replaced("test_batch", data=np.zeros((2, 3072), object)),
            "test_batch .*arrays must have dtype 'u1', got 'O8'",
        ),
        (replaced("test_batch", labels=[1]), "test_batch: 2 images .* got 1 label"),
        (replaced("test_batch", labels=b"ab"), "test_batch: 2 images .* got bytes"),
        (replaced("test_batch", labels=[0, 10]), r"test_batch: label 10 is not in \[0, 10\)"),
        (replaced("test_batch", labels=[0, -1]), r"test_batch: label -1 is not in \[0, 10\)"),
        (replaced("test_batch", labels=[0, 1.0]), r"test_batch: label 1.0 is not in \[0, 10\)"),
    ],
)
@pytest.mark.parametrize("form", ["archive", "folder"])
def test_names_what_is_wrong_with_the_data(edit, message, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = cifar10_files()
    edit(files)
    if form == "archive":
        pack(tmp_path / "broken", files)
        error = ValueError
    else:
        unpack(tmp_path / "broken", files)
        error = ValueError if files else FileNotFoundError
        message = message if files else "holds no data set"
    with pytest.raises(error, match=rf"(?s)broken.*{message}") as raised:
        cifar_data.load("broken")
    for text in ("Download", "https://www.cs.toronto.edu/~kriz/cifar.html"):
        assert text in str(raised.value)
    assert os.listdir() == ["broken"]  # nothing was executed or written


def test_says_where_to_get_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar-9 does not exist") as raised:
        cifar_data.load(tmp_path / "cifar-9")
    for text in (
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "cifar-10-python.tar.gz (md5 c58f30108f718f92721af3b95e74349a)",
        "cifar-100-python.tar.gz (md5 eb9058c3a382ffc7106e4002c42a8d85)",
    ):
        assert text in str(raised.value)


def test_asks_which_of_several_to_load(tmp_path):
    pack(tmp_path / CIFAR10.archive, cifar10_files())
    unpack(tmp_path / CIFAR100.folder, cifar100_files())
    both = "holds several data sets; choose one: cifar-10-python.tar.gz, cifar-100-python"
    with pytest.raises(ValueError, match=both):
        cifar_data.load(tmp_path)
    assert_cifar10(cifar_data.load(tmp_path / CIFAR10.archive))
    assert_cifar100(cifar_data.load(tmp_path / CIFAR100.folder))


@pytest.fixture(scope="module")
def archive_bytes(tmp_path_factory):
    path = pack(tmp_path_factory.mktemp("archive") / "archive", cifar10_files())
    return path.read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 5, 11, 300, 0.25, 0.5, 0.75, 0.95, -9, -8, -4, -1])
def test_refuses_a_truncated_archive(kept, archive_bytes, tmp_path):
    length = int(kept * len(archive_bytes)) if isinstance(kept, float) else kept
    (tmp_path / "cut").write_bytes(archive_bytes[:length])
    with pytest.raises(ValueError, match=r"cut: is not a complete tar.gz.*Download it again"):
        cifar_data.load(tmp_path / "cut")


@pytest.mark.parametrize("pixels", ["random", "equal"])  # stored uncompressed, or compressed
def test_refuses_a_changed_byte(pixels, tmp_path):
    files = cifar10_files()
    if pixels == "equal":
        for member in (*CIFAR10.train, CIFAR10.test):
            files[member][b"data"][:] = 7
    whole = pack(tmp_path / "changed", files).read_bytes()
    body = range(10 + len("changed") + 1, len(whole))  # the header holds the time and the name
    for position in [0, 1, *body[:: len(body) // 30], *body[-8:]]:
        changed = bytearray(whole)
        changed[position] ^= 16
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(ValueError, match=r"changed: is not a complete tar.*Download it again"):
            cifar_data.load(tmp_path / "changed")


def test_does_not_follow_links_in_an_archive(tmp_path):
    files = cifar10_files() | {"test_batch": b""}
    with tarfile.open(tmp_path / "linked", "w:gz") as tar:
        for member, content in files.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(pickled(content))
            if member == "test_batch":
                entry.type, entry.linkname = tarfile.SYMTYPE, "../elsewhere"
            tar.addfile(entry, io.BytesIO(pickled(content)))
    with pytest.raises(ValueError, match="linked: has no test_batch"):
        cifar_data.load(tmp_path / "linked")


def test_refuses_other_files(tmp_path, archive_bytes):
    (tmp_path / "zip").write_bytes(b"PK\x03\x04 and so on")
    (tmp_path / "gz").write_bytes(gzip.compress(b"no tar in here" * 100))
    (tmp_path / "tar").write_bytes(gzip.decompress(archive_bytes))
    for name in ("zip", "gz", "tar"):
        with pytest.raises(ValueError, match=f"{name}: is not a complete tar.gz archive"):
            cifar_data.load(tmp_path / name)


def refusal(path):
    """Return the message of the error that `path` raises, or None."""
    try:
        cifar_data.load(path)
    except ValueError as error:
        return str(error)


def test_a_damaged_pickle_raises_nothing_but_the_documented_error(tmp_path):
    folder = unpack(tmp_path / "folder", cifar10_files())
    whole = (folder / "test_batch").read_bytes()
    generator = np.random.default_rng(0)
    messages = []
    # The parts around the pixels, where every byte has a meaning.
    for position in [*range(260), *range(len(whole) - 40, len(whole))]:
        changed = bytearray(whole)
        changed[position] = generator.integers(256)
        (folder / "test_batch").write_bytes(changed)
        messages.append(refusal(folder))
    messages = list(filter(None, messages))
    assert len(messages) > 100
    for message in messages:
        assert "test_batch" in message
        assert "Download it again" in message


@pytest.mark.parametrize(
    "make",
    [
        lambda path: Calls(os.mkdir, path),
        lambda path: {b"data": Calls(eval, f"__import__('os').mkdir({path!r})"), b"labels": []},
        lambda path: Calls(Path(path).mkdir),
    ],
    ids=["function", "inside", "method"],
)
def test_a_forbidden_pickle_does_not_run(make, tmp_path):
    target = tmp_path / "executed"
    evil = pickle.dumps(make(str(target)), protocol=2)
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        cifar_data.PlainUnpickler(io.BytesIO(evil), encoding="bytes").load()
    archive = pack(tmp_path / "evil", cifar10_files() | {"test_batch": evil})
    with pytest.raises(ValueError, match=r"evil: test_batch is not a pickle .* is not allowed"):
        cifar_data.load(archive)
    assert not target.exists()
    pickle.loads(evil)
    assert target.exists()  # without the protection, it would have run


# The digits in the form of CIFAR-10


@pytest.fixture(scope="module")
def digits_path(tmp_path_factory):
    return cifar_data.write_digits(tmp_path_factory.mktemp("digits") / "new" / "deep")


def test_digits_are_the_enlarged_digits(digits_path):
    data = cifar_data.load(digits_path)
    assert data.classes == tuple("0123456789")
    assert (len(data.train.label), len(data.test.label)) == (1500, 297)
    pixels, labels = load_digits(return_X_y=True)
    large = jax.image.resize(pixels.reshape(-1, 8, 8), (len(pixels), 32, 32), "bilinear")
    gray = np.rint(np.asarray(large) * 255 / 16).astype(np.uint8)
    expected = Counter(
        (np.stack([image] * 3, axis=-1).tobytes(), label)
        for image, label in zip(gray, labels, strict=True)
    )
    got = Counter(
        (image.tobytes(), label)
        for part in (data.train, data.test)
        for image, label in zip(part.image, part.label, strict=True)
    )
    assert got == expected
    assert (data.train.label != labels[:1500]).mean() > 0.8  # shuffled


def test_digits_archive_has_the_form_of_cifar10(digits_path):
    assert digits_path.name == "cifar-10-python.tar.gz"
    with tarfile.open(digits_path) as tar:
        contents = {
            name: pickle.load(tar.extractfile(name), encoding="bytes") for name in tar.getnames()
        }
    batches = [f"cifar-10-batches-py/data_batch_{n}" for n in range(1, 6)]
    assert sorted(contents) == [
        "cifar-10-batches-py/batches.meta",
        *batches,
        "cifar-10-batches-py/test_batch",
    ]
    assert [len(contents[name][b"labels"]) for name in batches] == [300] * 5
    assert contents[batches[0]][b"data"].shape == (300, 3072)
    assert contents["cifar-10-batches-py/batches.meta"][b"label_names"][7] == b"7"


def test_digits_are_written_once_and_always_the_same(digits_path, tmp_path):
    other = cifar_data.write_digits(tmp_path)
    assert other.read_bytes() == digits_path.read_bytes()
    before = snapshot(tmp_path)
    assert cifar_data.write_digits(str(tmp_path)) == other
    assert snapshot(tmp_path) == before


def test_digits_never_overwrite(tmp_path):
    archive = pack(tmp_path / CIFAR10.archive, cifar10_files())
    before = snapshot(tmp_path)
    assert cifar_data.write_digits(tmp_path) == archive
    assert snapshot(tmp_path) == before
    archive.write_bytes(b"half an archive")
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz: is not a complete tar.gz"):
        cifar_data.write_digits(tmp_path)
    assert archive.read_bytes() == b"half an archive"
    assert os.listdir(tmp_path) == [CIFAR10.archive]


def test_digits_appear_at_once(tmp_path, monkeypatch):
    def interrupted(source, target):
        assert not Path(target).exists()
        assert Path(source).parent == Path(target).parent
        assert len(cifar_data.load(source).train.label) == 1500
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cifar_data.write_digits(tmp_path)
    assert os.listdir(tmp_path) == []


# Changing the data


def numbered(label):
    """Images that hold their own position, to see which ones are kept."""
    return Images(np.arange(len(label)), np.asarray(label, np.int32))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.333, 0.9])
def test_label_noise_is_exact_and_uniform(share):
    images = numbered(np.arange(20_001) % 10)
    noisy = cifar_data.with_label_noise(images, share, 10, seed=3)
    changed = noisy.label != images.label
    assert changed.sum() == round(share * 20_001)
    assert noisy.label.dtype == np.int32
    np.testing.assert_array_equal(noisy.image, images.image)
    np.testing.assert_array_equal(images.label, np.arange(20_001) % 10)
    shifts = np.bincount((noisy.label - images.label)[changed] % 10, minlength=10)[1:]
    expected = changed.sum() / 9
    assert np.abs(shifts - expected).max() <= 5 * np.sqrt(expected)
    by_half = changed[:10_000].sum() - changed[10_000:].sum()  # not only in the first half
    assert abs(by_half) <= 5 * np.sqrt(changed.sum() + 1)


def test_long_tail_has_the_published_counts():
    # CIFAR-10-LT with imbalance 100, in the literature on https://arxiv.org/abs/1901.05555.
    images = numbered(np.random.default_rng(0).permutation(np.arange(50_000) % 10))
    tail = cifar_data.long_tailed(images, 100, 10, seed=0)
    np.testing.assert_array_equal(
        np.bincount(tail.label), [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    )
    assert (np.diff(tail.image) > 0).all()
    np.testing.assert_array_equal(tail.label, images.label[tail.image])
    assert tail.image[tail.label == 9].max() > 25_000  # drawn from all images


def test_long_tail_of_unequal_classes():
    images = numbered([0] * 8 + [1] * 20 + [2] * 3 + [3] * 20)
    for imbalance, counts in ((1, [8, 20, 3, 20]), (8, [8, 10, 3, 2]), (1e9, [8, 1, 1, 1])):
        tail = cifar_data.long_tailed(images, imbalance, 4, seed=0)
        np.testing.assert_array_equal(np.bincount(tail.label), counts)
    exact = cifar_data.long_tailed(numbered(np.arange(294) % 3), 49, 3, seed=0)
    np.testing.assert_array_equal(np.bincount(exact.label), [98, 14, 2])  # 98 / 49 is exactly 2


def test_subset_is_balanced_and_in_order():
    images = numbered([0] * 2 + [1] * 30 + [2] * 30)
    for count, counts in ((12, [2, 5, 5]), (6, [2, 2, 2]), (62, [2, 30, 30])):
        chosen = cifar_data.subset(images, count, seed=0)
        np.testing.assert_array_equal(np.bincount(chosen.label), counts)
        assert (np.diff(chosen.image) > 0).all()
        np.testing.assert_array_equal(chosen.label, images.label[chosen.image])
    odd = [tuple(np.bincount(cifar_data.subset(images, 13, s).label)) for s in range(20)]
    assert set(odd) == {(2, 6, 5), (2, 5, 6)}  # no class is preferred
    few = [cifar_data.subset(images, 1, seed).label[0] for seed in range(40)]
    assert set(few) == {0, 1, 2}


CHANGES = {
    "noise": lambda images, seed: cifar_data.with_label_noise(images, 0.5, 10, seed),
    "tail": lambda images, seed: cifar_data.long_tailed(images, 10, 10, seed),
    "subset": lambda images, seed: cifar_data.subset(images, 100, seed),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_depend_on_the_seed_alone(change):
    images = numbered(np.arange(500) % 10)
    first, again, other = (CHANGES[change](images, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not all(map(np.array_equal, first, other))


def test_one_seed_serves_every_change():
    images = numbered([0] + [1] * 999)
    tail = set(cifar_data.long_tailed(images, 2, 2, seed=0).image)
    chosen = set(cifar_data.subset(images, 500, seed=0).image)
    noisy = cifar_data.with_label_noise(images, 0.5, 2, seed=0).label != images.label
    for one, two in itertools.combinations((tail, chosen, set(np.flatnonzero(noisy))), 2):
        assert len(one) == len(two) == 500
        assert 200 < len(one & two) < 300  # chosen independently


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: cifar_data.with_label_noise(i, 1.0, 10, 0), r"share must be in \[0, 1\), got 1"),
        (lambda i: cifar_data.with_label_noise(i, -0.1, 10, 0), "share must .* got -0.1"),
        (lambda i: cifar_data.with_label_noise(i, np.nan, 10, 0), "share must .* got nan"),
        (lambda i: cifar_data.with_label_noise(i, 0.1, 9, 0), "classes must be at least 10 .* 9"),
        (lambda i: cifar_data.with_label_noise(i, 0.1, 10, -1), "seed must be at least 0, got -1"),
        (lambda i: cifar_data.long_tailed(i, 0.5, 10, 0), "imbalance .* at least 1, got 0.5"),
        (lambda i: cifar_data.long_tailed(i, np.inf, 10, 0), "imbalance must be finite .* got inf"),
        (lambda i: cifar_data.long_tailed(i, 2, 1, 0), "classes must be at least 10 .* got 1"),
        (lambda i: cifar_data.subset(i, 21, 0), r"count must be in \[1, 20\], got 21"),
        (lambda i: cifar_data.subset(i, 0, 0), r"count must be in \[1, 20\], got 0"),
        (lambda i: train(i, 21), r"batch_size must be in \[1, 20\], got 21"),
        (lambda i: train(i, 0), r"batch_size must be in \[1, 20\], got 0"),
        (lambda i: train(i, 2, augment="flip"), 'augment must be "none" or "standard", got'),
        (lambda i: train(i, 2, seed=-1), r"seed must be in \[0, 2\*\*32\), got -1"),
        (lambda i: train(i, 2, threads=-1), "num_threads must be non-negative, got -1"),
        (lambda i: cifar_data.test_batches(i, 0), "batch_size must be at least 1, got 0"),
        (lambda i: cifar_data.normalize(i.image / 255), "image must be uint8, got float64"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(numbered(np.arange(20) % 10))


# Batching


def train(images, batch_size, seed=0, augment="none", threads=0):
    return cifar_data.train_batches(
        images, batch_size, seed=seed, augment=augment, num_threads=threads
    )


@pytest.fixture(scope="module")
def images():
    rows = random_rows(50)
    return Images(rows.reshape(50, 32, 32, 3), (np.arange(50) % 7).astype(np.int32))


def following(iterator, count=5):
    return [next(iterator) for _ in range(count)]


def test_every_epoch_has_every_image_once(images):
    batches = following(train(images, 16), 25)  # 8 epochs of 50; most end inside a batch
    index = np.concatenate([batch["index"] for batch in batches]).reshape(8, 50)
    np.testing.assert_array_equal(np.sort(index), np.tile(np.arange(50), (8, 1)))
    assert len({tuple(epoch) for epoch in index} | {tuple(range(50))}) == 9
    for batch in batches:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            "image": ((16, 32, 32, 3), np.uint8),
            "label": ((16,), np.int32),
            "index": ((16,), np.int32),
        }
        np.testing.assert_array_equal(batch["image"], images.image[batch["index"]])
        np.testing.assert_array_equal(batch["label"], images.label[batch["index"]])


def test_batches_depend_on_the_seed_and_not_on_threads(images):
    expected = following(train(images, 16, seed=5, augment="standard"), 12)
    for threads in (1, 4):
        iterator = train(images, 16, seed=5, augment="standard", threads=threads)
        jax.tree.map(np.testing.assert_array_equal, following(iterator, 12), expected)
        iterator.close()
    other = following(train(images, 16, seed=6, augment="standard"), 12)
    assert not np.array_equal(other[0]["index"], expected[0]["index"])
    plain = following(train(images, 16, seed=5), 12)
    assert not np.array_equal(plain[0]["image"], expected[0]["image"])


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 25, 31])  # batch 3 crosses into epoch 1
def test_resumes_at_the_next_batch(position, threads, images):
    iterator = train(images, 16, augment="standard", threads=threads)
    following(iterator, position)
    state = json.dumps(iterator.get_state())
    assert len(state) < 100
    expected = following(iterator)
    fresh = train(images, 16, augment="standard", threads=threads)
    fresh.set_state(json.loads(state))
    jax.tree.map(np.testing.assert_array_equal, following(fresh), expected)
    iterator.set_state(json.loads(state))  # go back while batches are prefetched
    jax.tree.map(np.testing.assert_array_equal, following(iterator), expected)
    for used in (iterator, fresh):
        used.close()


def slow_crop_and_flip(images, tops, lefts, mirrored):
    results = []
    for image, top, left, mirror in zip(images, tops, lefts, mirrored, strict=True):
        padded = np.zeros((40, 40, 3), np.uint8)
        padded[4:36, 4:36] = image
        crop = padded[top : top + 32, left : left + 32]
        results.append(crop[:, ::-1] if mirror else crop)
    return np.stack(results)


def test_augmentation_crops_and_flips_as_the_slow_one(images):
    before = images.image.copy()
    generator = np.random.default_rng(7)
    tops, lefts = generator.integers(0, 9, (2, 50))
    mirrored = generator.random(50) < 0.5
    got = cifar_data.crop_and_flip(images.image, np.random.default_rng(7))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, slow_crop_and_flip(before, tops, lefts, mirrored))
    np.testing.assert_array_equal(images.image, before)


def test_augmented_batches_hold_every_crop_and_flip(images):
    choices = np.array(list(itertools.product(range(9), range(9), (False, True))))
    variants = {}  # from (index, bytes of the result) to the choice
    for index, image in enumerate(images.image):
        results = slow_crop_and_flip([image] * len(choices), *choices.T)
        for choice, result in zip(choices, results, strict=True):
            variants[index, result.tobytes()] = tuple(choice)
    batches = following(train(images, 50, augment="standard"), 20)
    seen = Counter(
        variants[int(index), image.tobytes()]
        for batch in batches
        for index, image in zip(batch["index"], batch["image"], strict=True)
    )
    for position, values in enumerate((range(9), range(9), (0, 1))):
        counts = Counter()
        for choice, count in seen.items():
            counts[choice[position]] += count
        expected = 1000 / len(values)
        for value in values:
            assert abs(counts[value] - expected) < 5 * np.sqrt(expected)
    assert len(seen) > 150  # of 162 choices: crop and flip are independent


@pytest.mark.parametrize("batch_size", [16, 50, 64, 1])
def test_test_batches_go_through_once_in_order(batch_size, images):
    batches = list(cifar_data.test_batches(images, batch_size))
    assert len(batches) == -(-50 // batch_size)
    for batch in batches:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            "image": ((batch_size, 32, 32, 3), np.uint8),
            "label": ((batch_size,), np.int32),
            "weight": ((batch_size,), np.float32),
        }
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    np.testing.assert_array_equal(whole["image"][:50], images.image)
    np.testing.assert_array_equal(whole["label"][:50], images.label)
    np.testing.assert_array_equal(whole["weight"], np.arange(len(whole["weight"])) < 50)
    assert not whole["image"][50:].any()
    assert not whole["label"][50:].any()


@pytest.mark.parametrize("function", [cifar_data.normalize, jax.jit(cifar_data.normalize)])
def test_normalize(function, images):
    got = function(images.image)
    assert got.dtype == np.float32
    for channel, (mean, std) in enumerate([(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]):
        expected = (images.image[..., channel] / 255 - mean) / std
        np.testing.assert_allclose(got[..., channel], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(function(images.image[0]), got[0], rtol=1e-6)
