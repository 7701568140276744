"""Which rollouts the page shows, and how: questions as rows, evaluations (before, after, per run) as columns, within a size budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup

from vaopd.report.heat import SHOWN_TOKENS, Token, clip, mean, nice_cap, read_tokens, spans, ticks, token_text
from vaopd.report.pictures import Picture, embed
from vaopd.report.read import Evaluation, Json, Run, items, number

MOST_QUESTIONS, MOST_ROLLOUTS, MOST_IMAGES = 24, 8, 4
Key = tuple[str, str]


@dataclass(frozen=True)
class Column:
    """One evaluation of one run."""

    label: str
    run: Run
    evaluation: Evaluation

    @cached_property
    def by_key(self) -> dict[Key, Json]:
        """The evaluation's rows by question."""
        return {key(row): row for row in self.evaluation.rows}


@dataclass(frozen=True)
class RolloutView:
    """One rollout as the template shows it."""

    spans: Markup
    mark: str  # correct | wrong | ungraded
    ended: bool | None
    weight: float | None
    va: float | None
    kl: float | None
    length: int
    hidden_tokens: int
    visual: tuple[tuple[str, float], ...]  # the tokens of highest advantage


@dataclass(frozen=True)
class QuestionView:
    """One question with its pictures, (original, degraded) each, and a list of rollouts per column (None: not sampled there)."""

    id: str
    problem: str
    answer: str | None
    pictures: list[tuple[Picture | None, Picture | None]]
    cells: list[list[RolloutView] | None]
    hidden_rollouts: int
    hidden_images: int
    size: int  # characters of the page that it takes, roughly


@dataclass(frozen=True)
class SamplesView:
    """Everything the rollouts' section needs."""

    columns: list[str]
    questions: list[QuestionView]
    total: int  # questions of the first column's evaluation
    rollouts: int
    cap_va: float
    cap_kl: float
    scored: bool  # whether any token has a visual advantage
    steps: str

    @property
    def ticks(self) -> dict[str, list[tuple[int, str]]]:
        """(level, nats) of both legends."""
        return {"v": ticks(self.cap_va), "k": ticks(self.cap_kl)}


def key(row: Json) -> Key:
    """What makes two rows the same question."""
    return str(row.get("id")), str(row.get("problem"))


def rollouts_of(row: Json) -> list[Json]:
    """A row's rollouts that have tokens; an empty response has nothing to shade."""
    return [r for r in items(row.get("rollouts")) if isinstance(r, dict) and items(r.get("tokens"))]


def texts(evaluation: Evaluation) -> list[list[str]]:
    """The rollouts' texts, to see whether two runs started from the same student with the same samples."""
    return [[str(r.get("text")) for r in rollouts_of(row)] for row in evaluation.rows]


def columns_of(runs: Sequence[Run], names: Sequence[str]) -> list[Column]:
    """Before and after of each run; one common "before" where the runs started with the very same rollouts."""
    sampled = [(run, name) for run, name in zip(runs, names, strict=True) if run.first]
    many = len(runs) > 1
    starts = [texts(run.first) for run, _ in sampled if run.first]
    common = len(starts) > 1 and all(s == starts[0] for s in starts)
    out: list[Column] = []
    for i, (run, name) in enumerate(sampled):
        if run.first and not (common and i):
            what = (
                ("student" if common else f"{name}, before") if many else "before training" if run.first.step == 0 else "first evaluation"
            )
            out.append(Column(f"{what} (step {run.first.step})", run, run.first))
        if run.last:
            out.append(Column(f"{f'{name}' if many else 'after training'} (step {run.last.step})", run, run.last))
    return out


def visual_tokens(tokens: Iterable[Token], most: int = 3) -> tuple[tuple[str, float], ...]:
    """The tokens of highest advantage, as text: the shading for those who can't see it."""
    ranked = sorted(((t.va, t.text) for t in tokens if t.va and t.va >= 0.005), key=lambda pair: -pair[0])
    return tuple((token_text(clip(text.strip() or text, 24)), va) for va, text in ranked[:most])


