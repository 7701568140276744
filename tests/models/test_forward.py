"""The states that predict the responses, against transformers' own whole forward, one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from small_pair import Pair, make_group, picture, random_responses, reference_logits, reference_states
from vaopd.models import families, forward
from vaopd.models.forward import continue_positions, head_of, micro_batches, padded_tokens, rows
from vaopd.models.shared_prompt import packed_tokens
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt

RAGGED = [(4, 1, 7), (3, 3), (5, 2), (2, 6, 1), (1, 4)]  # lengths of the siblings of each prompt


@pytest.fixture
def groups(prompts: list[Prompt]) -> list[Group]:
    return [make_group(prompt, lengths, seed) for seed, (prompt, lengths) in enumerate(zip(prompts, RAGGED, strict=True))]


def reference(model: Any, groups: list[Group], view: str) -> Tensor:
    with torch.no_grad():
        return torch.cat([reference_states(model, group.prompt, response, view) for group in groups for response in group.responses])


def error(model: Any, groups: list[Group], view: str = ORIGINAL) -> float:
    with torch.no_grad():
        return float((rows(model, groups, view) - reference(model, groups, view)).abs().max())


@pytest.mark.parametrize("view", [ORIGINAL, DEGRADED])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_logits_are_transformers_own_at_the_places_that_predict_each_token(pair: Pair, groups: list[Group], which: str, view: str) -> None:
    model = getattr(pair, which)
    with torch.no_grad():
        ours_NV = head_of(model, pair.vocab_size).logits(rows(model, groups, view))
        theirs_NV = torch.cat([reference_logits(model, g.prompt, r, view) for g in groups for r in g.responses])
    # Logits are of size 3 here, and how a sum of 96 is rounded depends on the processor: 1.0e-5 has been seen.
    torch.testing.assert_close(ours_NV, theirs_NV, rtol=1e-5, atol=1e-5)


def test_the_processors_own_output_gives_the_same_logits(pair: Pair) -> None:
    """Nothing of ours on the other side: chat template, processor, model."""
    processor, image, problem = pair.source.processor, picture(48, 32, 7), "Find the perimeter of the figure."
    chat = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": problem}]}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[chat], images=[image], return_tensors="pt")
    assert {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"} <= inputs.keys()
    (response,) = random_responses([6])
    ids = torch.cat([inputs.pop("input_ids"), response[None]], dim=1)
    prompt_length = inputs.pop("attention_mask").shape[1]
    types = (ids == pair.student.config.image_token_id).long()
    if "mm_token_type_ids" in inputs:
        torch.testing.assert_close(inputs.pop("mm_token_type_ids"), types[:, :prompt_length], check_dtype=False)
    prompt = Prompt("p", ids[0, :prompt_length], {ORIGINAL: dict(inputs)})
    with torch.no_grad():
        logits = pair.student(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **inputs).logits
        ours = head_of(pair.student, pair.vocab_size).logits(rows(pair.student, [Group(prompt, (response,), (True,))], ORIGINAL))
    torch.testing.assert_close(ours, logits[0, prompt_length - 1 : -1], rtol=1e-5, atol=1e-5)


def test_the_two_views_differ_wherever_there_is_an_image(pair: Pair, groups: list[Group]) -> None:
    with torch.no_grad():
        original, degraded = (rows(pair.student, groups, view) for view in (ORIGINAL, DEGRADED))
    start = 0
    for group in groups:
        tokens = slice(start, start := start + len(group.ids_N))
        distance = (original[tokens] - degraded[tokens]).abs().amax(dim=1)
        if group.prompt.images:
            assert float(distance.min()) > 1e-2
        else:
            assert float(distance.max()) < 1e-5


def test_empty_responses_have_no_states(pair: Pair, prompts: list[Prompt]) -> None:
    responses = random_responses((3, 2))
    empty = responses[0][:0]
    padded = Group(prompts[0], (empty, responses[0], empty, responses[1]), (True,) * 4)
    plain = Group(prompts[0], responses, (True,) * 2)
    torch.testing.assert_close(rows(pair.student, [padded], ORIGINAL), rows(pair.student, [plain], ORIGINAL), rtol=0, atol=1e-5)


def test_a_view_that_was_not_rendered_is_refused(pair: Pair, prompts: list[Prompt]) -> None:
    prompt = Prompt("only original", prompts[0].ids_P, {ORIGINAL: prompts[0].images[ORIGINAL]})
    with pytest.raises(ValueError, match="only original"):
        rows(pair.student, [make_group(prompt, (2,))], DEGRADED)


def test_the_gradient_is_that_of_rows_run_one_by_one(pair: Pair, groups: list[Group]) -> None:
    """Above all of the vision tower, which runs once per image here and once per rollout there."""
    direction = torch.randn(sum(len(g.ids_N) for g in groups), 48, generator=torch.Generator().manual_seed(0))
    ours, theirs = pair.fresh(), pair.fresh()
    (rows(ours, groups, ORIGINAL) * direction).sum().backward()
    parts = iter(direction.split([length for group in groups for length in group.lengths]))
    for group in groups:
        for response in group.responses:
            (reference_states(theirs, group.prompt, response) * next(parts)).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[name].grad
        assert expected is not None, name
        assert parameter.grad is not None, name
        # A key's bias shifts all scores of a row alike: its gradient is rounding, so the bound has a part relative to the whole.
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())), msg=name)
    assert float(gradients["model.visual.patch_embed.proj.weight"].grad.abs().max()) > 1e-2


# --- planted faults: what these tests would say if the forward were wrong ---------------------------------------------


def shifted_by_one(patch: pytest.MonkeyPatch) -> None:
    whole = forward._predicting
    patch.setattr(forward, "_predicting", lambda siblings, length: whole(siblings, length).roll(-1, dims=1))


def positions_from_the_token_count(patch: pytest.MonkeyPatch) -> None:
    def wrong(positions_AP: Tensor, count: int) -> Tensor:
        axes, length = positions_AP.shape
        return torch.cat([positions_AP, (length + torch.arange(max(count, 0))).expand(axes, -1)], dim=1)

    patch.setattr(forward, "continue_positions", wrong)


def views_swapped(patch: pytest.MonkeyPatch) -> None:
    whole = forward.view_images
    patch.setattr(forward, "view_images", lambda prompt, view: whole(prompt, DEGRADED if view == ORIGINAL else ORIGINAL))


def features_of_the_first_image(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: families.Qwen3VL, model: Any, prompts: Any, images: Any, repeats: Any) -> dict[str, Any]:
        return whole(self, model, prompts, [images[0]] * len(images), repeats)

    whole = families.Qwen3VL.encode_images
    patch.setattr(families.Qwen3VL, "encode_images", wrong)


def features_repeated_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    """Image 1, image 2, image 1, image 2 … for the rows of prompt 1, prompt 1, prompt 2, prompt 2 …"""

    def wrong(self: families.Qwen3VL, model: Any, prompts: Any, images: Any, repeats: Any) -> dict[str, Any]:
        return whole(self, model, list(prompts) * repeats[0], list(images) * repeats[0], [1] * (len(images) * repeats[0]))

    whole = families.Qwen3VL.encode_images
    patch.setattr(families.Qwen3VL, "encode_images", wrong)


def no_deepstack(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: families.Qwen3VL, *arguments: Any) -> dict[str, Any]:
        outputs = whole(self, *arguments)
        features = outputs["mm_encoder_outputs"]["image"]
        features.deepstack_features = [tuple(torch.zeros_like(part) for part in level) for level in features.deepstack_features]
        return outputs

    whole = families.Qwen3VL.encode_images
    patch.setattr(families.Qwen3VL, "encode_images", wrong)


def padding_is_attended_from_the_left(patch: pytest.MonkeyPatch) -> None:
    whole = forward.pad_sequence
    patch.setattr(forward, "pad_sequence", lambda rows, batch_first: whole(rows, batch_first=batch_first, padding_side="left"))


@pytest.mark.parametrize(
    "plant",
    [
        shifted_by_one,
        positions_from_the_token_count,
        views_swapped,
        features_of_the_first_image,
        features_repeated_in_the_wrong_order,
        no_deepstack,
        padding_is_attended_from_the_left,
    ],
)
def test_a_planted_fault_shows(
    pair: Pair, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Two prompts of one grid and equal lengths, so that a fault changes numbers and not shapes."""
    groups = [make_group(prompts[0], (4, 6), seed=1), make_group(prompts[4], (5, 3), seed=2)]
    assert error(pair.student, groups) < 1e-5
    plant(monkeypatch)
    assert error(pair.student, groups) > 1e-2


