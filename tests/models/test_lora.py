"""Adapters: they start as nothing, only they learn, off they leave the base, and merged they are the same model."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration
from transformers.video_processing_utils import BaseVideoProcessor

from small_families import BUILDERS, make_small, small_examples
from small_pair import Pair, make_group, reference_logits
from vaopd.config import LoraConfig
from vaopd.core import fused_weighted_divergence
from vaopd.errors import ConfigError, ModelError
from vaopd.models import lora as lora_module
from vaopd.models.export import export_model
from vaopd.models.forward import head_of, rows
from vaopd.models.load import Source, load_model, open_source, save_model
from vaopd.models.lora import adapters, adapters_off, add_adapters, check_lora, merged, save_adapter, target_modules
from vaopd.models.shared_prompt import Auto, shared, why_not_shared
from vaopd.rollouts.hf import HFEngine, Sampling
from vaopd.teachers.local import LocalTeacher
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt, ResponseForward

DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["qkv", "proj", "linear_fc1", "linear_fc2"]
LORA = LoraConfig(rank=4, alpha=8)


def adapted(pair: Pair, lora: LoraConfig = LORA, *, trained: bool = True, seed: int = 3) -> Any:
    """A student with adapters; `trained`: with B away from zero, so that they show in every layer's output."""
    model = pair.fresh()
    add_adapters(model, lora, seed=seed)
    if trained:
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0.0, 0.2, generator=generator)
    return model


@pytest.fixture
def groups(prompts: list[Prompt]) -> list[Group]:
    return [make_group(prompts[0], (4, 7, 1), seed=1), make_group(prompts[2], (3, 5, 0), seed=2), make_group(prompts[3], (6, 2), seed=3)]


def states(model: Any, groups: list[Group], forward: ResponseForward = rows) -> Tensor:
    with torch.no_grad():
        return forward(model, groups, ORIGINAL)


def largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# --- which layers -----------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_decoders_attention_and_mlp(pair: Pair) -> None:
    names = target_modules(pair.student, LoraConfig())
    layers = {f"model.language_model.layers.{layer}" for layer in range(2)}
    expected = {f"{layer}.{part}.{name}" for layer in layers for name in DECODER for part in ("self_attn", "mlp")}
    assert set(names) == {name for name in expected if dict(pair.student.named_modules()).get(name) is not None}
    assert len(names) == 14


def test_vision_and_chosen_layers(pair: Pair) -> None:
    assert check_lora(LoraConfig(vision=True), pair.source.config) == [*VISION, *DECODER]
    assert check_lora(LoraConfig(targets=("v_proj", "q_proj")), pair.source.config) == ["q_proj", "v_proj"]
    assert set(target_modules(pair.student, LoraConfig(targets=("qkv",), vision=True))) == {
        "model.visual.blocks.0.attn.qkv",
        "model.visual.blocks.1.attn.qkv",
    }


@pytest.mark.parametrize(
    ("target", "fix"),
    [("q_prj", "Did you mean 'q_proj'"), ("lm_head", "LM head"), ("embed_tokens", "embeddings"), ("qkv", "lora.vision"), ("", "q_proj")],
)
def test_a_target_that_is_none_is_refused_before_any_weight_is_read(pair: Pair, target: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"'{target}' is no linear layer within reach") as caught:
        check_lora(LoraConfig(targets=("q_proj", target)), pair.source.config)
    assert fix in str(caught.value)


def test_without_peft_the_extra_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'vaopd\[lora\]'"):
        check_lora(LoraConfig(), pair.source.config)


# --- what they are ----------------------------------------------------------------------------------------------------


def test_they_start_as_nothing_and_only_they_are_trained_in_fp32(pair: Pair, groups: list[Group]) -> None:
    model = adapted(pair, trained=False)
    assert torch.equal(states(model, groups), states(pair.student, groups))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 14
    assert all(".lora_" in name for name in trained)
    assert not any(module.training for module in model.modules())
    assert (adapters(pair.student), len(adapters(model))) == ({}, 14)


def test_adapters_beside_bf16_weights_are_fp32(pair: Pair) -> None:
    model = pair.fresh().bfloat16()
    add_adapters(model, LORA, seed=0)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


def test_the_start_comes_from_the_seed_alone(pair: Pair) -> None:
    torch.manual_seed(11)
    one = adapted(pair, trained=False, seed=3)
    drawn = torch.rand(1)
    torch.manual_seed(12)
    same, other = adapted(pair, trained=False, seed=3), adapted(pair, trained=False, seed=4)
    name = "model.language_model.layers.0.mlp.up_proj.lora_A.default.weight"
    weights = [model.state_dict()[name] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), drawn), "the global generator is left as it was"


