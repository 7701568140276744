"""A mistake in a recipe is answered in a moment, by name, and by ConfigError alone."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vaopd.config import METHODS, OFF_POLICY, RunConfig, load_config, load_study, parse_config
from vaopd.errors import ConfigError
from vaopd.train.setup import READS_THE_IMAGE_ONCE, WEIGHTINGS, set_up, weighting_of

RECIPE: dict[str, Any] = {"run": "runs/mine", "student": "small", "teacher": "big", "data": {"train": "train.jsonl"}}


def recipe(**changes: Any) -> dict[str, Any]:
    return {**RECIPE, **changes}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, yaml.safe_dump(RECIPE))


# --- values -----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers(path: Path) -> None:
    config = load_config(path)
    assert (config.method.name, config.loss) == ("va_opd", "reverse_kl")
    assert (config.rollouts.k, config.rollouts.temperature, config.rollouts.top_p) == (4, 0.7, 0.95)
    assert (config.view.name, config.view.options) == ("pixelate", {"ratio": 0.1, "resolution": "original"})
    optim = config.optim
    assert (optim.lr, optim.betas, optim.weight_decay, optim.schedule, optim.warmup) == (1e-6, (0.9, 0.95), 0.1, "cosine", 0.05)
    assert (optim.prompts_per_step, optim.epochs, config.eval.k, config.eval.temperature) == (16, 5, 8, 1.0)
    assert config.deadband == 1e-4
    assert (METHODS["va_opd"]["tau"], METHODS["va_opd"]["lam"], METHODS["va_opd"]["p_visual"]) == (1.0, 0.5, 0.2)


def test_every_methods_numbers_are_its_weightings_fields_and_defaults() -> None:
    assert METHODS.keys() == WEIGHTINGS.keys()
    for name, numbers in METHODS.items():
        fields = {field.name: field.default for field in dataclasses.fields(WEIGHTINGS[name])}  # type: ignore[arg-type]
        if name in OFF_POLICY:
            assert fields == {"per_token": False}  # says nothing where a prompt has one solution
            fields = {}
        assert fields == numbers, name
        assert {key: type(value) for key, value in fields.items()} == {key: type(value) for key, value in numbers.items()}
        config = parse_config(recipe(method=name))
        assert dataclasses.replace(weighting_of(config.method, 0), **({"seed": 0} if "seed" in numbers else {})) == WEIGHTINGS[name]()
    assert set(READS_THE_IMAGE_ONCE) < set(METHODS)


@pytest.mark.parametrize(
    ("method", "loss"), [("va_opd", "reverse_kl"), ("opd", "reverse_kl"), ("off_policy_kd", "forward_kl"), ("sft", "nll")]
)
def test_the_loss_of_a_method(method: str, loss: str) -> None:
    assert parse_config(recipe(method=method)).loss == loss
    assert parse_config(recipe(method=method, divergence="jsd:0.3")).loss == ("nll" if method == "sft" else "jsd:0.3")


def test_a_method_with_numbers() -> None:
    config = parse_config(recipe(method={"va_opd": {"tau": 0.5, "lam": 0.8}}))
    assert config.method.numbers == {"tau": 0.5, "lam": 0.8}
    weighting = weighting_of(config.method, 3)
    assert (weighting.tau, weighting.lam, weighting.p_visual) == (0.5, 0.8, 0.2)  # type: ignore[attr-defined]
    assert str(config.method) == "va_opd(tau=0.5, lam=0.8)"
    assert parse_config(recipe(method={"opd": None})).method == parse_config(recipe(method="opd")).method


@pytest.mark.parametrize("method", ["opd", {"va_opd": {"tau": 0.5}}, {"mask_tokens": {"which": "random", "seed": 3}}], ids=str)
def test_a_resolved_recipe_reads_back(tmp_path: Path, method: Any) -> None:
    config = parse_config(recipe(method=method, optim={"lr": 3e-7, "betas": [0.8, 0.9]}, eval={"questions": 5}))
    assert load_config(write(tmp_path, config.to_yaml())) == config


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optim.lr=1e-5", lambda c: c.optim.lr == 1e-5),
        ("optim.lr=1.0e-5", lambda c: c.optim.lr == 1e-5),
        ("optim.steps=7", lambda c: c.optim.steps == 7),
        ("optim.steps=null", lambda c: c.optim.steps is None),
        ("optim.betas=[0.5, 0.6]", lambda c: c.optim.betas == (0.5, 0.6)),
        ("optim.train_vision=false", lambda c: c.optim.train_vision is False),
        ("method=opd", lambda c: c.method.name == "opd"),
        ("method.va_opd.tau=2", lambda c: c.method.numbers == {"tau": 2}),
        ("run=elsewhere", lambda c: c.run == Path("elsewhere")),
        ("run=a=b", lambda c: c.run == Path("a=b")),
        (" seed = 5", lambda c: c.seed == 5),
        ("data.eval=eval.jsonl", lambda c: c.data.eval == Path("eval.jsonl")),
        ("trackers=[]", lambda c: c.trackers == ()),
    ],
)
def test_an_override(path: Path, override: str, read: Any) -> None:
    assert read(load_config(path, [override]))


def test_overrides_apply_in_order(path: Path) -> None:
    assert load_config(path, ["optim.lr=1", "optim.lr=2", "optim.steps=3"]).optim.model_dump(include={"lr", "steps"}) == {
        "lr": 2,
        "steps": 3,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "key=value"),
        ("", "key=value"),
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'"),
        ("optim.lrr=1", "Did you mean 'lr'"),
        ("=1", "unknown key ''"),
        ("optim.lr=fast", "optim.lr"),
        ("optim=3", "optim"),
        ("optim.lr.x=3", "optim.lr"),
        ("optim.lr=[", "not valid YAML"),
        ("optim.lr=2001-99-99", "not valid YAML"),
        ("optim.lr=!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_an_override_that_is_wrong(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_config(path, [override])


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"studnet": "x"}, r"unknown key 'studnet'\. Did you mean 'student'\?"),
        ({"optim": {"learning": 1}}, r"unknown key 'optim\.learning'.*Known here: lr, prompts_per_step"),
        ({"optim": {"lr_": 1}}, r"Did you mean 'lr'\?"),
        ({"rollouts": {"topp": 1}}, r"Did you mean 'top_p'\?"),
        ({"method": "vaopd"}, r"unknown method 'vaopd'\. Did you mean 'va_opd'\?"),
        ({"method": {"va_opd": {"lamda": 1}}}, r"no number 'lamda'\. Did you mean 'lam'\?"),
        ({"method": {"opd": {"tau": 1}}}, r"no number 'tau'.*per_token"),
        ({"method": {"sft": {"tau": 1}}}, r"no number 'tau'.*none"),
        ({"method": {"va_opd": {"tau": "high"}}}, "'tau' of method 'va_opd'"),
        ({"method": {"va_opd": {"tau": True}}}, "'tau' of method 'va_opd'"),
        ({"method": {"va_opd": [1]}}, "method"),
        ({"method": {"mask_tokens": {"which": 3}}}, "'which' of method 'mask_tokens'"),
        ({"method": {"random_tokens": {"seed": 1.5}}}, "'seed' of method 'random_tokens'"),
        ({"method": {"opd": {}, "va_opd": {}}}, "method"),
        ({"teacher": None}, "needs a teacher"),
        ({"student": ""}, "student"),
        ({"student": 3}, "student"),
        ({"data": {}}, r"'data\.train' is missing"),
        ({"data": "train.jsonl"}, "data"),
        ({"optim": {"lr": 0}}, r"optim\.lr.*found 0"),
        ({"optim": {"lr": -1}}, r"optim\.lr"),
        ({"optim": {"lr": math.inf}}, r"optim\.lr"),
        ({"optim": {"lr": math.nan}}, r"optim\.lr"),
        ({"optim": {"betas": [0.9]}}, r"optim\.betas"),
        ({"optim": {"betas": [0.9, 1.0]}}, r"optim\.betas"),
        ({"optim": {"betas": [-0.1, 0.9]}}, r"optim\.betas"),
        ({"optim": {"warmup": 1.5}}, r"optim\.warmup"),
        ({"optim": {"schedule": "linear"}}, r"optim\.schedule.*'cosine' or 'constant'"),
        ({"optim": {"steps": 0}}, r"optim\.steps"),
        ({"optim": {"steps": 2.5}}, r"optim\.steps"),
        ({"rollouts": {"k": 0}}, r"rollouts\.k"),
        ({"rollouts": {"top_p": 1.1}}, r"rollouts\.top_p"),
        ({"rollouts": {"temperature": 0}}, r"rollouts\.temperature"),
        ({"view": {"ratio": 1}}, r"view: .*ratio.*leaves an image as it is"),
        ({"view": {"resolution": "small"}}, r"view: resolution must be one of"),
        ({"checkpoint": {"keep": 1}}, r"checkpoint\.keep"),
        ({"precision": "fp16"}, r"precision"),
        ({"trackers": ["mlflow"]}, r"trackers"),
        ({"trackers": ["wandb", "wandb"]}, r"trackers: must name each tracker once, found wandb, wandb"),
        ({"deadband": -1}, r"deadband"),
        ({"seed": -1}, r"seed"),
    ],
    ids=str,
)
def test_a_mistake_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(recipe(**changes))


def test_every_mistake_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(recipe(optim={"lr": 0, "stps": 3}, rollouts={"k": 0}))
    assert len(str(caught.value).splitlines()) == 3


def test_a_missing_teacher_is_no_mistake_of_sft() -> None:
    assert parse_config(recipe(method="sft", teacher=None)).teacher is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"va_opd": {"tau": 0}}}, "tau must be a finite number above 0"),
        ({"method": {"va_opd": {"lam": 1.5}}}, "lam"),
        ({"method": {"mask_tokens": {"which": "bottom"}}}, "which must be"),
        ({"divergence": "reverse"}, "divergence"),
        ({"divergence": "jsd:2"}, "divergence"),
        ({"view": {"name": "pixelat"}}, "Did you mean 'pixelate'"),
    ],
    ids=str,
)
def test_what_only_the_method_can_judge_is_refused_before_any_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_up(parse_config(recipe(**changes)), on_check=lambda text: None)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch CANARY']",
        "run: !!python/object/apply:os.system ['touch CANARY']",
        "run: !!python/name:os.system",
        "run: !!python/module:antigravity",
        "run: !!python/object/new:pathlib.Path ['x']",
        "run: !anything x",
        "run: [1, 2",
        "a: b: c",
        "\t- x",
        "run: 2001-99-99",
        "run: \x00",
        "? [1]\n: 2",
        "[" * 5000,
        "optim: {lr: 1, lr: 2}",
        "run: a\noptim: {}\nrun: a",
        "- 1\n- 2",
        "just text",
        "",
        "3",
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_config(write(tmp_path, text))
    assert not (tmp_path / "CANARY").exists()


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe at"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="no recipe at"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "binary.yaml")


def test_the_shipped_recipes_load() -> None:
    folder = Path(sys.modules["vaopd"].__file__ or "").parent / "recipes"
    recipes = sorted(folder.glob("*.yaml"))
    assert recipes
    for file in recipes:
        study = "methods" in yaml.safe_load(file.read_text(encoding="utf-8"))
        assert (load_study if study else load_config)(file)


# --- whatever else ----------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=6), st.integers()), inner, max_size=3)),
    max_leaves=6,
)
KEYS = ["run", "method", "student", "teacher", "data", "view", "deadband", "divergence", "rollouts", "optim", "eval", "checkpoint"]
NESTED = ["train", "name", "ratio", "k", "lr", "betas", "steps", "keep", "va_opd", "tau", "which", "every"]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*KEYS, "precision", "trackers", "seed", "sed", ""]), VALUES, max_size=4))
def test_any_values_make_a_recipe_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = parse_config({**RECIPE, **values})
    except ConfigError:
        return
    assert isinstance(config, RunConfig)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KEYS), st.dictionaries(st.sampled_from(NESTED), VALUES, max_size=3))
def test_any_nested_values_make_a_recipe_or_a_config_error(key: str, values: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        parse_config({**RECIPE, key: values})


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_a_recipe_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = write(tmp_path_factory.getbasetemp(), text)
    with pytest.raises(ConfigError):
        load_config(path)
    path = write(tmp_path_factory.getbasetemp(), yaml.safe_dump(RECIPE))
    with contextlib.suppress(ConfigError):
        load_config(path, [f"optim.lr={text}", text])


def test_a_mistake_is_answered_before_torch_is_loaded() -> None:
    code = (
        "import sys, vaopd.config\n"
        "try:\n    vaopd.config.parse_config({'studnet': 1})\n"
        "except vaopd.config.ConfigError as error:\n    print(str(error))\n"
        "print(sorted({'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "studnet" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
