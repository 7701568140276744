import json

import pytest
import yaml

from vaopd.analysis.study import StudyFailed, plan, run_study
from vaopd.config import load_study
from vaopd.errors import ConfigError


def study_file(tmp_path, **changes):
    values = {
        "name": "tiny",
        "run": str(tmp_path / "study"),
        "methods": ["opd", {"va_opd": {"tau": 0.5}}],
        "world": {"train": 12, "eval": 4, "test": 4, "seed": 0},
        "recipe": {
            "student": "builtin:student",
            "teacher": "builtin:teacher",
            "rollouts": {"k": 2, "max_tokens": 48, "temperature": 1.0, "top_p": 1.0},
            "optim": {"lr": 1e-4, "prompts_per_step": 4, "steps": 2},
            "eval": {"every": 2, "k": 2},
        },
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def test_plan_gives_every_cell_the_same_recipe_but_method_and_seed(tmp_path):
    study = load_study(study_file(tmp_path, seeds=[0, 1]))
    jobs, cells = plan(study)
    assert list(cells) == ["opd-seed0", "opd-seed1", "va_opd-tau=0.5-seed0", "va_opd-tau=0.5-seed1"]
    assert [job.name for job in jobs] == [*cells, "student", "teacher"]
    stripped = [config.model_dump(exclude={"run", "method", "seed"}) for config in cells.values()]
    assert all(recipe == stripped[0] for recipe in stripped)
    assert [config.seed for config in cells.values()] == [0, 1, 0, 1]


def test_a_study_runs_every_cell_once_and_sums_up(tmp_path):
    study = load_study(study_file(tmp_path))
    states = []
    summary = run_study(study, on_progress=lambda now: states.append({job.name: state for job, state in now.items()}), workers=2)
    assert list(summary["models"]) == ["student", "opd", "va_opd-tau=0.5", "teacher"]
    assert summary["questions"] == 4
    for name in ("opd", "va_opd-tau=0.5"):
        evaluation = json.loads((study.run / name / "eval.json").read_text())
        before, after = (evaluation["models"][who]["accuracy"] for who in ("student", "trained"))
        assert summary["gains"][name]["points"] == pytest.approx(100 * (after - before), abs=1e-4)
        assert evaluation["gain"] == summary["gains"][name]
    assert set(states[-1].values()) == {"done"}
    # Running it again finds every result there: no process is started.
    again = run_study(study, on_progress=lambda now: pytest.fail("a finished study started a process"), workers=2)
    assert again["models"] == summary["models"]


def test_a_failing_cell_ends_the_study_with_the_end_of_its_output(tmp_path):
    study = load_study(study_file(tmp_path))
    plan(study)
    (study.run / "data" / "train.jsonl").write_text('{"problm": "x"}\n')
    with pytest.raises(StudyFailed, match="Did you mean 'problem'"):
        run_study(study, on_progress=lambda now: None, workers=1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": {"student": "a", "teacher": "b", "seed": 1}}, "must not have seed"),
        ({"recipe": {"studnt": "a"}}, "Did you mean 'student'"),
        ({"methods": ["opd", "opd"]}, "methods must differ"),
        ({"methods": []}, "at least 1"),
        ({"sedes": [1]}, "Did you mean 'seeds'"),
    ],
)
def test_mistakes_in_a_study(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        load_study(study_file(tmp_path, **changes))


def test_results_of_another_recipe_are_not_mixed_in(tmp_path):
    study = load_study(study_file(tmp_path))
    _, cells = plan(study)
    folder = cells["opd"].run
    folder.mkdir()
    (folder / "config.yaml").write_text(cells["opd"].to_yaml())
    plan(study)
    with pytest.raises(ConfigError, match=r"optim.lr was 0.0001, is 0.0002"):
        plan(load_study(study_file(tmp_path), ["recipe.optim.lr=2e-4"]))
