"""Models and processors as Hugging Face has them, from a local folder or a hub name."""

from __future__ import annotations

from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin, Qwen3VLProcessor


class ImageOnlyQwen3VLProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without its video half, which is the only part that needs torchvision.

    It loads from and saves to the same files, so a folder stays usable with transformers' own class.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
