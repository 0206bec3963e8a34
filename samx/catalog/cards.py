"""The written part of the method cards: when to use a variant, where to start, what to watch.

Everything else on a card (rule, cost, closures, fidelity, BibTeX) comes from `samx.catalog.table`
and from the docstring of the factory. To add a variant, add its name to a family and a card to
`CARDS`. A start value says where it comes from. A number without a source does not belong here.
"""

from typing import Literal, NamedTuple

from samx.catalog.measured import DIGITS as DIGITS_RADII

FAMILIES = {
    "The ball and its geometry": (
        "sam", "sharpness_aware", "asam", "usam", "friendly_sam", "fisher_sam", "monge_sam",
        "mup_sam", "msam", "gcsam", "zsharp", "le_sam", "unified_sam", "spectral_sam", "eigen_sam",
        "xsam", "lookbehind_sam", "tsam",
    ),
    "Noise in place of the ascent": ("lpf_sgd", "rwp", "arwp", "marwp"),
    "Fewer sharp gradients": (
        "momentum_sam", "looksam", "look_layer_sam", "periodic", "rst", "g_rst", "ae_sam",
        "ae_looksam", "vsam", "arsam",
    ),
    "Fewer examples or layers": ("ausam", "ksam", "esam", "sl_sam"),
    "What both gradients become": (
        "gsam", "wsam", "coupled_wsam", "stable_sam", "sagm", "gnp", "cr_sam",
        "gam", "gam_exact", "x_sam",
    ),
    "Optimizers of their own": (
        "lightsam_norm", "lightsam_adagrad", "lightsam_adam", "adasam", "bsam",
        "sam_polyak", "sassha", "msassha",
    ),
    "A teacher in place of the ascent": ("saf", "mesa"),
    "Logits, output layers and adapters": ("functional_sam", "logits_sam", "flat_lora", "bi_lora"),
    "Other losses and rare classes": ("bisam", "focal_sam", "imbalanced_sam"),
    "Masks": ("sam_on", "fisher_sparse_sam", "dynamic_sparse_sam"),
    "A learned radius": ("lets",),
    "Parallel and asynchronous": ("sampa", "async_sam", "lsam"),
}  # fmt: skip


class Start(NamedTuple):
    """A value of rho to start with.

    Attributes:
        rho: The value or range, with other arguments where they belong to it.
        where: Architecture, data and optimizer.
        kind: "cited" from a paper or its code, "measured" by a script of this repository,
            "recalled" from memory or a secondary source, "default" of samx, without a source.
        source: Which paper, code or script.

    Example:
        >>> from samx.catalog.cards import CARDS
        >>> print(CARDS["sam"].start[0])
        0.05 for a first try (cited: the paper's recommendation)
    """

    rho: str
    where: str
    kind: Literal["cited", "measured", "recalled", "default"]
    source: str = ""

    def __str__(self) -> str:
        """Return the value with its place and its source in parentheses."""
        source = f"{self.kind}: {self.source}" if self.source else self.kind
        return f"{self.rho} for {self.where} ({source})"


class Card(NamedTuple):
    """What a method card says beyond the catalog's row and the factory's docstring.

    Attributes:
        use_when: The situation it is made for.
        not_when: When something else is better.
        start: Values of rho to start with.
        watch: What goes wrong, and how it shows.
        coming_from: For each public implementation, its arguments and what they are called here.
        shown_in: Notebooks and scripts that use it, as paths from the root of the repository.
        formula: The update rule, where the factory's docstring has another one.

    Example:
        >>> from samx.catalog.cards import CARDS
        >>> CARDS["gsam"].coming_from["juntang-zhuang/GSAM"]["gsam_alpha"]
        'alpha'
    """

    use_when: str
    not_when: str
    start: tuple[Start, ...]
    watch: str
    coming_from: dict[str, dict[str, str]]
    shown_in: tuple[str, ...] = ()
    formula: str = ""


DIGITS = "examples/digits.py"
WHICH = "notebooks/which_variant.ipynb"
CHOOSING = "notebooks/choosing_rho.ipynb"
MIGRATING = "notebooks/coming_from.ipynb"
FINE_TUNE = "examples/train/fine_tune.py"
DEVICES = "notebooks/eight_devices.ipynb"
BAYES = "examples/claims/bsam.py"
WORKERS = "notebooks/workers_that_do_not_wait.ipynb"


BASES = {"sgd": "plain SGD", "momentum": "SGD with momentum", "adamw": "AdamW"}


def digits(name: str, setting: str = "") -> tuple[Start, ...]:
    """Return the radii that `examples/digits.py` chose on validation data, for each base."""
    found = []
    has_base = name not in FAMILIES["Optimizers of their own"]
    for base, (wrong, clean) in DIGITS_RADII.get(name, {}).items():
        rho = f"{wrong:g}" if wrong == clean else f"{wrong:g} with wrong labels, {clean:g} without"
        rho = f"{rho}, {setting}" if setting else rho
        where = "digits, a dense network with two layers of 64"
        where = f"{where}, {BASES[base]}" if has_base else where
        found.append(Start(rho, where, "measured", DIGITS))
    return tuple(found)


