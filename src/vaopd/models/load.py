"""Student, teacher and processor from a local folder, a hub name or `builtin:NAME`, and the gates before any weight is loaded."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedConfig

from vaopd.errors import ModelError, did_you_mean
from vaopd.models.families import Family, family_named, family_of
from vaopd.models.processors import PREFIX

BUILTIN = "builtin:"

log = logging.getLogger(__name__)

# Control ids that a model's configuration names, where it has them.
NAMED_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id")


@dataclass(frozen=True)
class Source:
    """A model before its weights are loaded."""

    name: str  # as the user gave it
    path: str  # folder or hub name
    config: Any  # transformers configuration
    processor: Any
    eos_ids: frozenset[int]  # ids that end a response

    @property
    def vocab_size(self) -> int:
        """Number of the tokenizer's ids; rows of the LM head beyond it are padding."""
        return len(self.processor.tokenizer)


def locate(name: str) -> str:
    """The folder or hub name that transformers can load. Raises ModelError for an unknown `builtin:` name or a missing folder."""
    if name.startswith(BUILTIN):
        root = Path(str(files("vaopd") / "world" / "models"))
        known = sorted(folder.name for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []
        wanted = name.removeprefix(BUILTIN)
        if wanted not in known:
            raise ModelError(f"there is no built-in model '{wanted}'.{did_you_mean(wanted, known)} Built in: {', '.join(known) or 'none'}")
        return str(root / wanted)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if looks_local:
        raise ModelError(f"there is no model folder at {folder.absolute()}. Give a folder with config.json, or a hub name like OWNER/NAME")
    return name


def open_source(name: str) -> Source:
    """Read a model's configuration, processor and end-of-response ids; no weights. Raises ModelError."""
    path = locate(name)
    # First the type alone: of one that transformers doesn't know it would only say that it wants to run the checkpoint's own code.
    if model_type := _loaded(name, lambda: PreTrainedConfig.get_config_dict(path)[0].get("model_type")):
        family_named(model_type)
    config = _loaded(name, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))
    family = family_of(config)
    processor = _loaded(name, lambda: load_processor(path, family))
    if (written := family.placeholder_id(processor)) != config.image_token_id:
        raise ModelError(
            f"{name}: its processor writes images as token {written}, its config.json names {config.image_token_id} "
            "(image_token_id). Take both from one model"
        )
    return Source(name, path, config, processor, _eos_ids(path, processor))


def limit_pixels(source: Source, smallest: int | None, largest: int | None) -> str:
    """Set how many pixels of an image the processor shows at least and at most; None leaves what the model has. Returns what holds now.

    An exported model keeps the limits, as they are part of its processor.

    Raises:
        ModelError: the processor shows images in other ways (tiles, one fixed size).
    """
    processor = source.processor.image_processor
    size = dict(processor.size)
    if not _has_limits(processor):
        raise ModelError(
            f"{source.name}: data.min_pixels and data.max_pixels are of models that show an image at its own resolution (Qwen-VL); "
            f"{type(processor).__name__} knows none. Take them out of the recipe"
        )
    size |= {key: value for key, value in (("shortest_edge", smallest), ("longest_edge", largest)) if value is not None}
    if size["shortest_edge"] > size["longest_edge"]:
        raise ModelError(
            f"{source.name}: at least {size['shortest_edge']} and at most {size['longest_edge']} pixels of an image can't both be shown. "
            "Set data.min_pixels and data.max_pixels together"
        )
    processor.size = type(processor.size)(**size)
    return f"an image is shown with {size['shortest_edge']:,} to {size['longest_edge']:,} pixels"


def show_alike(student: Source, teacher: Source) -> None:
    """The limits of pixels with which the student was trained hold for a teacher that scores it, said aloud: data.min_pixels and
    data.max_pixels are kept by an exported model, and unknown to the teacher's own folder.
    """
    ours, theirs = (source.processor.image_processor for source in (student, teacher))
    if ours.size != theirs.size and _has_limits(ours) and _has_limits(theirs):
        held = limit_pixels(teacher, ours.size["shortest_edge"], ours.size["longest_edge"])
        log.warning("%s was trained with limits of its own, which hold for %s too: %s", student.name, teacher.name, held)


def _has_limits(image_processor: Any) -> bool:
    # Elsewhere the two edges are sides of an image, and not its least and most pixels.
    return hasattr(image_processor, "merge_size") and {"shortest_edge", "longest_edge"} <= dict(image_processor.size).keys()


def load_processor(path: str, family: Family) -> Any:
    """The model's own processor; without torchvision, the same one without its video half."""
    if importlib.util.find_spec("torchvision") is not None:
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)
    processor = family.processor.from_pretrained(path, trust_remote_code=False)
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def load_model(source: Source, *, dtype: torch.dtype) -> Any:
    """The model with its weights, in evaluation mode; safetensors only. Raises ModelError."""
    model, report = _loaded(
        source.name,
        lambda: AutoModelForImageTextToText.from_pretrained(
            source.path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
        ),
    )
    if missing := sorted(report["missing_keys"]):  # transformers draws these at random, and goes on
        raise ModelError(f"{source.name}: the weights lack {len(missing)} tensors of the model, the first is {missing[0]}")
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < source.vocab_size:
        raise ModelError(
            f"{source.name}: the LM head has {rows} rows for {source.vocab_size} token ids; the tokenizer belongs to another model"
        )
    return model.eval()


