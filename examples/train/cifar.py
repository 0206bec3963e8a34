"""Train ResNet-18 or a small ViT on CIFAR-10 or CIFAR-100, with any variant of samx by name.

    python examples/train/cifar.py --data cifar-10-python.tar.gz --variant sam
    python examples/train/cifar.py --data cifar-100-python.tar.gz --model vit --variant sampa
    python examples/train/cifar.py --digits --images 256 --epochs 20 --augment none
    python examples/train/cifar.py --resume runs/cifar-001

The script reads the standard Python archives (https://www.cs.toronto.edu/~kriz/cifar.html), packed
or unpacked. Without an archive, use --digits: it writes scikit-learn's digits as such an archive.
These are real images that go through the real loader, so they test the whole script.

The batch is sharded over all devices. Each run has its own folder, --out: config.json,
metrics.jsonl (a line for each step and each epoch), tensorboard/, checkpoints/ and, at the end,
results.json and curves.png. If a run was killed, --resume FOLDER continues it from its newest
checkpoint. It ends with the same numbers as an uninterrupted run, to the last bit.

At half precision (--precision) parameters stay in float32; float16 scales the loss.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from examples.common import arguments, choices
from examples.common.resume import resumed

# Defaults of the command line: base of a model; learning rate and weight decay of a base.
BASES = {"resnet18": "momentum", "vit": "adamw"}
RATES = {"momentum": (0.1, 5e-4), "adamw": (1e-3, 0.05)}
NOT_SETTINGS = ("out", "resume", "devices")  # what --resume does not keep
NO_DATA = """--data is missing: the path of the archive, packed or unpacked.
Download "CIFAR-10 python version" (cifar-10-python.tar.gz, 163 MB) or "CIFAR-100 python version"
from https://www.cs.toronto.edu/~kriz/cifar.html, or pass --digits, which writes scikit-learn's
digits as such an archive."""


def make_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="PATH", help="archive of CIFAR-10 or CIFAR-100, packed or unpacked")
    add("--digits", action="store_true", help="train on scikit-learn's digits instead")
    add("--images", type=int, default=0, help="number of training images; default: all")
    add("--label-noise", type=float, default=0.0, metavar="SHARE", help="training labels to flip")
    add("--imbalance", type=float, default=1.0, help="exponential class sizes: largest / smallest")
    add("--augment", choices=["none", "standard"], default="standard", help="crops and flips")
    add("--model", choices=[*BASES], default="resnet18")
    add("--width", type=int, default=0, help="default: 64 channels; vit: 192 features")
    add("--depth", type=int, default=0, help="blocks of the ViT; default: 6")
    add("--dropout", type=float, default=0.0)
    add("--label-smoothing", type=float, default=0.0)
    names = choices.VARIANTS
    arguments.add_names(parser, "--variant", names, "; default: sam", default="sam")
    add("--rho", type=float, help="default: the paper's value, in registry.py")
    add(
        "--base",
        choices=list(RATES),
        help="default: momentum; vit: adamw; LightSAM and AdaSAM have no base",
    )
    add("--learning-rate", type=float, help="default: 0.1; adamw: 1e-3")
    add("--weight-decay", type=float, help="default: 5e-4; adamw: 0.05")
    add("--schedule", choices=["cosine", "step", "constant"], default="cosine")
    add("--warmup", type=float, default=0.05, metavar="SHARE", help="fraction of all steps")
    add("--epochs", type=int, default=200)
    add("--batch", type=int, default=128, help="images per step, all devices together")
    add("--accumulate", type=int, default=1, metavar="K", help="microbatches on each device")
    add("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--devices", type=int, help="default: all; if too few, simulated on the CPU")
    add("--seed", type=int, default=0)
    add("--checkpoint-every", type=int, default=0, metavar="STEPS", help="default: one epoch")
    where = "on the batch of the step, with its dropout masks, and BatchNorm over the batch"
    arguments.add_monitor(parser, where)
    arguments.add_out(parser, "cifar")
    add("--resume", metavar="FOLDER", help="continue this run, with its settings")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments, and fill in defaults; --resume takes them from the run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume is not None:
        args, config = resumed(parser, argv, "cifar.py", not_settings=NOT_SETTINGS)
        args.data_sha256 = config.get("data_sha256")
    args.base = args.base or BASES[args.model]
    learning_rate, weight_decay = RATES[args.base]
    args.learning_rate = learning_rate if args.learning_rate is None else args.learning_rate
    args.weight_decay = weight_decay if args.weight_decay is None else args.weight_decay
    if args.depth and args.model != "vit":
        parser.error(f"--depth is for --model vit only; the depth of {args.model} is fixed")
    if args.data is not None and args.digits:
        parser.error("--data and --digits exclude each other")
    if args.data is None and not args.digits:
        parser.error(NO_DATA)
    arguments.check_range(parser, args, "epochs", "batch", "accumulate", "devices")
    arguments.check_range(parser, args, "images", "width", "depth", low=0)
    arguments.check_range(parser, args, "checkpoint_every", "monitor", low=0)
    arguments.check_range(parser, args, "seed", low=0, high=2**31 - 1)
    arguments.check_range(parser, args, "imbalance", high=1e6)
    arguments.check_range(parser, args, "rho", "learning_rate", "weight_decay", low=0, high=1e6)
    arguments.check_range(parser, args, "warmup", low=0, high=1)
    shares = ("label_noise", "label_smoothing", "dropout")
    arguments.check_range(parser, args, *shares, low=0, high=0.999)
    return args


if __name__ == "__main__":
    parse()  # before the imports that take seconds: --help and wrong arguments are answered at once

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import samx
import samx.flax
from examples.common import figures, files, monitoring
from examples.common.checkpoints import fingerprint
from examples.common.programs import peak_bytes
from examples.common.readings import readings_of
from examples.common.registry import VARIANTS, Setting
from examples.common.vision import MODELS, describe
from examples.train import loop
from examples.train.cifar_data import (
    Cifar,
    load,
    long_tailed,
    normalize,
    subset,
    test_batches,
    train_batches,
    with_label_noise,
    write_digits,
)
from examples.train.metrics import Log

TRAIN_ACCURACY_IMAGES = 2048  # training images for the training accuracy of each epoch


def load_data(args: argparse.Namespace) -> Cifar:
    """Load the data set; apply --images, --imbalance and --label-noise to its training images."""
    data = load(write_digits("runs/digits") if args.digits else args.data)
    train, classes = data.train, len(data.classes)
    if args.images:
        train = subset(train, args.images, args.seed)
    train = long_tailed(train, args.imbalance, classes, args.seed)
    train = with_label_noise(train, args.label_noise, classes, args.seed)
    if args.batch > len(train.label):
        raise ValueError(
            f"--batch must be at most {len(train.label)}, the training images, got {args.batch}"
        )
    return data._replace(train=train)


def make_base(args: argparse.Namespace, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return the base optimizer."""
    if args.base == "adamw":
        return optax.adamw(schedule, weight_decay=args.weight_decay)
    decay = optax.add_decayed_weights(args.weight_decay)
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9))


