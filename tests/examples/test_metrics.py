"""metrics.jsonl and TensorBoard: rows survive a kill and a full disk, and damage is named."""

import json
import struct

import pytest

from examples.common.checkpoints import CheckpointError
from examples.common.files import SaveError
from examples.train import metrics
from examples.train.metrics import Log


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def points_of(folder):
    """Read TensorBoard's files back, with their checksums."""
    points = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            sums = (
                struct.unpack("<I", content[8:12]),
                struct.unpack("<I", content[12 + length :][:4]),
            )
            event = content[12 : 12 + length]
            assert [sums[0][0], sums[1][0]] == [
                metrics.masked_crc32c(part) for part in (content[:8], event)
            ]
            event = metrics.event_pb2.Event.FromString(event)
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            content = content[16 + length :]
    return points


def test_rows_and_curves_continue_after_a_checkpoint(tmp_path):
    log = Log(tmp_path, 0)
    for step in (1, 2, 3):
        log.write("step", step, loss=step / 2)
    log.write("epoch", 3, loss=float("inf"))
    log.flush()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # killed while writing
    log = Log(tmp_path, 2)
    log.write("step", 3, loss=7.0)
    log.flush()
    assert [row["loss"] for row in log.of("step")] == [0.5, 1.0, 7.0]
    assert rows_of(tmp_path) == log.rows
    assert points_of(tmp_path) == [
        ("step/loss", s, v) for s, v in ((1, 0.5), (2, 1), (3, 1.5), (3, 7))
    ]


def test_nothing_is_lost_while_the_disk_is_full(tmp_path, file_size_limit):
    log = Log(tmp_path, 0)
    log.write("step", 1, loss=0.5)
    log.flush()
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with file_size_limit(len(whole) + 20):
        for step in range(2, 500):  # more than is kept without an attempt to write
            log.write("step", step, loss=0.5)
        with pytest.raises(SaveError, match=r"metrics\.jsonl cannot be written \(File too large\)"):
            log.flush()
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    log.flush()
    assert rows_of(tmp_path) == log.rows
    assert [step for _, step, _ in points_of(tmp_path)] == list(range(1, 500))


ROW = '{"kind": "step", "step": 1}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must have a row for each of the steps 1 to 2"),
        (ROW, "must have a row for each of the steps 1 to 2"),
        (ROW + ROW, "must have a row for each of the steps 1 to 2"),
        (ROW + "{}\n", "line 2 is not a row of metrics: b'{}'"),
        (ROW + "[]\n", "line 2 is not a row"),
        (ROW + '{"kind": "step", "step": "2"}\n', "line 2 is not a row"),
        (ROW + '{"kind": "st\n', "line 2 is not a row"),
        (ROW + "\x00" * 200 + "\n", "line 2 is not a row"),
        (ROW + "[" * 1000 + "\n", "line 2 is not a row"),
        (ROW * 10, "metrics.jsonl has more than 200 bytes"),
    ],
)
def test_damage_is_named_and_left_alone(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MOST_BYTES", 200 if content == ROW * 10 else 10_000)
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Log(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
