"""On-policy distillation of vision-language models with visual advantage (VA-OPD, arXiv 2605.21924)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["RunConfig", "__version__", "train"]

_HOME = {"RunConfig": "vaopd.config", "train": "vaopd.train.loop"}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `import vaopd` and a wrong recipe answer before torch is loaded."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vaopd' has no attribute '{name}'")
