"""Low-rank adapters (LoRA, arXiv 2106.09685) through PEFT, put into the model in place: W x + alpha / rank · B A x.

The model stays what it was, with PEFT's layers where its linear layers were, so every forward pass, sampler and loss takes it as it is.
Its own weights are frozen; with the adapters off it is the model before training, and that is a teacher without a second copy.

Neither the LM head nor the embeddings are ever adapted: the divergence reads the head's weight as it is (vaopd.core.Head).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from vaopd.config import LoraConfig
from vaopd.errors import ConfigError, ModelError, did_you_mean

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear

ADAPTER = "default"  # PEFT's name of the only one
PEFT_PREFIX = "base_model.model."  # of the tensors in an adapter's file


def check_lora(lora: LoraConfig, config: Any) -> list[str]:
    """The last names of the layers that a model of this configuration has adapted, in order; no weight is loaded.

    Raises:
        ModelError: PEFT is not installed.
        ConfigError: a target names no linear layer within reach.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("`lora` needs PEFT, which is not installed: pip install 'vaopd[lora]'")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return list(dict.fromkeys(_last(name) for name in target_modules(model, lora)))


def target_modules(model: Any, lora: LoraConfig) -> list[str]:
    """The full names of the linear layers that are adapted.

    Within reach are those of the decoder's layers, attention and MLP alike, with `vision` also those of everything before the decoder:
    the vision tower and what projects its features. `targets` chooses among them by the last part of the name.

    Raises ConfigError for a target that is none of them.
    """
    reach = [f"{_name_of(model, model.get_decoder())}.layers."]
    if lora.vision:
        reach.append(f"{_name_of(model, model.model)}.")
    head = _name_of(model, model.get_output_embeddings())
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != head]
    within = [name for name in linear if name.startswith(tuple(reach))]
    known = list(dict.fromkeys(_last(name) for name in within))
    for target in lora.targets or ():
        if target not in known:
            raise ConfigError(
                f"lora.targets: '{target}' is no linear layer within reach.{did_you_mean(target, known)} There are: {', '.join(known)}"
                + ("" if lora.vision else "; with lora.vision: true those of the vision tower too")
                + ". The LM head and the embeddings are never adapted: the divergence reads the head's weight as it is"
            )
    return [name for name in within if lora.targets is None or _last(name) in lora.targets]


def add_adapters(model: Any, lora: LoraConfig, *, seed: int) -> None:
    """Put fp32 adapters into the model and freeze everything else. They start at B = 0, so the model computes what it did.

    A is drawn from the seed alone; the global generator is left as it was. Raises ConfigError as `target_modules`.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    names = target_modules(model, lora)
    settings = PeftConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:  # PEFT gives them the weights' precision, in which a small step is lost
            parameter.data = parameter.data.float()
    model.eval()


def adapters(model: Any) -> dict[str, LoraLinear]:
    """The adapted layers by name; empty for a model without adapters."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import Linear as LoraLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Inside, the model is what it was before training, in evaluation mode; may be nested.

    Raises ValueError for a model without adapters, which has no such state.
    """
    before = {layer: not layer.disable_adapters for layer in adapters(model).values()}
    if not before:
        raise ValueError("the model has no adapters to switch off, so it can't be what it was before training")
    was_training = model.training
    try:
        model.eval()
        for layer in before:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, enabled in before.items():
            layer.enable_adapters(enabled)
        model.train(was_training)


@torch.no_grad()
def merged(model: Any) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """The tensors of a model without adapters that computes the same, one after the other.

    Yields the name, the tensor, and what the adapters added to it, alpha / rank · B A in fp32: then the tensor is the sum, in fp32 too.
    With None nothing was added, and the tensor is the model's own.
    """
    layers = adapters(model)
    for name, tensor in model.state_dict().items():
        owner, adapted, rest = name.partition(".base_layer.")
        if adapted and rest == "weight":
            added = layers[owner].get_delta_weight(ADAPTER).float()
            yield f"{owner}.weight", tensor.float() + added, added
        elif ".lora_" not in name:
            yield (f"{owner}.{rest}" if adapted else name), tensor, None


def save_adapter(model: Any, folder: Path, *, base: str) -> None:
    """The adapters alone, in the format that `PeftModel.from_pretrained` reads; `base` is the name of the model they belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = model.peft_config[ADAPTER].to_dict()
    settings |= {"base_model_name_or_path": base, "inference_mode": True, "target_modules": sorted(settings["target_modules"])}
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
