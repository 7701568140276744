"""From a recipe to a run that can start: every gate first, then the models."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from vaopd import core
from vaopd.config import MethodConfig, RunConfig
from vaopd.data.render import Renderer
from vaopd.data.survey import RowCheck
from vaopd.data.validate import DataSets, open_sets
from vaopd.errors import ConfigError, DataError
from vaopd.evaluate.held_out import sampler
from vaopd.models.families import vision_parameters
from vaopd.models.forward import rows
from vaopd.models.load import Source, check_agreement, limit_pixels, load_model, open_source
from vaopd.models.lora import adapters_off, add_adapters, check_lora
from vaopd.models.shared_prompt import Auto
from vaopd.rollouts.given import GivenEngine
from vaopd.rollouts.hf import Sampling
from vaopd.rollouts.vllm import VLLMEngine, check_vllm
from vaopd.teachers.local import LocalTeacher
from vaopd.teachers.offload import Visits
from vaopd.train import trackers
from vaopd.train.checkpoint import fingerprint, frozen_tensors
from vaopd.train.folder import RunFolder
from vaopd.train.schedule import total_steps
from vaopd.train.step import StudentLoss, Tools
from vaopd.types import DEGRADED, ORIGINAL, Example, ResponseForward, RolloutEngine
from vaopd.views import Size

log = logging.getLogger(__name__)

WEIGHTINGS: dict[str, Callable[..., core.Weighting]] = {
    "va_opd": core.VAOPD,
    "opd": core.OPD,
    "rollout_only": core.RolloutOnly,
    "token_only": core.TokenOnly,
    "random_tokens": core.RandomTokens,
    "mask_tokens": core.MaskTokens,
    "off_policy_kd": core.OPD,
    "sft": core.OPD,
}
READS_THE_IMAGE_ONCE = ("opd", "off_policy_kd", "sft")  # their weighting does not look at the degraded view


@dataclass
class Run:
    """Everything a run holds while it goes on."""

    config: RunConfig
    folder: RunFolder
    source: Source
    student: Any
    teacher: LocalTeacher | None
    renderer: Renderer
    train: Sequence[Example]
    held_out: Sequence[Example]  # chooses the best checkpoint
    test: Sequence[Example]  # the final evaluation
    forward: ResponseForward
    tools: Tools
    steps: int
    account: dict[str, Any]  # data.json
    # What a checkpoint has beside weights and optimiser: non-finite steps in a row, the best evaluation so far, and the sum of the
    # frozen weights.
    state: dict[str, Any] = field(default_factory=lambda: {"nonfinite_streak": 0, "best": None, "frozen": None})
    warned_of_truncation: bool = False
    warned_of_gap: bool = False


def set_up(config: RunConfig, *, on_check: Callable[[str], None]) -> Run:
    """All gates, then the models. Raises ConfigError, ModelError or DataError before any weight is loaded, EngineError after it."""
    source, teacher_source = open_models(config, on_check)
    renderer = Renderer(source.processor, config.view.make())
    sets = read_data(config, row_check(config, (source, teacher_source), renderer), on_check)
    training, held_out, test = sets.train, sets.held_out, sets.test

    # A process whose prompts have no pictures leaves the vision tower without a gradient.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=precision(config), log_with=trackers.make(config) or None, kwargs_handlers=[parallel])
    student = load_student(config, source, accelerator)
    forward: ResponseForward = rows if config.forward == "rows" else Auto()
    if config.self_taught:
        teacher: LocalTeacher | None = self_teacher(config, source, student, forward)
    else:
        teacher = load_teacher(config, teacher_source, forward, accelerator) if teacher_source else None
    if config.teacher_offload:
        on_check(offload_note(teacher))
    engine = _engine(config, source, student, training, renderer)
    served = config.rollouts.engine == "vllm"
    loss = StudentLoss(student, vocab_size=source.vocab_size, forward=forward, loss=config.loss, with_logp=served)
    tools = _tools(config, accelerator, loss, teacher, engine)
    steps = total_steps(config.optim, len(training))
    folder, account = RunFolder(config.run, writes=accelerator.is_main_process), sets.account
    run = Run(config, folder, source, student, teacher, renderer, training, held_out, test, forward, tools, steps, account)
    run.state["frozen"] = fingerprint(frozen_tensors(student))
    return run


def open_models(config: RunConfig, on_check: Callable[[str], None]) -> tuple[Source, Source | None]:
    """Student and teacher before any weight is loaded, and every gate that needs no data. Raises ConfigError, ModelError."""
    weighting_of(config.method, 0)
    _check_divergence(config)
    trackers.check(config.trackers)
    source = open_source(config.student)
    teacher = open_source(config.teacher) if config.teacher and not config.self_taught else None
    data, sources = config.data, [source, *([teacher] if teacher else [])]
    limits = [limit_pixels(each, data.min_pixels, data.max_pixels) for each in sources] if data.min_pixels or data.max_pixels else []
    if teacher:
        check_agreement(source, teacher)
        on_check("vocabulary ok · control tokens ok · chat format ok · pixels ok")
    for limit in limits[:1]:  # the gate has found the teacher's to be the same
        on_check(limit)
    if config.rollouts.engine == "vllm":
        check_vllm(config, source)
    if config.lora:
        on_check(f"adapters of rank {config.lora.rank} on {', '.join(check_lora(config.lora, source.config))}")
    return source, teacher


def weighting_of(method: MethodConfig, step: int) -> core.Weighting:
    """The method's weighting; a random one draws anew at each step. Raises ConfigError for numbers that it refuses."""
    try:
        weighting = WEIGHTINGS[method.name](**method.numbers)
    except ValueError as error:
        raise ConfigError(f"method '{method.name}': {error}") from None
    if isinstance(weighting, core.RandomTokens | core.MaskTokens):
        return dataclasses.replace(weighting, seed=weighting.seed * 1_000_003 + step)
    return weighting


