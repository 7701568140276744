"""The hidden states that predict the responses, row by row: one row per rollout, prompt and response, right-padded.

The reference for faster ways of computing the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vaopd.core import Head
from vaopd.models.families import family_of, position_ids
from vaopd.types import Group, Prompt, ResponseForward


def view_images(prompt: Prompt, view: str) -> Any:
    """The image tensors of a prompt under a view; a text-only prompt looks the same under every view."""
    if not prompt.images:
        return {}
    if view not in prompt.images:
        raise ValueError(f"prompt '{prompt.id}' was rendered without view '{view}'; it has: {', '.join(prompt.images)}")
    return prompt.images[view]


def rows(model: Any, groups: Sequence[Group], view: str) -> Tensor:
    """(N, H) hidden states that predict the response tokens of all groups, flat, in order.

    Args:
        model: a Hugging Face image-text-to-text model.
        groups: rendered prompts with at least one response token in total; empty responses are allowed.
        view: which rendering of the images the model sees.
    """
    family, device = family_of(model), model.device
    siblings = [(group.prompt, response) for group in groups for response in group.responses]
    positions = {id(group.prompt): family.prompt_positions(model, group.prompt) for group in groups}
    ids = [torch.cat([prompt.ids_P, response[:-1]]) for prompt, response in siblings]
    places = [continue_positions(positions[id(prompt)], len(response) - 1) for prompt, response in siblings]
    ids_RL = pad_sequence(ids, batch_first=True)
    attention_RL = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    positions_ARL = pad_sequence([place.T for place in places], batch_first=True).permute(2, 0, 1)
    prompts, repeats = [group.prompt for group in groups], [len(group.responses) for group in groups]
    images = family.encode_images(model, prompts, [view_images(prompt, view) for prompt in prompts], repeats)
    body = model.model(
        input_ids=ids_RL.to(device),
        attention_mask=attention_RL.to(device),
        position_ids=position_ids(positions_ARL).to(device),
        use_cache=False,
        **{name: x.to(device) for name, x in family.token_inputs(model, ids_RL).items()},
        **images,
    )
    return body.last_hidden_state[_predicting(siblings, ids_RL.shape[1]).to(device)]


def continue_positions(positions_AP: Tensor, count: int) -> Tensor:
    """(A, P + count): every further token goes on at the prompt's largest position + 1, on all axes alike."""
    following = int(positions_AP.max()) + 1 + torch.arange(max(count, 0))
    return torch.cat([positions_AP, following.expand(len(positions_AP), -1)], dim=1)


def _predicting(siblings: Sequence[tuple[Prompt, Tensor]], length: int) -> Tensor:
    """(R, L) True where a state predicts a response token: from the prompt's last token to the response's last but one."""
    start = torch.tensor([len(prompt.ids_P) - 1 for prompt, _ in siblings])[:, None]
    count = torch.tensor([len(response) for _, response in siblings])[:, None]
    place = torch.arange(length)
    return (place >= start) & (place < start + count)


def head_of(model: Any, vocab_size: int) -> Head:
    """The LM head over the tokenizer's ids: rows beyond them (padding of the checkpoint) carry no probability."""
    layer = model.get_output_embeddings()
    return Head(layer.weight, getattr(layer, "bias", None), vocab_size=vocab_size)


def padded_tokens(groups: Sequence[Group]) -> int:
    """Prompt and response tokens of one row per rollout, all padded to the longest."""
    lengths = [len(group.prompt.ids_P) + length for group in groups for length in group.lengths]
    return len(lengths) * max(lengths, default=0)


def counted_by(forward: ResponseForward, model: Any) -> Callable[[Sequence[Group]], int]:
    """How many tokens this forward sends through the model for a batch: what its `tokens(model, groups)` says, else padded rows."""
    tokens = getattr(forward, "tokens", None)
    return padded_tokens if tokens is None else partial(tokens, model)


def micro_batches(
    groups: Sequence[Group], tokens: int, count: Callable[[Sequence[Group]], int] = padded_tokens
) -> Iterator[Sequence[Group]]:
    """Split groups, inside a group too, so that each micro-batch has at most `tokens` tokens by the `count` of the forward that is used.

    Order is kept, so the concatenation of all results over the micro-batches is the result of the whole.
    A single rollout longer than `tokens` is a micro-batch of its own. Where a group is cut, `sampler_logp_N` isn't carried over.
    """
    if (whole := [group for group in groups if group.responses]) and count(whole) <= tokens:
        yield whole
        return
    siblings = [(index, sibling) for index, group in enumerate(whole) for sibling in range(len(group.responses))]

    def first(size: int) -> list[Group]:
        parts = groupby(siblings[:size], key=itemgetter(0))
        return [whole[index].take([sibling for _, sibling in part]) for index, part in parts]

    while siblings:
        # Searched, not counted one by one: an evaluation sends hundreds of groups.
        fitting = max(bisect_right(range(1, len(siblings) + 1), tokens, key=lambda size: count(first(size))), 1)
        yield first(fitting)
        siblings = siblings[fitting:]
