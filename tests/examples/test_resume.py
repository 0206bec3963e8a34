"""--resume: a run continues with its own settings, and a damaged or foreign config is refused."""

import json
import os
import re

import pytest

import samx
from examples.common import arguments
from examples.common.resume import resumed, write_config

SETTINGS = {
    "epochs": 3,
    "rho": 0.5,
    "model": "vit",
    "rates": [0.1, 1],
    "digits": True,
    "data": None,
}


def new_parser():
    parser = arguments.new_parser("A script.")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--model", choices=["vit", "resnet18"], default="resnet18")
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--data")
    parser.add_argument("--resume")
    arguments.add_out(parser, "script")
    return parser


def resume(folder, *words):
    argv = ["--resume", str(folder), *words]
    return resumed(
        new_parser(),
        argv,
        "script.py",
        not_settings=("out", "resume"),
        changeable=("epochs",),
    )


def test_a_run_continues_with_its_settings(tmp_path):
    write_config(tmp_path, "script.py", SETTINGS, data_sha256="12")
    args, config = resume(tmp_path, "--rho", "0.5", "--epochs", "4")
    assert vars(args) == SETTINGS | {"epochs": 4, "resume": str(tmp_path), "out": None}
    assert config["data_sha256"] == "12"
    assert config["versions"]["samx"] == samx.__version__
    assert {"jax", "flax", "optax", "orbax-checkpoint"} < config["versions"].keys()


def with_settings(**changes):
    return lambda config: config["settings"].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.clear(), "config.json names no script"),
        (lambda config: config.update(script="cifar.py"), "is of cifar.py, this is script.py"),
        (lambda config: config.update(script=[1]), "is of [1], this is script.py"),
        (lambda config: config.update(settings=[1]), "must hold settings, got [1]"),
        (lambda config: config.pop("settings"), "must hold settings, got None"),
        (lambda config: config["settings"].pop("rho"), "config.json lacks rho"),
        (with_settings(depth=3), "config.json has unknown settings: depth"),
        (with_settings(epochs="3"), "config.json: epochs cannot be '3'"),
        (with_settings(epochs=3.5), "config.json: epochs cannot be 3.5"),
        (with_settings(epochs=True), "config.json: epochs cannot be True"),
        (with_settings(epochs=None), "config.json: epochs cannot be None"),
        (with_settings(epochs=[3]), "config.json: epochs cannot be [3]"),
        (with_settings(rho={"a": 1}), "config.json: rho cannot be {'a': 1}"),
        (with_settings(model="vgg"), "config.json: model cannot be 'vgg'"),
        (with_settings(rates=0.1), "config.json: rates cannot be 0.1"),
        (with_settings(rates=[]), "config.json: rates cannot be []"),
        (with_settings(rates=["0.1"]), "config.json: rates cannot be ['0.1']"),
        (with_settings(digits=1), "config.json: digits cannot be 1"),
        (with_settings(data=5), "config.json: data cannot be 5"),
    ],
)
def test_a_config_that_is_not_of_this_script_is_refused(edit, message, tmp_path, capsys):
    write_config(tmp_path, "script.py", SETTINGS)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    assert message in refusal(tmp_path, capsys)
    assert os.listdir(tmp_path) == ["config.json"]


def refusal(folder, capsys, *words):
    """Return the last line that the parser prints."""
    with pytest.raises(SystemExit) as stop:
        resume(folder, *words)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_other_versions_are_named(tmp_path, capsys):
    write_config(tmp_path, "script.py", SETTINGS)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["old"] = 1
    config["versions"] |= {"samx": "0.0.1", "jax": "0.9"}
    path.write_text(json.dumps(config))
    text = refusal(tmp_path, capsys)
    now = config["versions"]
    assert re.search(r"old; saved by samx 0\.0\.1, jax 0\.9; this is samx [\d.]+\S*, jax", text)
    assert now["optax"] not in text  # it is the same
    config["versions"] = 5
    path.write_text(json.dumps(config))
    assert "does not say which versions" in refusal(tmp_path, capsys)


def test_no_run_and_other_arguments(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert "there is no run to continue" in refusal(folder, capsys)
    (tmp_path / "config.json").mkdir()
    assert "config.json is not a file" in refusal(tmp_path, capsys)
    (tmp_path / "config.json").rmdir()
    write_config(tmp_path, "script.py", SETTINGS)
    assert "--rho: the run in" in refusal(tmp_path, capsys, "--rho", "0.6")
    assert "--out and --resume exclude each other" in refusal(tmp_path, capsys, "--out", "a")