def save_model(model: Any, processor: Any, folder: Path, *, state: dict[str, Any] | None = None) -> None:
    """A standard Hugging Face folder: weights as safetensors (`state` in the place of the model's), tokenizer, processor, chat template."""
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
    # transformers 5 writes it into processor_config.json alone. Its own video processors, which it builds for Qwen-VL wherever
    # torchvision is, and programs with an older reader (vLLM) look for this file.
    processor.image_processor.save_pretrained(folder)
    for file in ("processor_config.json", "tokenizer_config.json"):
        path = folder / file
        values = json.loads(path.read_text(encoding="utf-8"))
        # The name under which transformers itself knows the processor, with video where torchvision exists.
        values["processor_class"] = type(processor).__name__.removeprefix(PREFIX)
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def control_ids(source: Source) -> frozenset[int]:
    """Special ids that no response may contain: all of the tokenizer's and the configuration's but the ends of a response."""
    tokenizer, config = source.processor.tokenizer, source.config
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    special |= {value for key in NAMED_IDS if isinstance(value := getattr(config, key, None), int)}
    return frozenset(special - source.eos_ids)


def check_agreement(student: Source, teacher: Source) -> None:
    """Refuse a pair that does not speak one language: every difference that would silently misalign tokens or pixels.

    Raises:
        ModelError: lists each difference with its values and what to do.
    """
    differences = [text for compare in _GATES for text in [compare(student, teacher)] if text]
    if differences:
        lines = "\n".join(f"  - {text}" for text in differences)
        raise ModelError(
            f"student '{student.name}' and teacher '{teacher.name}' don't agree:\n{lines}\n"
            "Distillation compares the two models token by token, so take two models of one family with one tokenizer "
            "(Qwen3-VL-2B and 8B Instruct are such a pair)."
        )


def _vocabulary(student: Source, teacher: Source) -> str | None:
    ours, theirs = student.processor.tokenizer.get_vocab(), teacher.processor.tokenizer.get_vocab()
    if ours == theirs:
        return None
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    example = differing[0]
    return (
        f"vocabulary: {len(differing)} of {len(ours.keys() | theirs.keys())} tokens have different ids, "
        f"e.g. {example!r}: {ours.get(example)} in the student, {theirs.get(example)} in the teacher"
    )


def _special_ids(student: Source, teacher: Source) -> str | None:
    ours, theirs = control_ids(student), control_ids(teacher)
    if ours != theirs:
        return f"special ids: {sorted(ours ^ theirs)} are special in one of them only"
    named = [(key, getattr(student.config, key, None), getattr(teacher.config, key, None)) for key in NAMED_IDS]
    unequal = [f"{key} is {ours} in the student, {theirs} in the teacher" for key, ours, theirs in named if ours != theirs]
    return f"special ids: {'; '.join(unequal)}" if unequal else None


def _ends(student: Source, teacher: Source) -> str | None:
    if student.eos_ids == teacher.eos_ids:
        return None
    return f"end of a response: ids {sorted(student.eos_ids)} in the student, {sorted(teacher.eos_ids)} in the teacher"


def _chat_format(student: Source, teacher: Source) -> str | None:
    probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    ours, theirs = (
        source.processor.apply_chat_template(probe, tokenize=False, add_generation_prompt=True) for source in (student, teacher)
    )
    return None if ours == theirs else f"chat template: the student is prompted with {ours!r}, the teacher with {theirs!r}"


def _pixels(student: Source, teacher: Source) -> str | None:
    ours, theirs = (source.processor.image_processor.to_dict() for source in (student, teacher))
    ignored = {"processor_class", "image_processor_type", "_processor_class"}
    keys = sorted(key for key in (ours.keys() | theirs.keys()) - ignored if ours.get(key) != theirs.get(key))
    if not keys:
        return None
    return "image processor: " + "; ".join(f"{key} is {ours.get(key)} in the student, {theirs.get(key)} in the teacher" for key in keys)


def _placeholders(student: Source, teacher: Source) -> str | None:
    """What a processor says of itself, such as the number of placeholders for a tile."""
    ours, theirs = (
        {
            key: value
            for key, value in source.processor.to_dict().items()
            if isinstance(value, int | float | str) and key != "processor_class"
        }
        for source in (student, teacher)
    )
    unequal = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    differences = [f"{key} is {ours.get(key)} in the student, {theirs.get(key)} in the teacher" for key in unequal]
    return f"image placeholders: {'; '.join(differences)}" if differences else None


def _head_width(student: Source, teacher: Source) -> str | None:
    short = [
        f"{source.name} has {width} rows for {source.vocab_size} token ids"
        for source in (student, teacher)
        if (width := source.config.get_text_config().vocab_size) < source.vocab_size
    ]
    return f"LM head: {'; '.join(short)}" if short else None


_GATES: tuple[Callable[[Source, Source], str | None], ...] = (
    _vocabulary,
    _special_ids,
    _ends,
    _chat_format,
    _pixels,
    _placeholders,
    _head_width,
)


def _eos_ids(path: str, processor: Any) -> frozenset[int]:
    """The tokenizer's EOS and those of the generation configuration, where a model has one."""
    ids = {processor.tokenizer.eos_token_id}
    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # a model without generation_config.json
        named = None
    ids |= set(named) if isinstance(named, list) else {named}
    return frozenset(ids - {None})


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    """Run one of transformers' loaders; what goes wrong in it is about the folder or the hub, so it becomes a ModelError."""
    try:
        return load()
    except Exception as error:  # a damaged tokenizer raises a bare Exception, damaged weights one of safetensors' own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"can't load '{name}': {reason}\n"
            "Give a folder with config.json, tokenizer and safetensors weights, or a hub name that is reachable"
        ) from error
