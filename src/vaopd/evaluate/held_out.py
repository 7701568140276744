"""The held-out evaluation of one model: accuracy, blind accuracy, and how much its answers depend on the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vaopd.data.render import Renderer
from vaopd.data.sources import IMAGE_MARK, Rows
from vaopd.evaluate.runner import Answers, advantage_summary, answer_in_parts, mass_curve, standard_error, teacher_advantages, unseen
from vaopd.models.load import Source, control_ids
from vaopd.rollouts.hf import HFEngine, Sampling
from vaopd.types import DEGRADED, ORIGINAL, Example, Group, Teacher

CONDITIONS = 3  # of the final evaluation: seeing, the image degraded, the image removed
SCORED_SIBLINGS = 4  # of each question, for the mean advantage: the teacher's cost is the larger part


def sampler(model: Any, source: Source, sampling: Sampling, *, view: str = ORIGINAL, rows: int = 64) -> HFEngine:
    """An engine that samples from `model` and never a control id."""
    return HFEngine(
        model,
        sampling,
        vocab_size=source.vocab_size,
        eos_ids=source.eos_ids,
        forbidden_ids=control_ids(source),
        view=view,
        rows=rows,
    )


def decoder(source: Source) -> Callable[[Tensor], str]:
    """Token ids -> text without control tokens."""
    return lambda ids: source.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def evaluate_model(
    model: Any,
    source: Source,
    examples: Sequence[Example],
    renderer: Renderer,
    sampling: Sampling,
    *,
    k: int,
    teacher: Teacher | None,
    deadband: float,
    rows: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """The entry of one model in `eval.json` (docs/run_folder.md), with `per_question` accuracies and, with a teacher, the `mass_curve`.

    Blind accuracy is measured with the image degraded and with the image removed from the prompt; the latter where words are left.
    """
    conditions: dict[str, Sequence[Example]] = {"seeing": examples}
    if examples and all(example.answer is not None for example in examples):
        pictured = [index for index, example in enumerate(examples) if example.images]
        worded = [index for index in pictured if examples[index].problem.replace(IMAGE_MARK, "").strip()]
        conditions |= {"blind_degraded": _those(examples, pictured), "blind_removed": _those(examples, worded)}
    advantages: list[Tensor] = []

    def score(groups: Sequence[Group]) -> None:
        if teacher is not None:
            scored = [group.take(range(min(SCORED_SIBLINGS, len(group.responses)))) for group in groups]
            advantages.append(teacher_advantages(teacher, scored, deadband))

    entry: dict[str, Any] = {"blind_degraded": None, "blind_removed": None, "va": None, "va_top10": None}
    for done, (condition, asked) in enumerate(conditions.items(), 1):
        if asked:
            engine = sampler(model, source, sampling, view=DEGRADED if condition == "blind_degraded" else ORIGINAL, rows=rows)
            render = renderer.without_images if condition == "blind_removed" else renderer
            look = score if condition == "seeing" else unseen
            entry |= _entry(condition, answer_in_parts(engine, asked, render, decoder(source), k=k, at_once=max(1, rows // k), look=look))
        on_progress(done, len(conditions))
    if advantages:
        a_N = torch.cat(advantages)
        entry |= advantage_summary(a_N) | {"mass_curve": mass_curve(a_N)}
    return entry


def _those(examples: Sequence[Example], kept: Sequence[int]) -> Sequence[Example]:
    """Some of them; those of a file are still read only when they are asked."""
    return examples.take(kept) if isinstance(examples, Rows) else [examples[index] for index in kept]


def _entry(condition: str, answers: Answers) -> dict[str, Any]:
    if condition != "seeing":
        return {condition: float(answers.accuracy_Q.mean()), f"{condition}_se": standard_error(answers.accuracy_Q)}
    graded = answers.correct_QK is not None
    return answers.summary() | {"per_question": [round(x, 6) for x in answers.accuracy_Q.tolist()] if graded else None}
