"""The packed row against one row per rollout: the same states and gradients, the counted work, and every way to get it wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from small_pair import Pair, make_group, random_responses, randomise
from vaopd.core import fused_weighted_divergence
from vaopd.models import families, shared_prompt
from vaopd.models.forward import continue_positions, head_of, micro_batches, rows, view_images
from vaopd.models.shared_prompt import Packed, Spans, pack, shared
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt, ResponseForward

RAGGED = [(4, 1, 7), (3, 3), (5, 2), (2, 6, 1), (1, 4)]  # lengths of the siblings of each prompt
SQUARE, WIDE, TWO_IMAGES, TEXT, SQUARE_AGAIN = range(5)  # the prompts of the fixture


@pytest.fixture
def groups(prompts: list[Prompt]) -> list[Group]:
    return [make_group(prompt, lengths, seed) for seed, (prompt, lengths) in enumerate(zip(prompts, RAGGED, strict=True))]


@pytest.fixture(scope="session")
def grouped_heads(pair: Pair) -> Any:
    """A student whose four query heads share two key heads."""
    config = copy.deepcopy(pair.student.config)
    config.text_config.num_key_value_heads = 2
    return randomise(type(pair.student)._from_config(config, attn_implementation="sdpa"), 3).eval()


def dense(model: Any, groups: Sequence[Group], view: str) -> Tensor:
    """The readable reference: the same packed row under a mask over M × M."""
    family, prompts = families.family_of(model), [group.prompt for group in groups]
    packed = pack(groups, [family.prompt_positions(model, group.prompt) for group in groups])
    group_M, sibling_M = (torch.full_like(packed.ids_M, -1) for _ in range(2))
    for index, spans in enumerate(packed.spans):
        group_M[spans.prompt.start : spans.prompt.stop] = index
        for sibling, own in enumerate(spans.siblings):
            group_M[own.start : own.stop], sibling_M[own.start : own.stop] = index, sibling
    in_prompt_or_same = (sibling_M[None] == -1) | (sibling_M[:, None] == sibling_M[None])
    mask_MM = (group_M[:, None] == group_M[None]) & in_prompt_or_same & torch.ones(len(group_M), len(group_M)).tril().bool()
    body = model.model(
        input_ids=packed.ids_M[None],
        attention_mask=mask_MM[None, None],
        position_ids=packed.positions_AM[:, None],
        use_cache=False,
        **family.encode_images(model, prompts, [view_images(prompt, view) for prompt in prompts], [1] * len(prompts)),
    )
    return body.last_hidden_state[0, packed.predicting_N]


def states(way: ResponseForward, model: Any, groups: Sequence[Group], view: str = ORIGINAL) -> Tensor:
    with torch.no_grad():
        return way(model, groups, view)


def error(model: Any, groups: Sequence[Group], view: str = ORIGINAL) -> float:
    return float((states(shared, model, groups, view) - states(rows, model, groups, view)).abs().max())


def gradients(way: ResponseForward, model: Any, groups: Sequence[Group]) -> dict[str, Tensor]:
    model.zero_grad()
    hidden_NH = way(model, groups, ORIGINAL)
    (hidden_NH * torch.randn(hidden_NH.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative to each parameter's largest gradient, where that is more than rounding."""
    return max(float((ours[name] - theirs[name]).abs().max() / max(1.0, float(theirs[name].abs().max()))) for name in theirs)


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [ORIGINAL, DEGRADED])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_states_are_those_of_rows(pair: Pair, groups: list[Group], which: str, view: str) -> None:
    """Square, wide, two images, no image, all in one forward."""
    model = getattr(pair, which)
    assert error(model, groups, view) < 1e-5
    torch.testing.assert_close(states(dense, model, groups, view), states(rows, model, groups, view), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", range(5))
@pytest.mark.parametrize("lengths", [(6,), (1,), (1, 1, 1), (0, 3, 0, 5), (4, 4, 4, 4)])
def test_one_group(pair: Pair, prompts: list[Prompt], prompt: int, lengths: tuple[int, ...]) -> None:
    """A single sibling, siblings without a token in the row, empty ones, and no padding at all."""
    group = make_group(prompts[prompt], lengths, seed=prompt)
    assert error(pair.student, [group]) < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 9), min_size=1, max_size=5)), min_size=1, max_size=4), st.data())