def make_state(
    args: argparse.Namespace, data: Cifar, batch: Any, schedule: optax.Schedule, mesh: Any
) -> tuple[samx.flax.TrainState, Any]:
    """Return the state at step 0 and its shardings: replicated; stored examples are sharded."""
    sizes = {name: getattr(args, name) for name in ("width", "depth") if getattr(args, name)}
    model = MODELS[args.model](
        len(data.classes), dropout=args.dropout, dtype=jnp.dtype(args.precision), **sizes
    )
    init_key, key = jax.random.split(jax.random.key(args.seed))
    init = jax.jit(partial(model.init, train=False))
    variables = init(init_key, jnp.zeros((1, *batch["image"].shape[1:])))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    sizes = {"batch_size": args.batch, "num_examples": len(data.train.label)}
    setting = Setting(
        batch,
        **sizes,
        aux=batch_stats,
        logits=jax.ShapeDtypeStruct((len(data.classes),), jnp.float32),
        num_groups=mesh.size,
        learning_rate=schedule,
    )
    tx = loop.make_optimizer(args, make_base(args, schedule), setting)
    state = samx.flax.TrainState.create(
        apply_fn=model.apply, params=params, tx=tx, batch_stats=batch_stats, key=key
    )
    everywhere = NamedSharding(mesh, P())
    specs = samx.state_specs(tx, params, batch_specs=P("data"))
    shardings = jax.tree.map(lambda _: everywhere, state).replace(
        opt_state=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    )
    return jax.device_put(state, shardings), shardings


