"""The numbers of a run on disk: metrics.jsonl, and the same curves for TensorBoard."""

import contextlib
import importlib
import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from examples.common import files
from examples.common.checkpoints import CheckpointError
from examples.common.files import SaveError

event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")

MOST_BYTES = 2**30  # of metrics.jsonl
MANY_BYTES = 2**13  # they are written before the next checkpoint


class Log:
    """Writer of metrics.jsonl and tensorboard/; at the start it removes all rows after `step`.

    Nothing is lost if the disk is full for a while: rows stay in memory until they are written.

    Raises:
        OSError: If the files cannot be read or written.
        CheckpointError: If metrics.jsonl is damaged, or lacks a step up to `step`.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(path) if row["step"] <= step]
        if [row["step"] for row in self.of("step")] != list(range(1, step + 1)):
            raise CheckpointError(f"{path} must have a row for each of the steps 1 to {step}")
        files.write(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = Appended(path)
        board = folder / "tensorboard"
        board.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._board = Appended(board / name)
        # This purges the points of an earlier process after `step`.
        self._add_event(step=step + 1, file_version="brain.Event:2")
        self._add_event(
            step=step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        )
        self.flush()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add one line, and a point in the curve of each value."""
        row = {"kind": kind, "step": step} | values
        self.rows.append(row)
        self._file.add(f"{json.dumps(row)}\n".encode())
        for name, value in values.items():
            if isinstance(value, float) and np.isfinite(value):
                self._add_event(step=step, summary=scalar(f"{kind}/{name}", value))

    def of(self, kind: str) -> list[dict]:
        """Return the lines of one kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def flush(self) -> None:
        """Write all lines to disk; call it before the checkpoint that they belong to.

        Raises:
            SaveError: If they cannot be written; the next call tries again.
        """
        self._file.flush()
        self._board.flush()

    def _add_event(self, **content: Any) -> None:
        """Add a record in TensorBoard's format: length, content, and a checksum of each."""
        event = event_pb2.Event(wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, event)]
        self._board.add(length + sums[0] + event + sums[1])


class Appended:
    """A file that grows by whole pieces.

    tensorboardX's own writer would block the training forever after an error of the disk.
    """

    def __init__(self, path: Path):
        self._path, self._pending = path, b""
        self._size = path.stat().st_size if path.exists() else 0

    def add(self, piece: bytes) -> None:
        """Add to the end of the file; the piece may wait in memory for `flush`."""
        self._pending += piece
        if len(self._pending) > MANY_BYTES:
            with contextlib.suppress(SaveError):  # `flush` will tell
                self.flush()

    def flush(self) -> None:
        """Write what waits in memory; after an error, all of it still waits."""
        try:
            with self._path.open("ab") as file:
                file.write(self._pending)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, self._size)  # no piece is cut in two
            raise SaveError(f"{self._path} cannot be written ({files.reason(error)})") from error
        self._size, self._pending = self._size + len(self._pending), b""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; no file has no rows.

    Raises:
        OSError: If the file cannot be opened.
        CheckpointError: If the file is too large, or if a line is not a row. The last line may be
            incomplete.
    """
    if not path.exists():
        return []
    try:
        rows, lines = [], files.read(path, MOST_BYTES).split(b"\n")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            is_row = row["kind"] in ("step", "epoch") and type(row["step"]) is int
        except (ValueError, TypeError, KeyError, RecursionError):
            is_row = False
        if not is_row:
            raise CheckpointError(f"{path}: line {number} is not a row of metrics: {line!r:.60}")
        rows.append(row)
    return rows
