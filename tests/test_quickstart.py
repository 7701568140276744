"""docs/quickstart.md, done as it says: its files written, its commands run, with the built-in models and a few steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from vaopd.cli import app
from vaopd.config import load_config
from vaopd.models.load import load_model, open_source

PAGE = (Path(__file__).parents[1] / "docs/quickstart.md").read_text(encoding="utf-8")
FILES = {name: text for _, name, text in re.findall(r"```(\w+) ([\w.]+)\n(.*?)```", PAGE, flags=re.DOTALL)}
[COMMANDS] = [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)]
MODELS = {"Qwen/Qwen3-VL-2B-Instruct": "builtin:student", "Qwen/Qwen3-VL-8B-Instruct": "builtin:teacher"}
# A few steps of a few short answers; the recipe's other values stay as the page has them.
SHORT = ["optim.steps=2", "optim.prompts_per_step=3", "optim.lr=1e-4", "rollouts.k=2", "rollouts.max_tokens=24", "eval.every=1", "eval.k=2"]
OPTIONS = {
    "validate": [part for value in SHORT for part in ("--set", value)],
    "train": [part for value in SHORT for part in ("--set", value)],
    "evaluate": ["--k", "2", "--max-tokens", "24"],
    "inspect": ["--max-tokens", "24"],
    "report": [],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, and its pictures drawn."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        for real, small in MODELS.items():
            text = text.replace(real, small)
        Path(name).write_text(text, encoding="utf-8")
    exec(compile(FILES["pictures.py"], "pictures.py", "exec"), {})
    return tmp_path


def run(command: str) -> Result:
    """One line of the page."""
    program, name, *arguments = shlex.split(command)
    assert program == "vaopd"
    done = CliRunner().invoke(app, [name, *(MODELS.get(argument, argument) for argument in arguments), *OPTIONS[name]])
    assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception}"
    return done


def test_the_page_has_what_the_test_runs() -> None:
    assert set(FILES) == {"train.jsonl", "eval.jsonl", "test.jsonl", "pictures.py", "mine.yaml"}
    assert [command.split()[1] for command in COMMANDS] == list(OPTIONS)


def test_the_recipe_is_the_one_shown_elsewhere(tmp_path: Path) -> None:
    """With Qwen's names, word for word that of the README."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(run: .*?)```", readme, flags=re.DOTALL)
    (tmp_path / "readme.yaml").write_text(shown)
    (tmp_path / "page.yaml").write_text(FILES["mine.yaml"])
    assert load_config(tmp_path / "page.yaml") == load_config(tmp_path / "readme.yaml")


def test_from_nothing_to_a_trained_model_and_a_report(folder: Path) -> None:
    validated, trained, evaluated, inspected, reported = (run(command).output for command in COMMANDS)
    assert "5 train · 1 held out · 2 test · 0 skipped" in validated
    assert "data.train: 1 of 5 rows without a picture" in validated
    assert "nothing stands against this run" in validated

    made = folder / "runs/mine"
    rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert all(row["loss"] > 0 and row["va"] > 0 for row in rows if row["kind"] == "train")
    result = json.loads((made / "eval.json").read_text())
    assert set(result["models"]) == {"student", "trained", "teacher"}
    assert result["questions"] == 2
    assert "report: " in trained

    before, after = open_source("builtin:student"), open_source("runs/mine/model")
    assert after.vocab_size == before.vocab_size
    changed = [
        not torch.equal(a, b)
        for a, b in zip(*(load_model(source, dtype=torch.float32).parameters() for source in (before, after)), strict=True)
    ]
    assert any(changed)
    assert "AutoModelForImageTextToText" in (made / "model/README.md").read_text()

    measured = json.loads((folder / "after.json").read_text())
    assert (measured["questions"], measured["k"]) == (2, 2)
    assert measured["va"] > 0
    assert "2 questions, 2 samples each" in evaluated

    assert "page: " in inspected
    assert "How many arches" in (folder / "bridge.html").read_text()
    page = (made / "report.html").read_text()
    assert f"report: {Path('runs/mine/report.html')}" in reported
    assert all(text in page for text in ("va_opd", "door-1"))
