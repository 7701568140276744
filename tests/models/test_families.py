"""Every family against transformers alone: rendering, both forwards and their gradients, rollouts, saving; faults and refusals."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import family_checks as checks
from family_checks import BOUND, groups, logits, prompts, small
from small_families import BUILDERS, VARIANTS, make_small, plain_inputs
from vaopd.errors import ModelError
from vaopd.models import families, forward, shared_prompt
from vaopd.models.families import FAMILIES, family_of, repeat_features, vision_parameters
from vaopd.models.forward import head_of, rows
from vaopd.models.load import check_agreement, load_model, open_source, save_model
from vaopd.models.shared_prompt import Auto, Spans, shared, why_not_shared
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt

ALL = sorted(BUILDERS)
SHARING = [name for name in ALL if FAMILIES[name].not_shared is None]
MROPE = [name for name in ALL if FAMILIES[name].axes == 3]
WIDE, SQUARE, TWO, TEXT, WIDE_AGAIN = range(5)  # the prompts

every_family = pytest.mark.parametrize("name", ALL)
every_sharing_family = pytest.mark.parametrize("name", SHARING)


def test_every_family_is_tested() -> None:
    assert set(BUILDERS) == set(FAMILIES)
    assert set(ALL) - set(SHARING) == {"gemma3"}


# --- exactness --------------------------------------------------------------------------------------------------------


@every_family
def test_prompts_are_the_processors_own_in_both_views(name: str) -> None:
    image_token = small(name).model.config.image_token_id
    for sample, prompt in zip(checks.examples(), prompts(name), strict=True):
        for view in (ORIGINAL, DEGRADED):
            own = plain_inputs(small(name), sample, view)
            assert prompt.ids_P.tolist() == own["input_ids"][0].tolist()
            if not sample.images:
                continue
            for key, tensor in prompt.images[view].items():
                if key in own:
                    torch.testing.assert_close(tensor, own[key], rtol=0, atol=0)
        if sample.images:
            assert not torch.equal(prompt.images[ORIGINAL]["pixel_values"], prompt.images[DEGRADED]["pixel_values"])
        assert (int((prompt.ids_P == image_token).sum()) > 0) == bool(sample.images)


@every_family
def test_rows_give_the_logits_of_a_whole_forward(name: str) -> None:
    assert checks.rows_error(name) < BOUND


@every_family
def test_rows_give_the_gradients_of_whole_forwards(name: str) -> None:
    expected = checks.plain_gradients(name)
    assert checks.gradient_error(checks.way_gradients(name, rows), expected) < BOUND
    # Beside the bound: what is compared is there, in the vision tower above all.
    tower = [x for key, x in expected.items() if x is not None and ("vision" in key or "visual" in key) and "patch_embed" in key]
    assert max(float(x.abs().max()) for x in tower) > 1e-2


@every_sharing_family
def test_a_shared_prompt_gives_what_rows_give(name: str) -> None:
    assert why_not_shared(small(name).model) is None
    assert checks.shared_error(name) < BOUND
    assert checks.gradient_error(checks.way_gradients(name, shared), checks.way_gradients(name, rows)) < BOUND


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_other_language_models_of_a_family(name: str) -> None:
    assert checks.rows_error(name) < BOUND
    assert checks.shared_error(name) < BOUND
    by_rows = checks.way_gradients(name, rows)
    assert checks.gradient_error(by_rows, checks.plain_gradients(name)) < BOUND
    assert checks.gradient_error(checks.way_gradients(name, shared), by_rows) < BOUND
    assert checks.greedy(name) == [[answer, answer] for answer in checks.generated(name)]


@every_sharing_family
def test_recomputed_activations_give_the_same_gradients(name: str) -> None:
    """Layers are called once more in the backward, where the packed row's attention has to be the same."""
    model = copy.deepcopy(small(name).model).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    logits_NV = head_of(model, small(name).vocab_size).logits(shared(model, groups(name), ORIGINAL))
    found = checks.gradients(model, (logits_NV * checks.direction(name)).sum())
    assert len(calls) == 2, "a forward, and one more in the backward"
    assert checks.gradient_error(found, checks.way_gradients(name, rows)) < BOUND


@every_family
def test_the_choice_between_both_ways_is_made_quietly_or_with_a_reason(name: str, caplog: pytest.LogCaptureFixture) -> None:
    auto = Auto(least_ratio=1.0)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(logits(name, auto), logits(name, rows), rtol=0, atol=BOUND)
    reason = FAMILIES[name].not_shared
    assert [reason in message for message in caplog.messages if reason] == ([True] if reason else [])
    assert len(caplog.messages) == (1 if reason else 0)


