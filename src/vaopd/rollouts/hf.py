"""Rollouts through the Hugging Face model itself: the prompt is prefilled once per group, its cache is repeated for the siblings.

Sampling is Gumbel-max with noise from one generator per rollout, seeded by (run seed, step, prompt id, sibling). So a rollout depends
neither on which others share its batch nor on the number of processes, and a resumed run needs no sampler state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vaopd.models.families import family_of, position_ids
from vaopd.models.forward import head_of, view_images
from vaopd.types import ORIGINAL, Group, Prompt


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    bf16: bool = False  # compute in bfloat16, as the training step does with that precision; the weights stay as they are


class HFEngine:
    """Samples K sibling responses for each prompt from `model`, which may change between calls.

    Args:
        model: a Hugging Face image-text-to-text model.
        sampling: length limit, temperature, top-p, seed.
        vocab_size: the tokenizer's size; padded rows of the head are never sampled.
        eos_ids: ids that end a response; the first one is part of it.
        forbidden_ids: control ids (image placeholders, turn markers, padding) that are never sampled.
        view: the rendering of the images that the model answers from.
        rows: how many rollouts are decoded side by side.
    """

    def __init__(
        self,
        model: Any,
        sampling: Sampling,
        *,
        vocab_size: int,
        eos_ids: Collection[int],
        forbidden_ids: Collection[int],
        view: str = ORIGINAL,
        rows: int = 64,
    ) -> None:
        self.model, self.sampling, self.view, self.rows = model, sampling, view, rows
        self.vocab_size = vocab_size
        self.eos_ids = torch.tensor(sorted(eos_ids), device=model.device)
        self.forbidden_V = torch.zeros(vocab_size, dtype=torch.bool, device=model.device)
        self.forbidden_V[torch.tensor(sorted(forbidden_ids), dtype=torch.long)] = True

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], k: int, step: int) -> list[Group]:
        """K siblings for each prompt; `step` selects the noise."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.sampling.bf16):
                return [group for batch in _batches(prompts, max(1, self.rows // k)) for group in self._decode(batch, k, step)]
        finally:
            self.model.train(was_training)

    def _decode(self, prompts: Sequence[Prompt], k: int, step: int) -> list[Group]:
        device, sampling, head = self.model.device, self.sampling, head_of(self.model, self.vocab_size)
        noise = [_generator(rollout_seed(sampling.seed, step, p.id, sibling), device) for p in prompts for sibling in range(k)]
        state = _prefill(self.model, prompts, k, self.view)
        count = len(noise)
        alive_R = torch.arange(count, device=device)  # the rollouts still in the batch, by index
        ids_RT = torch.zeros(count, sampling.max_tokens, dtype=torch.long, device=device)
        logp_RT = torch.zeros(count, sampling.max_tokens, device=device)
        length_R = torch.full((count,), sampling.max_tokens, device=device)
        ended_R = torch.zeros(count, dtype=torch.bool, device=device)
        for position in range(sampling.max_tokens):
            logits_RV = head.logits(state.hidden_RH).masked_fill(self.forbidden_V, -torch.inf)
            gumbel_RV = _gumbel([noise[index] for index in alive_R.tolist()], self.vocab_size, device)
            chosen, logp = sample(logits_RV, gumbel_RV, temperature=sampling.temperature, top_p=sampling.top_p)
            ids_RT[alive_R, position], logp_RT[alive_R, position] = chosen, logp
            stop = torch.isin(chosen, self.eos_ids)
            ended_R[alive_R[stop]], length_R[alive_R[stop]] = True, position + 1
            if stop.any():
                going = (~stop).nonzero()[:, 0]
                alive_R, chosen = alive_R[going], chosen[going]
                state.keep(going)
            if len(alive_R) == 0 or position + 1 == sampling.max_tokens:
                break
            state.advance(self.model, chosen)
        return _as_groups(prompts, k, ids_RT.cpu(), logp_RT.cpu(), length_R.tolist(), ended_R.tolist())


def rollout_seed(seed: int, step: int, prompt_id: str, sibling: int) -> int:
    """The seed of one rollout's noise: a hash, so that neither batches nor processes matter."""
    text = f"{seed}|{step}|{sibling}|{prompt_id}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def sample(logits_RV: Tensor, gumbel_RV: Tensor, *, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one id per row by Gumbel-max, and its log-probability under the distribution that was sampled from.

    Nucleus sampling keeps the smallest set of ids whose probability reaches `top_p` (Holtzman et al., arXiv 1904.09751).
    """
    logp_RV = F.log_softmax(logits_RV / temperature, dim=-1)
    if top_p < 1:
        sorted_RV, order_RV = logp_RV.sort(dim=-1, descending=True, stable=True)
        before_RV = sorted_RV.exp().cumsum(-1) - sorted_RV.exp()  # mass of the more probable ids
        outside_RV = torch.zeros_like(before_RV, dtype=torch.bool).scatter(-1, order_RV, before_RV >= top_p)
        logp_RV = F.log_softmax(logp_RV.masked_fill(outside_RV, -torch.inf), dim=-1)
    ids_R = (logp_RV + gumbel_RV).argmax(-1)
    return ids_R, logp_RV.gather(-1, ids_R[:, None])[:, 0]


@dataclass
class _State:
    """What decoding carries from token to token for the rollouts still alive."""

    cache: DynamicCache
    hidden_RH: Tensor  # predicts the next token
    attention_RL: Tensor  # 1 where the cache holds a token
    next_R: Tensor  # position of the next token, the same on every axis
    axes: int

    def keep(self, going: Tensor) -> None:
        """Finished rollouts leave the batch."""
        self.cache.batch_select_indices(going)
        self.attention_RL, self.next_R = self.attention_RL[going], self.next_R[going]

    def advance(self, model: Any, ids_R: Tensor) -> None:
        """Feed one token of every rollout."""
        self.attention_RL = F.pad(self.attention_RL, (0, 1), value=1)
        body = model.model(
            input_ids=ids_R[:, None],
            attention_mask=self.attention_RL,
            position_ids=position_ids(self.next_R[None, :, None].expand(self.axes, -1, -1)),
            cache=self.cache,
            use_cache=True,
        )
        self.hidden_RH, self.next_R = body.last_hidden_state[:, -1], self.next_R + 1


def _prefill(model: Any, prompts: Sequence[Prompt], k: int, view: str) -> _State:
    """Run each prompt and its images once, left-padded, and repeat the result for the K siblings."""
    family, device = family_of(model), model.device
    ids_BP = pad_sequence([prompt.ids_P for prompt in prompts], batch_first=True, padding_side="left").to(device)
    attention_BP = pad_sequence([torch.ones_like(p.ids_P) for p in prompts], batch_first=True, padding_side="left").to(device)
    places = [family.prompt_positions(model, prompt) for prompt in prompts]
    positions_ABP = pad_sequence([place.T for place in places], batch_first=True, padding_side="left").permute(2, 0, 1).to(device)
    next_B = torch.tensor([int(place.max()) + 1 for place in places], device=device)
    cache = DynamicCache(config=model.config.get_text_config())
    images = family.encode_images(model, prompts, [view_images(prompt, view) for prompt in prompts], [1] * len(prompts))
    body = model.model(
        input_ids=ids_BP,
        attention_mask=attention_BP,
        position_ids=position_ids(positions_ABP),
        cache=cache,
        use_cache=True,
        **family.token_inputs(model, ids_BP),
        **images,
    )
    cache.batch_repeat_interleave(k)
    return _State(
        cache=cache,
        hidden_RH=body.last_hidden_state[:, -1].repeat_interleave(k, dim=0),
        attention_RL=attention_BP.repeat_interleave(k, dim=0),
        next_R=next_B.repeat_interleave(k),
        axes=len(positions_ABP),
    )


def _generator(seed: int, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    return generator


def _gumbel(generators: Sequence[torch.Generator], vocab_size: int, device: torch.device) -> Tensor:
    """(R, V) standard Gumbel noise, a row from each rollout's own generator."""
    noise_RV = torch.empty(len(generators), vocab_size, device=device)
    for row, generator in zip(noise_RV, generators, strict=True):
        row.exponential_(generator=generator)
    return -noise_RV.log()


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _as_groups(
    prompts: Sequence[Prompt], k: int, ids_RT: Tensor, logp_RT: Tensor, lengths: Sequence[int], ended: Sequence[bool]
) -> list[Group]:
    groups = []
    for index, prompt in enumerate(prompts):
        rows = range(index * k, (index + 1) * k)
        responses = tuple(ids_RT[row, : lengths[row]].clone() for row in rows)
        sampler_logp_N = torch.cat([logp_RT[row, : lengths[row]] for row in rows])
        groups.append(Group(prompt, responses, tuple(ended[row] for row in rows), sampler_logp_N))
    return groups