def row_check(config: RunConfig, sources: Sequence[Source | None], renderer: Renderer) -> RowCheck:
    """What a row must pass beside being read: it can be rendered, is no longer than the models were made for, and has a solution that can
    be written where the method learns from it.
    """
    limits = [(getattr(source.config.get_text_config(), "max_position_embeddings", None), source.name) for source in sources if source]
    limit, name = min(((limit, name) for limit, name in limits if limit), default=(None, ""))

    def check(example: Example, sizes: Sequence[Size]) -> int:
        tokens = renderer.prompt_tokens(example, sizes)
        if limit and tokens > limit:
            raise DataError(
                f"field 'problem': with its pictures it has {tokens:,} tokens, more than the {limit:,} that {name} was made for. "
                "Shorten it, or lower data.max_pixels."
            )
        if config.method.off_policy and example.solution is not None:
            try:
                renderer.encode_response(example.solution)
            except DataError as error:
                raise DataError(f"field 'solution': {error}") from error
        return tokens

    return check


def read_data(config: RunConfig, check: RowCheck, on_check: Callable[[str], None]) -> DataSets:
    """Training, held-out and test rows: every image decoded once, no question both trained on and held out."""
    sets = open_sets(config.data, check=check)
    check_solutions(config, sets)
    for note in sets.notes:
        on_check(note)
    return sets


def check_solutions(config: RunConfig, sets: DataSets) -> None:
    """Raises DataError for a method that learns from solutions where rows have none."""
    if config.method.off_policy and sets.surveys["train"].without["solution"]:
        missing = [example.id for example in sets.train if example.solution is None]
        if missing:
            raise DataError(
                f"method '{config.method.name}' learns from solutions, but {len(missing)} of {len(sets.train)} rows of {config.data.train} "
                f"have none, the first is '{missing[0]}'. Add the field 'solution' to them"
            )


def load_student(config: RunConfig, source: Source, accelerator: Accelerator) -> Any:
    """What is trained is fp32, since a bf16 weight does not move at the method's learning rate.

    Beside adapters the weights are frozen, as a teacher's are, and in the precision of the computation.
    """
    dtype = torch.bfloat16 if config.lora and precision(config) == "bf16" else torch.float32
    student = load_model(source, dtype=dtype).to(accelerator.device)
    if config.lora:
        add_adapters(student, config.lora, seed=config.seed)
    elif not config.optim.train_vision:
        for parameter in vision_parameters(student):
            parameter.requires_grad_(False)
    if config.optim.checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
        student.train()  # transformers recomputes in this mode only
    return student