@every_family
def test_greedy_rollouts_are_those_of_generate(name: str) -> None:
    expected = checks.generated(name)
    assert checks.greedy(name) == [[answer, answer] for answer in expected]
    assert any(len(answer) == checks.MAX_TOKENS for answer in expected)


@every_family
def test_the_samplers_log_probabilities_are_those_of_a_forward_without_a_cache(name: str) -> None:
    assert checks.sampled_error(name) < BOUND


@every_family
def test_images_are_encoded_once_for_all_siblings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small(name).model, []
    whole = model.get_image_features

    def counted(**inputs: Tensor) -> Any:
        seen.append(inputs["pixel_values"].numel())
        return whole(**inputs)

    monkeypatch.setattr(model, "get_image_features", counted)
    single = [prompts(name)[SQUARE].images[ORIGINAL]["pixel_values"].numel()]
    with torch.no_grad():
        rows(model, [groups(name)[SQUARE].take([0, 1, 0, 1])], ORIGINAL)
    assert seen == single


@every_family
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    it = small(name)
    save_model(it.model, it.processor, tmp_path)
    for file in ("processor_config.json", "tokenizer_config.json"):
        written = json.loads((tmp_path / file).read_text(encoding="utf-8"))["processor_class"]
        assert written in {kind.__name__ for kind in type(it.processor).__mro__}
        assert not written.startswith("ImageOnly")
    source = open_source(str(tmp_path))
    check_agreement(source, source)
    model = load_model(source, dtype=torch.float32)
    assert type(model) is type(it.model)
    for (key, ours), theirs in zip(model.state_dict().items(), it.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    again = replace(it, processor=source.processor).renderer
    for sample, prompt in zip(checks.examples(), prompts(name), strict=True):
        loaded = again(sample)
        assert loaded.ids_P.tolist() == prompt.ids_P.tolist()
        assert loaded.images.keys() == prompt.images.keys()
        for view, tensors in prompt.images.items():
            assert loaded.images[view].keys() == tensors.keys()
            assert all(torch.equal(loaded.images[view][key], tensor) for key, tensor in tensors.items())
    with torch.no_grad():
        torch.testing.assert_close(rows(model, groups(name), ORIGINAL), rows(it.model, groups(name), ORIGINAL), rtol=0, atol=0)


# --- planted faults: what these tests would say if a family were wrong ------------------------------------------------


def images_of_another_prompt(patch: pytest.MonkeyPatch, name: str) -> None:
    """The first and the last prompt have one grid, so their images fit each other's place."""

    def wrong(self: Any, model: Any, prompts: Any, images: Sequence[Any], repeats: Any) -> dict[str, Any]:
        return whole(self, model, prompts, [images[WIDE_AGAIN], *images[1:WIDE_AGAIN], images[WIDE]], repeats)

    whole = families.Family.encode_images
    patch.setattr(families.Family, "encode_images", wrong)


def views_swapped(patch: pytest.MonkeyPatch, name: str) -> None:
    whole = forward.view_images
    patch.setattr(forward, "view_images", lambda prompt, view: whole(prompt, DEGRADED if view == ORIGINAL else ORIGINAL))


def responses_a_position_late(patch: pytest.MonkeyPatch, name: str) -> None:
    def wrong(positions_AP: Tensor, count: int) -> Tensor:
        found = whole(positions_AP, count)
        return torch.cat([found[:, : len(positions_AP[0])], found[:, len(positions_AP[0]) :] + 1], dim=1)

    whole = forward.continue_positions
    patch.setattr(forward, "continue_positions", wrong)


def features_in_the_order_of_no_row(patch: pytest.MonkeyPatch, name: str) -> None:
    """Prompt 1, prompt 2, prompt 1, prompt 2 … where the rows are 1, 1, 2, 2 …"""

    def wrong(features: Any, tokens: Sequence[int], repeats: Sequence[int]) -> Any:
        flat = (features if isinstance(features, Tensor) else torch.cat(list(features))).flatten(0, -2)
        parts = flat.split(list(tokens))
        order = [part for turn in range(max(repeats)) for part, repeat in zip(parts, repeats, strict=True) if turn < repeat]
        return torch.cat(order) if isinstance(features, Tensor) else order

    patch.setattr(families, "repeat_features", wrong)


def positions_on_one_axis(patch: pytest.MonkeyPatch, name: str) -> None:
    patch.setattr(type(FAMILIES[name]), "prompt_positions", families.Family.prompt_positions)


def no_token_types(patch: pytest.MonkeyPatch, name: str) -> None:
    patch.setattr(type(FAMILIES[name]), "token_inputs", families.Family.token_inputs)


def deepstack_of_the_first_prompt(patch: pytest.MonkeyPatch, name: str) -> None:
    def wrong(self: Any, features: Any, tokens: Sequence[int], repeats: Sequence[int]) -> None:
        whole(self, features, tokens, repeats)
        features.deepstack_features = [[torch.cat(list(level)).roll(1, 0)] for level in features.deepstack_features]

    whole = families.Qwen3VL.repeat
    patch.setattr(families.Qwen3VL, "repeat", wrong)


FAULTS = [
    *((fault, name) for fault in (images_of_another_prompt, views_swapped, responses_a_position_late) for name in ALL),
    *((features_in_the_order_of_no_row, name) for name in ALL),
    *((positions_on_one_axis, name) for name in MROPE),
    *((deepstack_of_the_first_prompt, name) for name in ("qwen3_vl", "qwen3_vl_moe")),
    (no_token_types, "gemma3"),
]


@pytest.mark.parametrize(("fault", "name"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_shows(monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch, str], None], name: str) -> None:
    fault(monkeypatch, name)
    assert float((logits(name, rows) - checks.expected_logits(name)).abs().max()) > 1e-2


def siblings_see_one_another(patch: pytest.MonkeyPatch) -> None:
    def wrong(spans: Sequence[Spans]) -> shared_prompt.Layout:
        return whole([Spans(group.prompt, (range(group.prompt.stop, group.siblings[-1].stop),)) for group in spans])

    whole = shared_prompt.split_layout
    patch.setattr(shared_prompt, "split_layout", wrong)


def responses_from_position_zero(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shared_prompt, "continue_positions", lambda p, count: torch.cat([p, torch.arange(count).expand(len(p), -1)], dim=1))


@pytest.mark.parametrize("fault", [siblings_see_one_another, responses_from_position_zero])
@every_sharing_family
def test_a_fault_in_a_packed_row_shows_and_falls_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fault(monkeypatch)
    assert float((logits(name, shared) - logits(name, rows)).abs().max()) > 1e-2
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(logits(name, Auto(least_ratio=1.0)), logits(name, rows), rtol=0, atol=0)
    assert "differs" in caplog.text


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_gemma_3_would_be_wrong_in_a_packed_row_and_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, all_groups = small("gemma3").model, groups("gemma3")
    with pytest.raises(ValueError, match=r"Gemma 3 model: its image tokens see what comes after them\. Use `rows`"):
        shared(model, all_groups, ORIGINAL)
    monkeypatch.setattr(families.Gemma3, "not_shared", None)
    assert why_not_shared(model) == "it has layers without full attention: sliding_attention"
    assert float((logits("gemma3", shared) - logits("gemma3", rows)).abs().max()) > 1e-2
    # With full attention everywhere the images' mask alone is reason enough, and nothing but the family says so.
    full = copy.deepcopy(model)
    full.config.text_config.layer_types = ["full_attention"] * 2
    with torch.no_grad():
        difference_N = (shared(full, all_groups, ORIGINAL) - rows(full, all_groups, ORIGINAL)).abs().amax(dim=1)
    parts = difference_N.split([sum(group.lengths) for group in all_groups])
    assert all((float(part.max()) > 1e-2) == (index != TEXT) for index, part in enumerate(parts))
    full.config.text_config.sliding_window = None
    assert why_not_shared(full) is None
    monkeypatch.undo()
    assert why_not_shared(full) == "its image tokens see what comes after them"


LANGUAGE_MODELS = [
    ("internvl", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, "sliding_attention"),
    ("qwen2_5_vl", {"use_sliding_window": True, "sliding_window": 8}, "sliding window of 8"),
    ("qwen3_vl_moe", {"output_router_logits": True}, "loss over all tokens of a row"),
    ("llava_onevision", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ("smolvlm", {"is_causal": False}, "see what comes after them"),
]


@pytest.mark.parametrize(("name", "values", "reason"), LANGUAGE_MODELS)
def test_a_family_is_refused_with_a_language_model_that_cannot_share(name: str, values: dict[str, Any], reason: str) -> None:
    """What a family allows still depends on its language model: InternVL comes with several."""
    model = copy.deepcopy(small(name).model)
    for key, value in values.items():
        setattr(model.config.get_text_config(), key, value)
    assert reason in (why_not_shared(model) or "")


def with_images(name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Group:
    prompt = prompts(name)[WIDE]
    return replace(groups(name)[WIDE], prompt=Prompt("changed", prompt.ids_P, {ORIGINAL: change(dict(prompt.images[ORIGINAL]))}))


@every_family
def test_a_tensor_that_the_family_does_not_know_is_refused(name: str) -> None:
    group = with_images(name, lambda tensors: {**tensors, "image_prior": torch.zeros(1)})
    with pytest.raises(ModelError, match=rf"image_prior, which {family_of(small(name).model).title.split(' (')[0]}"):
        rows(small(name).model, [group], ORIGINAL)


@pytest.mark.parametrize("name", ["idefics3", "llava_onevision"])
def test_a_tensor_that_is_lacking_is_refused(name: str) -> None:
    group = with_images(name, lambda tensors: {"pixel_values": tensors["pixel_values"]})
    with pytest.raises(ModelError, match="makes no"):
        rows(small(name).model, [group], ORIGINAL)


def test_a_tile_that_the_model_takes_for_padding_is_refused() -> None:
    """SmolVLM tells padded tiles by their zeros: an image of exactly the mean colour vanishes."""

    def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["pixel_values"] = tensors["pixel_values"].clone()
        tensors["pixel_values"][:, 1] = 0
        return tensors

    with pytest.raises(ModelError, match=r"8 features for 12 image tokens.*blank"):
        rows(small("smolvlm").model, [with_images("smolvlm", blank)], ORIGINAL)


def test_features_go_to_their_prompts_in_order() -> None:
    features = torch.arange(6.0).view(3, 2, 1)  # three tiles of two tokens; the first prompt has two of them
    assert repeat_features(features, [4, 2], [1, 3]).flatten().tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 4, 5]
    pieces = repeat_features(list(features), [4, 2], [2, 1])
    assert isinstance(pieces, list)
    assert torch.cat(pieces).flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    with pytest.raises(ModelError, match="6 features for 7"):
        repeat_features(features, [4, 3], [1, 1])


def test_a_head_is_not_capped_where_the_model_does_not_cap_it() -> None:
    """Gemma 3's text configuration knows a cap that its image-text class does not apply."""
    it = small("gemma3")
    capped = copy.deepcopy(it.model)
    capped.config.text_config.final_logit_softcapping = 2.0
    group = groups("gemma3")[TEXT]
    ids = torch.cat([group.prompt.ids_P, group.responses[0]])[None]
    with torch.no_grad():
        theirs = capped(input_ids=ids).logits[0, len(group.prompt.ids_P) - 1 : -1]
        ours = head_of(capped, it.vocab_size).logits(rows(capped, [group.take([0])], ORIGINAL))
    assert float(theirs.abs().max()) > 2.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=BOUND)


@pytest.mark.parametrize(("model_type", "hint"), [("internvl_chat", "internvl"), ("qwen2_vl", "qwen2_5_vl"), ("gemma3n", "gemma3")])
def test_a_type_that_is_not_supported_is_refused_by_name(tmp_path: Path, model_type: str, hint: str) -> None:
    """Also one that brings code of its own, which is not run."""
    remote = {"auto_map": {"AutoConfig": "configuration.Config"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **remote}), encoding="utf-8")
    (tmp_path / "configuration.py").write_text("raise SystemExit('run')", encoding="utf-8")
    with pytest.raises(ModelError, match=rf"'{model_type}' are not supported\. Did you mean '{hint}'\?.*-HF"):
        open_source(str(tmp_path))


