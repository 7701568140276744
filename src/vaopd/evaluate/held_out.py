"""The held-out evaluation of one model: accuracy, blind accuracy, and how much its answers depend on the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vaopd.data.render import Renderer
from vaopd.evaluate.runner import Answers, advantage_summary, answer, mass_curve, standard_error, teacher_advantages
from vaopd.models.load import Source, control_ids
from vaopd.rollouts.hf import HFEngine, Sampling
from vaopd.types import DEGRADED, ORIGINAL, Example, Teacher

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

    Blind accuracy is measured with the image degraded and with the image removed from the prompt.
    """
    pictured = [example for example in examples if example.images]
    conditions: list[tuple[str, Sequence[Example]]] = [("seeing", examples)]
    if examples and all(example.answer is not None for example in examples):
        conditions += [("blind_degraded", pictured), ("blind_removed", pictured)]
    entry: dict[str, Any] = {"blind_degraded": None, "blind_removed": None, "va": None, "va_top10": None}
    for index, (condition, asked) in enumerate(conditions):
        if asked:
            answers = _ask(condition, model, source, asked, renderer, sampling, k, rows)
            entry |= _entry(condition, answers)
            if condition == "seeing" and teacher is not None:
                a_N = teacher_advantages(
                    teacher, [group.take(range(min(SCORED_SIBLINGS, len(group.responses)))) for group in answers.groups], deadband
                )
                entry |= advantage_summary(a_N) | {"mass_curve": mass_curve(a_N)}
        on_progress(index + 1, len(conditions))
    return entry


def _ask(
    condition: str, model: Any, source: Source, examples: Sequence[Example], renderer: Renderer, sampling: Sampling, k: int, rows: int
) -> Answers:
    view = DEGRADED if condition == "blind_degraded" else ORIGINAL
    prompts = [renderer.without_images(e) if condition == "blind_removed" else renderer(e) for e in examples]
    engine = sampler(model, source, sampling, view=view, rows=rows)
    return answer(engine, prompts, [example.answer for example in examples], decoder(source), k=k)


def _entry(condition: str, answers: Answers) -> dict[str, Any]:
    if condition != "seeing":
        return {condition: float(answers.accuracy_Q.mean()), f"{condition}_se": standard_error(answers.accuracy_Q)}
    graded = answers.correct_QK is not None
    return answers.summary() | {"per_question": [round(x, 6) for x in answers.accuracy_Q.tolist()] if graded else None}