def load_teacher(config: RunConfig, source: Source, forward: ResponseForward, accelerator: Accelerator) -> LocalTeacher:
    """Frozen, in the precision of the computation."""
    dtype = torch.bfloat16 if precision(config) == "bf16" else torch.float32
    model, budget = load_model(source, dtype=dtype), config.optim.tokens_per_forward
    if config.teacher_offload and accelerator.device.type != "cpu":
        visits, device = Visits(model, accelerator.device), accelerator.device
        return LocalTeacher(model, vocab_size=source.vocab_size, forward=forward, tokens_per_forward=budget, within=visits, device=device)
    return LocalTeacher(model.to(accelerator.device), vocab_size=source.vocab_size, forward=forward, tokens_per_forward=budget)


def offload_note(teacher: LocalTeacher | None) -> str:
    """What `teacher_offload` comes to here."""
    if teacher and isinstance(teacher.within, Visits):
        return f"teacher's {teacher.within.bytes / 2**30:.1f} GiB in CPU memory, on the device only to score"
    return "teacher_offload does nothing here: there is no teacher's own copy of weights on a GPU"


def self_teacher(config: RunConfig, source: Source, student: Any, forward: ResponseForward) -> LocalTeacher:
    """The student with its adapters off: the model before training, without a second copy of it."""
    if config.loss != "nll":
        log.warning(
            "the teacher is the student before training and sees what the student sees: their divergence starts at 0, its least value, "
            "and its gradient at nothing but rounding, which AdamW makes as large as any other. Such a teacher measures what `method: sft` "
            "changes; `%s` has nothing to learn from it",
            config.method.name,
        )
    budget = config.optim.tokens_per_forward
    return LocalTeacher(student, vocab_size=source.vocab_size, forward=forward, tokens_per_forward=budget, within=adapters_off)


def precision(config: RunConfig) -> str:
    """Accelerate's name for the computation's precision."""
    if config.precision == "auto":
        return "bf16" if torch.cuda.is_available() else "no"
    return "no" if config.precision == "fp32" else "bf16"


def training_sampling(config: RunConfig) -> Sampling:
    """How rollouts are drawn for training."""
    rollouts = config.rollouts
    return Sampling(rollouts.max_tokens, rollouts.temperature, rollouts.top_p, config.seed, bf16=precision(config) == "bf16")


def held_out_sampling(config: RunConfig, seed: int) -> Sampling:
    """How an evaluation samples: from the whole distribution."""
    return Sampling(config.rollouts.max_tokens, config.eval.temperature, 1.0, seed, bf16=precision(config) == "bf16")


def _check_divergence(config: RunConfig) -> None:
    if config.loss != "nll":
        try:
            core.as_divergence(config.loss)
        except ValueError as error:
            raise ConfigError(f"divergence: {error}") from None


def _engine(config: RunConfig, source: Source, student: Any, training: Sequence[Example], renderer: Renderer) -> RolloutEngine:
    if config.method.off_policy:
        responses = {example.id: renderer.encode_response(example.solution or "", example.id) for example in training}
        return GivenEngine(responses, max_tokens=config.rollouts.max_tokens)
    if config.rollouts.engine == "vllm":
        return VLLMEngine(student, source, training_sampling(config), url=config.rollouts.url, run=config.run)
    return sampler(student, source, training_sampling(config), rows=config.rollouts.rows)


def _tools(config: RunConfig, accelerator: Accelerator, loss: StudentLoss, teacher: LocalTeacher | None, engine: RolloutEngine) -> Tools:
    optim = config.optim
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    prepared, optimizer = accelerator.prepare(loss, optimizer)
    return Tools(
        engine=engine,
        teacher=None if config.loss == "nll" else teacher,  # a recipe of sft may name one, for its evaluations
        student_loss=prepared,
        optimizer=optimizer,
        accelerator=accelerator,
        views=() if config.method.name in READS_THE_IMAGE_ONCE else (ORIGINAL, DEGRADED),
        k=1 if config.method.off_policy else config.rollouts.k,
        deadband=config.deadband,
        clip=optim.clip,
        tokens_per_forward=optim.tokens_per_forward,
    )
