"""Rollouts from a vLLM server, which has an environment and a process of its own (docs/vllm.md)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vaopd.config import RunConfig
from vaopd.errors import ConfigError, EngineError
from vaopd.models.load import Source, control_ids
from vaopd.rollouts.hf import Sampling
from vaopd.rollouts.vllm_server import PAGE, SERVED, Server, serve_command, write_served
from vaopd.rollouts.vllm_wire import Rules, forbidden_ids, read_answer, request
from vaopd.types import Group, Prompt

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")  # whose images' tensors are known in vLLM's format
SIDE_BY_SIDE = 32  # prompts that are asked for at once


def check_vllm(config: RunConfig, source: Source) -> None:
    """Refuses a student whose images can't be sent, and several processes. Raises ConfigError before any weight is loaded."""
    if source.config.model_type not in FAMILIES:
        raise ConfigError(
            f"rollouts.engine: vllm is written for {', '.join(FAMILIES)}; {source.name} is of type '{source.config.model_type}'. "
            "Use rollouts.engine: hf"
        )
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":  # as torchrun and `accelerate launch` tell it
        raise ConfigError(f"rollouts.engine: vllm is written for one training process, found {processes}. Use rollouts.engine: hf")


class VLLMEngine:
    """Samples K sibling responses for each prompt from a server, to which it gives the weights of `model` first, each time.

    The sampled distribution is `HFEngine`'s: the same temperature, top-p, ends and forbidden ids; the noise is the server's own, seeded by
    (run seed, step, prompt id, sibling). `Group.served_logp_N` has what the server computed, for the comparison with the trainer.

    Args:
        model: the student, which may change between calls.
        source: where it came from.
        sampling: as of `HFEngine`.
        url: of the server.
        run: the run folder, below which the weights are handed over.

    Raises:
        EngineError: no server answers (the message has the line that starts one), or it is set up otherwise than training needs.
    """

    def __init__(self, model: Any, source: Source, sampling: Sampling, *, url: str, run: Path) -> None:
        self.model, self.processor, self.folder = model, source.processor, run / SERVED
        self.dtype = torch.bfloat16 if sampling.bf16 else torch.float32
        self.server = Server(url)
        rows = model.get_output_embeddings().weight.shape[0]
        self.rules = Rules(
            sampling,
            source.eos_ids,
            rows,
            forbidden_ids(control_ids(source), source.vocab_size, rows),
            source.config.image_token_id,
            source.processor.image_processor.merge_size,
        )
        self._label, self._syncs = secrets.token_hex(4), 0
        if not self.server.alive():
            run.mkdir(parents=True, exist_ok=True)
            write_served(model, self.processor, self.folder, self.dtype)
            context = getattr(source.config.get_text_config(), "max_position_embeddings", None)
            command = serve_command(self.folder, url, self.dtype, sampling.max_tokens, context)
            raise EngineError(
                f"no vLLM server answers at {url}. The student is in {self.folder}; start a server in vLLM's own environment, and this "
                f"again when it is up ({PAGE}):\n  {command}"
            )
        self.server.check(self.dtype)

    def generate(self, prompts: Sequence[Prompt], k: int, step: int) -> list[Group]:
        """K siblings for each prompt from the model's present weights; `step` is part of the seeds. Raises EngineError."""
        version = self.sync()
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            return list(pool.map(lambda prompt: self._answers(prompt, k, step, version), prompts))

    def sync(self) -> str:
        """Give the server the model's weights; returns the name under which its answers tell that they come from them."""
        self._syncs += 1
        version = f"{self._label}-{self._syncs}"
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        write_served(self.model, self.processor, self.folder, self.dtype)
        self.server.load(self.folder, version)
        return version

    def _answers(self, prompt: Prompt, k: int, step: int, version: str) -> Group:
        try:
            content = self.server.ask("POST", "/inference/v1/generate", request(prompt, k, step, self.rules))
        except EngineError as error:
            raise EngineError(f"example '{prompt.id}': {error}") from None
        return read_answer(content, prompt, k, self.rules, version)