def test_the_scale_is_alpha_over_rank(pair: Pair) -> None:
    """W + 8/4 · B A, written out for one layer."""
    model = adapted(pair)
    name = "model.language_model.layers.1.mlp.down_proj"
    state = model.state_dict()
    a, b = state[f"{name}.lora_A.default.weight"], state[f"{name}.lora_B.default.weight"]
    expected = pair.student.state_dict()[f"{name}.weight"] + 2.0 * b @ a
    found = {key: tensor for key, tensor, _ in merged(model)}[f"{name}.weight"]
    assert largest_difference(found, expected) < 1e-6
    assert a.shape[0] == b.shape[1] == 4


def test_rollouts_come_from_the_adapted_model(pair: Pair, prompts: list[Prompt]) -> None:
    def sampled(model: Any) -> list[Tensor]:
        engine = HFEngine(model, Sampling(8), vocab_size=pair.vocab_size, eos_ids={1}, forbidden_ids={0})
        return [response for group in engine.generate(prompts[:2], 3, 1) for response in group.responses]

    model = adapted(pair)
    folded = pair.fresh()
    folded.load_state_dict({name: tensor for name, tensor, _ in merged(model)})
    assert all(map(torch.equal, sampled(model), sampled(folded)))
    assert not all(map(torch.equal, sampled(model), sampled(pair.student)))
    with adapters_off(model):
        assert all(map(torch.equal, sampled(model), sampled(pair.student)))


# --- shared prompts and gradients -------------------------------------------------------------------------------------


def adapter_gradients(pair: Pair, model: Any, groups: list[Group], forward: ResponseForward) -> tuple[Tensor, dict[str, Tensor]]:
    teacher = LocalTeacher(pair.teacher, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=4096)
    hidden_NG = torch.cat([score.hidden_NG for score in teacher.score(groups)])
    hidden_NH = forward(model, groups, ORIGINAL)
    c_N = torch.linspace(0.1, 1.0, len(hidden_NH))
    loss, _ = fused_weighted_divergence(hidden_NH, head_of(model, pair.vocab_size), hidden_NG, teacher.head, c_N, normalizer=1.0)
    model.zero_grad(set_to_none=True)
    loss.backward()
    return hidden_NH.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("vision", [False, True])
