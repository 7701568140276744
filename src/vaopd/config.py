"""The typed configuration of a run, read from YAML. Light to import: a misspelt key is answered before torch is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from vaopd.errors import ConfigError, did_you_mean
from vaopd.views import View, options_of, view

# method -> its numbers with their defaults (method.md of the paper: tau = 1, lambda = 0.5, p_v = 0.2); the same names as the
# weightings of vaopd.core
METHODS: dict[str, dict[str, Any]] = {
    "va_opd": {"tau": 1.0, "lam": 0.5, "p_visual": 0.2, "eps": 1e-6, "absolute": False},
    "opd": {"per_token": False},
    "rollout_only": {"tau": 1.0, "eps": 1e-6, "absolute": False},
    "token_only": {"lam": 0.5, "p_visual": 0.2, "absolute": False},
    "random_tokens": {"tau": 1.0, "lam": 0.5, "p_visual": 0.2, "eps": 1e-6, "seed": 0},
    "mask_tokens": {"which": "top", "share": 0.1, "seed": 0},
    "off_policy_kd": {},
    "sft": {},
}
SELF = "student"  # as the teacher: the student before training
LOOPBACK = ("127.0.0.1", "localhost", "::1")
VLLM_TEMPERATURES = (0.01, 2.0)  # it takes a lower one for the first (_MAX_TEMP in vllm/sampling_params.py) and refuses a higher one
OFF_POLICY = ("off_policy_kd", "sft")  # they learn from the data's solutions, not from the student's rollouts


_Decay = Annotated[float, Field(ge=0, lt=1)]
QuestionKind = Literal["perimeter", "longest", "shortest", "difference"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MethodConfig(_Strict):
    """A method's name and its numbers. In YAML: `va_opd`, or `{va_opd: {tau: 0.5}}`."""

    name: str
    numbers: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {value: {}}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, numbers),) = value.items()
            return {"name": name, "numbers": numbers or {}}
        return value

    @model_validator(mode="after")
    def _known(self) -> MethodConfig:
        if self.name not in METHODS:
            raise ValueError(f"unknown method '{self.name}'.{did_you_mean(self.name, METHODS)} Known: {', '.join(METHODS)}")
        for key, value in self.numbers.items():
            known = METHODS[self.name]
            if key not in known:
                raise ValueError(
                    f"method '{self.name}' has no number '{key}'.{did_you_mean(key, known)} It has: {', '.join(known) or 'none'}"
                )
            kind = int | float if isinstance(known[key], float) else type(known[key])
            if isinstance(value, bool) != isinstance(known[key], bool) or not isinstance(value, kind):
                raise ValueError(f"'{key}' of method '{self.name}' must be like {known[key]!r}, found {value!r}")
        return self

    @model_serializer
    def _to_yaml(self) -> Any:
        return {self.name: self.numbers} if self.numbers else self.name

    @classmethod
    def from_option(cls, text: str, where: str) -> MethodConfig:
        """A method from the command line, `va_opd` or `{va_opd: {tau: 0.5}}`. Raises ConfigError."""
        try:
            return _parse(cls, _read_yaml(text), where)
        except (yaml.YAMLError, ValueError):
            raise ConfigError(f"{where}: '{text}' is not valid YAML. Give va_opd, or '{{va_opd: {{tau: 0.5}}}}'") from None

    @property
    def off_policy(self) -> bool:
        """Whether the responses come from the data's solutions."""
        return self.name in OFF_POLICY

    def __str__(self) -> str:
        numbers = ", ".join(f"{key}={value}" for key, value in self.numbers.items())
        return f"{self.name}({numbers})" if numbers else self.name


