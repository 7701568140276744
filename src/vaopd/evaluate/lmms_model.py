"""A model folder of this package inside lmms-eval: `lmms_eval --model vaopd --model_args pretrained=FOLDER,sample=3`.

Loaded by lmms-eval through the entry point `lmms_eval.models`, in the environment where lmms-eval is installed. Answers are drawn by the
sampler that training uses: the model's whole distribution at the temperature asked for, each from its own seed. lmms-eval's wrappers
differ there: they leave top-k to the checkpoint's generation_config.json, add a system prompt, or draw every sample with one seed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from vaopd.data.images import png_bytes
from vaopd.data.render import Renderer
from vaopd.data.sources import IMAGE_MARK
from vaopd.errors import ConfigError, DataError
from vaopd.evaluate.held_out import decoder, sampler
from vaopd.models.load import load_model, open_source
from vaopd.rollouts.hf import Sampling
from vaopd.types import Example, Prompt

manifest = ModelManifest(model_id="vaopd", chat_class_path="vaopd.evaluate.lmms_model.SampledModel")


class SampledModel(lmms):
    """lmms-eval's interface to a model; sample `sample` of `seed` is the same however questions are batched."""

    is_simple = False

    def __init__(
        self, pretrained: str, sample: int = 0, seed: int = 1, batch_size: int | str = 64, device: str | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.source = open_source(str(pretrained))
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = load_model(self.source, dtype=torch.bfloat16 if place.type == "cuda" else torch.float32).to(place)
        self.sample, self.seed, self.rows = int(sample), int(seed), int(batch_size)
        self.renderers: dict[str, Renderer] = {}  # by system prompt

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Raises `ConfigError` for requests without temperature and length, `DataError` naming the question that can't be shown."""
        if not requests:
            return []
        options = requests[0].args[2]
        if any(request.args[2] != options for request in requests):
            raise ConfigError("the task's questions differ in their generation_kwargs; evaluate them as tasks of their own")
        # Stop texts ("until") are for completions: a chat model ends its turn, and lmms-eval's own chat wrappers ignore them, too.
        sampling = Sampling(*_required(options), float(options.get("top_p") or 1.0), self.seed, bf16=self.network.device.type == "cuda")
        engine = sampler(self.network, self.source, sampling, rows=self.rows)
        text, results = decoder(self.source), list[GenerationResult]()
        for start in range(0, len(requests), self.rows):  # the pictures of a whole benchmark fit no memory
            groups = engine.generate([self._prompt(request) for request in requests[start : start + self.rows]], 1, self.sample)
            results += [GenerationResult(text(g.responses[0]), TokenCounts(output_tokens=len(g.responses[0]))) for g in groups]
            print(f"answered {len(results)} of {len(requests)}", flush=True)
        return results

    def _prompt(self, request: Instance) -> Prompt:
        _, to_messages, _, doc_id, task, split = request.args
        system, example = as_example(f"{task}/{doc_id}", to_messages(self.task_dict[task][split][doc_id]))
        if system not in self.renderers:
            self.renderers[system] = Renderer(with_system(self.source.processor, system) if system else self.source.processor)
        return self.renderers[system](example)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: the benchmarks are answered in words."""
        raise NotImplementedError("the model 'vaopd' generates answers; take a task with output_type: generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: the benchmarks have one turn."""
        raise NotImplementedError("the model 'vaopd' answers in one turn; take a task with output_type: generate_until")


def as_example(id_: str, messages: Sequence[Mapping[str, Any]]) -> tuple[str, Example]:
    """lmms-eval's messages -> the system prompt ('' for none) and the user's one turn."""
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise DataError(f"question '{id_}' has the turns {', '.join(roles)}; one turn of the user can be answered")
    system = "".join(part["text"] for part in messages[0]["content"]) if roles[0] == "system" else ""
    text, images = "", list[bytes]()
    for part in messages[-1]["content"]:
        if part["type"] == "image":
            text, images = text + IMAGE_MARK, [*images, png_bytes(part["url"].convert("RGB"))]
        elif part["type"] != "text":
            raise DataError(f"question '{id_}' has a part of type '{part['type']}'; texts and images can be shown")
        elif IMAGE_MARK in part["text"]:
            raise DataError(f"question '{id_}': its text has {IMAGE_MARK!r} in it, which marks the place of an image")
        else:
            text += part["text"]
    return system, Example(id=id_, images=tuple(images), problem=text)


def _required(options: Mapping[str, Any]) -> tuple[int, float]:
    tokens, temperature = options.get("max_new_tokens"), options.get("temperature")
    if not tokens or not temperature:
        raise ConfigError("the model 'vaopd' samples: give --gen_kwargs temperature=1.0,max_new_tokens=N")
    return int(tokens), float(temperature)


def with_system(processor: Any, system: str) -> Any:
    """The processor with a system prompt before its chats."""
    begun = copy.copy(processor)
    turn = {"role": "system", "content": [{"type": "text", "text": system}]}
    begun.apply_chat_template = lambda messages, **options: processor.apply_chat_template([turn, *messages], **options)
    return begun
