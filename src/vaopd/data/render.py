"""Example -> Prompt: the model's own chat template, tokenizer and image processor, for every view of the images.

Text of the data can't become a control token (`control_text`), and all views of a prompt share one row of ids: the degraded images go
through the same processor as the original ones, and anything that differs but the pixels is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vaopd.data.control_text import ControlText
from vaopd.data.images import decode
from vaopd.data.sources import IMAGE_MARK, split_marks
from vaopd.errors import DataError, ModelError
from vaopd.types import DEGRADED, ORIGINAL, Example, Prompt
from vaopd.views import Size, View

Part = str | None  # a text, or an image (None)


class Renderer:
    """Renders examples for one processor; student and teacher share it, so they are given the same ids and pixels."""

    def __init__(self, processor: Any, degrade: View | None = None) -> None:
        """`degrade` makes the degraded view, e.g. `vaopd.views.view("pixelate")`; None: only the original view can be asked for.

        Raises `ModelError` when the chat template is missing or rewrites texts.
        """
        self._processor = processor
        self._degrade = degrade
        self._control = ControlText(processor)
        self._check_template()
        self.eos_id = self._turn_end()  # the token with which the chat template ends the assistant's turn

    def __call__(self, example: Example, views: Sequence[str] | None = None) -> Prompt:
        """The prompt with the images of `views` (default: all there are); no images at all for a text-only example.

        Raises `DataError` naming the example: an image that can't be decoded or shown, a view that changes more than pixels, text that
        can't be kept apart from control tokens.
        """
        views = views if views is not None else [ORIGINAL, DEGRADED] if self._degrade else [ORIGINAL]
        try:
            return self._render(example, views)
        except DataError as error:
            raise DataError(f"example '{example.id}': {error}") from error

    def without_images(self, example: Example) -> Prompt:
        """The same question with its images left out, for the blind evaluation."""
        text = example.problem.replace(IMAGE_MARK, "").strip()
        if not text:
            raise DataError(f"example '{example.id}': without its images there is no question left to ask.")
        return self(Example(id=example.id, images=(), problem=text))

    def degraded_images(self, example: Example) -> list[Image.Image]:
        """The images of an example as the degraded view has them, for people to look at."""
        images = [_decode(source, number) for number, source in enumerate(example.images, 1)]
        text, _, _ = self._chat_text(split_marks(example.problem, len(images)))
        return self._degraded(images, self._process(text, images), DEGRADED) if images else []

    def encode_response(self, text: str, row: str = "") -> Tensor:
        """(T,) int64: a given response as the student would have written it, with the token that ends its turn."""
        try:
            return torch.tensor([*self._control.encode(text), self.eos_id], dtype=torch.long)
        except DataError as error:
            raise DataError(f"example '{row}', response: {error}" if row else f"response: {error}") from error

    def prompt_tokens(self, example: Example, sizes: Sequence[Size]) -> int:
        """How many tokens the prompt will have, from its text and the (width, height) of its images, without touching a pixel.

        Exact for Qwen-VL; elsewhere a few tokens around each image may be missing. Raises `DataError` naming the field for a text or a
        size that `__call__` would refuse.
        """
        try:
            text, _, cuts = self._chat_text(split_marks(example.problem, len(sizes)))
        except DataError as error:
            raise DataError(f"field 'problem': {error}") from error
        tokens = len(self._processor.tokenizer(text, **self._options(text))["input_ids"]) - cuts
        for number, (width, height) in enumerate(sizes, 1):
            try:
                tokens += self._image_tokens(width, height) - 1
            except (ValueError, TypeError, ZeroDivisionError) as error:
                raise DataError(
                    f"field 'images', image {number}: {width}x{height} can't be shown ({error}). Crop it, or take the row out."
                ) from error
        return tokens

    @lru_cache(maxsize=4096)  # noqa: B019 - a renderer lives as long as its run
    def _image_tokens(self, width: int, height: int) -> int:
        """Placeholders of an image of this size, which stand where the text has one."""
        count = getattr(self._processor, "_get_num_multimodal_tokens", None)  # the processors' own, which vLLM plans with, too
        if count is not None:
            return int(sum(count(image_sizes=[(height, width)]).num_image_tokens))
        text, _, _ = self._chat_text([None])
        shown = self._processor(text=[text], images=[[Image.new("RGB", (width, height))]], return_tensors="pt", **self._options(text))
        return int(shown["input_ids"].shape[1]) - len(self._processor.tokenizer(text, **self._options(text))["input_ids"]) + 1

    def _options(self, text: str) -> dict[str, Any]:
        """As in `apply_chat_template`: a template that writes the BOS itself must not get a second one."""
        bos = self._processor.tokenizer.bos_token
        return {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}

    def _render(self, example: Example, views: Sequence[str]) -> Prompt:
        parts = split_marks(example.problem, len(example.images))
        text, separator, cuts = self._chat_text(parts)
        images = [_decode(source, number) for number, source in enumerate(example.images, 1)]
        original = self._process(text, images)
        shown: dict[str, Mapping[str, Tensor]] = {}
        for view in views if images else ():
            if view == ORIGINAL:
                shown[view] = _image_tensors(original)
            else:
                degraded = self._process(text, self._degraded(images, original, view))
                _check_same_but_pixels(original, degraded, view)
                shown[view] = _image_tensors(degraded)
        ids = original["input_ids"][0]
        if cuts:
            ids = torch.tensor(self._control.remove(ids.tolist(), separator, cuts), dtype=torch.long)
        return Prompt(id=example.id, ids_P=ids, images=shown)

    def _chat_text(self, parts: Sequence[Part]) -> tuple[str, str, int]:
        """The rendered chat with user texts cut where needed; the separator used, and how often."""
        literals, texts = self._literals(parts), [part for part in parts if part is not None]
        texts = _as_template_writes(self._template(parts), literals, texts)
        for text in texts:
            self._control.encode(text)  # raises where the text can't be kept apart
        separator, cuts = "", 0
        if any(self._control.found(text) for text in texts):
            separator = self._control.separator("\0".join(literals))
            pairs = [self._control.cut(text, separator) for text in texts]
            texts, cuts = [text for text, _ in pairs], sum(count for _, count in pairs)
        chat = _interleave(literals, texts)
        if len(self._control.found(chat)) != cuts + sum(len(self._control.found(literal)) for literal in literals):
            raise DataError("the text completes a control token of the chat template. Reword its beginning or end.")
        return chat, separator, cuts

    def _literals(self, parts: Sequence[Part]) -> list[str]:
        """What the template itself writes before, between and after the texts of `parts`."""
        nonces: list[str] = [f"text{secrets.token_hex(8)}" for part in parts if part is not None]
        replacements = iter(nonces)
        rest, literals = self._template([None if part is None else next(replacements) for part in parts]), []
        for nonce in nonces:
            literal, found, rest = rest.partition(nonce)
            if not found or nonce in rest:
                raise ModelError(
                    "the chat template drops, repeats or reorders texts of the user's message; use a template that keeps them."
                )
            literals.append(literal)
        literals.append(rest)
        self._check_image_places(parts, literals)
        return literals

    def _check_image_places(self, parts: Sequence[Part], literals: Sequence[str]) -> None:
        """Refuses a template that moves images; one that writes no `image_token` for each can't be checked and passes."""
        wanted = [0]
        for part in parts:
            if part is None:
                wanted[-1] += 1
            else:
                wanted.append(0)
        token = getattr(self._processor, "image_token", None)
        found = [literal.count(token) for literal in literals] if token else wanted
        if sum(found) == sum(wanted) and found != wanted:
            raise DataError("the chat template moves images away from their marks. Put the images before the text.")

    def _template(self, parts: Sequence[Part], answer: str | None = None) -> str:
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self._processor.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)

    def _check_template(self) -> None:
        probe = 'it\'s "a" \\ b\n<é> & c'  # a template that escapes, or prints a list as Python, changes one of these
        try:
            rendered = self._template([probe])
        except Exception as error:  # a template is a program of its own; whatever it raises, it can't be used
            raise ModelError(f"the processor's chat template can't render a user's message ({error}).") from error
        if probe not in rendered:
            raise ModelError("the processor's chat template rewrites the user's text; use one that inserts it as it is.")

    def _turn_end(self) -> int:
        nonce = f"text{secrets.token_hex(8)}"
        try:
            ending = self._template(["a"], answer=nonce).partition(nonce)[2]
        except Exception:  # templates for prompts alone refuse or can't read an assistant's turn: the tokenizer's EOS is what is left
            ending = ""
        id_ = self._control.first_id(ending)
        id_ = self._processor.tokenizer.eos_token_id if id_ is None else id_
        if id_ is None:
            raise ModelError("neither the chat template nor the tokenizer says which token ends the assistant's turn.")
        return id_

    def _process(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The processor on one chat: `input_ids` (1, P) and the images' tensors."""
        options = self._options(text)
        if images:
            options["images"] = [list(images)]
        try:
            return dict(self._processor(text=[text], return_tensors="pt", **options))
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            raise DataError(f"the processor refuses the row (images: {sizes or 'none'}): {error}") from error

    def _degraded(self, images: Sequence[Image.Image], original: Mapping[str, Tensor], view: str) -> list[Image.Image]:
        if view != DEGRADED or self._degrade is None:
            raise ValueError(
                f"view {view!r} was asked for, but this renderer makes {ORIGINAL!r}{f' and {DEGRADED!r}' if self._degrade else ' only'}"
            )
        degraded = []
        for number, (image, shown_size) in enumerate(zip(images, shown_sizes(self._processor, original, len(images)), strict=True), 1):
            result = self._degrade(image, shown_size=shown_size)
            if result.size != image.size or result.mode != "RGB":
                raise DataError(
                    f"image {number}: the view made it {result.size[0]}x{result.size[1]} {result.mode} from "
                    f"{image.width}x{image.height} RGB; a view must keep size and mode."
                )
            degraded.append(result)
        return degraded


def shown_sizes(processor: Any, tensors: Mapping[str, Any], n_images: int) -> list[Size | None]:
    """The (width, height) in pixels to which the processor resized each image, None where it can't be told from its output."""
    grid, patch = tensors.get("image_grid_thw"), getattr(processor.image_processor, "patch_size", None)
    if grid is not None and isinstance(patch, int) and len(grid) == n_images:
        return [(width * patch, height * patch) for _, height, width in grid.tolist()]
    pixels = tensors.get("pixel_values")
    if pixels is not None and pixels.ndim == 4 and len(pixels) == n_images:  # (image, channel, height, width)
        return [(pixels.shape[3], pixels.shape[2])] * n_images
    return [None] * n_images


def _decode(source: Any, number: int) -> Image.Image:
    try:
        return decode(source)
    except DataError as error:
        raise DataError(f"image {number}: {error}") from error


def _image_tensors(processed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The processor's output without what belongs to the text."""
    of_text = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {name: tensor for name, tensor in processed.items() if name not in of_text}


def _interleave(literals: Sequence[str], texts: Sequence[str]) -> str:
    return literals[0] + "".join(text + literal for text, literal in zip(texts, literals[1:], strict=True))


def _as_template_writes(rendered: str, literals: Sequence[str], texts: Sequence[str]) -> list[str]:
    """The texts as they stand in `rendered`: untouched, or stripped by a template that does so. Raises `DataError` otherwise."""
    for strip in (str, str.strip, str.rstrip, str.lstrip):
        stripped = [strip(text) for text in texts]
        if _interleave(literals, stripped) == rendered:
            return stripped
    raise DataError("the chat template changes this text or reacts to it. Reword the text or use a template that inserts it as it is.")


def _check_same_but_pixels(original: Mapping[str, Tensor], degraded: Mapping[str, Tensor], view: str) -> None:
    """Both views must differ in pixel values alone: equal ids, keys, shapes, and equal integers (grids, sizes, masks)."""
    if original.keys() != degraded.keys():
        raise DataError(f"the {view} view has {sorted(degraded)}, the original one {sorted(original)}; both must be processed alike.")
    for name, tensor in original.items():
        other = degraded[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise DataError(
                f"the {view} view's '{name}' is {tuple(other.shape)}, the original's {tuple(tensor.shape)}; both must have one grid."
            )
        if not tensor.is_floating_point() and not torch.equal(tensor, other):
            raise DataError(f"the {view} view's '{name}' differs from the original's; only pixel values may differ.")
