"""The makers of the built-in models: which world a pupil learns, and the command's mistakes. Training itself is tested where it is used."""

from __future__ import annotations

import random
import sys

import pytest

from vaopd.config import WorldConfig
from vaopd.world import build


def test_pupils_of_another_world_learn_its_text_and_its_pictures() -> None:
    plain, wordy = (build.world_pupils(world)[1] for world in (WorldConfig(), WorldConfig(wording="wordy", unit=9)))
    assert plain.name == wordy.name == "teacher-m"
    [first, second] = [pupil.phases[1].sample(random.Random(3)) for pupil in (plain, wordy)]
    assert "Each unit is" in second.problem
    assert "Each unit is" not in first.problem
    assert len(second.response.split()) > 2 * len(first.response.split())


def test_the_command_makes_the_named_models_of_the_named_world(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    made = []
    monkeypatch.setattr(build, "make", lambda pupil, processor, folder: made.append((pupil, str(folder))))
    monkeypatch.setattr(sys, "argv", ["build", str(tmp_path), "teacher-m", "--set", "working=0", "--set", "wording=terse"])
    build.main()
    [(pupil, folder)] = made
    assert (pupil.name, folder) == ("teacher-m", str(tmp_path))
    assert len(pupil.phases[1].sample(random.Random(3)).response) < 20


@pytest.mark.parametrize(("arguments", "message"), [(["teachr"], "no model teachr"), (["--set", "stile=1"], "stile")])
def test_mistakes(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["build", "folder", *arguments])
    with pytest.raises(SystemExit) as stopped:
        build.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