def compile_step(args: argparse.Namespace, state, shardings, batch, classes: int) -> Any:
    """Compile the training step."""
    step = partial(train_step, classes=classes, smoothing=args.label_smoothing)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return step.lower(state, batch).compile()


def train_step(state, batch, *, classes: int, smoothing: float):
    """Take one step of any variant; return `(state, readings)`."""

    def features_fn(params, batch):
        features, moved = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            normalize(batch["image"]),
            train=True,
            rngs=state.rngs("dropout"),
            mutable=["batch_stats"],
            method="features",
        )
        return features, moved.get("batch_stats", {})

    def head_fn(params, features):
        return state.apply_fn({"params": params}, features, method="logits")

    def apply_fn(params, batch):
        features, batch_stats = features_fn(params, batch)
        return head_fn(params, features), batch_stats

    def teacher_fn(params, batch):
        variables = {"params": params, "batch_stats": state.batch_stats}
        return state.apply_fn(variables, normalize(batch["image"]), train=False)

    def loss_on_logits(logits, batch):
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], classes), smoothing)
        return optax.softmax_cross_entropy(logits, targets)

    def ascent_fn(params):
        logits, _ = apply_fn(params, batch)
        return samx.losses.log_lower_bound(logits, batch["label"]).mean()

    def losses_fn(params, batch):
        logits, batch_stats = apply_fn(params, batch)
        return loss_on_logits(logits, batch), batch_stats

    def value_fn(params):
        losses, batch_stats = losses_fn(params, batch)
        return losses.mean(), batch_stats

    (value, batch_stats), grads = jax.value_and_grad(value_fn, has_aux=True)(state.params)
    new = state.apply_gradients(
        grads=grads,
        value=value,
        losses_fn=losses_fn,
        features_fn=features_fn,
        head_fn=head_fn,
        loss_on_logits=loss_on_logits,
        teacher_fn=teacher_fn,
        batch=batch,
        labels=batch["label"],
        index=batch["index"],
        ascent_fn=ascent_fn,
        batch_stats=batch_stats,
    )
    measured = monitoring.measured(new.opt_state, state.step)
    return new, readings_of(new.opt_state, value) | measured


