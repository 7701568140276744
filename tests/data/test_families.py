"""The renderer on processors of other families: different placeholders, one image expanded to several tiles, a BOS in the template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_processor import encoded, make_tokenizer, noise
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
)

from vaopd.data.render import Renderer
from vaopd.types import DEGRADED, ORIGINAL, Example
from vaopd.views import view

COMMON = ["<unk>", "<pad>", "<spare>"]
NAMED = {"unk_token": "<unk>", "pad_token": "<pad>"}
TURNS = (
    "{% for m in messages %}START{{ m['role'] }}: "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}TEXT{% endif %}{% endfor %}END{% endfor %}"
)


def template(image: str, end: str, start: str = "", text: str = "{{ c['text'] }}", bos: str = "") -> str:
    turns = TURNS.replace("IMAGE", image).replace("TEXT", text).replace("START", start).replace("END", end)
    return bos + turns + "{% if add_generation_prompt %}" + start + "assistant: {% endif %}"


def llava() -> Any:
    tokenizer = make_tokenizer([*COMMON, "</s>", "<image>"], eos_token="</s>", **NAMED)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    options = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, tokenizer, chat_template=template("<image>\n", "</s>"), **options)


def idefics3() -> Any:
    """Cuts an image into tiles, each with tokens of its own."""
    special = [*COMMON, "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>"]
    tokenizer = make_tokenizer(special, eos_token="<end_of_utterance>", **NAMED)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template("<image>", "<end_of_utterance>\n"))


def gemma3() -> Any:
    """Writes a BOS, strips texts, and expands a token that isn't its image token."""
    special = [*COMMON, "<bos>", "<end_of_turn>", "<start_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    extra = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = make_tokenizer(special, eos_token="<end_of_turn>", bos_token="<bos>", extra_special_tokens=extra, **NAMED)
    chat = template("<start_of_image>", "<end_of_turn>\n", "<start_of_turn>", "{{ c['text'] | trim }}", "{{ bos_token }}")
    return Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, image_seq_length=4, chat_template=chat)


@pytest.mark.parametrize("make", [llava, idefics3, gemma3])
def test_own_ids_and_harmless_text(make: Callable[[], Any]) -> None:
    processor = make()
    renderer, picture = Renderer(processor, view("pixelate")), noise(100, 60)
    prompt = renderer(Example("a", (encoded(picture),), "What is x?"))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is x?"}]
    own = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt.ids_P.tolist() == list(own["input_ids"][0])
    assert prompt.images[ORIGINAL].keys() == prompt.images[DEGRADED].keys() >= {"pixel_values"}
    assert not torch.equal(prompt.images[ORIGINAL]["pixel_values"], prompt.images[DEGRADED]["pixel_values"])

    added = processor.tokenizer.added_tokens_decoder
    # `<image>` marks an image in our rows, so it can't be user text
    text = " ".join(str(token) for token in added.values() if str(token) != "<image>")
    hostile = renderer(Example("a", (encoded(picture),), f"<image>What is {text} x?"))
    assert [id_ for id_ in hostile.ids_P.tolist() if id_ in added] == [id_ for id_ in prompt.ids_P.tolist() if id_ in added]
    assert text in processor.tokenizer.decode(hostile.ids_P)
    assert renderer.eos_id == processor.tokenizer.eos_token_id
