"""The token scores that the report shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from small_pair import Pair, make_group, reference_logits
from vaopd.core import OPD, VAOPD
from vaopd.models.forward import rows
from vaopd.teachers.local import LocalTeacher
from vaopd.train.samples import Scored, score_groups, token_pieces
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt


def score(pair: Pair, groups: list[Group], **options: object) -> Scored:
    teacher = LocalTeacher(pair.teacher, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=150)
    arguments: dict[str, object] = {"weighting": VAOPD(), "deadband": 1e-4, "divergence": "reverse_kl", **options}
    return score_groups(pair.student, teacher, groups, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=150, **arguments)  # type: ignore[arg-type]


def test_every_number_of_every_token(pair: Pair, prompts: list[Prompt]) -> None:
    groups = [
        make_group(prompt, lengths, seed)
        for seed, (prompt, lengths) in enumerate(zip(prompts, [(4, 2), (3,), (5, 1), (2, 2), (6,)], strict=True))
    ]
    for group, rollouts in zip(groups, score(pair, groups).groups, strict=True):
        assert sum(sum(rollout["coefficient"]) for rollout in rollouts) == pytest.approx(1, abs=1e-3)
        for response, rollout in zip(group.responses, rollouts, strict=True):
            with torch.no_grad():
                student, original, degraded = (
                    reference_logits(model, group.prompt, response, view).log_softmax(-1)
                    for model, view in ((pair.student, ORIGINAL), (pair.teacher, ORIGINAL), (pair.teacher, DEGRADED))
                )
            picked = {
                name: logp.gather(1, response[:, None])[:, 0]
                for name, logp in (("logp_student", student), ("logp_teacher", original), ("logp_degraded", degraded))
            }
            expected = {**picked, "kl": (student.exp() * (student - original)).sum(-1)}
            expected["va"] = (picked["logp_teacher"] - picked["logp_degraded"]).clamp(min=0)
            for column, values in expected.items():
                assert rollout[column] == pytest.approx(values.tolist(), abs=2e-4), column
            if not group.prompt.images:
                assert rollout["va"] == [0.0] * len(response)


def test_groups_without_rollouts_keep_their_place(pair: Pair, prompts: list[Prompt]) -> None:
    whole, nothing = make_group(prompts[0], (3, 2)), Group(prompts[1], (), ())
    scored = score(pair, [nothing, whole, nothing], weighting=OPD())
    assert [len(rollouts) for rollouts in scored.groups] == [0, 2, 0]
    assert scored.groups[1][0]["coefficient"] == pytest.approx([1 / 6] * 3, abs=1e-5)
    assert score(pair, [nothing]).groups == [[]]
    assert score(pair, [nothing]).mean("va") is None


def test_the_mean_is_over_tokens() -> None:
    scored = Scored([[{"va": [1.0, 2.0, 3.0]}, {"va": [6.0]}], [], [{"va": [0.0]}]])
    assert scored.mean("va") == pytest.approx(12 / 5)


@given(st.text(max_size=20))
def test_pieces_join_to_the_text(pair: Pair, text: str) -> None:
    """Whatever script: a character of several tokens shows at its last one."""
    tokenizer = pair.source.processor.tokenizer
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)
    pieces = token_pieces(tokenizer)(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)


@given(st.lists(st.integers(0, 500), max_size=12))
def test_any_ids_have_one_piece_each(pair: Pair, ids: list[int]) -> None:
    pieces = token_pieces(pair.source.processor.tokenizer)(torch.tensor(ids, dtype=torch.long))
    assert len(pieces) == len(ids)


def test_control_tokens_show_and_half_a_character_at_the_end_does_too(pair: Pair) -> None:
    tokenizer = pair.source.processor.tokenizer
    pieces = token_pieces(tokenizer)
    assert pieces(torch.tensor([*tokenizer.encode("3 é"), tokenizer.eos_token_id]))[-1] == "<|im_end|>"
    half = tokenizer.encode("é", add_special_tokens=False)[:1]
    assert pieces(torch.tensor(half)) == ["\ufffd"]
