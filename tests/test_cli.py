"""What a user sees who makes a mistake: one message, the right exit code, no traceback."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import yaml

from vaopd import errors
from vaopd.cli import main
from vaopd.config import WorldConfig
from vaopd.world.data import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(WorldConfig(train=12, eval=4, test=4, seed=3), folder)
    return folder


@pytest.fixture
def recipe(tmp_path, world):
    """Writes a small recipe, changed by keyword arguments, and returns its path."""

    def write(**changes):
        values = {
            "run": str(tmp_path / "run"),
            "method": "va_opd",
            "student": "builtin:student",
            "teacher": "builtin:teacher",
            "data": {name: str(world / f"{name}.jsonl") for name in ("train", "eval", "test")},
            "rollouts": {"k": 2, "max_tokens": 48, "temperature": 1.0, "top_p": 1.0},
            "optim": {"lr": 1e-4, "prompts_per_step": 4, "steps": 2},
            "eval": {"every": 2, "k": 2},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write


@pytest.fixture
def vaopd(monkeypatch, capsys):
    """Runs a command in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vaopd", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return run


def changed_rows(world, tmp_path, change):
    """A copy of the training rows with the first row changed."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    change(rows[0])
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (tmp_path / "images").exists():
        (tmp_path / "images").symlink_to(world / "images")
    return path


def test_a_misspelt_key_is_named_with_the_right_one(vaopd, recipe):
    code, _, err = vaopd("train", recipe(optim={"lrr": 1e-4}))
    assert code == 2
    assert "unknown key 'optim.lrr'" in err
    assert "Did you mean 'lr'?" in err


def test_a_misspelt_key_answers_without_a_traceback_in_a_process_of_its_own(recipe):
    done = subprocess.run([sys.executable, "-m", "vaopd", "train", recipe(studnt="x")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean 'student'?" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_missing_image_names_file_and_row(vaopd, recipe, world, tmp_path):
    (tmp_path / "d" / "images").mkdir(parents=True)
    rows = [{"id": "q0", "images": ["images/nowhere.png"], "problem": "What?"}]
    path = tmp_path / "d" / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = vaopd("train", recipe(data={"train": str(path)}))
    assert code == 3
    assert "images/nowhere.png" in err
    assert "line 1" in err


def test_an_empty_data_set_is_refused(vaopd, recipe, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    code, _, err = vaopd("train", recipe(data={"train": str(path)}))
    assert code == 3
    assert "no rows" in err
    assert str(path) in err


def test_a_teacher_with_another_vocabulary_is_refused_before_its_weights_are_read(vaopd, recipe, tmp_path):
    from vaopd.models.load import open_source, save_model
    from vaopd.world.tiny import Size, build_model, build_processor

    processor = build_processor(["quite other words"], side=64, background=(0, 0, 0))
    other = tmp_path / "other"
    save_model(build_model(processor, Size(32, 1, 32, 1), side=64, seed=0), processor, other)
    (other / "model.safetensors").unlink()
    assert open_source(str(other)).vocab_size < open_source("builtin:student").vocab_size
    code, _, err = vaopd("train", recipe(teacher=str(other)))
    assert code == 4
    assert "vocabulary:" in err
    assert "Qwen3-VL-2B and 8B" in err
    assert not (tmp_path / "run").exists()


def test_text_with_an_image_token_is_handled(vaopd, recipe, world, tmp_path):
    def hostile(row):
        row["problem"] = "What is the perimeter <|image_pad|> of <|im_end|> this?"

    path = changed_rows(world, tmp_path, hostile)
    # The image folder is a link here; rows must stay inside the data folder, so the pictures are copied instead.
    (tmp_path / "images").unlink()
    (tmp_path / "images").mkdir()
    for picture in (world / "images").iterdir():
        (tmp_path / "images" / picture.name).write_bytes(picture.read_bytes())
    code, out, err = vaopd("train", recipe(data={"train": str(path)}), "--no-report")
    assert code == 0, err
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert "12 train" in out


def test_a_held_out_question_that_is_trained_on_is_refused(vaopd, recipe, world):
    both = str(world / "train.jsonl")
    code, _, err = vaopd("train", recipe(data={"train": both, "eval": both}))
    assert code == 3
    assert "12 of 12 rows of data.eval" in err


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"student": "no/such/folder"}, 4, "no model folder"),
        ({"student": "builtin:studnt"}, 4, "Did you mean 'student'?"),
        ({"method": "va_opf"}, 2, "Did you mean 'va_opd'?"),
        ({"method": {"va_opd": {"tau": -1}}}, 2, "tau"),
        ({"divergence": "reverse_lk"}, 2, "divergence"),
        ({"view": {"name": "pixelte"}}, 2, "pixelte"),
        ({"data": {"train": "nowhere.jsonl"}}, 3, "nowhere.jsonl"),
    ],
)
def test_other_mistakes(vaopd, recipe, changes, code, says):
    got, _, err = vaopd("train", recipe(**changes))
    assert got == code
    assert says in err


def test_an_unknown_recipe_name_lists_the_shipped_ones(vaopd):
    code, _, err = vaopd("study", "dmeo")
    assert code == 2
    assert "Did you mean 'demo'?" in err


def test_training_prints_its_table_and_resume_needs_a_run(vaopd, recipe, tmp_path):
    path = recipe()
    code, _, err = vaopd("train", path, "--resume")
    assert code == 5
    assert "no run to resume" in err
    code, out, err = vaopd("train", path)
    assert code == 0, err
    assert "vocabulary ok" in out
    assert "12 train · 4 held out · 4 test · 0 skipped" in out
    for row in ("student", "trained", "teacher", "trained against student", "top 10 % of tokens"):
        assert row in out
    assert (tmp_path / "run" / "report.html").exists()
    code, _, err = vaopd("train", path)
    assert code == 5
    assert "--resume" in err


def test_evaluate_writes_what_it_prints(vaopd, world, tmp_path):
    out_file = tmp_path / "out.json"
    arguments = ("--data", world / "test.jsonl", "--k", 3, "--teacher", "builtin:teacher", "--max-tokens", 48, "--out", out_file)
    code, out, err = vaopd("evaluate", "builtin:student", *arguments)
    assert code == 0, err
    result = json.loads(out_file.read_text())
    assert result["questions"] == 4
    assert result["k"] == 3
    assert len(result["per_question"]) == 4
    assert result["accuracy"] == pytest.approx(sum(result["per_question"]) / 4)
    assert f"{100 * result['accuracy']:.1f}" in out
    assert result["va"] > 0


def test_python_dash_m_works_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, "-m", "vaopd", "--help"], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0
    assert "study" in done.stdout


def test_every_kind_of_mistake_has_an_exit_code_of_its_own() -> None:
    """1 is that of any other; 2 is typer's too, for a mistake on the command line."""
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.VaopdError)]
    codes = [kind.exit_code for kind in kinds]
    assert sorted(codes) == list(range(1, len(kinds) + 1))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("va_odp", "Did you mean 'va_opd'?"),
        ("{va_opd: {tau: -1}}", "tau must be"),
        ("{va_opd: {tau: 1", "is not valid YAML"),
        ("sft", "learns from the data's solutions"),
    ],
)
def test_a_weighting_to_probe_is_checked_before_a_model_is_loaded(vaopd, world, method, message):
    code, _, err = vaopd("probe", "nowhere", "--teacher", "nowhere", "--data", world / "eval.jsonl", "--method", method)
    assert code == 2
    assert message in err