def test_any_ragged_shape(pair: Pair, prompts: list[Prompt], shape: list[tuple[int, list[int]]], data: st.DataObject) -> None:
    groups = [make_group(prompts[prompt], lengths, seed) for seed, (prompt, lengths) in enumerate(shape)]
    if not any(group.lengths != [0] * len(group.lengths) for group in groups):
        groups.append(make_group(prompts[0], (2,)))
    together = data.draw(st.sampled_from([1, 16, 1024]))  # each group for itself, some, all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prompt, "TOGETHER", together)
        assert error(pair.student, groups) < 1e-5


@pytest.mark.parametrize("budget", [1, 70, 100, 10_000])
def test_any_subset_of_the_siblings(pair: Pair, groups: list[Group], budget: int) -> None:
    parts = [states(shared, pair.student, batch) for batch in micro_batches(groups, budget)]
    torch.testing.assert_close(torch.cat(parts), states(rows, pair.student, groups), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_key_heads_than_query_heads(grouped_heads: Any, groups: list[Group], dtype: torch.dtype) -> None:
    model = copy.deepcopy(grouped_heads).to(dtype)
    ours, theirs = states(shared, model, groups), states(rows, model, groups)
    assert ours.dtype == dtype
    assert float(((ours - theirs).float().norm(dim=1) / theirs.float().norm(dim=1)).max()) < (1e-5 if dtype == torch.float32 else 5e-2)


def test_autocast(pair: Pair, groups: list[Group]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = states(shared, pair.student, groups), states(rows, pair.student, groups)
    assert float(((ours - theirs).float().norm(dim=1) / theirs.float().norm(dim=1)).max()) < 5e-2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("which", ["student", "grouped_heads"])
def test_gradients_are_those_of_rows(pair: Pair, grouped_heads: Any, groups: list[Group], which: str, implementation: str) -> None:
    """Of all parameters: the vision tower runs once per image in both, the prompt once here and once per sibling there."""
    model = pair.fresh() if which == "student" else copy.deepcopy(grouped_heads)
    model.set_attn_implementation(implementation)
    ours, theirs = gradients(shared, model, groups), gradients(rows, model, groups)
    assert largest_difference(ours, theirs) < 5e-6
    assert float(theirs["model.visual.patch_embed.proj.weight"].abs().max()) > 1e-2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(pair: Pair, groups: list[Group], reentrant: bool) -> None:
    """The layers run once more in the backward, after the forward has returned."""
    model, theirs = pair.fresh(), gradients(rows, pair.fresh(), groups)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    runs = [0]
    model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    assert largest_difference(gradients(shared, model, groups), theirs) < 5e-6
    assert runs == [2]
    assert model.get_decoder().config._attn_implementation == "sdpa"


def test_replayed_rollouts_train_alike(pair: Pair, groups: list[Group]) -> None:
    """Fixed rollouts and coefficients, twenty steps: the losses stay together."""
    teacher_NG = states(rows, pair.teacher, groups)
    c_N = torch.rand(len(teacher_NG), generator=torch.Generator().manual_seed(1)).div(len(teacher_NG))

    def losses(way: ResponseForward) -> list[float]:
        model, seen = pair.fresh(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        heads = head_of(model, pair.vocab_size), head_of(pair.teacher, pair.vocab_size)
        for _ in range(20):
            loss, _ = fused_weighted_divergence(way(model, groups, ORIGINAL), heads[0], teacher_NG, heads[1], c_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
        return seen

    ours, theirs = losses(shared), losses(rows)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[-1] < 0.9 * ours[0]


# --- the work ---------------------------------------------------------------------------------------------------------


def counted(way: ResponseForward, model: Any, groups: Sequence[Group]) -> dict[str, int]:
    """Tokens through the decoder, rows through the LM head, runs and patches of the vision tower."""
    counts = dict.fromkeys(("decoder", "head", "runs", "patches"), 0)

    def count(key: str, amount: Callable[[Tensor], int]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[key] += amount(inputs[0])

        return hook

    hooks = [
        model.get_decoder().layers[-1].mlp.register_forward_pre_hook(count("decoder", lambda x: x.shape[:-1].numel())),
        model.lm_head.register_forward_pre_hook(count("head", lambda x: x.shape[:-1].numel())),
        model.model.visual.register_forward_pre_hook(count("runs", lambda x: 1)),
        model.model.visual.patch_embed.register_forward_pre_hook(count("patches", lambda x: len(x))),
    ]
    with torch.no_grad():
        model.lm_head(way(model, groups, ORIGINAL))
    for hook in hooks:
        hook.remove()
    return counts


def test_the_work_is_that_of_the_formulas(pair: Pair, groups: list[Group]) -> None:
    prompt_tokens = [len(group.prompt.ids_P) for group in groups]
    own = [sum(length - 1 for length in group.lengths) for group in groups]
    patches = sum(len(group.prompt.images[ORIGINAL]["pixel_values"]) for group in groups if group.prompt.images)
    head = sum(sum(group.lengths) for group in groups)
    assert counted(shared, pair.student, groups) == {"decoder": sum(prompt_tokens) + sum(own), "head": head, "runs": 1, "patches": patches}
    longest = max(P + max(group.lengths) - 1 for P, group in zip(prompt_tokens, groups, strict=True))
    row_tokens = longest * sum(len(group.responses) for group in groups)
    assert counted(rows, pair.student, groups) == {"decoder": row_tokens, "head": head, "runs": 1, "patches": patches}


def test_no_graph_without_gradients(pair: Pair, groups: list[Group]) -> None:
    assert not states(shared, pair.student, groups).requires_grad
    assert shared(pair.student, groups, ORIGINAL).requires_grad


# --- planted faults: every silent mistake shows -----------------------------------------------------------------------


def repack(change: Callable[[Packed], Packed]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(shared_prompt, "pack", lambda groups, positions: change(pack(groups, positions)))

    return plant


def respan(change: Callable[[Sequence[Spans]], Sequence[Spans]]) -> Callable[[pytest.MonkeyPatch], None]:
    whole = shared_prompt.split_layout

    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(shared_prompt, "split_layout", lambda spans: whole(change(spans)))

    return plant


def positions_from_the_token_count(patch: pytest.MonkeyPatch) -> None:
    def wrong(positions_AP: Tensor, count: int) -> Tensor:
        axes, length = positions_AP.shape
        return torch.cat([positions_AP, (length + torch.arange(max(count, 0))).expand(axes, -1)], dim=1)

    patch.setattr(shared_prompt, "continue_positions", wrong)


def siblings_behind_one_another(patch: pytest.MonkeyPatch) -> None:
    """Positions that run on over the siblings."""

    def wrong(groups: Sequence[Group], positions: Sequence[Tensor]) -> Packed:
        packed = pack(groups, positions)
        joined = [continue_positions(p, sum(map(len, s.siblings))) for p, s in zip(positions, packed.spans, strict=True)]
        return Packed(packed.ids_M, torch.cat(joined, dim=1), packed.predicting_N, packed.spans)

    patch.setattr(shared_prompt, "pack", wrong)


def first_tokens_predicted_by_the_row(packed: Packed) -> Packed:
    """Every sibling's first token by the state before it in the row: right for the first sibling alone."""
    wrong_N = packed.predicting_N.clone()
    for spans in packed.spans:
        ends = [spans.prompt.stop, *(own.stop for own in spans.siblings)][:-1]
        wrong_N[wrong_N == spans.prompt.stop - 1] = torch.tensor(ends) - 1
    return Packed(packed.ids_M, packed.positions_AM, wrong_N, packed.spans)


def plain_causal(spans: Sequence[Spans]) -> Sequence[Spans]:
    return [Spans(range(spans[-1].siblings[-1].stop), ())]


def siblings_see_one_another(spans: Sequence[Spans]) -> Sequence[Spans]:
    return [Spans(group.prompt, (range(group.prompt.stop, group.siblings[-1].stop),)) for group in spans]


def prompts_unseen(patch: pytest.MonkeyPatch) -> None:
    whole = shared_prompt.visible_keys

    def wrong(prompts_rP: Tensor, T: int) -> Tensor:
        mask = whole(prompts_rP, T).clone()
        mask[..., : prompts_rP.shape[1]] = False
        return mask

    patch.setattr(shared_prompt, "visible_keys", wrong)


def future_seen(patch: pytest.MonkeyPatch) -> None:
    whole = shared_prompt.visible_keys
    patch.setattr(shared_prompt, "visible_keys", lambda prompts_rP, T: whole(prompts_rP, T)[:, :, -1:].expand(-1, -1, T, -1))


def padding_seen(patch: pytest.MonkeyPatch) -> None:
    whole = shared_prompt.visible_keys
    patch.setattr(shared_prompt, "visible_keys", lambda prompts_rP, T: whole(prompts_rP.abs(), T))


def padded_from_the_left(patch: pytest.MonkeyPatch) -> None:
    whole = shared_prompt.pad_sequence
    patch.setattr(shared_prompt, "pad_sequence", lambda runs, **keywords: whole(runs, padding_side="left", **keywords))


def views_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shared_prompt, "view_images", lambda prompt, view: view_images(prompt, DEGRADED if view == ORIGINAL else ORIGINAL))


def images_swapped(patch: pytest.MonkeyPatch) -> None:
    """The first two prompts have one grid, so their pictures fit each other's place."""
    whole = families.Qwen3VL.encode_images

    def wrong(self: families.Qwen3VL, model: Any, prompts: Any, images: Sequence[Any], repeats: Sequence[int]) -> dict[str, Any]:
        return whole(self, model, prompts, [images[1], images[0], *images[2:]] if set(repeats) == {1} else images, repeats)

    patch.setattr(families.Qwen3VL, "encode_images", wrong)


def positions_of_another_grid(patch: pytest.MonkeyPatch) -> None:
    """As of a text without an image."""

    def wrong(groups: Sequence[Group], positions: Sequence[Tensor]) -> Packed:
        return pack(groups, [torch.arange(p.shape[1]).expand(p.shape[0], -1) for p in positions])

    patch.setattr(shared_prompt, "pack", wrong)


@pytest.mark.parametrize(
    "plant",
    [
        positions_from_the_token_count,
        positions_of_another_grid,
        siblings_behind_one_another,
        pytest.param(repack(first_tokens_predicted_by_the_row), id="first_tokens_predicted_by_the_row"),
        pytest.param(repack(lambda p: Packed(p.ids_M, p.positions_AM, p.predicting_N.roll(-1), p.spans)), id="off_by_one"),
        pytest.param(respan(plain_causal), id="plain_causal"),
        pytest.param(respan(siblings_see_one_another), id="siblings_see_one_another"),
        prompts_unseen,
        future_seen,
        padding_seen,
        padded_from_the_left,
        views_swapped,
        images_swapped,
    ],
)
def test_a_planted_fault_shows(
    pair: Pair, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    order = (SQUARE, SQUARE_AGAIN, WIDE, TWO_IMAGES)
    groups = [make_group(prompts[index], lengths, index) for index, lengths in zip(order, [(4, 6), (5, 3), (2, 7), (6, 4)], strict=True)]
    assert error(pair.student, groups) < 1e-5
    plant(monkeypatch)
    assert error(pair.student, groups) > 1e-2


def test_left_padding_of_a_prompt_is_not_the_prompt(pair: Pair, prompts: list[Prompt]) -> None:
    """Why a prompt comes without padding: nothing here masks it."""
    prompt = prompts[SQUARE]
    group = make_group(prompt, (4, 6))
    padded = Group(
        Prompt("padded", torch.cat([torch.zeros(3, dtype=torch.long), prompt.ids_P]), prompt.images), group.responses, (True,) * 2
    )
    assert float((states(shared, pair.student, [padded]) - states(shared, pair.student, [group])).abs().max()) > 1e-2


def test_the_models_own_positions_are_not_used(pair: Pair, groups: list[Group]) -> None:
    """`rope_deltas` is what the model remembers of another call; without positions of ours, it or a plain count would come in."""
    model = pair.fresh()
    model.model.rope_deltas = torch.tensor([[37]])
    assert error(model, groups) < 1e-5
    model.model.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True)
    assert float((states(shared, model, groups) - states(shared, pair.student, groups)).abs().max()) > 1e-2


def test_images_in_a_response_are_refused(pair: Pair, prompts: list[Prompt]) -> None:
    image = torch.tensor([300, pair.student.config.image_token_id, 301])
    with pytest.raises(ValueError, match="image tokens"):
        shared(pair.student, [Group(prompts[TEXT], (image, *random_responses((3,))), (True, True))], ORIGINAL)


def test_a_view_that_was_not_rendered_is_refused(pair: Pair, prompts: list[Prompt]) -> None:
    prompt = Prompt("only original", prompts[SQUARE].ids_P, {ORIGINAL: prompts[SQUARE].images[ORIGINAL]})
    with pytest.raises(ValueError, match="only original"):
        shared(pair.student, [make_group(prompt, (2,))], DEGRADED)
