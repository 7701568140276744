"""The evaluation of a model: what it sees under each condition, and that its numbers are those of its answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from small_pair import Pair, mixed_examples, write_data
from vaopd.analysis.probe_models import load
from vaopd.config import ViewConfig
from vaopd.data.sources import read_examples
from vaopd.errors import ModelError
from vaopd.evaluate import held_out
from vaopd.evaluate.command import evaluate_folder
from vaopd.evaluate.held_out import SCORED_SIBLINGS, evaluate_model
from vaopd.evaluate.runner import answer_in_parts, standard_error
from vaopd.models.forward import rows
from vaopd.rollouts.hf import HFEngine, Sampling
from vaopd.teachers.local import LocalTeacher
from vaopd.types import DEGRADED, ORIGINAL, Example, Group, Prompt

SAMPLING = Sampling(6, 1.0, 1.0, seed=5)


@pytest.fixture
def examples(data: dict[str, str]) -> list[Example]:
    return read_examples(data["eval"])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every engine was asked, and what it answered."""
    calls: list[dict[str, Any]] = []
    generate = HFEngine.generate

    def recording(self: HFEngine, prompts: Sequence[Prompt], k: int, step: int) -> list[Group]:
        groups = generate(self, prompts, k, step)
        calls.append({"view": self.view, "prompts": prompts, "k": k, "groups": groups, "forbidden": self.forbidden_V})
        return groups

    monkeypatch.setattr(HFEngine, "generate", recording)
    return calls


def run(pair: Pair, examples: Sequence[Example], teacher: LocalTeacher | None = None, **options: Any) -> dict[str, Any]:
    return evaluate_model(
        pair.student, pair.source, examples, pair.renderer, SAMPLING, **{"k": 3, "teacher": teacher, "deadband": 1e-4, **options}
    )


def make_teacher(pair: Pair) -> LocalTeacher:
    return LocalTeacher(pair.teacher, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=10_000)


def test_the_blind_see_a_degraded_image_or_none(pair: Pair, examples: list[Example], seen: list[dict[str, Any]]) -> None:
    run(pair, examples)
    assert [call["view"] for call in seen] == [ORIGINAL, DEGRADED, ORIGINAL]
    image = pair.source.processor.image_token_id
    with_image, degraded, without = ([p.ids_P for p in call["prompts"]] for call in seen)
    assert all(torch.equal(a, b) for a, b in zip(with_image, degraded, strict=True))
    for ids, blind, prompt in zip(with_image, without, seen[2]["prompts"], strict=True):
        assert int((ids == image).sum()) == 4
        assert image not in blind
        assert not prompt.images
        text = pair.source.processor.tokenizer.decode(blind)
        assert "vision" not in text
        question = text.split("\n")[1].removesuffix("<|im_end|>")
        assert any(example.problem == question for example in examples)
    assert not all(torch.equal(a, b) for a, b in zip(seen[0]["groups"][0].responses, seen[1]["groups"][0].responses, strict=True)), (
        "the degraded view was answered from other pixels"
    )


def test_control_tokens_are_forbidden_under_every_condition(pair: Pair, examples: list[Example], seen: list[dict[str, Any]]) -> None:
    run(pair, examples)
    for call in seen:
        assert call["forbidden"].nonzero().flatten().tolist() == sorted(held_out.control_ids(pair.source))


def test_the_numbers_are_those_of_the_answers(
    pair: Pair, examples: list[Example], monkeypatch: pytest.MonkeyPatch, seen: list[dict[str, Any]]
) -> None:
    """With a grader that calls an answer right when its text has an even number of characters: a random model has no right answers."""
    monkeypatch.setattr("vaopd.evaluate.runner.is_correct", lambda text, answer: len(text) % 2 == 0)
    entry = run(pair, examples)
    decode = held_out.decoder(pair.source)
    for call, key, se in zip(
        seen, ("accuracy", "blind_degraded", "blind_removed"), ("se", "blind_degraded_se", "blind_removed_se"), strict=True
    ):
        right = torch.tensor([[float(len(decode(r)) % 2 == 0) for r in g.responses] for g in call["groups"]], dtype=torch.float64)
        assert entry[key] == pytest.approx(float(right.mean())), key
        assert entry[se] == pytest.approx(standard_error(right.mean(1))), key
    assert entry["per_question"] == [
        pytest.approx(sum(len(decode(r)) % 2 == 0 for r in g.responses) / 3, abs=1e-6) for g in seen[0]["groups"]
    ]
    lengths = [length for group in seen[0]["groups"] for length in group.lengths]
    assert entry["tokens"] == pytest.approx(sum(lengths) / len(lengths))


def test_the_teacher_scores_what_the_model_answered_when_it_saw(pair: Pair, examples: list[Example], seen: list[dict[str, Any]]) -> None:
    teacher = make_teacher(pair)
    entry = run(pair, examples, teacher, k=SCORED_SIBLINGS + 1)
    groups = [Group(g.prompt, g.responses[:SCORED_SIBLINGS], g.ended_K[:SCORED_SIBLINGS]) for g in seen[0]["groups"]]
    scores = teacher.score(groups, (ORIGINAL, DEGRADED))
    a = torch.cat([(s.logp_N[ORIGINAL] - s.logp_N[DEGRADED]).clamp(min=0) for s in scores])
    assert entry["va"] == pytest.approx(float(a.mean()), rel=1e-4)
    assert entry["va"] > 0.1
    assert 0 < entry["va_top10"] <= 1
    assert len(entry["mass_curve"]["mass"]) == 101
    assert run(pair, examples)["va"] is None