@partial(jax.jit, static_argnames="classes")
def evaluate_batch(state, batch, *, classes: int):
    """Sum over a batch, padding excluded: loss; correct answers and examples of each class."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, normalize(batch["image"]), train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    is_right = logits.argmax(axis=-1) == batch["label"]
    by_class = partial(jnp.zeros(classes).at[batch["label"]].add)
    weight = batch["weight"]
    return (losses * weight).sum(), by_class(is_right * weight), by_class(weight)


class Evaluation:
    """Loss and accuracy of a state on some images."""

    def __init__(self, images, batch_size: int, classes: int, place):
        self._batches = partial(test_batches, images, batch_size)
        self._sums = partial(evaluate_batch, classes=classes)
        self._place = place

    def __call__(self, state) -> dict[str, Any]:
        """Return "loss", "accuracy" and "accuracy_by_class" over all images."""
        # Each batch is waited for. Simulated devices of a CPU share its threads: many programs at
        # once could wait for one another for ever.
        batches = map(self._place, self._batches())
        sums = [jax.device_get(self._sums(state, batch)) for batch in batches]
        loss, right, examples = (np.sum(part, axis=0) for part in zip(*sums, strict=True))
        return {
            "loss": float(loss / examples.sum()),
            "accuracy": float(right.sum() / examples.sum()),
            "accuracy_by_class": (right / np.maximum(examples, 1)).tolist(),
        }


def train(args: argparse.Namespace, data: Cifar, devices: list[Any]) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint in the run's folder or from scratch."""
    classes = len(data.classes)
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    place = partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    steps_per_epoch = max(1, len(data.train.label) // args.batch)
    steps = args.epochs * steps_per_epoch
    schedule = loop.make_schedule(args, steps)
    batches = train_batches(data.train, args.batch, seed=args.seed, augment=args.augment)
    batch = place(next(train_batches(data.train, args.batch, seed=0, augment="none")))
    state, shardings = make_state(args, data, batch, schedule, mesh)
    start = time.perf_counter()
    step_fn = compile_step(args, state, shardings, batch, classes)
    print(
        f"{args.model}: {describe(state.params)}; compiled in {time.perf_counter() - start:.0f} s; "
        f"a step of {args.variant} at batch {args.batch} needs "
        f"{peak_bytes(step_fn) / 1e9:.2f} GB on each device"
    )

    first = data.train._replace(
        image=data.train.image[:TRAIN_ACCURACY_IMAGES],
        label=data.train.label[:TRAIN_ACCURACY_IMAGES],
    )
    on_test = Evaluation(data.test, args.batch, classes, place)
    on_train = Evaluation(first, args.batch, classes, place)

    def evaluate(state, step, loss, rate):
        tested = on_test(state)
        values = {
            "epoch": step // steps_per_epoch,
            "loss": loss,
            "test_loss": tested["loss"],
            "test_accuracy": tested["accuracy"],
            "train_accuracy": on_train(state)["accuracy"],
            "images_per_second": rate,
        }
        return values, describe_epoch(values, args.epochs)

    def finish(state, log):
        return write_results(args, log, state, on_test(state), on_train(state))

    return loop.train(
        args.folder,
        "cifar.py",
        state,
        step_fn,
        batches,
        place,
        evaluate,
        finish,
        steps=steps,
        evaluate_every=steps_per_epoch,
        checkpoint_every=args.checkpoint_every or steps_per_epoch,
        schedule=schedule,
        unit="images",
        units=args.batch,
    )


def describe_epoch(values: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {values['epoch']:>{len(str(epochs))}}/{epochs}  loss {values['loss']:.4f}  "
        f"train {100 * values['train_accuracy']:.2f}%  test {100 * values['test_accuracy']:.2f}%  "
        f"{values['images_per_second']:.0f} images/s"
    )


def write_results(args, log: Log, state, on_test: dict, on_train: dict) -> dict[str, Any]:
    """Write results.json and curves.png; return the results."""
    results = loop.counts_of(state, log, "images") | {
        "test": on_test,
        "train": on_train,
        "state_sha256": fingerprint(state),
    }
    files.write(args.folder / "results.json", json.dumps(results, indent=1))
    draw(log, args.folder / "curves.png", f"{args.model}, {args.variant}, seed {args.seed}")
    print(
        f"test accuracy {100 * on_test['accuracy']:.2f}%, train accuracy "
        f"{100 * on_train['accuracy']:.2f}%, {results['gradients']:.0f} gradients, "
        f"{results['images_per_second']:.0f} images/s\n"
        f"{loop.describe_monitored(results)}state sha256 {results['state_sha256']}"
    )
    print(f"Results: {args.folder / 'results.json'}\nPlot: {args.folder / 'curves.png'}")
    print(f"TensorBoard: tensorboard --logdir {args.folder / 'tensorboard'}")
    return results


def draw(log: Log, path: Path, title: str) -> None:
    """Plot losses, accuracies and, if it was measured, the top eigenvalue."""
    figure, panels = loop.make_panels(log)
    left, right, *_ = panels
    epochs = log.of("epoch")
    loop.draw_losses(left, log)
    left.set(xlabel="step", title="loss", yscale="log")
    for name in ("train_accuracy", "test_accuracy"):
        points = [(row["step"], 100 * row[name]) for row in epochs]
        label = name.removesuffix("_accuracy")
        right.plot(*zip(*points, strict=True), "o-", label=label, markersize=3)
    last = 100 * epochs[-1]["test_accuracy"]
    right.set(xlabel="step", title=f"accuracy, %: {last:.2f} on the test images at the end")
    for axes in panels:
        axes.grid(alpha=0.3)
        figures.label_ends(axes)
    figures.save(figure, path, title)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    args.rho = VARIANTS[args.variant].rho if args.rho is None else args.rho
    devices = loop.choose_devices(args.devices)
    loop.check_batch(args, devices)
    data = loop.begin(
        args,
        "cifar.py",
        "cifar",
        partial(load_data, args),
        data_name=args.data or "digits",
        not_settings=NOT_SETTINGS,
    )
    print(
        f"device: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), jax "
        f"{jax.__version__}, samx {samx.__version__}\n"
        f"{len(data.train.label)} training images, {len(data.test.label)} test images, "
        f"{len(data.classes)} classes\nrun: {args.folder}"
    )
    with loop.ends_in_one_line("cifar.py", args.folder):
        return train(args, data, devices)


if __name__ == "__main__":
    main()
