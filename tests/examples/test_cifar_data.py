"""The data of the CIFAR example: archives are read exactly, and errors are clear."""

import gzip
import io
import itertools
import os
import pickle
import struct
import tarfile
import tracemalloc
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.common.digits_task import load_digits
from examples.train import cifar_data
from examples.train.cifar_data import CIFAR10, CIFAR100


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
        (
            put("test_batch", b"\x80\x02]r\xff\xff\xff\x0f."),
            "test_batch is not .* an object 268435455",
        ),
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


def bomb(path, size=50_000_000):
    """An archive of one file of zeros: it unpacks to 200 times its size."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        entry = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        entry.size = size
        tar.addfile(entry, io.BytesIO(bytes(size)))


def sparse(path, map="0,0"):
    """An archive of a file that has no content, but a size."""
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("test_batch")
        entry.pax_headers = {"GNU.sparse.map": map, "GNU.sparse.size": "9000000"}
        tar.addfile(entry)


def twice(folders):
    def write(path):
        with tarfile.open(path, "w:gz") as tar:
            for folder in folders:
                for member in ("test_batch", "batches.meta"):
                    tar.addfile(tarfile.TarInfo(f"{folder}/{member}"), io.BytesIO())

    return write


def folder_of(size):
    def write(path):
        path.mkdir()
        with (path / "test_batch").open("wb") as file:
            file.truncate(size)  # takes no space

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (bomb, "unpacks to more than 2,000,000 bytes"),
        (sparse, "test_batch has 9,000,000 bytes, more than 1,000,000"),
        (partial(sparse, map="x"), "is not a complete tar.gz archive .*'x'"),
        (lambda path: path.write_bytes(bytes(3_000_000)), "has 3,000,000 bytes, more than 2,000,"),
        (folder_of(2**40), r"data/test_batch has more than 1,000,000 bytes"),
        (twice(["a", "b"]), "holds test_batch twice: a/test_batch, b/test_batch"),
        (twice(["a", "a"]), "holds test_batch twice: a/test_batch, a/test_batch"),
        (os.mkfifo, "is not a file"),
    ],
)
def test_reading_is_bounded_before_it_happens(write, message, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar_data, "MOST_BYTES", 2_000_000)
    monkeypatch.setattr(cifar_data, "MOST_OF_A_FILE", 1_000_000)
    write(tmp_path / "data")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"data: .*{message}.*Download it again"):
            cifar_data.load(tmp_path / "data")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_the_bounds_leave_room_for_the_archives():
    images, labels = 3073, 60_000  # bytes of an image with its label in CIFAR's own count
    assert images * labels < cifar_data.MOST_BYTES < 2 * images * labels
    assert 155_249_918 < cifar_data.MOST_OF_A_FILE < cifar_data.MOST_BYTES


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
    pixels, labels = load_digits()
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
