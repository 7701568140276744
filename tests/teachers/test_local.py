"""The teacher's scores against transformers' own logits, one row at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from small_pair import Pair, make_group, random_responses, reference_logits, reference_states
from vaopd.core import token_log_probs
from vaopd.models.forward import rows
from vaopd.teachers import local
from vaopd.teachers.local import LocalTeacher
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt, Scores

VIEWS = (ORIGINAL, DEGRADED)
RAGGED = [(4, 1, 7), (3, 3), (5, 2), (2, 6, 1), (1, 4)]


@pytest.fixture
def groups(prompts: list[Prompt]) -> list[Group]:
    return [make_group(prompt, lengths, seed) for seed, (prompt, lengths) in enumerate(zip(prompts, RAGGED, strict=True))]


def make_teacher(pair: Pair, tokens: int = 10_000, forward: Callable[..., Tensor] = rows) -> LocalTeacher:
    return LocalTeacher(pair.teacher, vocab_size=pair.vocab_size, forward=forward, tokens_per_forward=tokens)


def reference_logp(model: Any, group: Group, view: str) -> Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                reference_logits(model, group.prompt, response, view).log_softmax(-1).gather(1, response[:, None])[:, 0]
                for response in group.responses
            ]
        )


def close(scores: Sequence[Scores], others: Sequence[Scores], tolerance: float = 1e-5) -> None:
    for one, other in zip(scores, others, strict=True):
        torch.testing.assert_close(one.hidden_NG, other.hidden_NG, rtol=0, atol=tolerance)
        for view in one.logp_N:
            torch.testing.assert_close(one.logp_N[view], other.logp_N[view], rtol=0, atol=tolerance)


def test_scores_are_transformers_own(pair: Pair, groups: list[Group]) -> None:
    scores = make_teacher(pair).score(groups, VIEWS)
    for group, score in zip(groups, scores, strict=True):
        with torch.no_grad():
            states = torch.cat([reference_states(pair.teacher, group.prompt, response) for response in group.responses])
        torch.testing.assert_close(score.hidden_NG, states, rtol=0, atol=1e-5)
        assert set(score.logp_N) == set(VIEWS)
        for view in VIEWS:
            torch.testing.assert_close(score.logp_N[view], reference_logp(pair.teacher, group, view), rtol=0, atol=1e-5)
            assert score.logp_N[view].dtype == torch.float32
    pictured = [score for score, group in zip(scores, groups, strict=True) if group.prompt.images]
    assert all(float((s.logp_N[ORIGINAL] - s.logp_N[DEGRADED]).abs().max()) > 0.1 for s in pictured), "the views must differ"


def test_the_head_and_the_states_give_the_log_probabilities(pair: Pair, groups: list[Group]) -> None:
    teacher = make_teacher(pair)
    for group, score in zip(groups, teacher.score(groups, VIEWS), strict=True):
        logp = teacher.head.logits(score.hidden_NG).log_softmax(-1).gather(1, group.ids_N[:, None])[:, 0]
        torch.testing.assert_close(logp.detach(), score.logp_N[ORIGINAL], rtol=0, atol=1e-5)


def test_siblings_each_get_their_own_score(pair: Pair, prompts: list[Prompt]) -> None:
    """Permuted siblings get permuted scores, and equal lengths don't make them equal."""
    responses, order = random_responses((5, 5, 5)), [2, 0, 1]
    group = Group(prompts[0], responses, (True,) * 3)
    turned = Group(prompts[0], tuple(responses[k] for k in order), (True,) * 3)
    (score,), (other) = make_teacher(pair).score([group], VIEWS), make_teacher(pair).score([turned], VIEWS)[0]
    for view in VIEWS:
        parts = score.logp_N[view].split(5)
        torch.testing.assert_close(other.logp_N[view], torch.cat([parts[k] for k in order]), rtol=0, atol=1e-5)
        assert float((parts[0] - parts[1]).abs().min()) > 1e-3
    parts = score.hidden_NG.split(5)
    torch.testing.assert_close(other.hidden_NG, torch.cat([parts[k] for k in order]), rtol=0, atol=1e-5)


