"""Files that scripts read and write: reading is bounded, and a written file is whole or absent."""

import functools
import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

MOST_BYTES = 2**24  # of a JSON file

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class SaveError(OSError):
    """A file of a run could not be written."""


def reason(error: BaseException) -> str:
    """Describe an error in a few words, on one line."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.split("\n")[0][:300]


def write(path: Path, content: str | bytes) -> None:
    """Write a file at once: `path` gets the new content, or keeps the old one.

    Raises:
        SaveError: If the file cannot be written; the message names it.
    """
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(f"{path} cannot be written ({reason(error)})") from error


def read(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the content of a file that has at most `most_bytes` bytes.

    Raises:
        OSError: If there is no file, or if it cannot be opened.
        ValueError: If the file is larger.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise OSError(f"{path} is not a file")
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path} has more than {most_bytes:,} bytes")
    return content


def in_package(package: str, name: str) -> Path:
    """Return the path of a data file of an installed package, which is not imported.

    Raises:
        ImportError: If the package, or the file in it, is missing.
    """
    found = importlib.util.find_spec(package)
    folders = (found and found.submodule_search_locations) or []
    for path in (Path(folder) / name for folder in folders):
        if path.is_file():
            return path
    raise ImportError(f"{package} is not installed, or lacks {name}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: If there is no file, or if it cannot be opened.
        ValueError: If the file is too large, is not JSON, or does not hold an object.
    """
    content = read(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({reason(error)})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {found!r:.40}")
    return found


def ends_in_one_line(main: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let the `main` of a script end with one line if it cannot write, or if it is interrupted."""

    @functools.wraps(main)
    def run(*args: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        try:
            return main(*args, **keywords)
        except SaveError as error:
            sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)

    return run
