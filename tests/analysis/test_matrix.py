"""From a study's axes to its cells: names, recipes, data, and what a study refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from vaopd.analysis.matrix import Place, comparison_cells, data_of, development_cells, places, write_data
from vaopd.config import load_study
from vaopd.data.sources import read_examples
from vaopd.data.validate import files_of
from vaopd.errors import ConfigError

RECIPE = {"student": "s", "teacher": "t", "rollouts": {"k": 2, "max_tokens": 48}, "optim": {"steps": 2}, "eval": {"k": 3}}
OWN = {"train": "train.jsonl", "eval": "eval.jsonl", "test": "test.jsonl"}


def study_of(folder: Path, *, without=(), **changes):
    recipe = {key: value for key, value in RECIPE.items() if key not in without}
    values = {
        "name": "n",
        "run": str(folder / "study"),
        "methods": ["opd", {"va_opd": {"tau": 0.5}}],
        "world": {"train": 8},
        "recipe": recipe,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return load_study(path)


def test_without_axes_a_cell_is_a_method(tmp_path):
    study = study_of(tmp_path)
    assert [cell.name for cell in comparison_cells(study, {})] == ["opd", "va_opd-tau=0.5"]
    assert development_cells(study) == []
    assert not study.is_matrix
    (only,) = places(study)
    assert only == Place(None, None, None, None)


def test_cells_differ_in_what_the_axes_say_and_in_nothing_else(tmp_path):
    study = study_of(
        tmp_path,
        without=("student", "teacher"),
        students={"a": "A", "b": "B"},
        teachers={"S": "TS", "L": "TL"},
        train_sizes=[4, 8],
        regimes={"plain": {}, "deep": {"recipe": {"rollouts": {"k": 8}}}},
        seeds=[3, 5],
    )
    cells = comparison_cells(study, {})
    assert len(cells) == 2 * 2 * 2 * 2 * 2 * 2
    assert len({cell.name for cell in cells}) == len(cells)
    cell = next(cell for cell in cells if cell.name == "va_opd-tau=0.5-deep-b-L-n4-seed5")
    config = cell.config
    assert (config.student, config.teacher, config.seed, config.rollouts.k) == ("B", "TL", 5, 8)
    assert config.rollouts.max_tokens == 48  # merged key by key: the regime's k leaves the rest of rollouts
    assert config.data.train == study.run / "data" / "train-4.jsonl"
    assert config.eval.baselines is False
    varied = {"run", "method", "seed", "student", "teacher", "rollouts", "data"}
    rest = [c.config.model_dump(exclude=varied) for c in cells]
    assert all(recipe == rest[0] for recipe in rest)
    held_out = {(c.config.data.eval, c.config.data.test) for c in cells}
    assert len(held_out) == 1


def test_development_runs_every_rate_once_a_regime_and_has_no_test_set(tmp_path):
    study = study_of(
        tmp_path,
        without=("student",),
        students={"a": "A", "b": "B"},
        train_sizes=[4, 8],
        regimes={"plain": {}, "deep": {}},
        seeds=[3, 5],
        learning_rates=[1e-4, 3e-4, 1e-3],
        development_seeds=[100],
    )
    cells = development_cells(study)
    assert len(cells) == 2 * 3 * 2  # methods, rates, regimes
    assert {cell.config.student for cell in cells} == {"A"}
    assert {cell.config.data.train.name for cell in cells} == {"train-8.jsonl"}
    assert {cell.config.data.test for cell in cells} == {None}
    assert cells[0].name == "development/opd-plain-lr0.0001-seed100"
    chosen = {("plain", "opd"): 1e-4, ("deep", "opd"): 1e-3, ("plain", "va_opd(tau=0.5)"): 3e-4, ("deep", "va_opd(tau=0.5)"): 1e-4}
    for cell in comparison_cells(study, chosen):
        assert cell.config.optim.lr == chosen[cell.place.regime, str(cell.method)]
        assert cell.config.seed in (3, 5)


def test_a_method_with_one_rate_has_nothing_to_choose(tmp_path):
    rates = {"opd": [6e-4], "va_opd(tau=0.5)": [1e-4, 3e-4]}
    study = study_of(tmp_path, learning_rates=rates, development_seeds=[100, 101])
    assert {(str(cell.method), cell.config.optim.lr) for cell in development_cells(study)} == {
        ("va_opd(tau=0.5)", 1e-4),
        ("va_opd(tau=0.5)", 3e-4),
    }
    compared = comparison_cells(study, {(None, "va_opd(tau=0.5)"): 3e-4})
    assert {(str(cell.method), cell.config.optim.lr) for cell in compared} == {("opd", 6e-4), ("va_opd(tau=0.5)", 3e-4)}
    fixed = study_of(tmp_path, learning_rates={"opd": [6e-4], "va_opd(tau=0.5)": [1e-4]})
    assert development_cells(fixed) == []


def test_numbers_alone_need_no_samples_and_no_tracker(tmp_path):
    (cell, _) = comparison_cells(study_of(tmp_path, keep="numbers"), {})
    assert (cell.config.eval.samples, cell.config.trackers) == (0, ())
    (cell, _) = comparison_cells(study_of(tmp_path), {})
    assert cell.config.eval.samples == 8


def test_a_smaller_training_set_is_the_first_rows_of_the_whole_one(tmp_path):
    study = study_of(tmp_path, train_sizes=[3, 8], world={"train": 8, "eval": 2, "test": 2})
    write_data(study)
    whole, part = (read_examples(data_of(study, Place(None, None, None, size)).train) for size in (None, 3))
    assert part == whole[:3]
    assert len(read_examples(study.run / "data" / "train-8.jsonl")) == 8


def test_a_folder_drawn_from_another_world_is_refused(tmp_path):
    write_data(study_of(tmp_path, world={"train": 4, "eval": 2, "test": 2}))
    write_data(study_of(tmp_path, world={"train": 4, "eval": 2, "test": 2}))
    with pytest.raises(ConfigError, match=r"another world: grain was 0\.0, is 9\.0"):
        write_data(study_of(tmp_path, world={"train": 4, "eval": 2, "test": 2, "grain": 9}))


def test_regimes_with_the_same_world_share_its_data(tmp_path):
    regimes = {"plain": {}, "g": {"world": {"grain": 9}}, "g8": {"world": {"grain": 9.0}, "recipe": {"rollouts": {"k": 8}}}}
    study = study_of(tmp_path, regimes=regimes)
    folders = {cell.place.regime: cell.config.data.train.parent.name for cell in comparison_cells(study, {})}
    assert folders == {"plain": "data", "g": "data-g", "g8": "data-g"}


def test_own_data_with_fewer_rows_than_asked_for(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"problem": "q"}\n')
    study = study_of(
        tmp_path, world=None, recipe={**RECIPE, "data": {"train": str(tmp_path / "train.jsonl"), "eval": "e.jsonl"}}, train_sizes=[2]
    )
    with pytest.raises(ConfigError, match=r"asks for 2 rows, but .* has 1"):
        write_data(study)


def test_own_data_of_another_format_is_shortened_too(tmp_path):
    """The shortened rows are in the package's own format, so a cell's other files have to be, and the recipe's format goes."""
    for name, count in (("train", 4), ("eval", 2), ("test", 2)):
        turns = [[{"from": "human", "value": f"{name} {n}?"}, {"from": "gpt", "value": f"{n}."}] for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"id": f"{name}{n}", "conversations": turns[n]}) + "\n" for n in range(count))
        )
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "eval", "test")}
    study = study_of(tmp_path, world=None, recipe={**RECIPE, "data": {**files, "format": "llava"}}, train_sizes=[3])
    write_data(study)
    data = data_of(study, Place(None, None, None, 3))
    rows = {name: read_examples(path, data.format, data.question) for name, path in files_of(data).items()}
    assert {name: [row.id for row in found] for name, found in rows.items()} == {
        "train": ["train0", "train1", "train2"],
        "eval": ["eval0", "eval1"],
        "test": ["test0", "test1"],
    }
    assert rows["train"][2].solution == "2."


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": {**RECIPE, "seed": 1}}, "recipe must not have seed"),
        ({"students": {"a": "A"}}, "recipe must not have student: the study sets it"),
        ({"teachers": {"a": "A"}, "regimes": {"r": {"recipe": {"teacher": "x"}}}}, "must not have teacher"),
        ({"regimes": {"r": {"recipe": {"data": OWN}}}}, "regimes.r.recipe must not have data"),
        ({"learning_rates": [0.1], "development_seeds": [9], "recipe": {**RECIPE, "optim": {"lr": 1e-3}}}, "must not have optim.lr"),
        ({"recipe": {**RECIPE, "studnt": "a"}}, "Did you mean 'student'"),
        ({"regimes": {"r": {"recipe": {"rolouts": {}}}}}, "recipe in regime 'r': unknown key 'rolouts'"),
        ({"regimes": {"r": {"world": {"grian": 3}}}}, "regimes.r.world: unknown key 'grian'.* Did you mean 'grain'"),
        ({"regimes": {"a b": {}}}, "the name 'a b' becomes part of a folder's name"),
        ({"regimes": {"../x": {}}}, "becomes part of a folder's name"),
        ({"methods": ["opd", "opd"]}, "methods must differ"),
        ({"methods": []}, "at least 1"),
        ({"sedes": [1]}, "Did you mean 'seeds'"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"baseline": "opf"}, "none of the methods. Did you mean 'opd'"),
        ({"learning_rates": [1e-3, 1e-2]}, "belong together"),
        ({"development_seeds": [7]}, "belong together"),
        ({"learning_rates": [1e-3], "development_seeds": [7]}, "belong together"),
        ({"learning_rates": [1e-3, 1e-3], "development_seeds": [7]}, "learning_rates of opd must differ"),
        ({"learning_rates": {"opd": [1e-3]}}, r"learning_rates names opd, the methods are opd, va_opd\(tau=0.5\)"),
        ({"learning_rates": {"opd": [1e-3], "va_opd(tau=0.5)": []}}, "at least 1"),
        ({"learning_rates": [1e-3, 1e-2], "development_seeds": [1, 2], "seeds": [2, 3]}, "share 2: a rate chosen on a seed looks better"),
        ({"train_sizes": [9]}, "goes up to 9, but world.train .* 8"),
        ({"train_sizes": [8], "regimes": {"r": {"world": {"train": 4}}}}, "in regime 'r' there are 4"),
        ({"world": None, "recipe": {**RECIPE, "data": OWN}, "regimes": {"r": {"world": {"grain": 1}}}}, "the study has no `world`"),
        ({"world": None, "recipe": {**RECIPE, "data": {"train": "t.jsonl"}}}, "name data.test, or data.eval"),
        (
            {
                "world": None,
                "recipe": {**RECIPE, "data": {"train": "t", "eval": "e"}},
                "learning_rates": [0.1, 1],
                "development_seeds": [9],
            },
            "chosen on data.eval and compared on data.test",
        ),
    ],
)
def test_mistakes_in_a_study(tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        study_of(tmp_path, **changes)


def test_the_shipped_studies_have_the_cells_they_had(tmp_path):
    folder = Path(__file__).parents[2] / "src" / "vaopd" / "recipes"
    for name, run in (("demo", "runs/demo"), ("easy_vqa", "runs/easy-vqa")):
        study = load_study(folder / f"{name}.yaml")
        assert not study.is_matrix
        assert [str(cell.config.run) for cell in comparison_cells(study, {})] == [f"{run}/opd", f"{run}/va_opd"]