def test_groups_keep_their_order(pair: Pair, groups: list[Group]) -> None:
    close(make_teacher(pair).score(groups[::-1], VIEWS)[::-1], make_teacher(pair).score(groups, VIEWS))


@pytest.mark.parametrize("tokens", [1, 60, 100, 250])
def test_batches_do_not_matter(pair: Pair, groups: list[Group], tokens: int) -> None:
    close(make_teacher(pair, tokens).score(groups, VIEWS), make_teacher(pair).score(groups, VIEWS))


def test_every_forward_stays_within_its_budget(pair: Pair, groups: list[Group]) -> None:
    sizes = []

    def counting(model: Any, batch: Sequence[Group], view: str) -> Tensor:
        lengths = [len(group.prompt.ids_P) + len(response) for group in batch for response in group.responses]
        sizes.append((len(lengths), len(lengths) * max(lengths)))
        return rows(model, batch, view)

    make_teacher(pair, 100, counting).score(groups, VIEWS)
    assert len(sizes) >= 8
    assert all(size <= 100 or count == 1 for count, size in sizes)


def test_a_text_only_prompt_has_one_score_for_all_views(pair: Pair, groups: list[Group]) -> None:
    """To the bit, whatever batches the two views are computed in: its visual advantage is 0, not rounding."""
    teacher = make_teacher(pair, 100)
    text = [index for index, group in enumerate(groups) if not group.prompt.images]
    assert text
    scores = teacher.score(groups, VIEWS)
    assert all(torch.equal(scores[index].logp_N[ORIGINAL], scores[index].logp_N[DEGRADED]) for index in text)
    (alone,) = teacher.score([groups[text[0]]], VIEWS)
    assert torch.equal(alone.logp_N[ORIGINAL], alone.logp_N[DEGRADED])


@pytest.mark.parametrize("views", [(), (ORIGINAL,)])
def test_only_what_is_asked_for_is_computed(
    pair: Pair, groups: list[Group], views: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without views the states alone: no product with the head."""
    seen, scored = [], []

    def recording(model: Any, batch: Sequence[Group], view: str) -> Tensor:
        seen.append(view)
        return rows(model, batch, view)

    def counting(hidden_NG: Tensor, *rest: Any) -> Tensor:
        scored.append(len(hidden_NG))
        return token_log_probs(hidden_NG, *rest)

    monkeypatch.setattr(local, "token_log_probs", counting)
    scores = make_teacher(pair, forward=recording).score(groups, views)
    assert seen == [ORIGINAL]
    assert scored == [sum(sum(group.lengths) for group in groups)] * len(views)
    assert all(tuple(score.logp_N) == views for score in scores)
    whole = make_teacher(pair).score(groups, VIEWS)
    assert all(torch.equal(score.hidden_NG, other.hidden_NG) for score, other in zip(scores, whole, strict=True))


def test_padded_rows_carry_no_probability(pair: Pair, groups: list[Group]) -> None:
    padded = pair.fresh()
    padded.resize_token_embeddings(pair.vocab_size + 11, mean_resizing=False)
    with torch.no_grad():
        padded.get_output_embeddings().weight[pair.vocab_size :] = 50.0
    plain, wide = (LocalTeacher(m, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=999) for m in (pair.fresh(), padded))
    close(wide.score(groups, VIEWS), plain.score(groups, VIEWS))


def test_the_teacher_is_frozen(pair: Pair, groups: list[Group]) -> None:
    model = pair.fresh().train()
    teacher = LocalTeacher(model, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=999)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    (score,) = teacher.score(groups[:1], VIEWS)
    assert not score.hidden_NG.requires_grad
    assert not any(logp.requires_grad for logp in score.logp_N.values())
