"""A trained student as a standard Hugging Face folder: merged, in the precision of the model that it came from, and complete."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from vaopd.models.load import Source, load_model, save_model
from vaopd.models.lora import adapters, merged

log = logging.getLogger(__name__)

VIDEO = "video_preprocessor_config.json"
LEAST_KEPT = 0.9  # below it, the user is told that the folder has lost a part of the training


@dataclass(frozen=True)
class Export:
    """What an export did to the weights."""

    dtype: str  # of the folder's tensors
    kept: float | None  # share of the training's change that the rounding left, 1 for all of it; None: nothing was rounded


def export_model(model: Any, source: Source, folder: Path) -> Export:
    """Write `model`, trained from `source`, to `folder`: no adapters in it, and all files that transformers and vLLM look for.

    The tensors get the precision that the source's config.json names: whoever serves a bf16 model serves its student in bf16. Training
    is in fp32, and a weight that moved by less than half a bf16 step is rounded back to where it was; how much of the change is left
    is measured, and a warning names it where it is less than nine tenths. The checkpoints keep the fp32 weights.
    """
    dtype = named_dtype(source.config)
    name = str(dtype).removeprefix("torch.")
    base = {} if dtype == torch.float32 or adapters(model) else load_model(source, dtype=dtype).state_dict()
    state, kept = _rounded(model, base, dtype)
    save_model(model, source.processor, folder, state=state)
    _name_dtype(folder / "config.json", name)
    _keep_video_settings(source.path, folder)
    if kept is not None and kept < LEAST_KEPT:
        log.warning(
            "%s is in %s, as its base is, and rounding left %.0f %% of what training changed. The checkpoints have all of it, in fp32",
            folder,
            name,
            100 * kept,
        )
    return Export(name, kept)


def _rounded(model: Any, base: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], float | None]:
    """The merged tensors in `dtype`, on the CPU, and what is left of their change since `base`: Σ (change left · change) / Σ change²."""
    state, shared = {}, dict[int, Tensor]()
    left = whole = 0.0
    for name, tensor, added in merged(model):
        if not tensor.is_floating_point():
            state[name] = tensor
            continue
        rounded = state[name] = tensor.to("cpu", dtype)
        if added is None:  # a tied weight has two names and one tensor, which it keeps: transformers saves it once
            rounded = state[name] = shared.setdefault(tensor.data_ptr(), rounded)
        change = tensor.float() - base[name].to(tensor.device).float() if name in base else added
        if change is not None:
            left += float(((change - tensor.float() + rounded.to(tensor.device).float()) * change).sum(dtype=torch.float64))
            whole += float(change.square().sum(dtype=torch.float64))
    return state, None if dtype == torch.float32 or whole == 0 else left / whole


def named_dtype(config: Any) -> torch.dtype:
    """The floating-point type that a configuration names for the weights; fp32 where it names none."""
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    dtype = getattr(torch, named) if isinstance(named, str) else named
    return dtype if dtype.is_floating_point else torch.float32


def _name_dtype(file: Path, name: str) -> None:
    """The saved configuration names the type of the saved tensors, in its parts too."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values["dtype"] = name
    for part in values.values():
        if isinstance(part, dict) and "dtype" in part:
            part["dtype"] = name
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _keep_video_settings(path: str, folder: Path) -> None:
    """Without torchvision a processor has no video half to save; the base's settings of it go into the folder as they are."""
    own: Mapping[str, Any] = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    if "video_processor" in own:
        return
    settings = _json_of(path, VIDEO) or (_json_of(path, "processor_config.json") or {}).get("video_processor")
    if settings:
        (folder / VIDEO).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _json_of(path: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a folder or a hub name; None where there is none."""
    file = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # it is asked for after the training, which must not end for it
        _raise_exceptions_for_gated_repo=False,
    )
    return None if file is None else dict(json.loads(Path(file).read_text(encoding="utf-8")))
