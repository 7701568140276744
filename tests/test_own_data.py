"""A person's own pictures and questions, through the recipe that the README shows."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw

from vaopd.config import load_config, parse_config
from vaopd.train.loop import train

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def own_data(tmp_path):
    """Photos of different sizes and formats; a question without a picture, one with two; no answers."""
    (tmp_path / "pictures").mkdir()
    for name, size in (("bridge.jpg", (200, 120)), ("tower.png", (50, 90)), ("door.webp", (64, 64))):
        picture = Image.new("RGB", size, "navy")
        ImageDraw.Draw(picture).rectangle((5, 5, 30, 40), fill="orange")
        picture.save(tmp_path / "pictures" / name)
    rows = [
        {"images": ["pictures/bridge.jpg"], "problem": "<image>How many arches does the bridge have?"},
        {"images": ["pictures/tower.png", "pictures/door.webp"], "problem": "Is <image> taller than <image>?"},
        {"images": ["pictures/door.webp"], "problem": "What colour is the door?"},
        {"problem": "What is two plus two?"},
    ]
    for name, chosen in (("train", rows), ("eval", [{**rows[0], "problem": "What is this?"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return tmp_path


def test_own_pictures_without_answers_train(own_data):
    config = parse_config(
        {
            "run": str(own_data / "run"),
            "student": "builtin:student",
            "teacher": "builtin:teacher",
            "data": {"train": str(own_data / "train.jsonl"), "eval": str(own_data / "eval.jsonl")},
            "rollouts": {"k": 3, "max_tokens": 12},
            "optim": {"lr": 1e-4, "prompts_per_step": 4, "steps": 2},
            "eval": {"every": 1, "k": 2},
        }
    )
    folder = train(config)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["skipped_prompts"] for row in trained] == [0, 0]
    assert all(row["loss"] > 0 for row in trained)
    evaluations = [row for row in rows if row["kind"] == "eval"]
    assert all(row["accuracy"] is None and row["kl"] > 0 for row in evaluations)
    # Without answers the checkpoint nearest to the teacher is the best.
    best = min(evaluations, key=lambda row: row["kl"])["step"]
    assert json.loads((folder / "checkpoints" / "best.json").read_text())["checkpoint"] == f"step_{best:06d}"
    assert (folder / "model" / "model.safetensors").exists()


def test_the_recipe_of_the_readme_is_a_valid_one(tmp_path):
    (block,) = re.findall(r"```yaml\n(run: .*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    config = load_config(path, ["optim.lr=2e-6"])
    assert config.method.name == "va_opd"
    assert config.optim.lr == 2e-6
    assert config.student == "Qwen/Qwen3-VL-2B-Instruct"
    assert yaml.safe_load(config.to_yaml())["data"]["train"] == "train.jsonl"


def test_the_row_of_the_readme_is_a_valid_one(own_data):
    from vaopd.data.sources import read_examples

    (block,) = re.findall(r"```json\n(\{.*?\})\n```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (own_data / "row.jsonl").write_text(block)
    (example,) = read_examples(own_data / "row.jsonl")
    assert example.answer == "5"
    assert len(example.images) == 1


def test_every_file_in_the_tree_of_the_readme_exists():
    (tree,) = re.findall(r"```\nsrc/vaopd/\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    source = README.parent / "src" / "vaopd"
    named = set(re.findall(r"[\w/]+\.(?:py|yaml)", tree))
    present = {path.name for path in source.rglob("*") if path.suffix in (".py", ".yaml")} - {"__init__.py", "__main__.py"}
    assert named <= present
    # Two folders have one phrase for all their files.
    together = {path.name for folder in ("report", "bench") for path in (source / folder).glob("*.py")}
    assert present - together - {"_checks.py"} <= named, "a file without a phrase in the README"
