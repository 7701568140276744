"""Atomic checkpoints: a temporary folder, fsync, a manifest of SHA-256 sums, a rename, and only then `latest.json` and retention.

A kill at any moment leaves either the old or the new checkpoint whole. Weights and optimiser state are safetensors, the rest JSON:
reading a checkpoint never runs code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vaopd.errors import CheckpointError

log = logging.getLogger(__name__)

MANIFEST, STATE, MODEL, OPTIMIZER = "manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"
LATEST, BEST = "latest.json", "best.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:
    """Write `folder/step_NNNNNN` whole or not at all and make it the latest. Frozen weights are left out: the recipe names them."""
    folder.mkdir(parents=True, exist_ok=True)
    final, unfinished = folder / f"step_{step:06d}", folder / f".unfinished_step_{step:06d}"
    for leftover in (unfinished, final):  # of a save that was killed, or of a run that was resumed before this step
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()
    save_file(_flat(trained_tensors(model)), unfinished / MODEL)
    save_file(optimizer_tensors(model, optimizer), unfinished / OPTIMIZER)
    _write_json(unfinished / STATE, {**state, "step": step})
    _write_json(unfinished / MANIFEST, {name: _sha256(unfinished / name) for name in (MODEL, OPTIMIZER, STATE)})
    for file in unfinished.iterdir():
        _sync(file)
    _sync(unfinished)
    os.rename(unfinished, final)
    _sync(folder)
    point(folder, LATEST, final.name)
    return final


def point(folder: Path, pointer: str, name: str) -> None:
    """Make `latest.json` or `best.json` name a checkpoint, atomically."""
    unfinished = folder / f".{pointer}"
    _write_json(unfinished, {"checkpoint": name})
    _sync(unfinished)
    os.replace(unfinished, folder / pointer)
    _sync(folder)


def named(folder: Path, pointer: str) -> Path | None:
    """The checkpoint of this folder that a pointer names, None when there is none."""
    try:
        path = folder / json.loads((folder / pointer).read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if path in checkpoints(folder) else None


def retain(folder: Path, keep: int, newest: Path) -> None:
    """Delete what is older than `newest` and the `keep` - 1 before it, but the best.

    Later ones don't count: after a fallback they are the damaged ones, which the run writes again when it gets there.
    """
    best = named(folder, BEST)
    found = checkpoints(folder)
    for path in found[found.index(newest) + keep :]:
        if path != best:
            shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    return sorted(folder.glob("step_*"), key=lambda path: (len(path.name), path.name), reverse=True) if folder.is_dir() else []


def load(path: Path) -> Checkpoint:
    """Read one checkpoint after verifying every file's sum. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in (MODEL, OPTIMIZER, STATE):
            if manifest[name] != _sha256(path / name):
                raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(path, state, load_file(path / MODEL), load_file(path / OPTIMIZER))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; a damaged one is reported and passed over. None when there is none at all.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    found = checkpoints(folder)
    for path in found:
        try:
            return load(path)
        except CheckpointError as error:
            log.warning("%s; falling back to the one before it", error)
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is whole. Start the run again in another folder")
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and optimiser state back, to the bit. Raises CheckpointError when the model is another one."""
    wanted = _flat(trained_tensors(model))
    if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in checkpoint.model.items()}:
        raise CheckpointError(f"checkpoint {checkpoint.path} belongs to another model than the recipe's student")
    # Tied weights are stored once and frozen ones not at all; the check above is the strict one.
    model.load_state_dict(checkpoint.model, strict=False)
    named_parameters = dict(model.named_parameters())
    for key, tensor in checkpoint.optimizer.items():
        name, _, slot = key.rpartition("/")
        optimizer.state[named_parameters[name]][slot] = tensor.to(named_parameters[name].device if slot != "step" else "cpu")


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without its frozen parameters."""
    frozen = frozen_tensors(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are not trained, under all of their names."""
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def fingerprint(tensors: Mapping[str, Tensor]) -> str | None:
    """SHA-256 over names and bytes, None for no tensors: whether frozen weights are those that a checkpoint was trained beside."""
    if not tensors:
        return None
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `parameter name/slot` -> tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{slot}": value.detach().cpu().contiguous().clone()
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def _flat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, one for each storage: a tied weight appears once, under its first name."""
    kept: dict[Any, str] = {}
    for name, tensor in state.items():
        kept.setdefault(tensor.data_ptr() if tensor.numel() else name, name)
    return {name: state[name].detach().cpu().contiguous() for name in kept.values()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
