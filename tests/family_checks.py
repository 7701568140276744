"""What is measured of every family, against transformers' own forward and `generate`; each result is computed once per process."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from small_families import Small, make_small, plain_inputs, plain_logits, small_examples
from vaopd.models.forward import head_of, rows
from vaopd.models.shared_prompt import shared
from vaopd.rollouts.hf import HFEngine, Sampling
from vaopd.types import DEGRADED, ORIGINAL, Example, Group, Prompt, ResponseForward

BOUND = 1e-5  # of logits of size 1 to 10, and of gradients relative to their largest entry
RAGGED = [(4, 1, 7), (3, 3), (5, 2), (2, 6, 1), (3, 4)]  # lengths of the siblings of each prompt
MAX_TOKENS = 12  # longer than Gemma 3's window here


@functools.cache
def small(model_type: str) -> Small:
    """The model that all tests share; none of them changes it."""
    return make_small(model_type)


@functools.cache
def examples() -> list[Example]:
    return small_examples()


@functools.cache
def prompts(model_type: str) -> list[Prompt]:
    return [small(model_type).renderer(sample) for sample in examples()]


def responses(model_type: str, lengths: tuple[int, ...], seed: int) -> tuple[Tensor, ...]:
    """Random ids of ordinary tokens: those behind the special ones and before the tokenizer's end."""
    generator, last = torch.Generator().manual_seed(seed), small(model_type).vocab_size
    return tuple(torch.randint(20, last, (length,), generator=generator) for length in lengths)


@functools.cache
def groups(model_type: str) -> list[Group]:
    return [
        Group(prompt, responses(model_type, lengths, seed), (True,) * len(lengths))
        for seed, (prompt, lengths) in enumerate(zip(prompts(model_type), RAGGED, strict=True))
    ]


def logits(model_type: str, way: ResponseForward, view: str = ORIGINAL) -> Tensor:
    """(N, V) of all groups, through the package."""
    it = small(model_type)
    with torch.no_grad():
        return head_of(it.model, it.vocab_size).logits(way(it.model, groups(model_type), view))


@functools.cache
def expected_logits(model_type: str, view: str = ORIGINAL) -> Tensor:
    """(N, V) of all groups, through transformers alone, one row at a time."""
    it = small(model_type)
    pairs = [(sample, response) for sample, group in zip(examples(), groups(model_type), strict=True) for response in group.responses]
    with torch.no_grad():
        return torch.cat([plain_logits(it, sample, response, view) for sample, response in pairs])


def rows_error(model_type: str) -> float:
    """Largest difference of a logit, both views."""
    pairs = [(logits(model_type, rows, view), expected_logits(model_type, view)) for view in (ORIGINAL, DEGRADED)]
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


def shared_error(model_type: str) -> float:
    """Largest difference of a logit, both views."""
    return max(float((logits(model_type, shared, view) - logits(model_type, rows, view)).abs().max()) for view in (ORIGINAL, DEGRADED))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    """Of every parameter; the model is left without."""
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def direction(model_type: str) -> Tensor:
    """(N, V) by which logits are weighted before their gradient is taken; of size 1 for each token, as a divergence's gradient is."""
    shape = expected_logits(model_type).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5


@functools.cache
def way_gradients(model_type: str, way: ResponseForward) -> dict[str, Tensor | None]:
    it = small(model_type)
    found_NV = head_of(it.model, it.vocab_size).logits(way(it.model, groups(model_type), ORIGINAL))
    return gradients(it.model, (found_NV * direction(model_type)).sum())


@functools.cache
def plain_gradients(model_type: str) -> dict[str, Tensor | None]:
    """Through transformers alone: the vision tower runs once per row."""
    it, parts = small(model_type), iter(direction(model_type).split([n for group in groups(model_type) for n in group.lengths]))
    pairs = [(sample, response) for sample, group in zip(examples(), groups(model_type), strict=True) for response in group.responses]
    return gradients(it.model, torch.stack([(plain_logits(it, s, r, ORIGINAL) * next(parts)).sum() for s, r in pairs]).sum())


def gradient_error(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """Largest difference over the largest entry of the parameter's gradient, or over 1 where that is smaller.

    A key's bias shifts all scores of a row alike, so its gradient is rounding: no relative error can be asked of it.
    """
    assert {name for name, x in found.items() if x is not None} == {name for name, x in expected.items() if x is not None}
    pairs = [(found[name], x) for name, x in expected.items() if x is not None]
    return max(float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max())) for ours, theirs in pairs if ours is not None)


def engine(model_type: str, temperature: float) -> HFEngine:
    it = small(model_type)
    sampling = Sampling(MAX_TOKENS, temperature=temperature, seed=3)
    return HFEngine(it.model, sampling, vocab_size=it.vocab_size, eos_ids=ends(model_type), forbidden_ids=forbidden(model_type))


def forbidden(model_type: str) -> list[int]:
    """Special ids that end nothing."""
    return sorted(set(small(model_type).processor.tokenizer.added_tokens_decoder) - set(ends(model_type)))


def ends(model_type: str) -> list[int]:
    """A tenth of the ordinary ids ends a response, so that siblings leave the batch at different times."""
    return [small(model_type).processor.tokenizer.eos_token_id, *range(25, small(model_type).vocab_size, 10)]


def greedy(model_type: str) -> list[list[list[int]]]:
    """The engine's answers at no temperature, two siblings to each prompt, all prompts in one batch."""
    found = engine(model_type, 1e-5).generate(prompts(model_type), 2, 1)
    return [[response.tolist() for response in group.responses] for group in found]


def generated(model_type: str) -> list[list[int]]:
    """Those of transformers' `generate`, one prompt at a time."""
    it, answers = small(model_type), []
    for sample in examples():
        inputs: dict[str, Any] = plain_inputs(it, sample, ORIGINAL)
        found = it.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=ends(model_type),
            suppress_tokens=forbidden(model_type),
        )
        answers.append(found[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def sampled_error(model_type: str) -> float:
    """Largest difference between the sampler's log-probabilities, from the cache, and those of a forward without one."""
    it = small(model_type)
    drawn = engine(model_type, 1.0).generate(prompts(model_type), 3, 1)
    with torch.no_grad():
        logits_NV = head_of(it.model, it.vocab_size).logits(rows(it.model, drawn, ORIGINAL))
    logits_NV[:, forbidden(model_type)] = -torch.inf
    ids_N, sampled = torch.cat([group.ids_N for group in drawn]), [group.sampler_logp_N for group in drawn]
    logp_N = logits_NV.log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    return float((logp_N - torch.cat([x for x in sampled if x is not None])).abs().max())