# --- positions, head, micro-batches -----------------------------------------------------------------------------------


def test_positions_go_on_at_the_largest_plus_one_on_every_axis() -> None:
    prompt = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    assert continue_positions(prompt, 3).tolist() == [[0, 1, 1, 1, 1, 3, 4, 5, 6], [0, 1, 1, 2, 2, 3, 4, 5, 6], [0, 1, 2, 1, 2, 3, 4, 5, 6]]
    assert continue_positions(prompt, 0).shape == (3, 6)
    assert continue_positions(prompt, -1).shape == (3, 6)


def test_a_padded_head_is_cut_to_the_tokenizers_ids(pair: Pair, groups: list[Group]) -> None:
    """Rows of a checkpoint beyond the tokenizer's ids, here large enough to take all of the probability if they were read."""
    padded = pair.fresh()
    padded.resize_token_embeddings(pair.vocab_size + 11, mean_resizing=False)
    with torch.no_grad():
        padded.get_output_embeddings().weight[pair.vocab_size :] = 50.0
    head = head_of(padded, pair.vocab_size)
    assert head.size == pair.vocab_size
    with torch.no_grad():
        ours, plain = (head_of(m, pair.vocab_size).logits(rows(m, groups[:1], ORIGINAL)) for m in (padded, pair.student))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert ours.shape[1] == pair.vocab_size


