"""Checkpoints are whole or not there, damage is noticed, and what is read back is what was written, to the bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vaopd.errors import CheckpointError
from vaopd.train import checkpoint

STATE = {"nonfinite_streak": 1, "best": {"step": 2, "accuracy": 0.5, "kl": None}}
FILES = [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST]


class Tied(nn.Module):
    """Two names for one weight, as a language model's embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4, bias=False)
        self.middle = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(7))


def trained(seed: int, steps: int = 2) -> tuple[Tied, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model.head(model.middle(torch.randn(5, 3))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), **checkpoint.optimizer_tensors(model, optimizer)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def test_a_checkpoint_reads_back_to_the_bit(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    path = checkpoint.save(tmp_path, 12, model, optimizer, STATE)
    assert path == tmp_path / "step_000012"
    assert {file.name for file in path.iterdir()} == set(FILES)
    assert checkpoint.named(tmp_path, checkpoint.LATEST) == path
    other, its_optimizer = trained(1)
    found = checkpoint.load(path)
    assert found.state == {**STATE, "step": 12}
    checkpoint.restore(found, other, its_optimizer)
    assert equal(everything(model, optimizer), everything(other, its_optimizer))
    assert other.head.weight is other.embed.weight, "tied weights stay tied"

    # And it goes on alike.
    for m, o in ((model, optimizer), (other, its_optimizer)):
        m.head(m.middle(torch.ones(2, 3))).square().sum().backward()
        o.step()
    assert equal(everything(model, optimizer), everything(other, its_optimizer))


def test_a_fresh_optimiser_takes_the_state_too(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    checkpoint.save(tmp_path, 1, model, optimizer, STATE)
    other, its_optimizer = trained(1, steps=0)
    checkpoint.restore(checkpoint.load(tmp_path / "step_000001"), other, its_optimizer)
    assert equal(everything(model, optimizer), everything(other, its_optimizer))


def test_another_models_checkpoint_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    checkpoint.save(tmp_path, 1, model, optimizer, STATE)
    other = nn.Linear(3, 4)
    before = other.weight.clone()
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.restore(checkpoint.load(tmp_path / "step_000001"), other, torch.optim.AdamW(other.parameters()))
    assert torch.equal(other.weight, before)


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "checkpoints") is None
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint.load_latest(tmp_path / "checkpoints") is None
    assert checkpoint.named(tmp_path, checkpoint.BEST) is None


# --- damage -----------------------------------------------------------------------------------------------------------


def bit_flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def last_bit_flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-4] ^= 0x40
    file.write_bytes(bytes(content))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def truncate_by_one(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def swap(file: Path) -> None:
    """The file of another checkpoint."""
    shutil.copy(file.parent.parent / "step_000001" / file.name, file)


DAMAGES: list[Callable[[Path], None]] = [bit_flip, last_bit_flip, truncate, truncate_by_one, empty, Path.unlink, swap]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2 of different models."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, *trained(step), {**STATE, "note": f"of step {step}"})
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_noticed_and_the_one_before_is_taken(
    two: Path, file: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(two / "step_000002" / file)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(two / "step_000002")
    with caplog.at_level(logging.WARNING):
        found = checkpoint.load_latest(two)
    assert found is not None
    assert found.path.name == "step_000001"
    assert found.state["note"] == "of step 1"
    assert any("step_000002" in record.message and "falling back" in record.message for record in caplog.records)


def test_every_place_of_the_small_files_counts(two: Path) -> None:
    for file in (checkpoint.STATE, checkpoint.MANIFEST):
        path = two / "step_000002" / file
        whole = path.read_bytes()
        for place in range(0, len(whole), 3):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError):
                checkpoint.load(path.parent)
        path.write_bytes(whole)
        checkpoint.load(path.parent)


def test_none_whole_is_an_error_and_not_a_fresh_start(two: Path) -> None:
    for step in (1, 2):
        truncate(two / f"step_{step:06d}" / checkpoint.MODEL)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        checkpoint.load_latest(two)


def test_a_manifest_that_is_no_manifest_is_damage(two: Path) -> None:
    for content in ("[]", "null", "3", '"text"', "{}", "\xff"):
        (two / "step_000002" / checkpoint.MANIFEST).write_text(content, encoding="latin-1")
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(two / "step_000002")


def test_a_damaged_pointer_is_no_pointer(two: Path) -> None:
    for content in ("", "[]", "{}", "{", '{"checkpoint": 3}'):
        (two / checkpoint.LATEST).write_text(content)
        assert checkpoint.named(two, checkpoint.LATEST) is None
        found = checkpoint.load_latest(two)
        assert found is not None
        assert found.path.name == "step_000002"


def test_a_pointer_stays_inside_its_folder(two: Path) -> None:
    (two / checkpoint.BEST).write_text('{"checkpoint": "../../elsewhere"}')
    assert checkpoint.named(two, checkpoint.BEST) is None


def test_an_unfinished_folder_is_not_a_checkpoint(two: Path) -> None:
    shutil.copytree(two / "step_000002", two / ".unfinished_step_000003")
    found = checkpoint.load_latest(two)
    assert found is not None
    assert found.path.name == "step_000002"
    checkpoint.save(two, 3, *trained(3), STATE)
    assert not list(two.glob(".unfinished*"))


# --- kills and full disks ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """A kill: no handler of ordinary errors sees it."""


def operations(patch: pytest.MonkeyPatch, die_at: int | None, error: BaseException | None = None) -> list[str]:
    """Make the `die_at`-th file operation of this module raise, before it or halfway through; returns the operations so far."""
    done: list[str] = []

    def watched(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            if len(done) == die_at:
                raise error or Killed(name)
            return operation(*arguments, **options)

        return run

    patch.setattr(checkpoint, "save_file", watched("save_file", checkpoint.save_file))
    patch.setattr(checkpoint, "_write_json", watched("_write_json", checkpoint._write_json))
    patch.setattr(checkpoint, "_sync", watched("_sync", checkpoint._sync))
    for name in ("rename", "replace"):
        patch.setattr(checkpoint.os, name, watched(name, getattr(os, name)))
    patch.setattr(checkpoint.shutil, "rmtree", watched("rmtree", shutil.rmtree))
    return done


def save_over(folder: Path, model: Tied, optimizer: torch.optim.Optimizer, step: int) -> None:
    path = checkpoint.save(folder, step, model, optimizer, STATE)
    checkpoint.point(folder, checkpoint.BEST, path.name)
    checkpoint.retain(folder, 2, path)


def test_a_kill_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {step: trained(step) for step in (1, 2, 3)}
    with monkeypatch.context() as patch:
        for step in (1, 2):
            save_over(tmp_path / "count", *models[step], step)
        total = operations(patch, None)
        save_over(tmp_path / "count", *models[3], 3)
    assert len(total) >= 16, total
    for die_at in range(1, len(total) + 1):
        folder = tmp_path / str(die_at)
        for step in (1, 2):
            save_over(folder, *models[step], step)
        with monkeypatch.context() as patch:
            operations(patch, die_at)
            with pytest.raises(Killed):
                save_over(folder, *models[3], 3)
        found = checkpoint.load_latest(folder)
        assert found is not None
        step = found.state["step"]
        assert step in (2, 3), total[die_at - 1]
        other = trained(9)
        checkpoint.restore(found, *other)
        assert equal(everything(*models[step]), everything(*other)), f"after dying at {die_at} ({total[die_at - 1]})"
        for pointer in (checkpoint.LATEST, checkpoint.BEST):
            named = checkpoint.named(folder, pointer)
            assert named is not None
            checkpoint.load(named)

        # The next save needs no cleaning up.
        save_over(folder, *models[3], 3)
        found = checkpoint.load_latest(folder)
        assert found is not None
        assert found.state["step"] == 3
        assert [path.name for path in checkpoint.checkpoints(folder)] == ["step_000003", "step_000002"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_over(tmp_path, *trained(1), 1)
    for die_at in range(3, 8):
        with monkeypatch.context() as patch:
            operations(patch, die_at, OSError(28, "No space left on device"))
            with pytest.raises(OSError, match="No space"):
                checkpoint.save(tmp_path, 2, *trained(2), STATE)
        found = checkpoint.load_latest(tmp_path)
        assert found is not None
        assert found.state["step"] == 1


def test_the_manifest_is_on_disk_before_the_rename_and_the_pointer_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        done = operations(patch, None)
        checkpoint.save(tmp_path, 1, *trained(1), STATE)
    rename = done.index("rename")
    assert done[:rename].count("_sync") == 5, "four files and their folder"
    assert done[:rename].count("save_file") == done[:rename].count("_write_json") == 2
    assert done[rename + 1] == "_sync", "the rename itself"
    assert "replace" in done[rename + 2 :], "the pointer comes last"


# --- retention --------------------------------------------------------------------------------------------------------


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    for step in range(0, 60, 10):
        path = checkpoint.save(tmp_path, step, model, optimizer, STATE)
        if step == 10:
            checkpoint.point(tmp_path, checkpoint.BEST, path.name)
        checkpoint.retain(tmp_path, 2, path)
        kept = [int(path.name.removeprefix("step_")) for path in checkpoint.checkpoints(tmp_path)]
        assert kept == {0: [0], 10: [10, 0], 20: [20, 10], 30: [30, 20, 10], 40: [40, 30, 10], 50: [50, 40, 10]}[step]


def test_after_a_fallback_the_damaged_later_ones_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, step, model, optimizer, STATE)
    truncate(tmp_path / "step_000006" / checkpoint.MODEL)
    checkpoint.retain(tmp_path, 2, checkpoint.save(tmp_path, 5, model, optimizer, STATE))
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step_000006", "step_000005", "step_000004"]
    for step in (4, 5):
        checkpoint.load(tmp_path / f"step_{step:06d}")


def test_steps_beyond_six_digits_stay_in_order(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        checkpoint.save(tmp_path, step, *trained(0), STATE)
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.state["step"] == 1_000_000


def test_a_checkpoint_is_plain_data(tmp_path: Path) -> None:
    """Safetensors and JSON: nothing that could run when it is read."""
    path = checkpoint.save(tmp_path, 1, *trained(0), STATE)
    for file in (checkpoint.STATE, checkpoint.MANIFEST):
        json.loads((path / file).read_text(encoding="utf-8"))
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        header = (path / file).read_bytes()
        json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
