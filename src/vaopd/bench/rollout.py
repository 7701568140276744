"""The package's rollouts against `generate(num_return_sequences=K)`: prompt tokens through the decoder, and tokens per CPU second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vaopd.bench.shapes import Plan, Shape, build_model, make_prompt, model_config, top_ids
from vaopd.bench.timing import Ratio, Times, over, take_turns
from vaopd.rollouts.hf import HFEngine, Sampling
from vaopd.types import ORIGINAL, Prompt

TEMPERATURE = 1.0


@dataclass(frozen=True)
class RolloutResult:
    """K responses of T tokens to one prompt, sampled from the whole distribution at temperature 1."""

    shape: Shape
    prefill: dict[str, int]  # prompt tokens through the decoder
    times: dict[str, Times]

    @property
    def prefill_ratio(self) -> float:
        return self.prefill["engine"] / self.prefill["generate"]

    @property
    def speed(self) -> Ratio:
        """Tokens per second over those of `generate`; above 1: ours is faster."""
        return over(self.times["generate"], self.times["engine"])


def measure_rollouts(plan: Plan) -> RolloutResult:
    """With the first shape of the plan."""
    shape = plan.shapes[0]
    model = build_model(model_config(plan.student, plan.vocab), seed=0)
    prompt = make_prompt(shape, plan.vocab)
    variants = {"engine": engine_rollouts(model, prompt, shape, plan.vocab), "generate": generate_rollouts(model, prompt, shape)}
    prefill = {name: prefill_tokens(model, run) for name, run in variants.items()}
    return RolloutResult(shape, prefill, take_turns(variants, plan.rounds))


def engine_rollouts(model: Any, prompt: Prompt, shape: Shape, vocab: int) -> Callable[[], list[Tensor]]:
    """HFEngine; nothing ends a response before T tokens, and no control id is sampled."""
    control = [*top_ids(vocab).values()]
    engine = HFEngine(model, Sampling(shape.T, TEMPERATURE), vocab_size=vocab, eos_ids=control[:1], forbidden_ids=control)
    return lambda: list(engine.generate([prompt], shape.K, step=1)[0].responses)


def generate_rollouts(model: Any, prompt: Prompt, shape: Shape) -> Callable[[], list[Tensor]]:
    """transformers, the same lengths from the same distribution."""
    ids = prompt.ids_P[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
        **prompt.images[ORIGINAL],
    }
    control = [getattr(model.config, name) for name in top_ids(0)]
    options = {"max_new_tokens": shape.T, "min_new_tokens": shape.T, "num_return_sequences": shape.K, "suppress_tokens": control}

    def run() -> list[Tensor]:
        found = model.generate(**inputs, **options, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, pad_token_id=0)
        return list(found[:, len(prompt.ids_P) :])

    return run


def prefill_tokens(model: Any, run: Callable[[], list[Tensor]]) -> int:
    """Positions that go through the decoder in calls of more than one token a row."""
    with counting_prefill(model) as counts:
        run()
    return sum(counts)


@contextmanager
def counting_prefill(model: Any) -> Iterator[list[int]]:
    """Collects the positions of every such call."""
    counts: list[int] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        if states.shape[1] > 1:
            counts.append(states.shape[:-1].numel())

    handle = model.get_decoder().layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()