def test_text_only_questions_have_no_blind_condition(pair: Pair, examples: list[Example], seen: list[dict[str, Any]]) -> None:
    text = Example("text", (), "How long is the whole outline?", "3")
    entry = run(pair, [text])
    assert [call["view"] for call in seen] == [ORIGINAL]
    assert entry["blind_degraded"] is entry["blind_removed"] is None
    seen.clear()
    run(pair, [text, *examples])
    assert [len(call["prompts"]) for call in seen] == [4, 3, 3]


def test_ungraded_data(pair: Pair, examples: list[Example], seen: list[dict[str, Any]]) -> None:
    entry = run(pair, [Example(e.id, e.images, e.problem) for e in examples])
    assert len(seen) == 1
    assert all(entry[key] is None for key in ("accuracy", "se", "per_question", "blind_degraded", "blind_removed"))
    assert entry["tokens"] > 0


def test_progress_is_told(pair: Pair, examples: list[Example]) -> None:
    told: list[tuple[int, int]] = []
    run(pair, examples, on_progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_only_a_few_questions_are_rendered_at_a_time(pair: Pair, seen: list[dict[str, Any]], at_once: int) -> None:
    """With the same answers and the same scores as all at once; no rendered image outlives its part."""
    examples = [*mixed_examples(), Example("mark alone", mixed_examples()[0].images, "<image>", "3")]
    examples = [replace(example, answer="3") for example in examples]
    teacher = make_teacher(pair)
    whole = run(pair, examples, teacher, k=2, rows=64)
    responses = [response.tolist() for call in seen for group in call["groups"] for response in group.responses]
    seen.clear()
    parts = run(pair, examples, teacher, k=2, rows=2 * at_once)
    assert max(len(call["prompts"]) for call in seen) == min(at_once, 6)
    assert [response.tolist() for call in seen for group in call["groups"] for response in group.responses] == responses
    assert parts.keys() == whole.keys()
    for key in parts.keys() - {"mass_curve"}:
        assert parts[key] == (whole[key] if whole[key] is None else pytest.approx(whole[key], rel=1e-4)), key
    assert parts["mass_curve"]["mass"] == pytest.approx(whole["mass_curve"]["mass"], abs=1e-4)


def test_answers_keep_no_pictures(pair: Pair, examples: list[Example]) -> None:
    looked = []
    engine = held_out.sampler(pair.student, pair.source, SAMPLING)
    answers = answer_in_parts(
        engine, examples, pair.renderer, held_out.decoder(pair.source), k=2, at_once=2, look=lambda groups: looked.append(groups)
    )
    assert [len(groups) for groups in looked] == [2, 1]
    assert all(group.prompt.images for groups in looked for group in groups)
    assert [group.prompt.id for group in answers.groups] == [example.id for example in examples]
    assert not any(group.prompt.images for group in answers.groups)
    assert answers.correct_QK is not None
    assert answers.correct_QK.shape == (3, 2)
    some = [examples[0], replace(examples[1], answer=None), examples[2]]
    assert answer_in_parts(engine, some, pair.renderer, held_out.decoder(pair.source), k=2, at_once=1).correct_QK is None


def options(**changes: Any) -> dict[str, Any]:
    return {
        **{"k": 2, "teacher": None, "max_tokens": 6, "temperature": 1.0, "rows": 64, "view_config": ViewConfig(), "seed": 5},
        "on_progress": lambda done, of: None,
        **changes,
    }


def test_a_folder_is_evaluated_as_the_model_in_it(pair: Pair, data: dict[str, str], examples: list[Example]) -> None:
    entry = evaluate_folder(str(pair.student_folder), Path(data["eval"]), **options(teacher=str(pair.teacher_folder)))
    expected = run(pair, examples, make_teacher(pair), k=2)
    assert entry.keys() == {"questions", "k"} | expected.keys()
    for key, value in {"questions": 3, "k": 2, **expected}.items():
        if key != "mass_curve":
            assert entry[key] == (value if value is None else pytest.approx(value, rel=1e-4)), key
    assert entry["mass_curve"]["mass"] == pytest.approx(expected["mass_curve"]["mass"], abs=1e-4)


def test_a_folder_and_a_teacher_that_do_not_agree_are_refused(pair: Pair, data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        evaluate_folder(str(pair.student_folder), Path(data["eval"]), **options(teacher=str(tmp_path / "nowhere")))


def test_a_student_with_pixel_limits_of_its_own_is_scored_by_its_teacher(
    pair: Pair, data: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An exported model keeps data.max_pixels, of which the teacher's folder knows nothing; other differences are refused as ever."""
    folder = tmp_path / "trained"
    shutil.copytree(pair.student_folder, folder)
    for name in ("processor_config.json", "preprocessor_config.json"):
        values = json.loads((folder / name).read_text())
        values.get("image_processor", values)["size"] = {"shortest_edge": 256, "longest_edge": 256}
        (folder / name).write_text(json.dumps(values))
    entry = evaluate_folder(str(folder), Path(data["eval"]), **options(teacher=str(pair.teacher_folder)))
    assert entry["va"] > 0
    assert "hold for" in caplog.text
    assert "256 to 256 pixels" in caplog.text
    scored = load([str(folder), str(pair.teacher_folder)])
    assert dict(scored[1].source.processor.image_processor.size) == {"shortest_edge": 256, "longest_edge": 256}
    values = json.loads((folder / "processor_config.json").read_text())
    values["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
    (folder / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="image_mean"):
        evaluate_folder(str(folder), Path(data["eval"]), **options(teacher=str(pair.teacher_folder)))


def test_the_data_set_of_these_tests_is_deterministic(tmp_path: Path, data: dict[str, str]) -> None:
    again = write_data(tmp_path)
    assert [(e.id, e.problem, e.answer) for e in read_examples(again["eval"])] == [
        (e.id, e.problem, e.answer) for e in read_examples(data["eval"])
    ]
