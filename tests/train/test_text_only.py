"""Rows without a picture beside rows with one in the same step."""

from __future__ import annotations

import torch

from small_pair import Pair, example, make_group, picture
from vaopd.core import OPD, VAOPD, token_coefficients
from vaopd.models.forward import rows
from vaopd.teachers.local import LocalTeacher
from vaopd.train.metrics import rollout_metrics
from vaopd.train.step import advantages, layout
from vaopd.types import DEGRADED, ORIGINAL


def test_a_prompt_without_a_picture_is_weighted_as_plain_opd(pair: Pair) -> None:
    """Its advantage is 0 to the bit, also without a deadband; beside it the prompt with a picture has some."""
    prompts = [
        pair.renderer(example("pictured", "How long is the longest side?", picture(32, 32, 1))),
        pair.renderer(example("text", "How long is the whole outline?")),
    ]
    groups = [make_group(prompt, [5, 9, 3], seed) for seed, prompt in enumerate(prompts)]
    teacher = LocalTeacher(pair.teacher, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=10_000)
    a_N = advantages(groups, teacher.score(groups, (ORIGINAL, DEGRADED)), VAOPD(), deadband=0.0)
    pictured, text = a_N.split(17)
    assert pictured.max() > 0
    assert torch.equal(text, torch.zeros(17))
    ours, plain = (token_coefficients(a_N, *layout(groups), weighting).split(17) for weighting in (VAOPD(), OPD()))
    torch.testing.assert_close(ours[1], plain[1])
    torch.testing.assert_close(ours[1], torch.cat([torch.full((T,), 1 / (3 * T)) for T in (5, 9, 3)]))
    assert (ours[0] - plain[0]).abs().max() > 1e-3
    torch.testing.assert_close(ours[0].sum(), torch.tensor(1.0))
    assert rollout_metrics(groups, groups)["text_only"] == 1
