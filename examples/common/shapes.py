"""What a step of a language model computes, sends and holds, counted from shapes alone.

A step is compiled for the CPU, or for simulated devices of it. Nothing is computed, so a model may
be larger than this machine. The counts are those of the CPU's compiler. An accelerator's compiler
may store bfloat16 where this one stores float32, may fuse attention, and may order the step in
another way.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import samx
from examples.common.gpt import Size
from examples.common.language_task import Parallel, Task, batch_like, logits_like, make_task
from examples.common.programs import communicated_bytes, peak_bytes, product_flops
from examples.common.registry import VARIANTS, Setting
from samx import policies


class Adaptation(NamedTuple):
    """What is trained, and what each device holds of it.

    Attributes:
        lora_rank: Rank of the adapters that alone are trained; 0 trains the whole model.
        parallel: As in `make_task`.
    """

    lora_rank: int = 0
    parallel: Parallel = "fsdp"


LEARNING_RATE, RHO, RANK = 1e-3, 0.05, 8
WHOLE = "whole"
ADAPTATIONS = {
    WHOLE: Adaptation(),
    "lora": Adaptation(RANK),
    "lora-data": Adaptation(RANK, "data"),
}
MICROBATCHES = 4
BY_HAND, IN_A_BRANCH, ACCUMULATED = "sam by hand", "sam in a branch", "sam accumulated"
ALWAYS = policies.between(0, 2**31 - 1)  # the compiler keeps the branch
# Compile fast: the machine code is not run. The order of the program is the one that needs least
# memory; by default the CPU's compiler prefers one in which more can be done at once.
OPTIONS: dict[str, str | bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}


def sam_by_hand(base: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return SAM without samx, in front of a base: what its step costs at least."""

    def update_fn(g: Any, state: Any, params: Any = None, **closures: Any):
        losses_fn, batch = closures["losses_fn"], closures["batch"]
        scale = RHO / (optax.tree.norm(g) + 1e-12)
        point = jax.tree.map(lambda w, x: w + scale * x, params, g)
        g_s = jax.grad(lambda params: losses_fn(params, batch).mean())(point)
        return base.update(g_s, state, params)

    return optax.GradientTransformationExtraArgs(base.init, update_fn)  # type: ignore[arg-type]


def methods(names: Iterable[str]) -> dict[str, Callable[[Setting], optax.GradientTransformation]]:
    """Return how each method is built: optimizers, SAM in some forms, and the variants on AdamW."""

    def variant(name):
        base = optax.adamw(LEARNING_RATE)
        return lambda setting: VARIANTS[name].make(RHO, base, setting)

    return {
        "sgd": lambda setting: optax.sgd(LEARNING_RATE),
        "adamw": lambda setting: optax.adamw(LEARNING_RATE),
        BY_HAND: lambda setting: sam_by_hand(optax.adamw(LEARNING_RATE)),
        IN_A_BRANCH: lambda setting: optax.chain(
            samx.perturb_if(ALWAYS, samx.sam(RHO)), optax.adamw(LEARNING_RATE)
        ),
        ACCUMULATED: lambda setting: samx.accumulate(
            optax.chain(samx.sam(RHO), optax.adamw(LEARNING_RATE)),
            math.gcd(setting.batch_size, MICROBATCHES),
        ),
    } | {name: variant(name) for name in names if name != "base"}


def task_of(
    size: Size,
    make: Callable[[Setting], optax.GradientTransformation],
    *,
    devices: list[Any],
    examples: int,
    remat: bool,
    adaptation: Adaptation = ADAPTATIONS[WHOLE],
) -> tuple[Task, Any]:
    """Return the task with bfloat16 computation and float32 parameters; and a batch."""
    batch = batch_like(size, examples * len(devices))
    count = examples * len(devices)
    setting = Setting(
        batch, count, num_examples=count, logits=logits_like(size), learning_rate=LEARNING_RATE
    )
    task = make_task(
        size,
        make(setting),
        devices=devices,
        remat=remat,
        dtype=jnp.bfloat16,
        **adaptation._asdict(),
    )
    return task, jax.tree.map(lambda leaf: leaf.update(sharding=task.batch_sharding), batch)


def count(task: Task, batch: Any) -> dict[str, Any]:
    """Compile a step and return its counts for one device."""
    program = task.step.lower(task.state, batch).compile(OPTIONS)
    sent = communicated_bytes(program)
    weights = task.state.params, task.state.frozen
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights)),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(task.state.params)),
        "parameter_bytes": held_bytes(weights),
        "state_bytes": held_bytes(task.state),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "peak_bytes": peak_bytes(program),
        "flops": product_flops(program),
        "sent_bytes": sum(sent.values()),
        "sent": sent,
    }


def held_bytes(tree: Any) -> int:
    """Return the bytes of one device's part of all leaves."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
