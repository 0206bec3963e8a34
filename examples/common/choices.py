"""What command lines offer and allow: names and limits, known before jax is imported.

Importing jax, samx or Flax takes seconds. A script parses its arguments before, so that `--help`
and wrong arguments are answered at once. The tests compare the names with what they stand for.
"""

import re
from pathlib import Path

TRAIN = 1000  # training images of the digits
BASES = ("sgd", "momentum", "adamw")
BATCHES = {"dense": 512, "conv": 64, "transformer": 16}  # the models of models.py

ELSEWHERE = {  # why a row of the catalog is missing in `VARIANTS`
    "sharpness_aware": "the other rows are built from it",
    "mup_sam": "needs scales: mup_transfer.py",
    "sam_on": "needs normalization layers",
    "lets": "needs held-out examples: lets.py",
    "focal_sam": "needs classes of different sizes: long_tail.py",
    "imbalanced_sam": "needs classes of different sizes: long_tail.py",
    "flat_lora": "for merged adapters: train/fine_tune.py",
    "bi_lora": "for merged adapters: train/fine_tune.py",
    "lsam": "with one worker it is SAM: lsam_digits.py",
}


def catalog() -> list[str]:
    """Return the names in samx's catalog. They are read from its text: samx is not imported."""
    table = Path(__file__).parents[2] / "samx" / "catalog" / "table.py"
    return re.findall(r'^    _entry\("(\w+)"', table.read_text(), re.MULTILINE)


VARIANTS = [
    "base",
    *(name.replace("_", "-") for name in catalog() if name not in ELSEWHERE),
]
VARIANTS.insert(VARIANTS.index("sampa") + 1, "sampa-separate")  # the same result, another cost