def rollout_view(rollout: Json, siblings: int, caps: tuple[float, float]) -> RolloutView:
    """A rollout with its first `SHOWN_TOKENS` tokens shaded; the means are over all of them."""
    tokens = read_tokens(rollout, siblings)
    correct, ended = rollout.get("correct"), rollout.get("ended")
    return RolloutView(
        spans=spans(tokens[:SHOWN_TOKENS], *caps),
        mark="correct" if correct is True else "wrong" if correct is False else "ungraded",
        ended=ended if isinstance(ended, bool) else None,
        weight=number(rollout.get("weight")),
        va=mean(t.va for t in tokens),
        kl=mean(t.kl for t in tokens),
        length=len(tokens),
        hidden_tokens=max(0, len(tokens) - SHOWN_TOKENS),
        visual=visual_tokens(tokens),
    )


def cell_view(row: Json | None, caps: tuple[float, float]) -> list[RolloutView] | None:
    """A question's rollouts in one column."""
    if row is None:
        return None
    rollouts = rollouts_of(row)
    return [rollout_view(r, len(rollouts), caps) for r in rollouts[:MOST_ROLLOUTS]]


def question_view(wanted: Key, columns: Sequence[Column], caps: tuple[float, float]) -> QuestionView:
    """One question over all columns. Its pictures come from the first column that has it."""
    rows = [column.by_key.get(wanted) for column in columns]
    home, row = next((c.run, r) for c, r in zip(columns, rows, strict=True) if r is not None)
    views = [v if isinstance(v, dict) else {} for v in items(row.get("images"))]
    pictures = [(embed(home.path, v.get("original")), embed(home.path, v.get("degraded"))) for v in views[:MOST_IMAGES]]
    cells = [cell_view(r, caps) for r in rows]
    answer = row.get("answer")
    spent = sum(len(r.spans) + 600 for cell in cells for r in cell or []) + sum(len(p.uri) for pair in pictures for p in pair if p)
    return QuestionView(
        id=clip(row.get("id"), 60),
        problem=clip(str(row.get("problem", "")).replace("<image>", "").strip(), 1500),
        answer=None if answer is None else clip(answer, 200),
        pictures=pictures,
        cells=cells,
        hidden_rollouts=sum(max(0, len(rollouts_of(r)) - MOST_ROLLOUTS) for r in rows if r),
        hidden_images=max(0, len(views) - MOST_IMAGES),
        size=spent + 1500,
    )


def scores(columns: Sequence[Column], name: str) -> Iterator[float]:
    """All known values of one score over the kept rollouts."""
    for column in columns:
        for row in column.evaluation.rows:
            for rollout in rollouts_of(row):
                yield from (v for v in map(number, items(rollout.get(name))) if v is not None)


def within(budget: int, questions: Iterable[QuestionView]) -> list[QuestionView]:
    """As many questions as fit, in order."""
    kept: list[QuestionView] = []
    for question in questions:
        budget -= question.size
        if budget < 0 or len(kept) == MOST_QUESTIONS:
            break
        kept.append(question)
    return kept


def choose(runs: Sequence[Run], names: Sequence[str], budget: int) -> SamplesView:
    """The samples of the first and the last evaluation of each run, as many questions as fit into `budget` characters."""
    columns = columns_of(runs, names)
    known = list(scores(columns, "va"))
    caps = nice_cap(known), nice_cap(scores(columns, "kl"))
    latest = next((c for c in columns if c.run.last is c.evaluation), columns[0] if columns else None)
    wanted = list(dict.fromkeys(key(row) for row in latest.evaluation.rows)) if latest else []
    questions = within(budget, (question_view(k, columns, caps) for k in wanted))
    evaluations = max((run.sampled_steps for run in runs), default=0)
    return SamplesView(
        columns=[c.label for c in columns],
        questions=questions,
        total=latest.evaluation.total if latest else 0,
        rollouts=sum(len(cell or []) for q in questions for cell in q.cells),
        cap_va=caps[0],
        cap_kl=caps[1],
        scored=bool(known),
        steps=f"the first and the last of {evaluations} evaluations" if evaluations > 1 else "the only evaluation so far",
    )