def fake_groups(prompt_lengths: list[int], response_lengths: list[list[int]]) -> list[Group]:
    groups, token = [], 0
    for index, (length, siblings) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        responses = []
        for size in siblings:
            responses.append(torch.arange(token, token := token + size))
        groups.append(
            Group(Prompt(str(index), torch.zeros(length, dtype=torch.long)), tuple(responses), tuple(s % 2 == 0 for s in siblings))
        )
    return groups


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(0, 20), min_size=0, max_size=5)), min_size=1, max_size=6),
    st.integers(1, 400),
    st.sampled_from([padded_tokens, packed_tokens]),
)
def test_micro_batches_keep_order_and_budget(shape: list[tuple[int, list[int]]], budget: int, count: Callable[..., int]) -> None:
    groups = fake_groups([length for length, _ in shape], [siblings for _, siblings in shape])
    batches = list(micro_batches(groups, budget, count))
    flat = [(g.prompt.id, r.tolist(), e) for g in groups for r, e in zip(g.responses, g.ended_K, strict=True)]
    again = [(g.prompt.id, r.tolist(), e) for batch in batches for g in batch for r, e in zip(g.responses, g.ended_K, strict=True)]
    assert again == flat
    for batch in batches:
        lengths = [len(group.prompt.ids_P) + len(response) for group in batch for response in group.responses]
        assert lengths, "an empty micro-batch"
        size = len(lengths) * max(lengths) if count is padded_tokens else sum(len(g.prompt.ids_P) + sum(g.lengths) for g in batch)
        assert size <= budget or len(lengths) == 1


def test_packed_batches_are_larger() -> None:
    """P = 10, T = 5, K = 5: a row has 15 tokens, so 60 hold four rows; packed, they hold a group of 35 and three siblings of the next."""
    groups = fake_groups([10, 10], [[5] * 5, [5] * 5])
    assert [[len(g.responses) for g in batch] for batch in micro_batches(groups, 60)] == [[4], [1, 3], [2]]
    assert [[len(g.responses) for g in batch] for batch in micro_batches(groups, 60, packed_tokens)] == [[5, 3], [2]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400))
def test_micro_batches_are_filled(budget: int) -> None:
    """The next rollout would not have fitted: no budget is left unused."""
    groups = fake_groups([10, 12, 8], [[3, 5, 9], [1, 1], [7, 2, 4, 6]])
    batches = [[(len(g.prompt.ids_P) + len(r)) for g in batch for r in g.responses] for batch in micro_batches(groups, budget)]
    for batch, following in pairwise(batches):
        longer = [*batch, following[0]]
        assert len(longer) * max(longer) > budget


@pytest.mark.parametrize(("budget", "least", "most"), [(1, 12, 12), (70, 2, 11), (100, 2, 11), (10_000, 1, 1)])
def test_states_of_micro_batches_join_to_the_whole(pair: Pair, groups: list[Group], budget: int, least: int, most: int) -> None:
    with torch.no_grad():
        parts = [rows(pair.student, batch, ORIGINAL) for batch in micro_batches(groups, budget)]
        whole = rows(pair.student, groups, ORIGINAL)
    assert least <= len(parts) <= most
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)