class DataConfig(_Strict):
    """Files or folders whose rows have images, problem and optionally answer and solution (docs/data.md)."""

    train: Path
    eval: Path | None = None  # chooses the best checkpoint
    test: Path | None = None  # the final evaluation; default: eval, or what is held out
    holdout: float | None = Field(None, gt=0, lt=1, description="in place of eval: this share of train, told by each row's id")
    format: Literal["plain", "imagefolder", "virl39k", "llava"] | None = Field(None, description="default: what the columns tell")
    question: str | None = Field(None, min_length=1, description="asked of every picture, where rows have no question of their own")
    bad_rows: Literal["refuse", "skip"] = Field("refuse", description="skip: rows that can't be used are left out, counted and named")
    min_pixels: int | None = Field(None, ge=1, description="a smaller image is enlarged; of student and teacher alike")
    max_pixels: int | None = Field(None, ge=1, description="a larger image is shrunk; of student and teacher alike")

    @model_validator(mode="after")
    def _fits_together(self) -> DataConfig:
        if self.holdout is not None and self.eval is not None:
            raise ValueError("`data.holdout` takes the held-out questions from data.train, so there is no place for data.eval. Keep one")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"data.min_pixels ({self.min_pixels}) must not be above data.max_pixels ({self.max_pixels})")
        return self


class ViewConfig(_Strict):
    """How the image is degraded for the teacher's second view. In YAML: `blur`, or `{name: blur, radius: 0.1}` (options: vaopd.views)."""

    name: str = "pixelate"
    options: dict[str, Any] = Field(default_factory=dict)  # all of the view's, filled in

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            return value
        given = {str(key): option for key, option in value.items()}
        name = given.pop("name", "pixelate")
        try:
            checked = {"name": name, "options": options_of(name, **given)}
            degrade = view(name, **given)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        picture = Image.linear_gradient("L").convert("RGB")
        if degrade(picture, shown_size=picture.size).tobytes() == picture.tobytes():
            raise ValueError(f"{name} with {given} leaves an image as it is, so that no token depends on it")
        return checked

    @model_serializer
    def _to_yaml(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}

    def make(self) -> View:
        """The view with its options filled in."""
        return view(self.name, **self.options)

    @classmethod
    def from_options(cls, name: str, settings: Sequence[str] = ()) -> ViewConfig:
        """A view from the command line: its name and `option=value` texts. Raises ConfigError."""
        values: dict[str, Any] = {"name": name}
        for setting in settings:
            _apply(values, setting)
        return _parse(cls, values, "--view")

    def to_options(self) -> list[str]:
        """The same as arguments of the command line."""
        return ["--view", self.name, *(f"--view-set={key}={value}" for key, value in self.options.items())]


