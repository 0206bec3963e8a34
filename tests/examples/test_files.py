"""Files of the examples: what is read is bounded, and what is written is whole or absent."""

import json
import os

import numpy as np
import pytest

from examples.common import figures, files
from examples.common.files import SaveError


def deep(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', r"config\.json is not JSON"),
        (b"\xff\xfe", r"config\.json is not JSON"),
        (deep(100_000).encode(), r"config\.json is not JSON"),
        (b"[1]", r"config\.json must hold a JSON object, got \[1\]"),
        (b"null", r"config\.json must hold a JSON object, got None"),
        (b" " * 2**24 + b"{}", r"config\.json has more than 16,777,216 bytes"),
    ],
)
def test_other_content_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing"):
        with pytest.raises(OSError, match=str(tmp_path / name)):
            files.read_json(tmp_path / name)


def test_a_file_without_end_is_not_read_to_the_end(tmp_path, monkeypatch):
    """Its size says nothing, as for files in /proc."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(ValueError, match="file has more than 1,000 bytes"):
        files.read(path, 1000)


def test_a_failed_write_keeps_what_was_there(tmp_path, file_size_limit):
    path = tmp_path / "results.json"
    files.write(path, "old")
    with (
        file_size_limit(1000),
        pytest.raises(SaveError, match=r"results\.json cannot be written \(File too large\)"),
    ):
        files.write(path, "new" * 1000)
    assert path.read_text() == "old"
    files.write(path, b"new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["results.json"]


def test_an_interrupted_write_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write(path, "old")

    def interrupted(source, target):
        assert (source.read_text(), path.read_text()) == ("new", "old")
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(SaveError, match=r"results\.json cannot be written \(Is a directory\)"):
        files.write(tmp_path / "results.json", "new")
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"file/a cannot be written \(Not a directory\)"):
        files.write(tmp_path / "file" / "a", "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "results.json"]


def test_a_picture_is_whole_or_absent(tmp_path, file_size_limit):
    figure = figures.make_figure(1)
    figure.subplots().plot(np.random.default_rng(0).normal(size=1000))
    with file_size_limit(1000), pytest.raises(SaveError, match=r"plot\.png cannot be written"):
        figures.save(figure, tmp_path / "plot.png")
    assert os.listdir(tmp_path) == []


def test_a_script_ends_in_one_line(monkeypatch, tmp_path, capsys):
    @files.ends_in_one_line
    def main(argv=None):
        if argv == ["interrupt"]:
            raise KeyboardInterrupt
        if argv:
            files.write(tmp_path / "missing" / "results.json", json.dumps(argv))
        return 5

    monkeypatch.setattr("sys.argv", ["examples/digits.py"])
    assert main() == 5
    with pytest.raises(SystemExit) as stop:
        main(["--epochs"])
    path = tmp_path / "missing" / "results.json"
    assert stop.value.code == (
        f"digits.py: error: {path} cannot be written (No such file or directory)"
    )
    with pytest.raises(SystemExit) as stop:
        main(["interrupt"])
    assert (stop.value.code, capsys.readouterr().err) == (130, "\ninterrupted\n")
