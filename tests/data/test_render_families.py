"""The renderer on processors of other families: different placeholders, one image expanded to several tiles, a BOS in the template."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_processor import encoded, make_tokenizer, noise
from transformers import CLIPImageProcessorPil, LlavaProcessor

from small_families import BUILDERS
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


def own(model_type: str) -> Any:
    """The processor of one of our families."""
    return BUILDERS[model_type](0, 48)[0]


@pytest.mark.parametrize("make", [llava, *(partial(own, name) for name in BUILDERS)], ids=["llava", *BUILDERS])
def test_own_ids_and_harmless_text(make: Callable[[], Any]) -> None:
    processor = make()
    renderer, picture = Renderer(processor, view("pixelate")), noise(100, 60)
    prompt = renderer(Example("a", (encoded(picture),), "What is x?"))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is x?"}]
    own = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt.ids_P.tolist() == list(own["input_ids"][0])
    assert prompt.images[ORIGINAL].keys() == prompt.images[DEGRADED].keys() >= {"pixel_values"}
    assert not torch.equal(prompt.images[ORIGINAL]["pixel_values"], prompt.images[DEGRADED]["pixel_values"])

    # The length is known before a pixel is touched: to the token for Qwen-VL, elsewhere but for what stands around an image.
    known = renderer.prompt_tokens(Example("a", (), "<image>What is x?"), [picture.size])
    assert abs(known - len(prompt.ids_P)) <= (0 if "qwen" in type(processor).__name__.lower() else 8)
    added = processor.tokenizer.added_tokens_decoder
    # `<image>` marks an image in our rows, so it can't be user text
    text = " ".join(str(token) for token in added.values() if str(token) != "<image>")
    hostile = renderer(Example("a", (encoded(picture),), f"<image>What is {text} x?"))
    assert [id_ for id_ in hostile.ids_P.tolist() if id_ in added] == [id_ for id_ in prompt.ids_P.tolist() if id_ in added]
    assert text in processor.tokenizer.decode(hostile.ids_P)
    assert renderer.eos_id == processor.tokenizer.eos_token_id