CARDS = {
    "sam": Card(
        use_when="You try sharpness-aware training for the first time: wrong labels, little data, "
        "fine-tuning, a vision transformer from scratch.",
        not_when="You take one pass over a very large data set, or the data are clean and easy: "
        "there is nothing to gain, and a step costs two gradients.",
        start=(
            Start("0.05", "a first try", "cited", "the paper's recommendation"),
            Start("0.05", "WRN-28-10 on CIFAR-10, SGD with momentum", "cited", "the paper, table 6"),
            Start("0.1", "the same on CIFAR-100", "cited", "the paper, table 6"),
            Start("0.05", "ResNets on ImageNet, SGD with momentum, batch 4096", "cited", "the paper"),
            Start("0.1", "ResNet-32 on CIFAR-10 with 20 to 60% wrong labels", "cited", "the paper"),
            Start("0.15", "ViT on ImageNet, Adam", "cited", "big_vision, pull request 8"),
            Start("0.15", "fine-tuning T5", "recalled", "arXiv 2110.08529"),
            *digits("sam"),
        ),
        watch="Sweep rho on validation data, together with the learning rate: it matters more than "
        "the choice of variant. Weight decay and clipping stand after it in the chain.",
        coming_from={
            "davda54/sam": {
                "SAM(rho=0.05)": "sam(0.05)",
                "adaptive=True": "asam(rho, eta=0.0, is_scaled=lambda path, leaf: True)",
                "first_step, second_step": "one `update` with `value_fn`",
            },
            "optax.contrib.sam": {
                "adv_optimizer=chain(normalize(), sgd(rho))": "rho",
                "sync_period=n": "sharpness_aware(..., ascent_steps=n - 1)",
                "opaque_mode=True": "how samx always works: you pass the loss",
            },
            "google-research/sam": {
                "sam_rho": "rho",
                "sync_perturbations=False": 'data_parallel(..., ascent="local")',
            },
            "kozistr/pytorch_optimizer": {"rho": "rho", "perturb_eps": "not needed"},
        },
        shown_in=("notebooks/sam_in_five_minutes.ipynb", CHOOSING, MIGRATING, DIGITS),
    ),
    "sharpness_aware": Card(
        use_when="You want a geometry of your own, only some of the leaves, or several ascent steps.",
        not_when="A named variant exists for it: that one checks its numbers. In SAM's paper more "
        "than one ascent step did not help.",
        start=(
            Start("the radius of the perturbation", "one ascent step", "default"),
            Start("that radius divided by their number", "several ascent steps, which add up",
                  "default"),
        ),
        watch="With `all_readings`, `perturbation_norm` is the length of the whole step.",
        coming_from={
            "optax.contrib.sam": {
                "sync_period=n": "ascent_steps=n - 1",
                "adv_optimizer": "perturbation",
            },
        },
        shown_in=("notebooks/write_your_variant.ipynb", MIGRATING),
    ),
    "asam": Card(
        use_when="Weights of very different sizes, normalization layers, or rho should mean the "
        "same in networks of different scales.",
        not_when="Many weights start at zero and `eta` is 0: those are never perturbed.",
        start=(
            Start("0.5", "CIFAR-10, SGD with momentum, eta 0.01", "cited", "SamsungLabs/ASAM, README"),
            Start("1", "CIFAR-100, likewise", "cited", "SamsungLabs/ASAM, README"),
            Start("2.0", "WRN-16-8 on CIFAR-10, in the geometry of davda54/sam", "cited",
                  "davda54/sam, issue 37"),
            *digits("asam"),
        ),
        watch="rho is about ten times SAM's. The most used PyTorch code means another geometry by "
        "`adaptive=True`: it scales biases too and has no `eta`.",
        coming_from={
            "SamsungLabs/ASAM": {"rho": "rho", "eta": "eta"},
            "davda54/sam": {
                "SAM(rho=2.0, adaptive=True)":
                    "asam(2.0, eta=0.0, is_scaled=lambda path, leaf: True)",
            },
        },
        shown_in=(CHOOSING, WHICH, DIGITS),
    ),
    "usam": Card(
        use_when="You want SAM's gradient without the normalization: analysis, or a perturbation "
        "that vanishes at a minimum.",
        not_when="The scale of your loss changes: the perturbation is proportional to it.",
        start=(
            Start("0.05", "the authors' class of Stable SAM", "cited", "cltan023/stablesam2024"),
            *digits("usam"),
        ),
        watch="rho is a factor of the gradient, not a radius: SAM's values do not carry over. Read "
        "`perturbation_norm`, which `all_readings` asks for.",
        coming_from={"cltan023/stablesam2024": {"usam.py, rho": "rho", "stable=False": "usam"}},
        shown_in=(DIGITS,),
    ),
    "friendly_sam": Card(
        use_when="SAM helps, and batches are small or noisy: only the part of the gradient that is "
        "special to the batch is climbed.",
        not_when="The batch is nearly the whole data set: what remains after the subtraction is "
        "rounding error.",
        start=(
            Start("0.2, decay 0.6 or 0.95", "ResNet-18 on CIFAR-100, SGD with momentum", "cited",
                  "nblt/F-SAM, run.sh and logs"),
            Start("0.1, decay 0.95", "the authors' command line", "cited", "nblt/F-SAM"),
            *digits("friendly_sam"),
        ),
        watch="With `all_readings`, `cosine` compares a direction that is not the gradient, so it may be "
        "negative.",
        coming_from={
            "nblt/F-SAM": {
                "rho": "rho",
                "sigma": "sigma",
                "lmbda": "decay",
                "adaptive=True": "perturbation=metric_ball(rho, magnitude(0.0))",
            },
            "kozistr/pytorch_optimizer": {"rho": "rho", "sigma": "sigma", "lmbda": "decay"},
        },
        shown_in=(WHICH, DIGITS),
    ),
    "fisher_sam": Card(
        use_when="You want a ball that is narrow along directions with large gradients.",
        not_when="The scale of your loss changes: the shape of the ball depends on it.",
        start=(
            Start("0.1, eta 1", "the third party's class", "cited",
                  "johnjaejunlee95/torch-unified-SAM-optimization"),
            *digits("fisher_sam"),
        ),
        watch="The Fisher information is the square of the batch gradient, not a mean over "
        "examples.",
        coming_from={
            "johnjaejunlee95/torch-unified-SAM-optimization": {"gamma": "rho", "eta": "eta"},
        },
        shown_in=("notebooks/write_your_variant.ipynb", DIGITS),
    ),
    "monge_sam": Card(
        use_when="Training is unstable with SAM while gradients are large, for example early in "
        "fine-tuning: large gradients shorten the perturbation.",
        not_when="You train with a sum of losses or with loss scaling inside the loss: the radius "
        "depends on the scale.",
        start=(
            Start("0.05 to 0.5", "ResNet-18 and ViT-B/32 on CIFAR-10, SGD with momentum", "cited",
                  "the sweep of a third party, manavdahra/sam-opt-research"),
            *digits("monge_sam"),
        ),
        watch="With `all_readings`, `perturbation_norm` is below rho, far below it where gradients are long. M-SAM is "
        "not Momentum-SAM, and not micro-batch SAM.",
        coming_from={"manavdahra/sam-opt-research": {"rho": "rho"}},
        shown_in=(DIGITS,),
    ),
    "mup_sam": Card(
        use_when="You tune a narrow network and train a wide one: the best rho stays the same.",
        not_when="You train one network of one width: at base width it is SAM.",
        start=(
            Start("tuned on the narrow network", "the wide one", "cited", "the paper's claim"),
            Start("0.2, learning rate 0.08", "digits, two hidden layers, widths 64 and 1024, SGD "
                  "with momentum", "measured", "examples/claims/mup_transfer.py"),
        ),
        watch="It is half of the method: learning rates and the initialization must follow µP too. "
        "While an output layer is zero, only that layer is perturbed.",
        coming_from={
            "moritzhaas/large-lr-width-scaling": {
                "perturbation scaling 'mpp'": "scales=samx.mup.layer_scales(params, base_params)",
            },
        },
        shown_in=("examples/claims/mup_transfer.py",),
    ),
    "msam": Card(
        use_when="You accumulate microbatches anyway, or want the smaller m that m-sharpness asks "
        "for.",
        not_when="One microbatch no longer fills the device: small pieces waste it.",
        start=(
            Start("0.2", "ResNet-18 on CIFAR-10, 128 examples per perturbation", "cited",
                  "arXiv 2206.06232, read off figure 1"),
            Start("0.4", "ResNet-34 on CIFAR-100, 128 examples per perturbation", "cited",
                  "arXiv 2206.06232, read off figure 1"),
            *digits("msam"),
        ),
        watch='The "m" of m-sharpness is the number of examples per perturbation, not '
        "`num_microbatches`. With data-parallel training, local ascent is the same thing and sends "
        "one gradient.",
        coming_from={
            "davda54/sam": {"first_step and second_step per microbatch": "num_microbatches"},
            "google-research/sam": {
                "sync_perturbations=False on D devices": 'data_parallel(..., ascent="local")',
            },
        },
        shown_in=(DEVICES, DIGITS),
    ),
    "momentum_sam": Card(
        use_when="There is no time for a second gradient, and your optimizer has a momentum.",
        not_when="The base has no momentum. Or twice the gradients are affordable: with them SAM is "
        "ahead by up to two points in the paper, but not at equal gradients in our comparison.",
        start=(
            Start("2.2 to 3", "convolutional networks on CIFAR-100, SGD with momentum", "cited",
                  "the paper"),
            Start("3", "ResNet-50 on ImageNet, SGD with momentum", "cited", "the paper"),
            Start("3", "ViT-S/32 on ImageNet, AdamW, rho 0 in the warm-up", "cited",
                  "MarlonBecker/MSAM, README; its config file has 10"),
            *digits("momentum_sam"),
        ),
        watch="rho is about ten times SAM's. Use 0 while the learning rate warms up: in the paper "
        "that is essential for transformers. BatchNorm statistics are those of the perturbed "
        "point: collect them again at the end.",
        coming_from={
            "MarlonBecker/MSAM": {
                "rho": "rho",
                "lr, momentum, weight_decay": "those of `base`",
                "moving the model back to evaluate": "not needed: the parameters are never moved",
            },
        },
        shown_in=(WHICH, DIGITS),
    ),
    "looksam": Card(
        use_when="SAM is worth something to you, but not twice the time.",
        not_when="`alpha` cannot be tuned: a large one can lose to the base optimizer. "
        "`perturb_if(policies.every(k), ...)` has no such number, and is behind on no task of our comparison.",
        start=(
            Start("SAM's, alpha 0.7, period 5", "vision transformers", "recalled",
                  "secondary sources on the paper"),
            Start("SAM's, alpha 0.1, period 5", "convolutional networks on CIFAR-100, SGD with "
                  "momentum", "cited", "the paper of Momentum-SAM, appendix A.14"),
            *digits("looksam", "alpha 0.1"),
        ),
        watch="`part_ratio` in the state is the true length of the reused part relative to the "
        "gradient. If `alpha` is far above it, the part is blown up.",
        coming_from={
            "MarlonBecker/MSAM": {"rho": "rho", "alpha": "alpha", "k": "period"},
            "kozistr/pytorch_optimizer": {
                "k": "period",
                "alpha": "alpha",
                "tensor by tensor": "another algorithm, not offered",
            },
        },
        shown_in=(WHICH, DIGITS),
    ),
    "look_layer_sam": Card(
        use_when="You train with very large batches and a layer-wise base such as LAMB.",
        not_when="You need the paper's own rule: its scaling could not be read.",
        start=(
            Start("a tenth of SAM's, or less", "the default scaling, whose unit is another", "default"),
            *digits("look_layer_sam", "alpha 0.1, the default scaling"),
        ),
        watch="The unit of rho depends on `scaling`. Ports disagree on the scaling: compare yours "
        "before you carry a radius over.",
        coming_from={
            "johnjaejunlee95/torch-unified-SAM-optimization": {
                "its layer-wise rule": "scaling=lambda w, g, total: w / g**2",
            },
        },
        shown_in=(DIGITS,),
    ),
    "periodic": Card(
        use_when="You want most of SAM's gain for few more gradients, with nothing to tune but the "
        "period.",
        not_when="Every step is affordable.",
        start=(
            Start("that of the variant inside", "any period", "default"),
            *digits("periodic", "every fifth step"),
        ),
        watch="`gradients_spent` shows the saving. Under `jax.vmap` keep the state inside the mapped "
        "function, or both branches are computed.",
        coming_from={
            "LookSAM's paper": {"SAM-k": "policies.every(k)"},
        },
        shown_in=(WHICH, DIGITS),
        formula="every period steps:  return ∇L(w + ρ g / ‖g‖)\non the other steps:  return g",
    ),
    "rst": Card(
        use_when="As periodic SAM, where a fixed rhythm could meet a rhythm in the data; or the "
        "share of sharp steps should follow a schedule.",
        not_when="Every step is affordable.",
        start=(
            Start("that of the variant inside, probability 0.6", "the authors' example", "cited",
                  "README of their JAX code"),
            *digits("rst", "probability 0.5"),
        ),
        watch="The draws come from a key and the step: all devices and a resumed run draw alike.",
        coming_from={"the authors' JAX code": {"probability p(t)": "policies.random(schedule)"}},
        shown_in=(DIGITS,),
        formula="X ~ Bernoulli(p)\nreturn ∇L(w + ρ g / ‖g‖) if X else g",
    ),
    "g_rst": Card(
        use_when="As RST, with the missing sharp steps made up for by a larger weight.",
        not_when="You need the authors' own mixing rule: it is inferred from the abstract.",
        start=(
            Start("that of the variant inside, weight 1 / probability", "SAM's sharpness term on "
                  "average", "recalled", "inferred from the abstract"),
            *digits("g_rst", "probability 0.5, weight 2"),
        ),
        watch="A weight above 1 goes past the sharp gradient: lower rho first if training becomes "
        "unstable.",
        coming_from={},
        shown_in=(DIGITS,),
        formula="X ~ Bernoulli(p)\nreturn g + weight (∇L(w + ρ g / ‖g‖) − g) if X else g",
    ),
    "ae_sam": Card(
        use_when="Sharp gradients should be taken where they matter, and you do not want to choose "
        "a period.",
        not_when="You need a fixed cost per step: the share of sharp steps is found in training.",
        start=(
            Start("SAM's, threshold from 1 to -1 over the training", "any network", "recalled",
                  "the paper's schedule"),
            *digits("ae_sam", "threshold 0"),
        ),
        watch="`sharp_fraction` in the state. With the paper's schedule late steps are nearly always "
        "sharp.",
        coming_from={},
        shown_in=(WHICH, DIGITS),
    ),
    "ae_looksam": Card(
        use_when="As AE-SAM, for fewer sharp steps still.",
        not_when="You need a checked rule: this one is from memory.",
        start=(
            Start("SAM's, a threshold that makes a fifth of the steps sharp", "any network",
                  "recalled", "the paper's share"),
            *digits("ae_looksam", "threshold 0, alpha 0.1"),
        ),
        watch="`sharp_fraction` and `part_ratio` in the state, as for AE-SAM and LookSAM.",
        coming_from={},
        shown_in=(DIGITS,),
    ),
    "vsam": Card(
        use_when="Long trainings, where the number of sharp steps may adapt itself.",
        not_when="Short trainings: on ours nearly all sharp steps were those of the warm-up, and "
        "helped little.",
        start=(
            Start("0.05", "CIFAR, SGD with momentum, learning rate 0.05, batch 128", "cited",
                  "ajiaaa/vSAM, train_vsam.py"),
            *digits("vsam"),
        ),
        watch="Give `policies.quota(warmup_steps=...)` the steps of three epochs, as the authors "
        "do, and read `sharp_fraction`.",
        coming_from={
            "ajiaaa/vSAM": {
                "rho": "rho",
                "hp_win[0]": "policy=policies.quota(window)",
                "hp2": "decay",
            },
        },
        shown_in=("examples/claims/second_order.py", DIGITS),
    ),
    "arsam": Card(
        use_when="You want to write your own rule for sampling and reusing the second-order part.",
        not_when="You need the authors' rule: beyond its three ideas nothing is known.",
        start=(
            Start("0.05", "any network, as with vSAM", "default"),
            *digits("arsam"),
        ),
        watch="`part_ratio` in the state is the length of the second-order part relative to the "
        "gradient.",
        coming_from={},
        shown_in=("examples/claims/second_order.py", DIGITS),
    ),
    "ausam": Card(
        use_when="You have per-example losses and want SAM at the price of one gradient.",
        not_when="The loader does not know where in the data set an example stands, or each "
        "example is seen once.",
        start=(
            Start("0.1, fraction 0.5", "WRN-28-10 on CIFAR-100, SGD with momentum, batch 256",
                  "cited", "ajiaaa/AUSAM, train.py"),
            *digits("ausam", "fraction 0.5"),
        ),
        watch="An index outside the table makes the updates NaN inside `jit`. The reading `loss` is "
        "that of the drawn examples.",
        coming_from={
            "ajiaaa/AUSAM": {
                "rho": "rho",
                "alpha": "fraction",
                "storage_size": "num_examples",
                "fmin, fmax": "low, high",
            },
        },
        shown_in=(WHICH, DIGITS),
    ),
    "ksam": Card(
        use_when="Labels can be trusted, and hard examples deserve the gradient.",
        not_when="Labels may be wrong: the largest losses are the wrong labels.",
        start=(
            Start("SAM's, num_selected 64 of 128", "the paper's batches", "recalled"),
            *digits("ksam", "half of the batch"),
        ),
        watch="A third of the batch costs about one gradient per step. BatchNorm sees the chosen "
        "examples only: keep the statistics of your own pass.",
        coming_from={},
        shown_in=(DIGITS,),
    ),
    "esam": Card(
        use_when="You compare with ESAM, or want its choice of examples whose losses rise the most.",
        not_when="You want its speed: in a compiled program the random tensors save nothing, and "
        "the cost stays near SAM's.",
        start=(
            Start("0.05, fractions 0.6 and 0.5", "ResNet-18 on CIFAR, SGD with momentum", "cited",
                  "dydjw9/Efficient_SAM, run.sh"),
            Start("0.1, fractions 0.5", "WRN-28-10, likewise", "cited", "the same"),
            Start("0.2, fractions 0.5", "PyramidNet-110, likewise", "cited", "the same"),
            *digits("esam", "fractions 0.6 and 0.5"),
        ),
        watch="The authors' code keeps one example fewer; `select=\"strict\"` does so too. Choose "
        '`sharp_pass="whole"` for a selected fraction above 2/3.',
        coming_from={
            "dydjw9/Efficient_SAM": {
                "rho": "rho",
                "beta": "perturbed_fraction",
                "gamma": "selected_fraction",
                "adaptive=True": "perturbation=metric_ball(rho, magnitude(0.0))",
            },
        },
        shown_in=(DIGITS,),
    ),
    "sl_sam": Card(
        use_when="You fine-tune a large model whose gradients do not fit.",
        not_when="The network is small or must move as a whole: each layer is trained on a part of "
        "the steps only.",
        start=(
            Start("0.05", "any network", "default"),
            *digits("sl_sam", "three groups"),
        ),
        watch="Each group is a program to compile. Compare at equal time, not at equal steps.",
        coming_from={},
        shown_in=(WHICH, DIGITS),
    ),
    "gsam": Card(
        use_when="Vision transformers and mixers, where the paper's gain over SAM is largest; you "
        "can tune two numbers.",
        not_when="You have the budget to tune one number only.",
        start=(
            Start("0.6 falling to 0 or 0.2, alpha 0.4", "ViT-S/32 and ViT-B/16 on ImageNet, AdamW",
                  "cited", "the paper, table 4"),
            Start("0.6 falling to 0.1, alpha 0.6", "ViT-B/32, likewise", "cited",
                  "the paper, table 4"),
            Start("0.5 or 0.7 falling to 0 to 0.2, alpha 0.01 to 0.6", "mixers, likewise", "cited",
                  "the paper, table 4"),
            Start("0.04 falling to 0.02, alpha 0.01", "ResNet-50 and 101 on ImageNet, SGD with "
                  "momentum", "cited", "the paper, table 4"),
            *digits("gsam", "alpha 0.1"),
        ),
        watch="rho follows the absolute learning rate, not its 0-to-1 multiplier. In a warm-up from "
        "zero the formula goes below `rho_min`.",
        coming_from={
            "google-research/big_vision": {
                "rho_max, rho_min": "rho=schedules.following(learning_rate, rho_max, rho_min, ...)",
                "lr_max, lr_min": "peak_value, end_value of it",
                "alpha": "alpha",
                "minimize_fp=False": 'descend="clean"',
                "adaptive_perturbation=True": "see the docstring",
            },
            "juntang-zhuang/GSAM": {
                "gsam_alpha": "alpha",
                "rho_scheduler": "rho=schedules.following(...)",
            },
        },
        shown_in=(MIGRATING, DIGITS),
    ),
    "wsam": Card(
        use_when="Sharpness should weigh more or less than in SAM, and the base's momentum and "
        "preconditioner should see the plain gradient.",
        not_when="The learning rate of the base is not at hand: the sharpness step needs it.",
        start=(
            Start("0.05, gamma 0.9", "the authors' class", "cited", "dlrover, WeightedSAM"),
            Start("SAM's, gamma 0.8 to 0.95", "tuning", "recalled",
                  "docstring of kozistr/pytorch_optimizer"),
            *digits("wsam", "gamma 0.9"),
        ),
        watch="Give `learning_rate` the base's schedule too. gamma 0.9 gives sharpness nine times "
        "SAM's weight.",
        coming_from={
            "dlrover (atorch)": {
                "rho": "rho",
                "gamma": "gamma",
                "decouple=False": "coupled_wsam",
                "max_norm": "not offered",
            },
            "kozistr/pytorch_optimizer": {"rho": "rho", "gamma": "gamma"},
        },
        shown_in=(DIGITS,),
    ),
    "coupled_wsam": Card(
        use_when="As `wsam`, where the step must go through the base.",
        not_when="You follow the paper: it prefers `wsam`.",
        start=(
            Start("0.05, gamma 0.9", "the authors' class", "cited", "dlrover, WeightedSAM"),
            *digits("coupled_wsam", "gamma 0.9"),
        ),
        watch="gamma 0.9 multiplies the sharp part by nine: choose rho smaller than SAM's.",
        coming_from={"dlrover (atorch)": {"decouple=False": "coupled_wsam", "gamma": "gamma"}},
        shown_in=(DIGITS,),
    ),
    "stable_sam": Card(
        use_when="SAM diverges at the learning rate of your base: the sharp gradient gets the "
        "length of the plain one.",
        not_when="The base is Adam or another optimizer that divides by the size of gradients: "
        "little of it is left.",
        start=(
            Start("0.05", "SGD, learning rate 0.05, not normalized", "cited",
                  "cltan023/stablesam2024, README"),
            *digits("stable_sam"),
        ),
        watch="rho multiplies the gradient, unless `normalize=True`: SAM's values do not carry "
        "over.",
        coming_from={
            "cltan023/stablesam2024": {
                "usam.py, stable=True": "stable_sam(rho)",
                "sam.py, stable=True": "stable_sam(rho, normalize=True)",
                "adaptive": "not offered",
            },
        },
        shown_in=(DIGITS,),
    ),
    "lightsam_norm": Card(
        use_when="There is no time to tune: of our optimizers it minds its numbers the least.",
        not_when="The best accuracy counts, or your training needs momentum.",
        start=(
            Start("0.05 to 1, learning rate 1", "a first try", "default"),
            *digits("lightsam_norm"),
        ),
        watch="The radius and the step shrink like one over the root of the step: late training is "
        "AdaGrad.",
        coming_from={
            "dimitris-oik/sam_sps": {"eta": "learning_rate", "rho": "rho", "eps": "eps"},
        },
        shown_in=("examples/claims/lightsam.py", DIGITS),
    ),
    "lightsam_adagrad": Card(
        use_when="Gradients of very different sizes, as in sparse features, and AdaGrad is what you "
        "would take.",
        not_when="You want SAM's radius: here each element moves by about rho.",
        start=(
            Start("0.001", "a first try: each element moves by about rho", "default"),
            *digits("lightsam_adagrad"),
        ),
        watch="The first perturbation is rho times the root of the number of parameters long.",
        coming_from={
            "dimitris-oik/sam_sps": {"eta": "learning_rate", "rho": "rho", "eps": "eps"},
        },
        shown_in=("examples/claims/lightsam.py", DIGITS),
    ),
    "lightsam_adam": Card(
        use_when="You compare with it.",
        not_when="You want Adam with SAM: `sam` before `optax.adamw` has bias correction and half "
        "of the memory.",
        start=(
            Start("0.001", "a first try: each element moves by about rho", "default"),
            *digits("lightsam_adam"),
        ),
        watch="Without bias correction the first step is 3.16 times as long as Adam's. It does not "
        "converge from learning rate 1 on (examples/claims/lightsam.py).",
        coming_from={
            "dimitris-oik/sam_sps": {
                "eta": "learning_rate",
                "rho": "rho",
                "beta1, beta2": "b1, b2",
                "eps": "eps",
            },
        },
        shown_in=("examples/claims/lightsam.py", DIGITS),
    ),
    "adasam": Card(
        use_when="You compare with it, or fine-tune with AMSGrad as its paper does.",
        not_when="You want SAM before an optax optimizer: that is `sam`.",
        start=(
            Start("0.05", "a first try, SAM's radius", "default"),
            *digits("adasam"),
        ),
        watch="Without bias correction the first steps are 3.16 times as long: lower the learning "
        "rate, or warm up. It is not SAM before `optax.amsgrad`.",
        coming_from={
            "dimitris-oik/sam_sps": {
                "gamma": "learning_rate",
                "rho": "rho",
                "beta1, beta2": "b1, b2",
            },
        },
        shown_in=(DIGITS,),
    ),
    "bisam": Card(
        use_when="Classification, where the ascent should aim at the error and not at the loss.",
        not_when="Regression or several labels: the bounds are not defined there.",
        start=(
            Start("0.05", "ResNet-56 on CIFAR-10, SGD with momentum", "cited",
                  "LIONS-EPFL/BiSAM, command line"),
            *digits("bisam", "log_lower_bound"),
        ),
        watch="The authors descend with label smoothing of 0.1: put it into `value_fn`. Their "
        "value of mu for tanh is not known.",
        coming_from={
            "LIONS-EPFL/BiSAM": {
                "rho": "rho",
                "bisam_log": "ascent_fn with losses.log_lower_bound",
                "bisam_tanh": "ascent_fn with losses.tanh_lower_bound(mu=, alpha=)",
            },
        },
        shown_in=(DIGITS,),
    ),
    "focal_sam": Card(
        use_when="Class sizes differ a lot, and rare classes should gain.",
        not_when="Classes are balanced: it is SAM with a smaller weight.",
        start=(
            Start("0.2, gamma 3, sharpness 0.5", "ResNet-32 on long-tailed CIFAR-10, SGD with "
                  "momentum", "cited", "scongl/Focal-SAM, scripts"),
            Start("0.3, gamma 3.2, sharpness 0.8", "the same on CIFAR-100", "cited", "the same"),
            Start("0.05", "fine-tuning CLIP ViT-B/16", "cited", "the same"),
            Start("0.5, gamma 3, sharpness 0.8", "digits, 100 to 1 images per class, SGD with "
                  "momentum", "measured", "examples/claims/long_tail.py"),
        ),
        watch="Long-tailed data want a larger rho than balanced data. Look at accuracy by class "
        "size, not only at its mean.",
        coming_from={
            "scongl/Focal-SAM": {
                "rho": "rho",
                "flat_gamma": "gamma",
                "sharpness": "sharpness",
            },
        },
        shown_in=("examples/claims/long_tail.py",),
    ),
    "imbalanced_sam": Card(
        use_when="The tail is a list of classes, and it may cost the frequent ones something.",
        not_when="There is no clear tail: Focal-SAM weighs classes by their size.",
        start=(
            Start("0.05", "ResNet-34 on long-tailed CIFAR-100, SGD with momentum", "cited",
                  "cool-xuan/Imbalanced_SAM"),
            Start("0.5, tail below 20 images", "digits, 100 to 1 images per class, SGD with "
                  "momentum", "measured", "examples/claims/long_tail.py"),
        ),
        watch="A batch without a tail example takes a step of the base. `tail_weight=2` is the "
        "authors' code, 1 their text.",
        coming_from={
            "cool-xuan/Imbalanced_SAM": {
                "rho": "rho",
                "its fixed factor 2": "tail_weight=2",
                "classes below eta images": "tail_classes",
            },
        },
        shown_in=("examples/claims/long_tail.py",),
    ),
    "sam_on": Card(
        use_when="Only the normalization layers should be perturbed: in the paper that beats "
        "perturbing everything.",
        not_when="The model has no normalization layers, or you expect a cheaper step.",
        start=(
            Start("1", "WRN-28-10 on CIFAR-100, SGD with momentum, where SAM takes 0.2", "cited",
                  "the paper, read off a figure"),
            Start("10", "elementwise ASAM on these layers, likewise, where ASAM takes 5", "cited",
                  "the same"),
            Start("0.5", "a first try", "default"),
        ),
        watch="rho wants to be two to ten times that for all parameters. Check by name which leaves "
        "are perturbed; the paper notes that measured sharpness may rise.",
        coming_from={
            "mueller-mp/SAM-ON": {
                "only_norm=True": "sam_on",
                "no_norm=True": "is_perturbed negated",
                "adaptive=True, elementwise=True, eta":
                    "perturbation=metric_ball(rho, magnitude(eta))",
                "layerwise=True": "perturbation=metric_ball(rho, layerwise(eta))",
                "p='infinity'": "perturbation=linf_ball(rho, ...)",
            },
        },
    ),
    "fisher_sparse_sam": Card(
        use_when="You study which entries matter, or want SAM on half of the entries at its cost.",
        not_when="You expect a faster step: a mask makes no pass cheaper.",
        start=(
            Start("0.1, sparsity 0.5", "ResNet-18 on CIFAR-10, SGD with momentum", "cited",
                  "Mi-Peng/Sparse-Sharpness-Aware-Minimization, README"),
            Start("0.2", "CIFAR, in the later paper", "cited",
                  "code of arXiv 2306.17504"),
            *digits("fisher_sparse_sam", "sparsity 0.5"),
        ),
        watch="The norm is that of the whole gradient, so the step is shorter than rho. Refreshing "
        "the mask takes one gradient per example: choose `period` and `num_microbatches`.",
        coming_from={
            "Mi-Peng/Sparse-Sharpness-Aware-Minimization": {
                "rho": "rho",
                "sparsity": "sparsity",
                "update_freq, in epochs": "period, in steps",
                "num_samples": "the length of `fisher_batch`",
            },
        },
        shown_in=(DIGITS,),
    ),
    "dynamic_sparse_sam": Card(
        use_when="As the Fisher mask, without per-example gradients.",
        not_when="You expect a faster step: a mask makes no pass cheaper.",
        start=(
            Start("0.05", "the authors' default", "cited",
                  "Mi-Peng/Sparse-Sharpness-Aware-Minimization"),
            *digits("dynamic_sparse_sam", "sparsity 0.5"),
        ),
        watch="The authors let `drop_rate` fall to 0 along a cosine.",
        coming_from={
            "Mi-Peng/Sparse-Sharpness-Aware-Minimization": {
                "rho": "rho",
                "sparsity": "sparsity",
                "drop_rate": "drop_rate",
                "drop_strategy": "drop",
                "growth_strategy": "grow",
                "update_freq, in epochs": "period, in steps",
            },
        },
        shown_in=(DIGITS,),
    ),
    "lets": Card(
        use_when="You have held-out data, and a small gap between both losses is what you want.",
        not_when="You expect it to find the best radius: on the digits it did not, from any start.",
        start=(
            Start("0.05", "a first radius", "default"),
            Start("the tuned radius (0.3)", "digits with wrong labels, a dense network with 64 units, "
                  "SGD with momentum", "measured", "examples/claims/lets.py"),
        ),
        watch="`rho`, `gap` and `hypergradient` in the state. Very large radii also close the gap, "
        "because nothing is learned.",
        coming_from={},
        shown_in=("examples/claims/lets.py",),
    ),
    "sampa": Card(
        use_when="Hardware is idle: twice the work fits into the same time, for example on two "
        "groups of devices.",
        not_when="You train on one busy device: both gradients are still computed there.",
        start=(
            Start("0.1, lam 0.2", "ResNet-56 on CIFAR-10, SGD with momentum", "cited",
                  "LIONS-EPFL/SAMPa, train.py"),
            Start("lam 0.1", "GLUE, AdamW", "recalled", "captions of the paper's tables"),
            *digits("sampa", "lam 0.2"),
        ),
        watch="Return the optimizer's reading `loss` instead of your own, or you pay for a third "
        'gradient. On the CPU use `gradients="separate"`.',
        coming_from={
            "LIONS-EPFL/SAMPa": {"--rho": "rho", "--og": "lam"},
        },
        shown_in=(DEVICES, WHICH, DIGITS),
    ),
    "async_sam": Card(
        use_when="A second device stands idle, even a slower one: a step then takes the time of one "
        "gradient.",
        not_when="You have one device: there it costs SAM's time.",
        start=(
            Start("SAM's", "any network", "default"),
            *digits("async_sam", "on one device"),
        ),
        watch="Where labels are wrong it kept a part of SAM's gain on the digits. Anything that "
        "waits for the ascent device between the two calls destroys the overlap.",
        coming_from={},
        shown_in=(WORKERS, "examples/claims/async_digits.py",
                  "examples/claims/async_cost.py"),
    ),
    "lsam": Card(
        use_when="Several workers whose batches together would be too large for SAM.",
        not_when="One worker has the time for all the steps.",
        start=(
            Start("0.05, beta 0.9, period 4", "a first try", "default"),
            Start("beta 0.9; 0.43, period 4, 16 or 64", "EASGD, from which the rule comes", "cited",
                  "sixin-zh/mpiT; yunfei-teng/LSGD"),
        ),
        watch="Evaluate the center, not a worker. One worker whose parameters are not finite makes "
        "the center so.",
        coming_from={
            "sixin-zh/mpiT": {"mva": "beta / number of workers", "su": "period"},
        },
        shown_in=(WORKERS, "examples/claims/lsam_digits.py"),
    ),
    "gcsam": Card(
        use_when="You already train with gradient centralization, or inputs with a large mean "
        "dominate the ascent.",
        not_when="The output axes of your kernels differ from leaf to leaf: one `filter_axis` holds "
        "for all of them.",
        start=(
            Start("0.05", "the authors' class, Adam with learning rate 1e-4", "cited",
                  "Mohamed-Hassan22/GCSAM"),
            *digits("gcsam"),
        ),
        watch="The step is shorter than rho: the mean counts in the norm, and is not climbed. Three "
        "rules share the name; they differ in the norm, and in whether the sharp gradient is "
        "centralized too. `optax.centralize` averages over the wrong axes of Flax's kernels.",
        coming_from={
            "Mohamed-Hassan22/GCSAM": {
                "rho": "rho",
                "adaptive=True": "`sharpness_aware(centralized_ball(rho, metric))`, see the docstring",
            },
            "kozistr/pytorch_optimizer": {"use_gc=True": "`gcsam` in place of `sam`"},
        },
        shown_in=(DIGITS,),
    ),
    "zsharp": Card(
        use_when="You want a sparse perturbation whose mask costs no state and no extra gradient.",
        not_when="Kernels are too large for one device: the sort needs the whole kernel on each.",
        start=(
            Start("0.05, quantile 0.95", "the authors' script, Adam with learning rate 1e-3", "cited",
                  "YUNBLAK/Sharpness-Aware-Minimization-with-Z-Score-Gradient-Filtering"),
            *digits("zsharp"),
        ),
        watch="Every kernel moves by rho, so the whole step is about rho times the root of the "
        "number of kernels: SAM's rho does not carry over to deep networks.",
        coming_from={
            "YUNBLAK/Sharpness-Aware-Minimization-with-Z-Score-Gradient-Filtering": {
                "rho, which their script does not pass on: it stays 0.05": "rho",
                "alpha": "quantile",
            },
        },
        shown_in=(DIGITS,),
    ),
    "le_sam": Card(
        use_when="You would rather set how much the loss rises than how far the weights move: the "
        "step is then short where gradients are long, and long where they are short.",
        not_when="The scale of your loss changes: sigma is in its units.",
        start=(
            Start("sigma 0.35, rho_max 999, with their schedule", "ResNet-18 on CIFAR-100, SGD with "
                  "momentum", "cited", "smithgun2005/LE-SAM-ICML2026, README"),
            Start("sigma 0.35, rho_max 0.3, with that schedule", "the authors' script by default",
                  "cited", "smithgun2005/LE-SAM-ICML2026"),
            *digits("le_sam", setting="as sigma"),
        ),
        watch="As the gradient shrinks, the radius grows up to rho_max; with `rho_max=None` it has no "
        "bound. While the radius is below rho_max, the reading `sharpness` is near sigma.",
        coming_from={
            "smithgun2005/LE-SAM-ICML2026": {
                "lesam_sigma": "sigma",
                "its schedule": "sigma=schedules.warmup_hold_cosine(...)",
                "lesam_rho_max <= 0": "rho_max=None",
                "lesam_alpha": "alpha",
                "lesam_topk": "write it into the loss",
                "lesam_adaptive=True": "see `perturbations.loss_rise_ball`",
            },
        },
        shown_in=(DIGITS,),
    ),
    "unified_sam": Card(
        use_when="You want to move from `usam` to `sam` during training, or to stay between them.",
        not_when="The scale of your loss changes: below lam 1 the step changes with it.",
        start=(
            Start("0.1", "a first try", "default"),
            *digits("unified_sam"),
        ),
        watch="rho is a radius at lam 1, and a factor of the gradient at lam 0: the best rho of one "
        "is not that of the other.",
        coming_from={
            "dimitris-oik/unifiedsam": {
                "rho": "rho",
                "lambd='1-1/t'": "the default of `lam`",
                "lambd='1/t'": "lam=lambda step: 1 / (step + 1)",
            },
        },
        shown_in=(DIGITS,),
    ),
    "spectral_sam": Card(
        use_when="The base is Muon, or another optimizer whose steps have a given spectral norm.",
        not_when="A step on an accelerator must be cheap: each matrix needs a singular value "
        "decomposition.",
        start=(
            Start("0.05", "a first try", "default"),
            *digits("spectral_sam"),
        ),
        watch="In L2 a matrix of rank r moves by rho times the root of r, and every leaf moves: SAM's "
        "rho is too long. With `norm=\"global\"` rho is an L2 radius, as SAM's.",
        coming_from={},
        shown_in=(DIGITS,),
    ),
    "eigen_sam": Card(
        use_when="You want the ascent to turn towards the largest curvature, and can pay five "
        "Hessian products every 100 steps.",
        not_when="JAX cannot differentiate your loss twice, or the second derivative does not fit "
        "into memory.",
        start=(
            Start("0.1, alpha 0.2, every 100", "CIFAR-100, batch 256", "cited",
                  "RitianLuo/EigenSAM, README"),
            Start("0.05, alpha 0.2, every 100", "the authors' script by default", "cited",
                  "RitianLuo/EigenSAM"),
            *digits("eigen_sam"),
        ),
        watch="The step is longer than rho. Before the first refresh it is SAM; the published code "
        "takes un-normalized steps there. The eigenvalue is the largest in magnitude, and may be "
        "negative.",
        coming_from={
            "RitianLuo/EigenSAM": {
                "rho": "rho",
                "alpha": "alpha",
                "freq, counted from the start of each epoch": "every, steps_per_epoch",
                "the steps before the first refresh": 'before_refresh="usam"',
            },
        },
        shown_in=(DIGITS,),
    ),
    "sagm": Card(
        use_when="You train for domain generalization with a small learning rate, as in its paper.",
        not_when="Gradients are long: above the norm rho / alpha the ascent becomes a descent.",
        start=(
            Start("0.05, alpha 0.001", "DomainBed, Adam with learning rate 5e-5", "cited",
                  "Wang-pengfei/SAGM"),
            *digits("sagm"),
        ),
        watch="The base gets the mean of both gradients, as in the code, so that SAM's learning rate "
        "carries over.",
        coming_from={
            "Wang-pengfei/SAGM": {
                "rho_scheduler": "rho",
                "alpha": "alpha",
                "adaptive=True": "perturbation=gradient_matching_step(rho, alpha, metric)",
            },
        },
        shown_in=(DIGITS,),
    ),
    "gnp": Card(
        use_when="You want to go from plain training (alpha 0) to SAM (alpha 1), and beyond.",
        not_when="alpha is 1: that is `sam`.",
        start=(
            Start("0.1, alpha 0.8, clean=\"unit\"", "ResNet-50 on CIFAR-10, SGD with momentum", "cited",
                  "zhaoyang-0204/gnp, recipes"),
            Start("0.1, alpha 0.8, clean=\"unit\"", "ViT-S/16 on CIFAR-10, Adam", "cited",
                  "zhaoyang-0204/gnp, recipes"),
            Start("0.1, alpha 1, after 40 epochs without", "the same ViT, with their warm-up", "cited",
                  "zhaoyang-0204/gnp, recipes"),
            *digits("gnp"),
        ),
        watch="The authors' published runs mix in a gradient of length 1, which is another "
        'algorithm: `clean="unit"`. Their weight decay is inside the loss, and they clip at 5.',
        coming_from={
            "zhaoyang-0204/gnp": {
                "r": "rho",
                "alpha": "alpha",
                "norm_perturbations=True, its default": 'clean="unit"',
                "gr_warmup_strategy='r'": "rho=optax.linear_schedule(0, rho, steps)",
                "gr_warmup_strategy='lambda'": "alpha=optax.linear_schedule(0, alpha, steps)",
                "sync_perturbations=False": 'data_parallel(..., ascent="local")',
            },
        },
        shown_in=(DIGITS,),
    ),
    "lpf_sgd": Card(
        use_when="A step may cost one gradient only: at equal gradients noise gains on nearly every "
        "task of our comparison. Or you need a baseline for SAM: a random direction of the same "
        "length.",
        not_when="Networks are so small that drawing the noise takes longer than the gradient.",
        start=(
            Start("0.002 as sigma", "ResNets on CIFAR without augmentation, SGD with momentum", "cited",
                  "devansh20la/LPF-SGD, README"),
            Start("0.001 as sigma", "ResNet-18 on TinyImageNet, SGD with momentum", "cited",
                  "devansh20la/LPF-SGD, README"),
            Start("0.0005 as sigma", "ResNet-18 on ImageNet, SGD with momentum", "cited",
                  "devansh20la/LPF-SGD, README"),
            *digits("lpf_sgd", setting="as sigma"),
        ),
        watch="sigma is relative to the norm of each filter, and holds for each of its weights: a "
        "filter of n weights moves by about sigma times the root of n times its norm.",
        coming_from={
            "devansh20la/LPF-SGD": {
                "std": "sigma",
                "M": "num_microbatches",
                "CosineInc": "a schedule as `sigma`",
            },
        },
        shown_in=(DIGITS,),
    ),
    "rwp": Card(
        use_when="You want noise and a clean gradient at the cost of one gradient: each sees half of "
        "the batch, and neither waits for the other.",
        not_when="Batches are small already: each gradient sees half of one.",
        start=(
            Start("0.01 as sigma, alpha 0.5", "ResNet-18 on CIFAR-100", "cited", "nblt/RWP, recipes"),
            *digits("rwp", setting="as sigma"),
        ),
        watch="The reading `sharpness` compares the losses of two halves of the batch: average it "
        "over many steps. sigma is relative to the norm of each filter.",
        coming_from={
            "nblt/RWP": {"gamma": "sigma", "alpha": "alpha"},
        },
        shown_in=(DIGITS,),
    ),
    "arwp": Card(
        use_when="You want noise at one gradient per step, and less of it where gradients are large.",
        not_when="You cannot hold one more copy of the parameters.",
        start=(
            Start("0.01 as sigma, eta 1, decay 0.9", "the authors' class", "cited", "nblt/mARWP"),
            Start("0.001 rising to 0.011 as sigma, eta 0.1, decay 0.99", "VGG-16 on CIFAR-100",
                  "cited", "nblt/mARWP, scripts"),
            *digits("arwp", setting="as sigma"),
        ),
        watch="The squares of gradients are summed, not averaged: eta depends on the scale of the "
        "loss and on decay.",
        coming_from={
            "nblt/mARWP": {"std": "sigma", "eta": "eta", "beta": "decay", "inc": "a schedule as `sigma`"},
        },
        shown_in=(DIGITS,),
    ),
    "marwp": Card(
        use_when="As `rwp`, with less noise where gradients are large.",
        not_when="Batches are small already, or you cannot hold one more copy of the parameters.",
        start=(
            Start("0.01 as sigma, lam 0.5", "the authors' class (their script: 0.015)", "cited",
                  "nblt/mARWP"),
            *digits("marwp", setting="as sigma"),
        ),
        watch="The authors take two batches for one step; here each half of one batch is one of "
        "them. The reading `sharpness` compares these halves: average it over many steps.",
        coming_from={
            "nblt/mARWP": {"sigma": "sigma", "eta": "eta", "beta": "decay", "lmbda": "lam"},
        },
        shown_in=(DIGITS,),
    ),
    "cr_sam": Card(
        use_when="You want SAM and a penalty on the curvature along its ascent, and have three "
        "gradients to spend.",
        not_when="Two gradients are the limit: `gsam` and `gnp` use both of SAM's.",
        start=(
            Start("0.1, gamma 0.1, beta 0.01", "CIFAR, the authors' script", "cited",
                  "TrustAIoT/CR-SAM; its class has beta 0.1"),
            *digits("cr_sam"),
        ),
        watch="On a loss that is close to quadratic, gamma has no effect, and beta only adds a part "
        "of the Hessian. The paper speaks of a normalized trace; the code divides by nothing.",
        coming_from={
            "TrustAIoT/CR-SAM": {
                "rho": "rho",
                "gamma": "gamma",
                "beta": "beta",
                "the losses that its driver stores": "nothing: nothing reads them",
            },
        },
        shown_in=(DIGITS,),
    ),
    "xsam": Card(
        use_when="You suspect that SAM's gradient points past the maximum nearby, and can pay some "
        "forward passes per epoch to look.",
        not_when="The method that you mean is X-SAM, with the eigenvector: `x_sam`.",
        start=(
            Start("0.15, rho_max 0.3", "CIFAR", "cited", "Cccjl219/XSAM"),
            *digits("xsam"),
        ),
        watch="Read `alpha` in the state: if it is always `alpha_max`, the search only "
        "extrapolates. Give `every` the steps of an epoch.",
        coming_from={
            "Cccjl219/XSAM": {
                "rho (of all steps together)": "rho",
                "rho_max, alpha_max, alpha_delta": "rho_max, alpha_max, alpha_step",
                "steps": "ascent_steps",
                "is_dynamic=False, alpha": "alpha",
                "the search on the first batch of each epoch": "every, the steps of an epoch",
            },
        },
        shown_in=(DIGITS,),
    ),
    "x_sam": Card(
        use_when="You compare with it, or want updates with less of the top eigenvector.",
        not_when="The method that you mean is XSAM, with the interpolation: `xsam`. Or you want an "
        "ascent along the eigenvector: `eigen_sam`.",
        start=(
            Start("0.05, alpha 0.2, every 3", "CIFAR-10, batch 256", "cited",
                  "huang5467/X-SAM, README; its script has every 5"),
            *digits("x_sam"),
        ),
        watch="Its updates have about length 1: tune the learning rate again. v and −v give "
        "different steps, and power iteration finds one of both. At `every=5` it costs 4 gradients.",
        coming_from={
            "huang5467/X-SAM": {
                "rho, alpha": "rho, alpha",
                "freq, counted from the start of each epoch": "every, steps_per_epoch",
                "steps of the power method": "iterations",
            },
        },
        shown_in=(DIGITS,),
    ),
    "lookbehind_sam": Card(
        use_when="A large radius is unstable with SAM, and a batch is worth several gradients.",
        not_when="Gradients are what you pay for: it takes k + 1 of them for one average.",
        start=(
            Start("0.5 with ASAM's metric, steps 5, alpha 0.5", "CIFAR", "cited",
                  "chandar-lab/Lookbehind-SAM"),
            *digits("lookbehind_sam"),
        ),
        watch="The base steps k times per step, but its schedules count steps. Compare at equal "
        "gradients.",
        coming_from={
            "chandar-lab/Lookbehind-SAM": {
                "rho": "rho",
                "k_steps": "steps",
                "alpha": 'alpha (-1: None)',
                "LookbehindASAM, eta": "perturbation=metric_ball(rho, magnitude(eta))",
            },
        },
        shown_in=(DIGITS,),
    ),
    "tsam": Card(
        use_when="You want a mean over a neighbourhood in which bad points count more, such as for "
        "rare or hard examples.",
        not_when="Two gradients are the limit: S points cost 2 S.",
        start=(
            Start("0.05, tilt 1, samples 3, radius 1", "the authors' script by default", "cited",
                  "litian96/TSAM"),
            *digits("tsam", "radius rho"),
        ),
        watch="Noise of length 1 is far for most networks: lower `radius` or `sigma`. With many "
        "parameters the noise lies on the sphere, whatever `sigma` is.",
        coming_from={
            "litian96/TSAM": {
                "rho": "rho",
                "tilt": "tilt",
                "num_samples": "samples",
                "radius, scaling": "radius, sigma",
                "schedule_t": "tilt, a schedule",
            },
        },
        shown_in=(DIGITS,),
    ),
    "sam_polyak": Card(
        use_when="There is no time to tune a learning rate, and the loss can reach a known minimum.",
        not_when="The loss of a batch stays far above `min_loss` (label noise, smoothing, "
        "regularizers): then the bound is the learning rate.",
        start=(
            Start("0.1, max_learning_rate 1", "the package by default", "cited", "sam-sps 1.0.0"),
            *digits("sam_polyak"),
        ),
        watch="Read `learning_rate` in the state. If it always is the bound, Polyak's rule does "
        "nothing.",
        coming_from={
            "PyPI sam-sps": {
                "rho": "rho",
                "lambd": "lam",
                "gamma_b": "max_learning_rate",
                "f_star": "min_loss",
                "weight_decay": "weight_decay",
            },
        },
        shown_in=(DIGITS,),
    ),
    "sassha": Card(
        use_when="You would use AdaHessian or Sophia, and want a flatter minimum.",
        not_when="JAX cannot differentiate your loss twice, or two copies of the parameters in the "
        "state are too many.",
        start=(
            Start("0.05, learning rate 0.15", "the authors' scripts, and the rate of their class",
                  "cited", "LOG-postech/Sassha"),
            *digits("sassha"),
        ),
        watch="The root of the curvature is small where the loss is flat: weights with D = 0 move by "
        "the learning rate divided by eps. On the digits 9 of 20 trainings failed with the authors' "
        "eps=1e-4, and none with eps=0.01, which was ahead of SGD. The published Hessian product "
        "mixes two points; this one does not.",
        coming_from={
            "LOG-postech/Sassha": {
                "lr, betas, weight_decay, eps": "learning_rate, b1, b2, weight_decay, eps",
                "rho": "rho",
                "lazy_hessian": "every",
                "n_samples": "samples",
                "hessian_power_scheduler": "power, a number or a schedule",
            },
        },
        shown_in=(DIGITS,),
    ),
    "msassha": Card(
        use_when="SASSHA is worth it to you, but a second gradient is not.",
        not_when="You need the authors' numbers: their code cannot run as published.",
        start=(
            Start("0.3, power 1", "the published class by default", "cited", "LOG-postech/Sassha"),
            *digits("msassha"),
        ),
        watch="It has one pass: BatchNorm statistics are those of the perturbed point, see "
        "`aux_like`.",
        coming_from={
            "LOG-postech/Sassha": {
                "lr, betas, weight_decay, eps": "learning_rate, b1, b2, weight_decay, eps",
                "rho": "rho",
                "lazy_hessian": "every",
            },
        },
        shown_in=(DIGITS,),
    ),
    "gam": Card(
        use_when="You compare with the published code of GAM.",
        not_when="You want the paper's equation: `gam_exact`. Or four gradients are too many.",
        start=(
            Start("0.2, rho_prime 0.02, beta0 0.5, beta1 0.6, gamma 0.03", "ResNets on CIFAR-100",
                  "cited", "xxgege/GAM, README"),
            Start("0.2, rho_prime 0.03, beta0 0.1, beta1 0.1, gamma 0.05", "ResNets on CIFAR-10",
                  "cited", "xxgege/GAM, README"),
            *digits("gam", "rho_prime rho / 10"),
        ),
        watch="`beta0` weighs nothing but |1 − beta0|. Without `outer` and with small differences "
        "of gradients, half precision leaves noise in g_1 − g_0.",
        coming_from={
            "xxgege/GAM": {
                "grad_norm_rho": "rho",
                "grad_rho": "rho_prime",
                "grad_beta_0, grad_beta_1": "beta0, beta1",
                "grad_gamma": "gamma",
                "adaptive": "outer and perturbation: metric_ball with magnitude(0.0) on all leaves",
            },
        },
        shown_in=(DIGITS,),
    ),
    "gam_exact": Card(
        use_when="You want a penalty on the largest gradient norm nearby, as the paper's equation "
        "has it.",
        not_when="You want the authors' numbers: their code runs `gam`.",
        start=(
            Start("0.2, alpha 0.5", "a first try, the radius of `gam`", "default"),
            *digits("gam_exact"),
        ),
        watch="The second term is rho alpha times a unit vector times the Hessian: where the "
        "curvature is large, it outgrows the gradient.",
        coming_from={},
        shown_in=(DIGITS,),
    ),
    "saf": Card(
        use_when="You want no second gradient, examples come back in every epoch, and a table with the "
        "logits of all of them fits into memory.",
        not_when="You train for few epochs, examples have no fixed number, or logits are large, as "
        "those of a language model: take `mesa`.",
        start=(
            Start("lam 0.3, lag 2, start 5", "ResNet-50 on ImageNet, 90 epochs, label smoothing 0.1",
                  "cited", "AngusDujw/SAF, run.sh"),
            Start("start at 5, or at 30% of the epochs", "other trainings", "cited",
                  "AngusDujw/SAF, README"),
            Start("lam 0.16, lag 3, end 300", "the defaults of the authors' script", "cited",
                  "AngusDujw/SAF"),
            *digits("saf", setting="as lam"),
        ),
        watch="Pass each example's own `index`: with a wrong one it gets the teacher of another "
        "example, and no error shows it. The reading `sharpness` is λ R. With augmentation the two "
        "passes of an example see different images.",
        coming_from={
            "AngusDujw/SAF": {
                "reinforce": "lam",
                "temperature": "temperature",
                "kl_start_epoch": "start",
                "kl_end_epoch": "end",
                "minus_epoch": "lag",
            },
        },
        shown_in=(DIGITS,),
    ),
    "mesa": Card(
        use_when="You want no second gradient, and a table of logits is too large or examples do not "
        "come back.",
        not_when="You cannot hold one more copy of the parameters. How much it helps beyond the average of "
        "the weights itself is not known to us.",
        start=(
            Start("lam 0.8, decay 0.9998, start 5",
                  "ResNet-50 on ImageNet, 90 epochs, label smoothing 0.1", "cited",
                  "AngusDujw/SAF, run.sh"),
            Start("lam 0.3, end 360", "the defaults of the authors' script", "cited",
                  "AngusDujw/SAF"),
            *digits("mesa", setting="as lam"),
        ),
        watch="decay belongs to the number of steps: 0.9998 averages over about 5000 steps, so a "
        "short run keeps its first weights as the teacher. With dropout or BatchNorm pass "
        "`teacher_fn`, the model in evaluation mode.",
        coming_from={
            "AngusDujw/SAF": {
                "reinforce": "lam",
                "temperature": "temperature",
                "kl_start_epoch": "start",
                "kl_end_epoch": "end",
                "ema_decay": "decay",
            },
        },
        shown_in=(DIGITS,),
    ),
    "functional_sam": Card(
        use_when="You train a language model, where SAM does not help: its change of the loss's derivative "
        "is left out.",
        not_when="The model is linear in its parameters: then it is the plain gradient. Or a step may "
        "cost one gradient only: `logits_sam`.",
        start=(
            Start("0.05", "a first try, SAM's radius", "default"),
            *digits("functional_sam"),
        ),
        watch="The reading `sharpness` is the rise of the loss at w + ε, which this variant does not "
        "descend. `loss_on_logits` must give each example the loss of its own logits.",
        coming_from={},
        shown_in=(DIGITS, FINE_TUNE),
    ),
    "logits_sam": Card(
        use_when="You tune a large model, by preferences for example, and a second gradient of all of it "
        "costs too much.",
        not_when="The sharpness that you mean is that of the whole model: the features are not "
        "perturbed.",
        start=(
            Start("0.001", "preference tuning (DPO) of models with 2 to 7 billion parameters",
                  "cited", "RitianLuo/logits-sam-dpo, README"),
            Start("0.05", "the default of the authors' code", "cited", "RitianLuo/logits-sam-dpo"),
            *digits("logits_sam"),
        ),
        watch="`features_fn` must end where `head_fn` begins, and only matrices that `head_fn` reads are "
        "perturbed. The norm is that of the output layer's gradient alone, so SAM's radii do not "
        "carry over.",
        coming_from={
            "RitianLuo/logits-sam-dpo": {
                "sam_rho": "rho",
                "sam_adaptive": "perturbation: metric_ball with a metric of |w| once, as `le_sam`",
            },
        },
        shown_in=(DIGITS, FINE_TUNE),
    ),
    "flat_lora": Card(
        use_when="You train adapters, deploy the merged weights, and a step may cost one gradient.",
        not_when="You train all weights: `lpf_sgd` and `rwp` are made for that.",
        start=(
            Start("0.05", "LoRA of language models, `num_steps` the whole training", "cited",
                  "nblt/Flat-LoRA, README"),
        ),
        watch="Pass `merge_fn`, and closures that take the merged weights. Let it return the adapted "
        "weights alone: all others that it returns are moved by noise too, and copied.",
        coming_from={"nblt/Flat-LoRA": {"rho": "rho", "T": "none: new noise in every step"}},
        shown_in=(FINE_TUNE,),
    ),
    "bi_lora": Card(
        use_when="You train adapters, deploy the merged weights, and want an ascent without a second "
        "gradient.",
        not_when="You compare with the authors' numbers: their code could not be had.",
        start=(
            Start("0.05, rank 8", "a first try, SAM's radius and a usual rank", "default"),
            Start("ascent at the learning rate of the main pair, 3e-4", "LoRA of Llama 3.1-8B",
                  "recalled", "a note on the paper"),
        ),
        watch="The second pair starts at zero and climbs slowly. In the first steps this is plain LoRA: "
        "look at `perturbation_norm` with `all_readings`. It should reach rho.",
        coming_from={},
        shown_in=(FINE_TUNE,),
    ),
    "bsam": Card(
        use_when="You want calibrated probabilities: predictions are averaged over draws from the "
        "posterior that it learns.",
        not_when="You need another base optimizer: bSAM is one itself.",
        start=(
            Start("0.01, learning rate 0.5, prior_precision 40", "ResNet-18 on CIFAR", "cited",
                  "team-approx-bayes/bayesian-sam"),
            Start("5e-5, learning rate 0.25, prior_precision 25", "ResNet-20 on TinyImageNet", "cited",
                  "team-approx-bayes/bayesian-sam"),
            *digits("bsam"),
        ),
        watch="rho is a step along g / s, not a radius. num_examples sets the noise: with too small "
        "a number the noise hides the gradient. Average probabilities over draws, not logits.",
        coming_from={
            "team-approx-bayes/bayesian-sam": {
                "alpha": "learning_rate",
                "number of training images, times dafactor": "num_examples",
                "priorprec": "prior_precision",
                "beta1, beta2": "b1, b2",
                "batchsplit": "num_microbatches",
                "custominit": "init_precision",
                "damping": "damping",
            },
            "kozistr/pytorch_optimizer": {"BSAM": "another algorithm: it differs in five places"},
        },
        shown_in=(BAYES, DIGITS),
    ),
}  # fmt: skip
