"""--resume FOLDER: a run keeps its settings in config.json, and continues with them."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.common import files
from examples.common.versions import differences, versions

NAME = "config.json"


def write_config(folder: Path, script: str, settings: dict[str, Any], **facts: Any) -> None:
    """Write config.json: the script, the versions, the settings, and further facts."""
    config = {"script": script, "versions": versions(), "settings": settings, **facts}
    files.write(folder / NAME, json.dumps(config, indent=1))


def resumed(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    script: str,
    *,
    not_settings: Sequence[str],
    changeable: Sequence[str] = (),
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the arguments with the settings of the run in --resume as defaults.

    The parser refuses a folder without a run, a run of another script, a damaged config.json, and
    another value of a setting.

    Args:
        parser: The parser of the script.
        argv: The arguments; --resume is among them.
        script: Name of the script, as in `write_config`.
        not_settings: Arguments that config.json does not hold.
        changeable: Settings that may differ from those of the run.

    Returns:
        The arguments, and the content of config.json.
    """
    args = parser.parse_args(argv)
    if args.out is not None:
        parser.error("--out and --resume exclude each other: a resumed run keeps its folder")
    where = f"--resume {args.resume}"
    try:
        config = files.read_json(Path(args.resume) / NAME)
    except (OSError, ValueError) as error:
        parser.error(f"{where}: there is no run to continue ({error})")
    if "script" not in config:
        parser.error(f"{where}: {NAME} names no script: it is damaged, or of older code")
    if config["script"] != script:
        parser.error(f"{where}: {NAME} is of {config['script']!s:.40}, this is {script}")
    _check_settings(parser, where, config, not_settings)
    settings = config["settings"]
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    for name, value in settings.items():
        if name not in changeable and getattr(args, name) != value:
            option = "--" + name.replace("_", "-")
            parser.error(
                f"{option}: the run in {args.resume} has {value}, got {getattr(args, name)}; "
                "--resume keeps the settings of a run; start a new run for other settings"
            )
    return args, config


def _check_settings(
    parser: argparse.ArgumentParser, where: str, config: dict[str, Any], left_out: Sequence[str]
) -> None:
    """Require a value for each argument, of a kind that the command line can give."""
    wanted = {a.dest: a for a in parser._actions if a.dest not in ("help", *left_out)}
    settings = config.get("settings")
    if not isinstance(settings, dict):
        parser.error(f"{where}: {NAME} must hold settings, got {settings!r:.40}")
    since = differences(config.get("versions"))
    for names, problem in (
        (wanted.keys() - settings.keys(), "lacks"),
        (settings.keys() - wanted.keys(), "has unknown settings:"),
    ):
        if names:
            parser.error(f"{where}: {NAME} {problem} {', '.join(sorted(names))}{since}")
    for name, value in settings.items():
        if not _can_be(wanted[name], value):
            parser.error(f"{where}: {NAME}: {name} cannot be {value!r:.40}{since}")


def _can_be(action: argparse.Action, value: Any) -> bool:
    """Tell whether an argument can have this value."""
    if value is None:
        return action.default is None
    if action.nargs == 0:
        return isinstance(value, bool)
    if action.nargs == "+":
        return isinstance(value, list) and len(value) > 0 and all(_is_one(action, v) for v in value)
    return _is_one(action, value)


def _is_one(action: argparse.Action, value: Any) -> bool:
    kinds = {float: (float, int), int: (int,)}.get(action.type, (str,))  # type: ignore[arg-type]
    is_kind = isinstance(value, kinds) and not isinstance(value, bool)
    return is_kind and (action.choices is None or value in action.choices)
