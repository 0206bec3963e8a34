"""The checkpoints that sharpness.py measures: trained from one start, or read from files."""

import argparse
import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from examples.common import files
from examples.common.arguments import refuse
from examples.common.digits_task import LEARNING_RATE
from examples.common.registry import VARIANTS
from examples.common.training import data_of, make_trainer, start_of, train_run
from examples.common.tuning import Runs

BASE = "momentum"
TUNED = Path(__file__).parents[1] / "compare" / "results" / "digits.json"
LAYERS = ("first", "second", "head")  # of `digits_task.Network`
PARTS = ("kernel", "bias")


class Checkpoint(NamedTuple):
    """Parameters of the digits network, and where they come from."""

    name: str
    params: dict[str, dict[str, Any]]
    about: dict[str, Any]


def tuned(name: str, noise: float) -> tuple[float, float]:
    """Return the learning rate and rho that digits.py chose for a variant, or where it begins.

    The committed results are for two shares of wrong labels; the nearer one counts. The base
    optimizer has those of a run with as many gradients as SAM.
    """
    row = "base2x" if name == "base" else name
    found = [r for r in files.read_json(TUNED)["rows"] if r["row"] == row]
    if not found:
        variant = VARIANTS[name]
        return variant.learning_rate or LEARNING_RATE[BASE], variant.start
    nearest = min(found, key=lambda r: abs(r["noise"] - noise))
    return nearest["learning_rate"], nearest["rho"]


def train(names: Iterable[str], args: argparse.Namespace) -> Iterator[Checkpoint]:
    """Train variants from the same start, each until it has spent the same gradients."""
    images, _, _ = data_of(args.seed, args.noise)
    for name in names:
        variant = VARIANTS[name]
        rate, rho = tuned(name, args.noise)
        epochs = max(1, round(2 * args.epochs / variant.gradients))
        trainer = make_trainer(variant, BASE, args.width, epochs)
        run = Runs(np.int32(args.seed), np.float32(rate), np.float32(rho))  # type: ignore[arg-type]
        trained = train_run(trainer, start_of(args.seed, args.width), run, images, epochs)
        params = nnx.to_pure_dict(jax.device_get(trained.params))
        about = {"learning_rate": rate, "rho": rho, "epochs": epochs}
        yield Checkpoint(name, params, {**about, "gradients": float(trained.gradients[-1])})


def read(paths: Iterable[str]) -> list[Checkpoint]:
    """Return the checkpoints in files of arrays, such as params.npz of this script.

    The arrays of a checkpoint are `NAME/first/kernel` and so on; NAME and its slash may be missing.
    A file that does not hold such arrays ends the script.
    """
    found: dict[str, Checkpoint] = {}
    for path in paths:
        try:
            for name, params in _grouped(_arrays(Path(path))).items():
                name = _free(name or Path(path).stem, found)
                found[name] = Checkpoint(name, _checked(params), {"file": str(path)})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            refuse(f"--params: {path}: {files.reason(error)}")
    widths = {width_of(checkpoint) for checkpoint in found.values()}
    if len(widths) > 1:
        refuse(f"--params: all checkpoints must have the same width, got {sorted(widths)}")
    return list(found.values())


def width_of(checkpoint: Checkpoint) -> int:
    """Return the width of the hidden layers."""
    return checkpoint.params["head"]["kernel"].shape[0]


def archive(checkpoints: Iterable[Checkpoint]) -> bytes:
    """Return the content of a file that `read` reads."""
    arrays = {
        f"{checkpoint.name}/{layer}/{part}": checkpoint.params[layer][part]
        for checkpoint in checkpoints
        for layer in LAYERS
        for part in PARTS
    }
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def _arrays(path: Path) -> dict[str, np.ndarray]:
    content = files.read(path)
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ValueError("it is not a .npz file of arrays")
    with np.load(io.BytesIO(content), allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}


def _grouped(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Return the arrays by checkpoint, layer and part."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for path, array in arrays.items():
        path = path.removesuffix("/value")  # of an `nnx.Variable`, as in data_parallel.py
        *name, layer, part = path.split("/") if "/" in path else ("", path)
        found.setdefault("/".join(name), {}).setdefault(layer, {})[part] = array
    return found


def _checked(params: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Return the parameters in float32, if they are those of the digits network."""
    shapes = {
        f"{layer}/{part}": array.shape for layer in params for part, array in params[layer].items()
    }
    width = (*shapes.get("head/kernel", ()), 0)[0]
    wanted = {"first/kernel": (64, width), "first/bias": (width,)}
    wanted |= {"second/kernel": (width, width), "second/bias": (width,)}
    wanted |= {"head/kernel": (width, 10), "head/bias": (10,)}
    if shapes != wanted or not width:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
        raise ValueError(
            "it must hold the kernel and bias of the layers first, second and head of the digits "
            f"network, got {listed or 'nothing':.150}"
        )
    return {
        layer: {part: np.asarray(params[layer][part], np.float32) for part in PARTS}
        for layer in LAYERS
    }


def _free(name: str, taken: Iterable[str]) -> str:
    """Return the name, with a number if it is taken."""
    names, number = [*taken], 2
    while name in names:
        name, number = f"{name.removesuffix(f' ({number - 1})')} ({number})", number + 1
    return name
