"""Every probe on a case whose answer is worked out by hand, and all of them together on a small pair of models."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from small_pair import Pair, make_group, mixed_examples, reference_logits
from vaopd.analysis.gradients import WEIGHTINGS
from vaopd.analysis.probe_models import Loaded, load, measure, probe, probe_folder
from vaopd.analysis.probes import (
    by_class,
    effective,
    masked_tokens,
    masking,
    next_token_entropy,
    reliance,
    repetition,
    share_of,
    split_mean,
    token_class,
)
from vaopd.analysis.view_table import strip, view_table
from vaopd.config import ViewConfig
from vaopd.core import OPD, VAOPD, Head
from vaopd.data.sources import read_examples
from vaopd.errors import ConfigError, DataError
from vaopd.evaluate.runner import mass_curve
from vaopd.models.forward import rows
from vaopd.rollouts.hf import Sampling
from vaopd.teachers.local import LocalTeacher
from vaopd.types import DEGRADED, ORIGINAL, Example
from vaopd.views import VIEWS, View, view

# Two responses of ten tokens to one prompt: one token of each holds nearly all the advantage.
A = torch.tensor([3.0, *[0.1] * 9, *[0.2] * 9, 5.0])
KL = torch.tensor([2.0, *[1.0] * 9, *[1.0] * 9, 4.0])
ROLLOUT, GROUP = torch.tensor([0] * 10 + [1] * 10), torch.tensor([0, 0])


# --- pure probes ------------------------------------------------------------------------------------------------------


def test_shares() -> None:
    found = share_of(torch.tensor([True, False, True, False]), kl=torch.tensor([1.0, 2.0, 3.0, 4.0]), va=torch.zeros(4))
    assert found == {"tokens": 0.5, "kl": pytest.approx(0.4), "va": None}


def test_masked_tokens_are_chosen_inside_each_response() -> None:
    assert masked_tokens(A, ROLLOUT, GROUP, "top").nonzero().flatten().tolist() == [0, 19]
    assert masked_tokens(A, ROLLOUT, GROUP, "lowest").nonzero().flatten().tolist() == [1, 10]  # ties in token order
    drawn = [masked_tokens(A, ROLLOUT, GROUP, "random", seed=seed) for seed in range(20)]
    assert all(mask[:10].sum() == mask[10:].sum() == 1 for mask in drawn)
    assert len({tuple(mask.tolist()) for mask in drawn}) > 10


def test_masking_by_hand() -> None:
    found = masking(A, KL, ROLLOUT, GROUP)
    mass_va, mass_kl = 3 + 0.9 + 1.8 + 5, 24
    assert found["top"] == {"tokens": 0.1, "kl": pytest.approx(6 / mass_kl), "va": pytest.approx(8 / mass_va)}
    assert found["lowest"] == {"tokens": 0.1, "kl": pytest.approx(2 / mass_kl), "va": pytest.approx(0.3 / mass_va)}
    assert found["random"]["tokens"] == 0.1


def test_nothing_to_mask_without_an_advantage() -> None:
    found = masking(torch.zeros(20), KL, ROLLOUT, GROUP)
    assert found["top"] == found["random"] == found["lowest"] == {"tokens": 0.0, "kl": 0.0, "va": None}


def test_mass_curve_by_hand() -> None:
    curve = mass_curve(torch.tensor([1.0, 6.0, 0.0, 3.0]), points=5)
    assert curve["mass"] == pytest.approx([0, 0.6, 0.9, 1, 1])


def test_means_of_visual_and_other_tokens() -> None:
    found = split_mean(torch.tensor([1.0, -2.0, 4.0]), torch.tensor([True, False, True]))
    assert found == {"all": 1.0, "visual": 2.5, "other": -2.0}
    assert split_mean(torch.tensor([1.0]), torch.tensor([False]))["visual"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 12", "number"),
        ("x2", "number"),
        ("½", "other"),
        (" sides", "word"),
        ("été", "word"),
        ("三", "word"),
        (".", "punctuation"),
        (" +=", "punctuation"),
        ("€", "punctuation"),
        ("", "other"),
        (" \n", "other"),
        ("<|im_end|>", "other"),
        ("\ufffd", "other"),
    ],
)
def test_token_classes(text: str, expected: str) -> None:
    assert token_class(text) == expected


def test_shares_by_class() -> None:
    found = by_class(["The", " 4", ".", " 5"], kl=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert list(found) == ["number", "word", "punctuation"]
    assert found["number"] == {"tokens": 0.5, "kl": pytest.approx(0.6)}
    assert sum(share["kl"] or 0 for share in found.values()) == pytest.approx(1)


def test_effective_rollouts() -> None:
    # Four siblings of one token with the paper's mean advantages: w = 0.656, 0.206, 0.095, 0.044.
    a_N, rollout_N, group_R = torch.tensor([0.045, 0.030, 0.020, 0.010]), torch.arange(4), torch.zeros(4, dtype=torch.long)
    expected = 1 / (0.656**2 + 0.206**2 + 0.095**2 + 0.044**2)
    assert effective(a_N, rollout_N, group_R, VAOPD()) == {
        "mean": pytest.approx(expected, rel=3e-3),
        "min": pytest.approx(expected, rel=3e-3),
    }
    assert effective(a_N, rollout_N, group_R, OPD())["mean"] == pytest.approx(4)


def test_entropy_by_hand() -> None:
    # Logits 0 everywhere: log V. Logits (log 3, 0): p = 3/4, 1/4. The third row is padding and carries no probability.
    head = Head(torch.tensor([[math.log(3)], [0.0], [50.0]]), vocab_size=2)
    expected = [math.log(2), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    hidden = torch.tensor([[0.0], [1.0]])
    assert next_token_entropy(hidden, head).tolist() == pytest.approx(expected)
    assert next_token_entropy(hidden, head, chunk=1).tolist() == pytest.approx(expected)


def test_repetition_by_hand() -> None:
    assert repetition(torch.tensor([1, 2, 1, 2, 1]), n=2) == pytest.approx(0.5)  # 12 21 12 21: two of four came before
    assert repetition(torch.arange(9)) == 0
    assert repetition(torch.arange(3)) == 0


def test_reliance_by_hand() -> None:
    found = reliance({"accuracy": 0.75, "blind_degraded": 0.5, "blind_removed": 0.25})
    assert found == {"seeing": 0.75, "degraded": 0.5, "removed": 0.25, "lost_degraded": 0.25, "lost_removed": 0.5}
    assert set(reliance({"accuracy": None, "blind_degraded": 0.5, "blind_removed": None}).values()) == {None, 0.5}


# --- on models --------------------------------------------------------------------------------------------------------


def loaded(pair: Pair, name: str) -> Loaded:
    model = copy.deepcopy(getattr(pair, name))  # a teacher is frozen, and the pair is everybody's
    return Loaded(name, pair.source, LocalTeacher(model, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=4096))


def groups_of(pair: Pair, count: int = 3) -> list[Any]:
    return [make_group(pair.renderer(example), (5, 3), seed) for seed, example in enumerate(mixed_examples()[:count])]


def test_every_column_equals_transformers_own(pair: Pair) -> None:
    [group] = groups_of(pair, 1)
    found = measure(loaded(pair, "student"), loaded(pair, "teacher"), [], [group], 0.0)

    def logp(model: Any, view_name: str) -> torch.Tensor:
        return torch.cat(
            [reference_logits(model, group.prompt, y, view_name)[:, : pair.vocab_size].log_softmax(-1) for y in group.responses]
        )

    own, scored = logp(pair.student, ORIGINAL), logp(pair.teacher, ORIGINAL)
    ids = group.ids_N[:, None]
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        gap_N = (logp(model, ORIGINAL) - logp(model, DEGRADED)).gather(1, ids)[:, 0]
        assert torch.allclose(found.gap_N[name], gap_N, atol=1e-4), name
    assert torch.allclose(found.a_N, found.gap_N["teacher"].clamp(min=0))
    assert torch.allclose(found.kl_N, (own.exp() * (own - scored)).sum(-1), atol=1e-4)
    assert torch.allclose(found.entropy_N, -(own.exp() * own).sum(-1), atol=1e-4)


def test_many_questions_are_those_of_each(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, models = groups_of(pair), (loaded(pair, "student"), loaded(pair, "teacher"), [])
    whole = measure(*models, groups, 1e-4)
    monkeypatch.setattr("vaopd.analysis.probe_models.QUESTIONS_AT_ONCE", 1)
    parts = measure(*models, groups, 1e-4)
    assert torch.allclose(whole.a_N, parts.a_N, atol=1e-4)
    assert torch.allclose(whole.kl_N, parts.kl_N, atol=1e-4)


def test_the_view_table(pair: Pair) -> None:
    examples = [example for example in mixed_examples() if example.images]
    groups = [make_group(pair.renderer(example), (5, 3), seed) for seed, example in enumerate(examples)]
    same: View = lambda image, *, shown_size=None: image.convert("RGB")  # noqa: E731
    teacher = loaded(pair, "teacher").scorer
    reference = measure(loaded(pair, "student"), loaded(pair, "teacher"), [], groups, 1e-4).a_N
    processor, views = pair.source.processor, {"pixelate": view("pixelate"), "black": view("black"), "same": same}
    table = view_table(teacher, processor, examples[::-1], groups, views, reference, 1e-4)
    assert table["same"] == {"va": 0.0, "va_top10": None, "same_tokens": None}
    assert table["pixelate"]["va"] == pytest.approx(float(reference.mean()), rel=1e-3)
    assert table["pixelate"]["same_tokens"] == 1
    assert table["black"]["va"] not in (0, table["pixelate"]["va"])


def test_the_picture_of_all_views() -> None:
    image = mixed_examples()[0].images[0]
    from vaopd.data.images import decode

    drawn = strip(decode(image), {name: view(name) for name in VIEWS})
    assert drawn.width > 8 * 150
    assert drawn.getpixel((0, 0)) == (255, 255, 255)
    assert drawn.getpixel((drawn.width - 20, 40)) == (0, 0, 0)  # the last view is black


def options(**changes: Any) -> dict[str, Any]:
    return {"weightings": None, "view_config": ViewConfig(), "sampling": Sampling(6, 1.0, 1.0, 1), "k": 2, "rows": 64, **changes}


def test_all_probes_of_a_folder(pair: Pair, data: dict[str, str]) -> None:
    told: list[tuple[int, int]] = []
    result = probe_folder(
        str(pair.student_folder),
        Path(data["eval"]),
        teacher=str(pair.teacher_folder),
        others=[str(pair.student_folder), str(pair.teacher_folder)],
        views=["grey", "pixelate"],
        on_progress=lambda done, of: told.append((done, of)),
        **options(),
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert told == [(i, 5) for i in range(1, 6)]
    assert (result["questions"], result["k"], result["view"]["name"]) == (3, 2, "pixelate")
    assert list(result["fixed_responses"]) == [str(pair.student_folder), str(pair.teacher_folder)]
    assert result["views"]["pixelate"]["va"] == pytest.approx(result["va"], rel=1e-3)
    assert 0 < result["tokens"] <= 6
    assert result["visual"]["va"] >= result["masking"]["top"]["va"] > result["masking"]["lowest"]["va"]
    assert sum(share["kl"] for share in result["classes"].values()) == pytest.approx(1)
    assert result["entropy"]["all"] < math.log(pair.vocab_size)
    assert set(result["reliance"]) == {"seeing", "degraded", "removed", "lost_degraded", "lost_removed"}


def test_gradients_need_a_question_for_each_batch(pair: Pair, data: dict[str, str]) -> None:
    """Said before anything is sampled: the three questions of the file are fewer than the eight batches."""
    student = loaded(pair, "student")
    with pytest.raises(DataError, match="8 batches of questions, but only 3 have a picture"):
        probe(student, student, read_examples(data["eval"]), **options(weightings=WEIGHTINGS))


def test_gradients_are_measured_on_request(pair: Pair, data: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaopd.analysis.gradients.BATCHES", 3)
    student, teacher = loaded(pair, "student"), loaded(pair, "teacher")
    told: list[tuple[int, int]] = []
    asked = read_examples(data["eval"])
    weightings = {"opd": WEIGHTINGS["opd"], "va_opd(tau=2)": VAOPD(tau=2)}
    result = probe(student, teacher, asked, on_progress=lambda done, of: told.append((done, of)), **options(weightings=weightings))
    assert list(result["gradients"]) == list(weightings)
    assert told[-1] == (5, 5)
    assert result["gradients"]["opd"]["norm"] > 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_model_that_scores_itself_has_no_divergence(pair: Pair, data: dict[str, str]) -> None:
    [student] = load([str(pair.student_folder)])
    examples = read_examples(data["eval"])
    ungraded = [Example(e.id, e.images, e.problem) for e in examples]
    result = probe(student, student, ungraded, **options())
    assert result["kl"]["all"] == pytest.approx(0, abs=1e-5)
    assert result["reliance"] == dict.fromkeys(("seeing", "degraded", "removed", "lost_degraded", "lost_removed"))
    assert "views" not in result


def test_mistakes(pair: Pair, data: dict[str, str]) -> None:
    student = loaded(pair, "student")
    with pytest.raises(DataError, match="no question has a picture"):
        probe(student, student, [Example("q", (), "What?")], **options())
    wrong: dict[str, Any] = {"others": [], "views": ["blr"], "on_progress": lambda done, of: None, **options()}
    with pytest.raises(ConfigError, match="Did you mean 'blur'"):
        probe_folder("x", Path(data["eval"]), teacher="y", **wrong)