class RolloutConfig(_Strict):
    """Sampling of the student's answers. The paper's appendix samples at 0.7 / 0.95; 1.0 / 1.0 is strictly on-policy."""

    k: int = Field(4, ge=1)
    max_tokens: int = Field(1024, ge=1)
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    rows: int = Field(64, ge=1, description="rollouts decoded side by side")
    engine: Literal["hf", "vllm"] = Field("hf", description="vllm: a server samples for training, in its own environment (docs/vllm.md)")
    url: str = Field("http://127.0.0.1:8000", description="of the vLLM server")

    @field_validator("url")
    @classmethod
    def _on_this_machine(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            fits = parts.scheme == "http" and parts.hostname in LOOPBACK and parts.port != 0 and not (parts.path.strip("/") or parts.query)
        except ValueError:  # a port that is no number
            fits = False
        if not fits or "@" in value:
            raise ValueError(
                "must be http://127.0.0.1:PORT (or localhost, [::1]): whoever reaches such a server can change its weights, and no "
                "password guards that. Reach one on another machine through an SSH tunnel, with the run folder on a disk that both see"
            )
        return value

    @model_validator(mode="after")
    def _temperature_that_vllm_has(self) -> RolloutConfig:
        least, most = VLLM_TEMPERATURES
        if self.engine == "vllm" and not least <= self.temperature <= most:
            raise ValueError(f"vLLM samples at temperatures from {least} to {most}, found {self.temperature}")
        return self


class OptimConfig(_Strict):
    """AdamW on fp32 weights (the paper's appendix: lr 1e-6, betas 0.9 / 0.95, decay 0.1, cosine with 5 % warm-up)."""

    lr: float = Field(1e-6, gt=0)
    prompts_per_step: int = Field(16, ge=1)
    epochs: float = Field(5, gt=0)
    steps: int | None = Field(None, ge=1, description="instead of epochs")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps")
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    tokens_per_forward: int = Field(
        16384, ge=1, description="of one micro-batch: each prompt once where siblings share it, else padded rows"
    )
    train_vision: bool = True
    checkpointing: bool = Field(False, description="recompute activations in the backward: less memory, about a third more time")


class LoraConfig(_Strict):
    """Low-rank adapters (LoRA, arXiv 2106.09685) in place of the weights: W + alpha / rank · B A, of which A and B are trained.

    They want a larger rate than whole weights do: `optim.lr` of 1e-5 to 1e-4 rather than 1e-6.
    """

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = 0.0
    targets: tuple[str, ...] | None = Field(None, min_length=1, description="names of linear layers, as q_proj; default: all within reach")
    vision: bool = Field(False, description="within reach are the decoder's layers; true: the vision tower's and the projector's too")

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError(
                f"must be 0, found {value}: the student learns from what it samples itself, and dropout would train another model than the "
                "one that sampled; siblings that share their prompt would share its dropout, too. Leave it out"
            )
        return value


class EvalConfig(_Strict):
    """Held-out evaluation: `k` samples a question at temperature 1 (avg@k)."""

    every: int = Field(50, ge=1, description="steps between evaluations")
    k: int = Field(8, ge=1)
    temperature: float = Field(1.0, gt=0)
    questions: int | None = Field(None, ge=1, description="how many questions the evaluations during training use; the final one uses all")
    samples: int = Field(8, ge=0, description="questions whose rollouts are kept with token scores")
    baselines: bool = Field(True, description="the final evaluation includes the untrained student and the teacher")


class CheckpointConfig(_Strict):
    """Atomic checkpoints; the best and the last are never deleted."""

    every: int | None = Field(None, ge=1, description="steps between checkpoints; default: eval.every")
    keep: int = Field(2, ge=2)


class RunConfig(_Strict):
    """One run: everything `vaopd train` needs."""

    run: Path
    method: MethodConfig = MethodConfig(name="va_opd")
    student: str
    teacher: str | None = None  # `student`: the student as it was before training
    lora: LoraConfig | None = None  # None: all weights are trained
    data: DataConfig
    view: ViewConfig = ViewConfig()
    deadband: float = Field(1e-4, ge=0, description="visual advantage below it counts as zero, nats")
    divergence: str | None = Field(None, description="reverse_kl, forward_kl, jsd or jsd:BETA; default: what the method names")
    rollouts: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    teacher_offload: bool = Field(False, description="on a GPU: the teacher's weights lie in CPU memory and come to score only")
    forward: Literal["auto", "rows"] = Field("auto", description="auto: siblings share their prompt where it pays; rows: the reference")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    seed: int = Field(0, ge=0)

    @field_validator("student", "teacher")
    @classmethod
    def _no_empty_name(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must be a folder, a hub name or builtin:NAME, found an empty text")
        return value

    @field_validator("trackers")
    @classmethod
    def _each_tracker_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"must name each tracker once, found {', '.join(value)}")
        return value

    @model_validator(mode="after")
    def _teacher_where_needed(self) -> RunConfig:
        if self.method.name != "sft" and self.teacher is None:
            raise ValueError(f"method '{self.method.name}' needs a teacher: add `teacher: FOLDER or hub name`")
        if self.self_taught and self.lora is None:
            raise ValueError(
                f"`teacher: {SELF}` is the student before training, which is in memory only where adapters are trained beside its weights: "
                f"add `lora: {{}}`, or load it twice with `teacher: {self.student}` (a folder of that name is `./{SELF}`)"
            )
        if self.lora and self.lora.vision and not self.optim.train_vision:
            raise ValueError("`lora.vision: true` adapts the vision tower, which `optim.train_vision: false` freezes. Keep one of them")
        if self.rollouts.engine == "vllm" and self.lora:
            raise ValueError("`rollouts.engine: vllm` is given whole weights, not adapters. Take out `lora`, or use `engine: hf`")
        if self.rollouts.engine == "vllm" and self.method.off_policy:
            raise ValueError(
                f"method '{self.method.name}' learns from the data's solutions and samples nothing: take out `rollouts.engine`"
            )
        return self

    @property
    def self_taught(self) -> bool:
        """Whether the teacher is the student before training."""
        return self.teacher == SELF

    @property
    def loss(self) -> str:
        """The divergence between student and teacher, or `nll` for sft."""
        if self.method.name == "sft":
            return "nll"
        return self.divergence or ("forward_kl" if self.method.name == "off_policy_kd" else "reverse_kl")

    def to_yaml(self) -> str:
        """The resolved configuration as a recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class WorldConfig(_Strict):
    """Questions drawn from the built-in world: how many, and its knobs, each of which leaves the others alone (docs/world.md)."""

    train: int = Field(2048, ge=1)
    eval: int = Field(64, ge=1)
    test: int = Field(320, ge=2)
    seed: int = 0
    labels: int = Field(3, ge=3, le=5, description="sides of the figure, each with its length")
    label_size: int = Field(14, ge=10, le=18, description="points; at 14 a label is about 8 x 10 of 64 x 64 pixels")
    grain: float = Field(0.0, ge=0, le=80, description="how hard labels are to read: noise of every pixel, in grey levels")
    questions: tuple[QuestionKind, ...] = Field(("perimeter", "longest", "difference"), min_length=1)
    unit: int = Field(1, ge=1, le=9, description="how hard the arithmetic is: sides are in units of 2 to this many centimetres")
    working: Literal[0, 1, 2] = Field(1, description="length of the solution's arithmetic: the answer alone, the steps, steps and a check")
    wording: Literal["terse", "plain", "wordy"] = Field("plain", description="how much language stands around the numbers")
    phrasing: float = Field(1.0, ge=0, le=1.79, description="entropy of every choice of words, in nats; there are six alternatives")
    style: Literal[0, 1] = Field(0, description="which alternatives are liked; a teacher and a student may differ")


class RegimeConfig(_Strict):
    """What is otherwise in one regime of a study."""

    world: dict[str, Any] = Field(default_factory=dict, description="knobs of the built-in world, in place of the study's")
    recipe: dict[str, Any] = Field(default_factory=dict, description="merged into the study's recipe, key by key")


_Rate = Annotated[float, Field(gt=0)]
_Seed = Annotated[int, Field(ge=0)]
_Level = Annotated[float, Field(gt=0, le=1)]
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")


class StudyConfig(_Strict):
    """Runs that differ in what is named here and in nothing else: every combination of the axes is a cell (docs/own_study.md)."""

    name: str
    run: Path
    methods: tuple[MethodConfig, ...] = Field(min_length=1)
    baseline: str | None = Field(None, description="the method that the others are compared with; default: the first")
    seeds: tuple[_Seed, ...] = Field((0,), min_length=1)
    students: dict[str, str] = Field(default_factory=dict, description="name -> model; default: recipe.student")
    teachers: dict[str, str] = Field(default_factory=dict, description="name -> model; default: recipe.teacher")
    train_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="first rows of the training set; default: all of it")
    regimes: dict[str, RegimeConfig] = Field(default_factory=dict, description="name -> what is otherwise there; default: one regime")
    learning_rates: tuple[_Rate, ...] | dict[str, Annotated[tuple[_Rate, ...], Field(min_length=1)]] = Field(
        (), description="each method runs at its best of these, or of those beside its name; default: recipe.optim.lr"
    )
    development_seeds: tuple[_Seed, ...] = Field((), description="the seeds that choose the learning rate, and do nothing else")
    levels: tuple[_Level, ...] = Field((), description="held-out accuracies; every cell reports when it first reached them")
    keep: Literal["models", "numbers"] = Field("models", description="numbers: a finished cell leaves no model and no checkpoints")
    world: WorldConfig | None = Field(None, description="draw the data from the built-in world, instead of recipe.data")
    recipe: dict[str, Any] = Field(description="everything of a run's recipe but run, method and seed")

    @model_validator(mode="after")
    def _only_what_varies(self) -> StudyConfig:
        taken = {"run", "method", "seed"} | ({"data"} if self.world else set())
        taken |= {key for key, axis in (("student", self.students), ("teacher", self.teachers)) if axis}
        for where, recipe in {"recipe": self.recipe, **{f"regimes.{name}.recipe": r.recipe for name, r in self.regimes.items()}}.items():
            found = sorted(taken & recipe.keys()) + (["optim.lr"] if self.learning_rates and "lr" in _mapping(recipe.get("optim")) else [])
            if found:
                raise ValueError(f"{where} must not have {', '.join(found)}: the study sets {'them' if len(found) > 1 else 'it'}")
        return self

    @model_validator(mode="after")
    def _values_differ(self) -> StudyConfig:
        names = [str(method) for method in self.methods]
        if isinstance(self.learning_rates, dict) and set(self.learning_rates) != set(names):
            raise ValueError(
                f"learning_rates names {', '.join(self.learning_rates)}, the methods are {', '.join(names)}. Give each method its rates"
            )
        axes = {"methods": names, "seeds": self.seeds, "train_sizes": self.train_sizes, "development_seeds": self.development_seeds}
        rates = {f"learning_rates of {method}": self.rates_of(method) for method in self.methods}
        for axis, values in {**axes, **rates}.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{axis} must differ, found {', '.join(map(str, values))}")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(
                f"the baseline '{self.baseline}' is none of the methods.{did_you_mean(self.baseline, names)} They are: {', '.join(names)}"
            )
        for name in (*self.students, *self.teachers, *self.regimes):
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"the name '{name}' becomes part of a folder's name: use letters, digits and . _ = - only")
        return self

    @model_validator(mode="after")
    def _development_is_apart(self) -> StudyConfig:
        if bool(self.rates_to_try) != bool(self.development_seeds):
            raise ValueError(
                "several learning_rates of a method and development_seeds belong together: every rate is run on the development seeds. "
                "Give both, or no development_seeds and one rate for each method"
            )
        if both := sorted(set(self.seeds) & set(self.development_seeds)):
            raise ValueError(
                f"development_seeds and seeds share {', '.join(map(str, both))}: a rate chosen on a seed looks better there than it is. "
                "Give the development other seeds"
            )
        return self

    @model_validator(mode="after")
    def _worlds_fit(self) -> StudyConfig:
        for name, regime in self.regimes.items():
            if regime.world and self.world is None:
                raise ValueError(f"regimes.{name}.world turns knobs of the built-in world, but the study has no `world`. Add `world: {{}}`")
            rows = regime.world.get("train", self.world.train if self.world else None)
            self._sizes_fit(rows, f"in regime '{name}'")
        self._sizes_fit(self.world.train if self.world else None, "world.train")
        return self

    def _sizes_fit(self, rows: Any, where: str) -> None:
        if self.train_sizes and isinstance(rows, int) and max(self.train_sizes) > rows:
            raise ValueError(
                f"train_sizes goes up to {max(self.train_sizes)}, but {where} there are {rows} training rows. Draw more: world.train"
            )

    @property
    def baseline_method(self) -> MethodConfig:
        """The method that the others are compared with."""
        return next(method for method in self.methods if self.baseline in (None, str(method)))

    def rates_of(self, method: MethodConfig) -> tuple[float, ...]:
        """The learning rates that are tried for a method; empty: that of the recipe."""
        return self.learning_rates.get(str(method), ()) if isinstance(self.learning_rates, dict) else self.learning_rates

    @property
    def rates_to_try(self) -> list[tuple[MethodConfig, float]]:
        """Every method that has several learning rates, with each of them."""
        return [(method, rate) for method in self.methods if len(rates := self.rates_of(method)) > 1 for rate in rates]

    @property
    def is_matrix(self) -> bool:
        """Whether anything but the method varies, so that there are means and paired differences to report."""
        axes = (self.students, self.teachers, self.regimes, self.train_sizes, self.development_seeds)
        return len(self.seeds) > 1 or any(axes)

    def recipe_of(self, regime: str | None, student: str | None, teacher: str | None) -> dict[str, Any]:
        """A run's recipe in a regime with a student and a teacher of the axes (None: what the recipe says), without run, method, seed."""
        changes: dict[str, Any] = self.regimes[regime].recipe if regime else {}
        models = {"student": self.students[student]} if student else {}
        models |= {"teacher": self.teachers[teacher]} if teacher else {}
        return _merged(_merged(self.recipe, changes), models)

    def world_of(self, regime: str | None) -> WorldConfig | None:
        """The world of a regime. Raises ConfigError for a wrong knob."""
        if self.world is None or not regime or not self.regimes[regime].world:
            return self.world
        return _parse(WorldConfig, self.world.model_dump() | self.regimes[regime].world, f"regimes.{regime}.world")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, mappings inside mappings likewise."""
    return base | {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }


_Config = TypeVar("_Config", bound=_Strict)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply `key.sub=value` overrides.

    Raises:
        ConfigError: the file is missing or no mapping, or a key or value is wrong; names the key and the nearest right one.
    """
    return _load(RunConfig, path, overrides)


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study, with overrides. Raises ConfigError as `load_config`; the recipe of every combination is checked too."""
    study = _load(StudyConfig, path, overrides)
    for regime, student, teacher in product(study.regimes or (None,), study.students or (None,), study.teachers or (None,)):
        where = f"{path}: recipe" + (f" in regime '{regime}'" if regime else "")
        study.world_of(regime)
        values = study.recipe_of(regime, student, teacher) | ({"data": {"train": "train.jsonl"}} if study.world else {})
        for method in study.methods:
            config = parse_config({**values, "run": "run", "method": method.model_dump()}, where=where)
            if not study.world and config.data.eval is None and config.data.test is None:
                raise ConfigError(f"{where}: a study compares on held-out questions: name data.test, or data.eval")
            if study.development_seeds and not study.world and None in (config.data.eval, config.data.test):
                raise ConfigError(f"{where}: learning_rates are chosen on data.eval and compared on data.test, so that both must be there")
    return study


def load_world(overrides: Sequence[str] = ()) -> WorldConfig:
    """The built-in world with some knobs turned, as `key=value`. Raises ConfigError."""
    values: dict[str, Any] = {}
    for override in overrides:
        _apply(values, override)
    return _parse(WorldConfig, values, "world")


def parse_config(values: dict[str, Any], *, where: str = "configuration") -> RunConfig:
    """Validate a configuration given as plain values. Raises ConfigError."""
    return _parse(RunConfig, values, where)


def _load(kind: type[_Config], path: Path, overrides: Sequence[str]) -> _Config:
    try:
        values = _read_yaml(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no recipe at {path.absolute()}. Give the path of a YAML file, as in: vaopd train recipe.yaml") from None
    except (yaml.YAMLError, ValueError) as error:  # of the text's encoding, too
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return _parse(kind, values, str(path))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is given twice", node.value[place][0].start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, or ValueError for a value such as the date 2001-99-99."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _parse(kind: type[_Config], values: Any, where: str) -> _Config:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(kind, problem)}" for problem in error.errors())) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"an override has the form key=value, found '{override}'. Example: --set optim.lr=1e-6")
    *parents, last = key.strip().split(".")
    for parent in parents:
        nested = values.setdefault(parent, {})
        if not isinstance(nested, dict):
            nested = values[parent] = {}
        values = nested
    try:
        values[last] = _number(_read_yaml(text))
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"the value of override '{override}' is not valid YAML") from None


def _number(value: Any) -> Any:
    """YAML reads `1e-6` as text (it wants `1.0e-6`); people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(kind: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(kind, problem["loc"][:-1])
        return f"unknown key '{where}'.{did_you_mean(str(problem['loc'][-1]), known)} Known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"'{where}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    value = "" if problem["type"] == "value_error" else f", found {problem['input']!r}"
    return f"{where + ': ' if where else ''}{message}{value}"


def _fields_at(kind: type[BaseModel], path: Sequence[Any]) -> list[str]:
    model: Any = kind
    for part in path:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        sections = [x for x in (annotation, *get_args(annotation)) if isinstance(x, type) and issubclass(x, BaseModel)]  # also `X | None`
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)