@every_family
def test_what_stands_before_the_decoder_can_be_frozen(name: str) -> None:
    """The tower, the projector and the line ends of LLaVA-OneVision; neither the embeddings nor a head tied to them."""
    model = small(name).model
    found = {id(parameter) for parameter in vision_parameters(model)}
    names = {key for key, parameter in model.named_parameters() if id(parameter) in found}
    parts = ("model.visual.", "model.vision_", "model.multi_modal_projector.", "model.connector.", "model.image_newline")
    assert names == {key for key, _ in model.named_parameters() if key.startswith(parts)}
    assert len({key.split(".")[1] for key in names}) == {"qwen2_5_vl": 1, "qwen3_vl": 1, "qwen3_vl_moe": 1, "llava_onevision": 3}.get(
        name, 2
    )


# --- pairs ------------------------------------------------------------------------------------------------------------


def saved(name: str, folder: Path, **changes: Any) -> str:
    it = make_small(name)
    for key, value in changes.items():
        setattr(it.processor, key, value)
    save_model(it.model, it.processor, folder)
    return str(folder)


def test_a_dense_student_and_a_teacher_with_experts_agree(tmp_path: Path) -> None:
    student, teacher = (open_source(saved(name, tmp_path / name)) for name in ("qwen3_vl", "qwen3_vl_moe"))
    check_agreement(student, teacher)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("internvl", "image_seq_length", 9), ("smolvlm", "image_seq_len", 9), ("llava_onevision", "num_image_tokens", 9)],
)
def test_another_number_of_placeholders_is_refused_before_any_weight_is_read(tmp_path: Path, name: str, key: str, value: int) -> None:
    student, teacher = open_source(saved(name, tmp_path / "student")), open_source(saved(name, tmp_path / "teacher", **{key: value}))
    with pytest.raises(ModelError, match=rf"placeholders: {key} is \d+ in the student, 9 in the teacher"):
        check_agreement(student, teacher)
