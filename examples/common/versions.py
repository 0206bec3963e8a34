"""The versions of what a run was made with, and how they differ from those that run now."""

from importlib import metadata
from typing import Any

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """Return the versions of samx and of the libraries that decide what a checkpoint holds."""
    import samx  # here, because it takes seconds: a script that only shows its help needs none

    return {"samx": samx.__version__} | {name: metadata.version(name) for name in LIBRARIES}


def differences(saved: Any) -> str:
    """Describe how saved versions differ from those of now; "" if they are the same."""
    if not isinstance(saved, dict):
        return "; it does not say which versions saved it"
    now = versions()
    others = [name for name in now if saved.get(name) != now[name]]
    if not others:
        return ""
    then = ", ".join(f"{name} {saved.get(name, '(unknown)')!s:.30}" for name in others)
    return f"; saved by {then}; this is {', '.join(f'{name} {now[name]}' for name in others)}"
