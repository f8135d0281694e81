"""Knowledge distillation and model compression for JAX, as pure functions.

``import distill_jax as dj``; then ``dj.losses.kl``, ``dj.train.make_train_step`` and so on. Each
module is imported on first use.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"
__all__ = [
    "compress", "data", "export", "features", "losses", "metrics", "models", "teachers", "train", "weights",
]  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"distill_jax.{name}")
    raise AttributeError(f"module 'distill_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
