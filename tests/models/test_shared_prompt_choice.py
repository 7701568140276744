"""Where siblings cannot share their prompt, how the choice between the packed row and rows is made, and the switch of the attention."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_pair import Pair, make_group, random_responses
from vaopd.models import shared_prompt
from vaopd.models.forward import counted_by, micro_batches, padded_tokens, rows
from vaopd.models.shared_prompt import LAYOUT, NAME, Auto, Spans, packed_tokens, shared, split_attention, token_ratio, why_not_shared
from vaopd.types import ORIGINAL, Group, Prompt, ResponseForward

SQUARE, TEXT = 0, 3  # prompts of the fixture


@pytest.fixture
def groups(prompts: list[Prompt]) -> list[Group]:
    return [make_group(prompt, (5, 2, 4), seed) for seed, prompt in enumerate(prompts)]


def states(way: ResponseForward, model: Any, groups: Sequence[Group]) -> Tensor:
    with torch.no_grad():
        return way(model, groups, ORIGINAL)


def error(model: Any, groups: Sequence[Group]) -> float:
    return float((states(shared, model, groups) - states(rows, model, groups)).abs().max())


def test_token_ratio() -> None:
    def group(P: int, *lengths: int) -> Group:
        return Group(Prompt("p", torch.zeros(P, dtype=torch.long)), random_responses(lengths), (True,) * len(lengths))

    assert token_ratio([group(600, 500, 500, 500, 500)]) == pytest.approx(4400 / 2600)
    assert token_ratio([group(10, 5)]) == 1.0
    assert token_ratio([group(10, 1, 3), group(4, 2, 2, 2)]) == pytest.approx((24 + 18) / (14 + 10))


def text(**values: Any) -> Callable[[Any], None]:
    """Changes the text configuration."""

    def change(model: Any) -> None:
        for key, value in values.items():
            setattr(model.config.get_text_config(), key, value)

    return change


def dropout(model: Any) -> None:
    model.train()
    model.get_decoder().layers[0].mlp.add_module("drop", nn.Dropout(0.1))


def attention_dropout(model: Any) -> None:
    model.train()
    model.get_decoder().layers[0].self_attn.attention_dropout = 0.2


def recurrent(model: Any) -> None:
    del model.get_decoder().layers[0].self_attn


def sinks(model: Any) -> None:
    model.get_decoder().layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))


REFUSED = [
    (text(layer_types=["full_attention", "linear_attention"]), "linear_attention"),
    (text(layer_types=["sliding_attention", "full_attention"]), "sliding_attention"),
    (text(sliding_window=4096), "4096"),
    (sinks, "sinks"),
    (recurrent, "recurrent"),
    (text(use_bidirectional_attention="vision"), "after them"),
    (lambda model: setattr(model.config, "model_type", "gemma3"), "after them"),
    (text(expert_capacity=64), "capacity"),
    (text(num_experts=8, output_router_logits=True), "output_router_logits"),
    (text(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    (text(_attn_implementation="flex_attention"), "flex_attention"),
    (dropout, "dropout 0.1"),
    (attention_dropout, "dropout 0.2"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_models_in_which_siblings_cannot_share(pair: Pair, change: Callable[[Any], None], reason: str) -> None:
    model = pair.fresh()
    assert why_not_shared(model) is None
    change(model)
    assert reason in (why_not_shared(model) or "")


def test_dropout_matters_in_training_alone(pair: Pair) -> None:
    model = pair.fresh()
    dropout(model)
    assert why_not_shared(model.eval()) is None


def used(auto: Auto, model: Any, groups: Sequence[Group]) -> str:
    """Which way the choice went, after a first call that checks."""
    states(auto, model, groups)
    shapes: list[int] = []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[0]))
    torch.testing.assert_close(states(auto, model, groups), states(rows, model, groups), rtol=0, atol=1e-5)
    hook.remove()
    assert len(shapes) == 2  # one forward each: the check is not repeated
    return "rows" if shapes[0] == shapes[1] else "shared"


def test_the_choice_follows_the_token_ratio(pair: Pair, prompts: list[Prompt]) -> None:
    few, many = make_group(prompts[SQUARE], (3, 3, 3, 3)), make_group(prompts[SQUARE], (200, 200))
    assert token_ratio([few]) > 2
    assert token_ratio([many]) < 1.3
    assert used(Auto(), pair.student, [few]) == "shared"
    assert used(Auto(), pair.student, [many]) == "rows"
    assert used(Auto(least_ratio=1.0), pair.student, [many]) == "shared"


def test_a_model_that_cannot_share_falls_back_loudly_and_once(pair: Pair, groups: list[Group], caplog: pytest.LogCaptureFixture) -> None:
    model, auto = pair.fresh(), Auto()
    sinks(model)
    with caplog.at_level(logging.WARNING):
        assert used(auto, model, groups) == "rows"
    (message,) = caplog.messages
    assert "attention sinks" in message


def positions_from_zero(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shared_prompt, "continue_positions", lambda p, count: torch.cat([p, torch.arange(count).expand(len(p), -1)], dim=1))


def prompts_unseen(patch: pytest.MonkeyPatch) -> None:
    whole = shared_prompt.visible_keys
    patch.setattr(shared_prompt, "visible_keys", lambda prompts_rP, T: whole(torch.full_like(prompts_rP, -1), T))


def siblings_see_one_another(patch: pytest.MonkeyPatch) -> None:
    def wrong(spans: Sequence[Spans]) -> shared_prompt.Layout:
        return whole([Spans(group.prompt, (range(group.prompt.stop, group.siblings[-1].stop),)) for group in spans])

    whole = shared_prompt.split_layout
    patch.setattr(shared_prompt, "split_layout", wrong)


@pytest.mark.parametrize("plant", [positions_from_zero, prompts_unseen, siblings_see_one_another])
def test_a_difference_falls_back_loudly_and_once(
    pair: Pair,
    groups: list[Group],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    plant: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """Also under autocast, where rounding alone would hide a good deal."""
    plant(monkeypatch)
    auto = Auto()
    with caplog.at_level(logging.WARNING), torch.autocast("cpu", torch.bfloat16):
        states(auto, pair.student, groups)
    assert used(auto, pair.student, groups) == "rows"
    (message,) = caplog.messages
    assert "differs" in message


def test_training_is_checked_beside_evaluation(pair: Pair, groups: list[Group]) -> None:
    model, auto = pair.fresh(), Auto()
    dropout(model)
    model.eval()
    assert used(auto, model, groups) == "shared"
    states(auto, model.train(), groups)
    assert auto._reasons[model] == {False: None, True: "it is trained with dropout 0.1"}


def test_half_precision_passes_its_check(pair: Pair, groups: list[Group], caplog: pytest.LogCaptureFixture) -> None:
    auto = Auto()
    with caplog.at_level(logging.WARNING):
        states(auto, pair.fresh().to(torch.bfloat16), groups)
    assert not caplog.messages


def test_images_in_a_response_are_left_to_rows(pair: Pair, prompts: list[Prompt]) -> None:
    image = torch.tensor([300, pair.student.config.image_token_id, 301])
    group = Group(prompts[TEXT], (image, *random_responses((3,))), (True, True))
    assert used(Auto(), pair.student, [group]) == "rows"


# --- the token budget -------------------------------------------------------------------------------------------------


def sent(way: ResponseForward, model: Any, groups: Sequence[Group], budget: int) -> list[tuple[int, int]]:
    """Rollouts of each micro-batch, and the positions that it sends through the decoder. `way` has been called before."""
    seen: list[tuple[int, int]] = []
    for batch in micro_batches(groups, budget, counted_by(way, model)):
        seen.append((sum(len(group.responses) for group in batch), positions(way, model, batch)))
    return seen


def positions(way: ResponseForward, model: Any, groups: Sequence[Group]) -> int:
    """That go through the decoder, padding included."""
    sizes: list[int] = []
    hook = model.get_decoder().layers[0].register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[:-1].numel()))
    states(way, model, groups)
    hook.remove()
    return sum(sizes)


@pytest.mark.parametrize("budget", [40, 90, 150, 400])
def test_no_batch_exceeds_the_budget_however_it_is_computed(pair: Pair, groups: list[Group], budget: int) -> None:
    """Counted on the model itself: packed rows, rows, and the mixture that the ratio of each batch asks for."""
    for way in (Auto(least_ratio=1.0), rows, Auto(least_ratio=1.6)):
        states(way, pair.student, groups)
        batches = sent(way, pair.student, groups, budget)
        assert sum(rollouts for rollouts, _ in batches) == 15
        assert all(tokens <= budget or rollouts == 1 for rollouts, tokens in batches)


def test_packed_rows_fill_the_budget(pair: Pair, groups: list[Group]) -> None:
    """All fifteen siblings fit in one packed row for which padded rows would need several forwards."""
    auto, budget = Auto(), packed_tokens(groups)
    states(auto, pair.student, groups)
    ((rollouts, tokens),) = sent(auto, pair.student, groups, budget)
    assert (rollouts, tokens) == (15, budget - 15)  # the last token of a response is left out
    assert len(sent(rows, pair.student, groups, budget)) >= 2


def test_the_count_is_that_of_rows_where_siblings_cannot_share(pair: Pair, groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    """For a known reason from the start, and once the check has found a difference. The check itself changes no count."""
    auto, apart = Auto(), pair.fresh()
    sinks(apart)
    assert auto.tokens(apart, groups) == padded_tokens(groups) > packed_tokens(groups)
    assert auto.tokens(pair.student, groups) == packed_tokens(groups)
    states(auto, pair.student, groups)
    assert auto.tokens(pair.student, groups) == packed_tokens(groups)
    positions_from_zero(monkeypatch)
    differing = pair.fresh()
    states(auto, differing, groups)
    assert auto.tokens(differing, groups) == padded_tokens(groups)


# --- the switch -------------------------------------------------------------------------------------------------------


def test_the_attention_is_switched_in_the_decoder_alone_and_back(pair: Pair, groups: list[Group]) -> None:
    model, seen = pair.fresh(), []
    vision = model.model.visual
    vision.blocks[0].attn.register_forward_hook(lambda *_: seen.append(vision.config._attn_implementation))
    decoder = model.get_decoder()
    for layer in decoder.layers:
        for module in (layer.self_attn.o_proj, layer.mlp):
            module.register_forward_hook(lambda *_: seen.append(decoder.config._attn_implementation))
    states(shared, model, groups)
    assert seen == ["sdpa", NAME, "sdpa", NAME, "sdpa"]
    assert error(copy.deepcopy(model), groups) < 1e-5


def test_an_exception_leaves_the_model_as_it_was(pair: Pair, groups: list[Group]) -> None:
    model = pair.fresh()

    def fail(*_: Any) -> None:
        raise RuntimeError("inside the attention")

    hook = model.get_decoder().layers[1].self_attn.o_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside the attention"):
        shared(model, groups, ORIGINAL)
    assert model.get_decoder().config._attn_implementation == "sdpa"
    hook.remove()
    assert error(model, groups) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_attention_that_was_not_switched_fails_loudly(
    pair: Pair, groups: list[Group], monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    model = pair.fresh()
    model.set_attn_implementation(implementation)
    monkeypatch.setattr(shared_prompt, "switch_attention", lambda model: None)
    for layer in model.get_decoder().layers:
        layer.self_attn._forward_pre_hooks.clear()
        layer.self_attn._forward_hooks.clear()
    with pytest.raises(RuntimeError):
        shared(model, groups, ORIGINAL)


def test_without_a_layout_the_attention_is_transformers_own(pair: Pair, groups: list[Group]) -> None:
    model = pair.fresh()
    model.get_decoder().config._attn_implementation = NAME
    torch.testing.assert_close(states(rows, model, groups), states(rows, pair.student, groups), rtol=0, atol=0)


def test_extra_keyword_arguments_reach_the_attention(pair: Pair, groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*arguments: Any, **keywords: Any) -> Any:
        seen.append(keywords[LAYOUT])
        return split_attention(*arguments, **keywords)

    monkeypatch.setitem(shared_prompt.AttentionInterface._global_mapping, NAME, watched)
    states(shared, pair.student, groups)
    assert len(seen) == len(pair.student.get_decoder().layers)
    assert all(layout is seen[0] for layout in seen)
