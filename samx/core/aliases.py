"""Names of types in signatures: `help()` prints the word, not the union behind it."""

import sys
from typing import Any

import jax
import optax

if sys.version_info >= (3, 12):
    from typing import TypeAliasType
else:
    from typing_extensions import TypeAliasType

ScalarOrSchedule = TypeAliasType("ScalarOrSchedule", float | jax.Array | optax.Schedule)
"""A number, or a function from the step count to a number."""

Radius = TypeAliasType("Radius", float | jax.Array | optax.Schedule)
"""A radius ρ ≥ 0: a number, or a schedule over the optimizer's steps."""

Perturbation = TypeAliasType("Perturbation", optax.GradientTransformation | None)
"""An optax transformation `g -> ε`, from `samx.perturbations`; `None` is the default ball."""

DType = TypeAliasType("DType", Any)
"""A dtype or its name; `None` keeps the dtypes of the parameters."""

Transformation = TypeAliasType("Transformation", optax.GradientTransformationExtraArgs)
"""An optax transformation whose `update` takes keywords."""
