"""`vaopd probe`: all probes of a student and a teacher on held-out questions, from one set of sampled responses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaopd.analysis.gradients import check_questions, gradient_probe
from vaopd.analysis.probes import (
    by_class,
    effective,
    masking,
    next_token_entropy,
    reliance,
    repetition,
    share_of,
    split_mean,
    token_class,
)
from vaopd.analysis.view_table import QUESTIONS_AT_ONCE, view_table
from vaopd.config import ViewConfig
from vaopd.core import VAOPD, Weighting, fused_weighted_divergence, visual_advantage, visual_tokens
from vaopd.data.render import Renderer
from vaopd.data.sources import read_examples
from vaopd.errors import ConfigError, DataError, did_you_mean
from vaopd.evaluate.command import DEADBAND, TOKENS_PER_FORWARD
from vaopd.evaluate.held_out import decoder, sampler
from vaopd.evaluate.runner import Answers, advantage_summary, answer, mass_curve
from vaopd.models.load import Source, check_agreement, load_model, open_source, show_alike
from vaopd.models.shared_prompt import Auto
from vaopd.rollouts.hf import Sampling
from vaopd.teachers.local import LocalTeacher
from vaopd.train.samples import token_pieces
from vaopd.train.step import drop_empty, layout
from vaopd.types import DEGRADED, ORIGINAL, Example, Group
from vaopd.views import VIEWS

CONDITIONS = ("seeing", "blind_degraded", "blind_removed")
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Loaded:
    """A frozen model that can be sampled from and that scores responses."""

    name: str
    source: Source
    scorer: LocalTeacher

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.scorer.model


@dataclass(frozen=True)
class Measured:
    """What the models say about every token of the same N responses, on the CPU."""

    a_N: Tensor  # visual advantage, nats: eq. 2
    kl_N: Tensor  # KL(student ‖ teacher), nats
    entropy_N: Tensor  # of the student's next token, nats
    gap_N: dict[str, Tensor]  # model -> log p(y_t | v) - log p(y_t | ṽ), nats, signed


def load(names: Sequence[str]) -> list[Loaded]:
    """The models, each once; the first is the student, and all others must agree with it. A run folder stands for its `model/`.

    Raises:
        ModelError: one can't be loaded, or does not agree with the first.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = {name: open_source(str(Path(name) / "model") if (Path(name) / "model").is_dir() else name) for name in names}
    for source in sources.values():
        show_alike(sources[names[0]], source)
        check_agreement(sources[names[0]], source)
    loaded = {}
    for name, source in sources.items():
        model = load_model(source, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
        scorer = LocalTeacher(model, vocab_size=source.vocab_size, forward=Auto(), tokens_per_forward=TOKENS_PER_FORWARD)
        loaded[name] = Loaded(name, source, scorer)
    return [loaded[name] for name in names]


def probe(
    student: Loaded,
    teacher: Loaded,
    examples: Sequence[Example],
    *,
    view_config: ViewConfig,
    sampling: Sampling,
    k: int = 4,
    rows: int = 64,
    deadband: float = DEADBAND,
    others: Sequence[Loaded] = (),
    views: Sequence[str] = (),
    weightings: Mapping[str, Weighting] | None = None,
    on_progress: OnProgress = lambda done, of: None,
) -> dict[str, Any]:
    """All probes on the student's K responses to every question that has a picture.

    Args:
        others: more models, for instance other checkpoints, whose reading of the same responses is compared.
        views: names of views to put side by side; none: no such table.
        weightings: by name, those whose gradients are measured (`vaopd.analysis.gradients`), `opd` among them; takes minutes and holds
            a dozen gradients of the student for each; None: no gradients.

    Returns:
        the JSON that docs/probes.md describes.

    Raises:
        DataError: no question has a picture, or too few for gradients, or the student gives no response with a token.
    """
    asked = [example for example in examples if example.images]
    if not asked:
        raise DataError("no question has a picture, so nothing can depend on one. Give data with images")
    if weightings:
        check_questions(len(asked), "have a picture")
    graded = all(example.answer is not None for example in asked)
    conditions = CONDITIONS if graded else CONDITIONS[:1]
    parts = len(conditions) + 1 + bool(views) + bool(weightings)
    renderer = Renderer(student.source.processor, view_config.make())
    answers = {}
    for condition in conditions:
        answers[condition] = _ask(student, asked, renderer, condition, sampling, k, rows)
        on_progress(len(answers), parts)
    groups = drop_empty(answers["seeing"].groups)
    if not groups:
        raise DataError("the student's responses are all empty, so there is no token to probe")
    measured = measure(student, teacher, others, groups, deadband)
    on_progress(len(answers) + 1, parts)
    result = {
        "model": student.name,
        "teacher": teacher.name,
        "view": view_config.model_dump(mode="json"),
        "questions": len(asked),
        "k": k,
        "reliance": reliance(_accuracies(answers)),
        **summarise(measured, groups, token_pieces(student.source.processor.tokenizer)),
    }
    if views:
        chosen = {name: view_config.make() if name == view_config.name else ViewConfig.from_options(name).make() for name in views}
        result["views"] = view_table(teacher.scorer, student.source.processor, asked, groups, chosen, measured.a_N, deadband)
        on_progress(parts - bool(weightings), parts)
    if weightings:
        result["gradients"] = _gradients(student, teacher, answers["seeing"], weightings, deadband)
        on_progress(parts, parts)
    return result


def _gradients(student: Loaded, teacher: Loaded, answers: Answers, weightings: Mapping[str, Weighting], deadband: float) -> dict[str, Any]:
    """Of the questions of which every response has a token: others would compare fewer siblings."""
    whole = [index for index, group in enumerate(answers.groups) if all(group.lengths)]
    check_questions(len(whole), "were answered by every sample")
    groups = [answers.groups[index] for index in whole]
    pieces = token_pieces(student.source.processor.tokenizer)
    classes = [token_class(text) for group in groups for response in group.responses for text in pieces(response)]
    right = None if answers.correct_QK is None else [answers.correct_QK[index].tolist() for index in whole]
    return gradient_probe(student.scorer, teacher.scorer, groups, classes, right, deadband=deadband, weightings=weightings)


def measure(student: Loaded, teacher: Loaded, others: Sequence[Loaded], groups: Sequence[Group], deadband: float) -> Measured:
    """Every model's scores of the same responses, a few questions at a time."""
    starts = range(0, len(groups), QUESTIONS_AT_ONCE)
    parts = [_measure(student, teacher, others, groups[start : start + QUESTIONS_AT_ONCE], deadband) for start in starts]
    gap_N = {name: torch.cat([part.gap_N[name] for part in parts]) for name in parts[0].gap_N}
    return Measured(torch.cat([p.a_N for p in parts]), torch.cat([p.kl_N for p in parts]), torch.cat([p.entropy_N for p in parts]), gap_N)


@torch.no_grad()
def _measure(student: Loaded, teacher: Loaded, others: Sequence[Loaded], groups: Sequence[Group], deadband: float) -> Measured:
    own_NH, own_logp = _scores(student, groups)
    teacher_NG, teacher_logp = (own_NH, own_logp) if teacher is student else _scores(teacher, groups)
    logp = {student.name: own_logp, teacher.name: teacher_logp}
    logp |= {other.name: _scores(other, groups)[1] for other in others if other.name not in logp}
    a_N = visual_advantage(teacher_logp[ORIGINAL], teacher_logp[DEGRADED], deadband=deadband)
    no_weight_N = torch.zeros(len(own_NH), device=own_NH.device)
    _, kl_N = fused_weighted_divergence(own_NH, student.scorer.head, teacher_NG, teacher.scorer.head, no_weight_N)
    gap_N = {name: (by_view[ORIGINAL] - by_view[DEGRADED]).cpu() for name, by_view in logp.items()}
    return Measured(a_N.cpu(), kl_N.cpu(), next_token_entropy(own_NH, student.scorer.head).cpu(), gap_N)


def _scores(loaded: Loaded, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    """(N, H) states under the original view, and per view (N,) log-probabilities."""
    scores = loaded.scorer.score(groups, (ORIGINAL, DEGRADED))
    logp_N = {view: torch.cat([score.logp_N[view] for score in scores]) for view in (ORIGINAL, DEGRADED)}
    return torch.cat([score.hidden_NG for score in scores]), logp_N


def summarise(measured: Measured, groups: Sequence[Group], pieces: Callable[[Tensor], list[str]]) -> dict[str, Any]:
    """The token probes of docs/probes.md from what was measured on these responses."""
    rollout_N, group_R = layout(groups)
    a_N, kl_N = measured.a_N, measured.kl_N
    is_visual_N = visual_tokens(a_N, rollout_N)
    responses = [response for group in groups for response in group.responses]
    ended = [ended for group in groups for ended in group.ended_K]
    texts = [text for response in responses for text in pieces(response)]
    return {
        "tokens": len(a_N) / len(responses),
        "truncated": 1 - sum(ended) / len(ended),
        "repetition": sum(map(repetition, responses)) / len(responses),
        "effective_rollouts": effective(a_N, rollout_N, group_R, VAOPD()),
        "entropy": split_mean(measured.entropy_N, is_visual_N),
        "kl": split_mean(kl_N, is_visual_N),
        **advantage_summary(a_N),
        "mass_curve": mass_curve(a_N),
        "visual": share_of(is_visual_N, kl=kl_N, va=a_N),
        "masking": masking(a_N, kl_N, rollout_N, group_R),
        "classes": by_class(texts, kl=kl_N, va=a_N),
        "fixed_responses": {name: split_mean(gap_N, is_visual_N) for name, gap_N in measured.gap_N.items()},
    }


def probe_folder(
    model: str,
    data: Path,
    *,
    teacher: str,
    others: Sequence[str],
    views: Sequence[str],
    weightings: Mapping[str, Weighting] | None,
    view_config: ViewConfig,
    sampling: Sampling,
    k: int,
    rows: int,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """What `vaopd probe` does: names of models and a data file in, the probes out.

    Raises:
        ConfigError: an unknown view.
        ModelError, DataError: something can't be loaded, or the models don't agree.
    """
    names = _view_names(views)
    examples = read_examples(data)
    loaded = load([model, teacher, *others])
    options: dict[str, Any] = {"view_config": view_config, "sampling": sampling, "k": k, "rows": rows, "on_progress": on_progress}
    return probe(loaded[0], loaded[1], examples, others=loaded[2:], views=names, weightings=weightings, **options)


def _view_names(views: Sequence[str]) -> list[str]:
    if "all" in views:
        return list(VIEWS)
    for name in views:
        if name not in VIEWS:
            raise ConfigError(f"unknown view '{name}'.{did_you_mean(name, VIEWS)} Known: all, {', '.join(VIEWS)}")
    return list(views)


def _ask(
    student: Loaded, examples: Sequence[Example], renderer: Renderer, condition: str, sampling: Sampling, k: int, rows: int
) -> Answers:
    prompts = [renderer.without_images(e) if condition == "blind_removed" else renderer(e) for e in examples]
    view = DEGRADED if condition == "blind_degraded" else ORIGINAL
    engine = sampler(student.model, student.source, sampling, view=view, rows=rows)
    return answer(engine, prompts, [example.answer for example in examples], decoder(student.source), k=k)


def _accuracies(answers: dict[str, Answers]) -> dict[str, float | None]:
    graded = {name: a.summary()["accuracy"] for name, a in answers.items()}
    return {"accuracy": graded.pop("seeing"), **graded}
