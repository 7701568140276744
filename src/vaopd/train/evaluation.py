"""Evaluations of a run: on held-out questions while it trains, and of student, trained student and teacher at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vaopd.data.images import decode
from vaopd.evaluate.held_out import SCORED_SIBLINGS, decoder, evaluate_model, sampler
from vaopd.evaluate.runner import Answers, answer_in_parts, gain
from vaopd.models.load import load_model
from vaopd.models.lora import adapters, adapters_off
from vaopd.train.metrics import Metrics
from vaopd.train.samples import Scored, score_groups, token_pieces
from vaopd.train.setup import Run, held_out_sampling, weighting_of
from vaopd.types import Example, Group

FINAL_NOISE = 1  # the final evaluation samples with other noise than those that chose the best checkpoint


def evaluate_step(run: Run, step: int) -> tuple[Metrics, list[dict[str, Any]]]:
    """The metrics row of an evaluation, always with the same noise so that those of one run are paired, and its sample rows."""
    config = run.config
    asked = run.held_out[: config.eval.questions]
    engine = sampler(run.student, run.source, held_out_sampling(config, config.seed), rows=config.rollouts.rows)
    scored: list[list[dict[str, list[float]]]] = []

    def score(groups: Sequence[Group]) -> None:
        if run.teacher is not None:
            scored.extend(_score(run, [group.take(_scored_siblings(run, group)) for group in groups], step).groups)

    at_once = max(1, config.rollouts.rows // config.eval.k)
    answers = answer_in_parts(engine, asked, run.renderer, decoder(run.source), k=config.eval.k, at_once=at_once, look=score)
    row: Metrics = {"kind": "eval", "step": step, "questions": len(asked), "k": config.eval.k, **answers.summary(), "va": None, "kl": None}
    if run.teacher is None:
        return row, []
    row |= {"va": Scored(scored).mean("va"), "kl": Scored(scored).mean("kl")}
    return row, [_sample_row(run, step, asked[q], answers, q, scored[q]) for q in range(min(config.eval.samples, len(asked)))]


def better(row: Metrics, best: Metrics) -> bool:
    """By accuracy; where it is equal, or the data has no answers, by the divergence from the teacher; with neither, the later one."""
    if row["accuracy"] != best["accuracy"]:
        return bool(row["accuracy"] > best["accuracy"])
    return row["kl"] is None or bool(row["kl"] < best["kl"])


def final_evaluation(run: Run, on_final: Callable[[str, int, int], None]) -> dict[str, Any]:
    """`eval.json` (docs/run_folder.md): the best weights, which the student now holds, beside the untrained student and the teacher."""
    config = run.config
    models, inside = {"trained": run.student}, dict[str, AbstractContextManager[None]]()
    if config.eval.baselines:
        if adapters(run.student):  # the untrained student is the trained one with its adapters off
            models["student"], inside["student"] = run.student, adapters_off(run.student)
        else:
            models["student"] = load_model(run.source, dtype=torch.float32).to(run.student.device)
        if run.teacher and not config.self_taught:  # of which the untrained student's entry says everything
            models["teacher"], inside["teacher"] = run.teacher.model, run.teacher.present()
    entries = {}
    for name, model in models.items():
        with inside.get(name, nullcontext()):
            entries[name] = evaluate_model(
                model,
                run.source,
                run.test,
                run.renderer,
                held_out_sampling(config, config.seed + FINAL_NOISE),
                k=config.eval.k,
                teacher=run.teacher,
                deadband=config.deadband,
                rows=config.rollouts.rows,
                on_progress=lambda done, of, name=name: on_final(name, done, of),  # type: ignore[misc]
            )
    return summarise(entries, questions=len(run.test), k=config.eval.k)


def summarise(entries: dict[str, dict[str, Any]], *, questions: int, k: int) -> dict[str, Any]:
    """`eval.json` from the models' entries, with the gain of `trained` over `student` where both are graded."""
    curves = {name: entry.pop("mass_curve", None) for name, entry in entries.items()}
    before, after = (entries.get(name, {}).get("per_question") for name in ("student", "trained"))
    return {
        "questions": questions,
        "k": k,
        "models": entries,
        "gain": gain(torch.tensor(before), torch.tensor(after)) if before and after else None,
        "mass_curve": curves.get("student") or curves.get("trained"),
    }


def _scored_siblings(run: Run, group: Group) -> list[int]:
    limit = min(run.config.rollouts.k, SCORED_SIBLINGS)
    return [k for k, response in enumerate(group.responses[:limit]) if len(response)]


def _score(run: Run, groups: Sequence[Group], step: int) -> Scored:
    assert run.teacher is not None  # evaluate_step's own condition
    return score_groups(
        run.student,
        run.teacher,
        groups,
        vocab_size=run.source.vocab_size,
        forward=run.forward,
        tokens_per_forward=run.config.optim.tokens_per_forward,
        weighting=weighting_of(run.config.method, step),
        deadband=run.config.deadband,
        divergence="reverse_kl" if run.config.loss == "nll" else run.config.loss,
    )


def _sample_row(
    run: Run, step: int, example: Example, answers: Answers, question: int, columns: list[dict[str, list[float]]]
) -> dict[str, Any]:
    """One row of samples.jsonl."""
    pieces = token_pieces(run.source.processor.tokenizer)
    group, correct_QK = answers.groups[question], answers.correct_QK
    rollouts = [
        {
            "text": answers.texts[question][k],
            "correct": None if correct_QK is None else bool(correct_QK[question, k]),
            "ended": group.ended_K[k],
            "weight": round(sum(scores["coefficient"]), 5),
            "tokens": pieces(group.responses[k]),
            **scores,
        }
        for k, scores in zip(_scored_siblings(run, group), columns, strict=True)
    ]
    views = zip((decode(source) for source in example.images), run.renderer.degraded_images(example), strict=True)
    pictures = [{"original": run.folder.picture(original), "degraded": run.folder.picture(degraded)} for original, degraded in views]
    return {
        "step": step,
        "id": example.id,
        "problem": example.problem,
        "answer": example.answer,
        "images": pictures,
        "rollouts": rollouts,
    }