def test_shared_prompts_give_the_states_and_gradients_of_rows(pair: Pair, groups: list[Group], vision: bool, checkpointing: bool) -> None:
    model = adapted(pair, LORA.model_copy(update={"vision": vision}))
    assert why_not_shared(model) is None
    expected, by_rows = adapter_gradients(pair, model, groups, rows)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    found, by_sharing = adapter_gradients(pair, model, groups, shared)
    assert largest_difference(found, expected) < 1e-5 * float(expected.abs().max())
    assert by_sharing.keys() == by_rows.keys()
    assert all(".lora_" in name for name in by_rows)
    assert len(by_rows) == 2 * len(adapters(model))
    for name, gradient in by_rows.items():
        assert float(gradient.abs().max()) > 0, name
        assert float((by_sharing[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_auto_shares_with_adapters(pair: Pair, groups: list[Group], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(pair)
    states(model, groups, Auto(least_ratio=1.0))
    assert caplog.text == "", "a refusal would be a warning"


# --- off --------------------------------------------------------------------------------------------------------------


def test_off_the_model_is_the_base_and_on_again_itself(pair: Pair, groups: list[Group]) -> None:
    model = adapted(pair).train()
    with torch.no_grad():
        on, base = states(model, groups), states(pair.student, groups)
        with adapters_off(model):
            assert not model.training
            assert torch.equal(states(model, groups), base)
            with adapters_off(model):
                pass
            assert torch.equal(states(model, groups), base), "leaving the inner one leaves the outer one"
        assert model.training
        assert torch.equal(states(model, groups), on)
    assert largest_difference(on, base) > 0.1
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 28
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert torch.equal(states(model, groups), on), "an error does not leave them off"
    with pytest.raises(ValueError, match="no adapters"), adapters_off(pair.student):
        pass


def test_a_teacher_that_is_the_student_scores_as_the_base_does(pair: Pair, groups: list[Group]) -> None:
    model = adapted(pair)
    options: dict[str, Any] = {"vocab_size": pair.vocab_size, "forward": rows, "tokens_per_forward": 4096}
    separate = LocalTeacher(load_model(pair.source, dtype=torch.float32), **options)
    own = LocalTeacher(model, within=adapters_off, **options)
    for found, expected in zip(own.score(groups, (ORIGINAL, DEGRADED)), separate.score(groups, (ORIGINAL, DEGRADED)), strict=True):
        assert largest_difference(found.hidden_NG, expected.hidden_NG) <= 1e-6
        for view in (ORIGINAL, DEGRADED):
            assert largest_difference(found.logp_N[view], expected.logp_N[view]) <= 1e-6
    assert own.head.weight_VH.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 28, "the student is still trained"
    unaware = LocalTeacher(copy.deepcopy(model), **options).score(groups, (ORIGINAL,))[0]
    assert largest_difference(unaware.logp_N[ORIGINAL], separate.score(groups, (ORIGINAL,))[0].logp_N[ORIGINAL]) > 0.1, (
        "the test sees adapters left on"
    )


# --- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("load", [AutoModelForImageTextToText, Qwen3VLForConditionalGeneration])
def test_the_merged_folder_is_the_adapted_model(pair: Pair, prompts: list[Prompt], tmp_path: Path, load: Any, vision: bool) -> None:
    model = adapted(pair, LORA.model_copy(update={"vision": vision}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export = export_model(model, pair.source, tmp_path / "model")
    assert (export.dtype, export.kept) == ("float32", None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "the student goes on as it was"
    plain = load.from_pretrained(tmp_path / "model").eval()
    assert type(plain) is Qwen3VLForConditionalGeneration
    assert adapters(plain) == {}
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    for prompt in prompts[:4]:
        response = make_group(prompt, (6,)).ids_N
        with torch.no_grad():
            ours, theirs = reference_logits(model, prompt, response), reference_logits(plain, prompt, response)
            base = reference_logits(pair.student, prompt, response)
        assert largest_difference(ours, theirs) <= 1e-5 * float(ours.abs().max())
        assert largest_difference(ours, base) > 0.1
    assert plain.state_dict().keys() == pair.student.state_dict().keys()
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == load_file(pair.student_folder / "model.safetensors").keys()


def test_the_merged_folder_needs_no_peft(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_model(adapted(pair), pair.source, tmp_path / "model")
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    load_model(open_source(str(tmp_path / "model")), dtype=torch.float32)
    for file in (tmp_path / "model").glob("*.json"):
        assert "lora" not in file.read_text(encoding="utf-8").lower(), file


def test_the_adapter_loads_with_peft(pair: Pair, groups: list[Group], tmp_path: Path) -> None:
    model = adapted(pair)
    save_adapter(model, tmp_path / "adapter", base="owner/base")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    expected = {f"base_model.model.{layer}.lora_{part}.weight" for layer in adapters(model) for part in "AB"}
    assert names == expected, "PEFT's own names, without that of the adapter"
    again = PeftModel.from_pretrained(pair.fresh(), tmp_path / "adapter").base_model.model
    assert torch.equal(states(again, groups), states(model, groups))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["base_model_name_or_path"], settings["r"], settings["lora_alpha"]) == ("owner/base", 4, 8)
    assert str(pair.student_folder) not in json.dumps(settings)


@pytest.mark.parametrize("model_type", BUILDERS)
def test_every_family_is_adapted_merged_and_switched_off(model_type: str, tmp_path: Path) -> None:
    small = make_small(model_type)
    save_model(small.model, small.processor, tmp_path / "base")
    source = open_source(str(tmp_path / "base"))
    lora = LoraConfig(rank=2, alpha=4, vision=True)
    model = load_model(source, dtype=torch.float32)
    add_adapters(model, lora, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    assert {"q_proj", "o_proj"} < set(check_lora(LoraConfig(), source.config)) < set(check_lora(lora, source.config))
    groups = [Group(small.renderer(small_examples()[0]), (torch.arange(20, 24), torch.arange(30, 33)), (True, True))]
    export_model(model, source, tmp_path / "model")
    expected = states(model, groups)
    found = states(load_model(open_source(str(tmp_path / "model")), dtype=torch.float32), groups)
    assert largest_difference(found, expected) <= 1e-5 * float(expected.abs().max())
    with adapters_off(model):
        base = states(model, groups)
    assert torch.equal(base, states(load_model(source, dtype=torch.float32), groups))
    assert largest_difference(expected, base) > 0.05


# --- the precision of the folder --------------------------------------------------------------------------------------


@pytest.fixture
def bf16_source(pair: Pair, tmp_path: Path) -> Source:
    save_model(pair.fresh().bfloat16(), pair.source.processor, tmp_path / "bf16")
    return open_source(str(tmp_path / "bf16"))


@pytest.mark.parametrize("with_adapters", [False, True])
def test_a_bf16_base_gives_a_bf16_folder(bf16_source: Source, tmp_path: Path, with_adapters: bool) -> None:
    """Every tensor of it, adapted or not, is its fp32 value rounded once; a tied head stays tied."""
    model = load_model(bf16_source, dtype=torch.float32)
    if with_adapters:
        add_adapters(model, LORA, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or not with_adapters:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    exact = {name: tensor for name, tensor, _ in merged(model)}
    export = export_model(model, bf16_source, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert (export.dtype, config["dtype"]) == ("bfloat16", "bfloat16")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in tensors.items())
    assert export.kept is not None
    assert 0.9 < export.kept < 1.1
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    tied = loaded.get_output_embeddings().weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert tied == bf16_source.config.tie_word_embeddings


@pytest.mark.parametrize("with_adapters", [False, True])
def test_a_tied_head_is_written_once(tmp_path: Path, with_adapters: bool) -> None:
    small = make_small("gemma3")
    assert small.model.config.tie_word_embeddings
    save_model(small.model.bfloat16(), small.processor, tmp_path / "base")
    source = open_source(str(tmp_path / "base"))
    model = load_model(source, dtype=torch.float32)
    if with_adapters:
        add_adapters(model, LORA, seed=0)
    export_model(model, source, tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == load_file(tmp_path / "base" / "model.safetensors").keys()


@pytest.mark.parametrize("with_adapters", [False, True])
def test_what_rounding_swallows_is_measured_and_said(
    bf16_source: Source, tmp_path: Path, with_adapters: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A change of every weight far below half a bf16 step is gone: 0 % of it is left."""
    model = load_model(bf16_source, dtype=torch.float32)
    if with_adapters:
        add_adapters(model, LORA, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(1e-7)
    else:
        for parameter in model.parameters():
            parameter.data *= 1 + 1e-5
    export = export_model(model, bf16_source, tmp_path / "model")
    assert export.kept is not None
    assert abs(export.kept) < 0.05
    assert "of what training changed" in caplog.text


# --- all files --------------------------------------------------------------------------------------------------------


FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",  # vLLM and transformers 4 read the image processor from here
}


def test_the_folder_has_all_files_that_transformers_and_vllm_read(pair: Pair, tmp_path: Path) -> None:
    export_model(pair.fresh(), pair.source, tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES
    values = {name: json.loads((tmp_path / "model" / name).read_text(encoding="utf-8")) for name in FILES if name.endswith(".json")}
    assert values["config.json"]["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert values["config.json"]["model_type"] == "qwen3_vl"
    assert values["generation_config.json"]["eos_token_id"] == pair.student.generation_config.eos_token_id
    assert values["tokenizer_config.json"]["processor_class"] == values["processor_config.json"]["processor_class"] == "Qwen3VLProcessor"
    assert values["preprocessor_config.json"] == values["processor_config.json"]["image_processor"]
    again = open_source(str(tmp_path / "model"))
    assert again.processor.chat_template == pair.source.processor.chat_template
    assert again.eos_ids == pair.source.eos_ids


def test_transformers_own_video_processor_finds_its_settings(pair: Pair, tmp_path: Path) -> None:
    """Where torchvision is, `AutoProcessor` builds one for Qwen-VL and fails in a folder that has only `processor_config.json`."""
    export_model(pair.fresh(), pair.source, tmp_path / "model")
    settings, _ = BaseVideoProcessor.get_video_processor_dict(str(tmp_path / "model"))
    assert settings["patch_size"] == pair.source.processor.image_processor.patch_size
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="Can't load video processor"):
        BaseVideoProcessor.get_video_processor_dict(str(tmp_path / "model"))


@pytest.mark.parametrize("place", ["video_preprocessor_config.json", "processor_config.json"])
def test_the_bases_video_settings_are_kept(pair: Pair, tmp_path: Path, place: str) -> None:
    """Where torchvision is, transformers' own processor reads them; this machine may have no such half."""
    base = tmp_path / "base"
    export_model(pair.fresh(), pair.source, base)
    settings = {"fps": 7, "video_processor_type": "Qwen3VLVideoProcessor"}
    file = base / place
    whole = {**json.loads(file.read_text(encoding="utf-8")), "video_processor": settings} if place == "processor_config.json" else settings
    file.write_text(json.dumps(whole), encoding="utf-8")
    source = open_source(str(base))
    if hasattr(source.processor, "video_processor") and source.processor.video_processor is not None:
        pytest.skip("with torchvision the processor saves its own")
    export_model(pair.fresh(), source, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "video_preprocessor_config.json").read_text(encoding="utf-8")) == settings
