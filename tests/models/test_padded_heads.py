"""Student and teacher of one tokenizer with hidden sizes and paddings of their own: the padding never carries probability.

Checkpoints of one family pad the vocabulary differently (Qwen2.5-VL: 151,936 rows at 3B, 152,064 at 7B). Here the rows beyond the
tokenizer's ids are made so large that they would take all of the probability wherever they were read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import family_checks as checks
from family_checks import BOUND, RAGGED, gradient_error, gradients, responses
from small_families import Small, make_small, plain_inputs, plain_logits, small_examples
from vaopd.core import Head
from vaopd.models.forward import head_of, rows
from vaopd.models.load import check_agreement, load_model, open_source, save_model
from vaopd.rollouts.hf import HFEngine, Sampling
from vaopd.teachers.local import LocalTeacher
from vaopd.train.step import StudentLoss
from vaopd.types import DEGRADED, ORIGINAL, Group

NARROW, WIDE = {"pad": 7, "hidden": 48}, {"pad": 20, "hidden": 96}


@dataclass(frozen=True)
class Padded:
    """A student and a teacher, loaded from their folders, and groups for both."""

    student: Small
    teacher: Small
    groups: list[Group]
    c_N: Tensor  # coefficients that sum to 1 in each group

    @property
    def vocab_size(self) -> int:
        return self.student.vocab_size

    def plain(self, which: Small, view: str = ORIGINAL) -> Tensor:
        """(N, V) by transformers alone: whole logits, cut to the tokenizer's ids."""
        pairs = [(s, response) for s, group in zip(small_examples(), self.groups, strict=True) for response in group.responses]
        return torch.cat([plain_logits(which, sample, response, view) for sample, response in pairs])

    @property
    def ids_N(self) -> Tensor:
        return torch.cat([group.ids_N for group in self.groups])


@pytest.fixture(scope="module", params=["qwen2_5_vl", "gemma3"])  # a head of its own, and one that is the embedding
def padded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Padded:
    loaded = []
    for name, shape in (("student", NARROW), ("teacher", WIDE)):
        it = make_small(request.param, seed=len(loaded) + 1, **shape)
        with torch.no_grad():  # whatever the state is, one of two opposite rows is far above every other logit
            padding = it.model.get_output_embeddings().weight[it.vocab_size :]
            padding[::2], padding[1::2] = 50.0, -50.0
        folder: Path = tmp_path_factory.mktemp(name)
        save_model(it.model, it.processor, folder)
        source = open_source(str(folder))
        loaded.append((source, Small(request.param, source.processor, load_model(source, dtype=torch.float32))))
    (ours, student), (theirs, teacher) = loaded
    check_agreement(ours, theirs)
    prompts = [student.renderer(sample) for sample in small_examples()]
    groups = [
        Group(prompt, responses(request.param, lengths, seed), (True,) * len(lengths))
        for seed, (prompt, lengths) in enumerate(zip(prompts, RAGGED, strict=True))
    ]
    generator = torch.Generator().manual_seed(0)
    c_N = torch.cat([torch.rand(sum(lengths), generator=generator).softmax(0) for lengths in RAGGED])
    return Padded(student, teacher, groups, c_N)


def teacher_of(padded: Padded) -> LocalTeacher:
    return LocalTeacher(padded.teacher.model, vocab_size=padded.vocab_size, forward=rows, tokens_per_forward=10_000)


def test_the_heads_differ_in_everything_but_the_tokens(padded: Padded) -> None:
    shapes = [tuple(it.model.get_output_embeddings().weight.shape) for it in (padded.student, padded.teacher)]
    assert shapes == [(padded.vocab_size + 7, 48), (padded.vocab_size + 20, 96)]
    for it in (padded.student, padded.teacher):
        inputs = plain_inputs(it, small_examples()[0], ORIGINAL)
        with torch.no_grad():
            whole = it.model(**inputs, use_cache=False).logits[0].softmax(-1)
        assert float(whole[:, padded.vocab_size :].sum(-1).median()) > 0.99, "the padding would take the probability"


def test_scores_are_log_probabilities_over_the_tokenizers_ids(padded: Padded) -> None:
    scores = teacher_of(padded).score(padded.groups, (ORIGINAL, DEGRADED))
    for view in (ORIGINAL, DEGRADED):
        with torch.no_grad():
            expected_N = padded.plain(padded.teacher, view).log_softmax(-1).gather(1, padded.ids_N[:, None])[:, 0]
        torch.testing.assert_close(torch.cat([score.logp_N[view] for score in scores]), expected_N, rtol=0, atol=2 * BOUND)


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl"])
def test_the_loss_and_its_gradients_are_those_of_sliced_logits(padded: Padded, loss: str) -> None:
    teacher, model = teacher_of(padded), padded.student.model
    hidden_NG = torch.cat([score.hidden_NG for score in teacher.score(padded.groups)])
    objective = StudentLoss(model, vocab_size=padded.vocab_size, forward=rows, loss=loss)
    found, kl_N, _ = objective(padded.groups, hidden_NG, teacher.head, padded.c_N, float(len(padded.groups)))
    ours = gradients(model, found)

    with torch.no_grad():
        theirs_NV = padded.plain(padded.teacher).log_softmax(-1)
    student_NV = padded.plain(padded.student).log_softmax(-1)
    ahead_NV, behind_NV = (student_NV, theirs_NV) if loss == "reverse_kl" else (theirs_NV, student_NV)
    expected_N = (ahead_NV.exp() * (ahead_NV - behind_NV)).sum(-1)
    expected = (padded.c_N * expected_N).sum() / len(padded.groups)
    torch.testing.assert_close(kl_N, expected_N.detach(), rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=BOUND, atol=0)
    assert gradient_error(ours, gradients(model, expected)) < BOUND

    head = ours["lm_head.weight"] if "lm_head.weight" in ours else ours["model.language_model.embed_tokens.weight"]
    assert head is not None
    assert float(head[padded.vocab_size :].abs().max()) == 0.0, "the padding is left alone"
    assert float(head[: padded.vocab_size].abs().max()) > 1e-3


def test_a_head_with_its_padding_would_show(padded: Padded, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = head_of(padded.teacher.model, padded.vocab_size)
    monkeypatch.setattr(LocalTeacher, "head", property(lambda self: Head(whole.weight_VH)))
    score = teacher_of(padded).score(padded.groups, (ORIGINAL,))[0]
    with torch.no_grad():
        expected_NV = padded.plain(padded.teacher).log_softmax(-1)[: len(score.logp_N[ORIGINAL])]
    expected_N = expected_NV.gather(1, padded.groups[0].ids_N[:, None])[:, 0]
    assert float((score.logp_N[ORIGINAL] - expected_N).abs().median()) > 1.0


def test_padding_is_never_sampled(padded: Padded) -> None:
    it: Any = padded.student
    sampling = Sampling(checks.MAX_TOKENS, temperature=1.0, seed=1)
    eos = it.processor.tokenizer.eos_token_id
    special = sorted(set(it.processor.tokenizer.added_tokens_decoder) - {eos})
    engine = HFEngine(it.model, sampling, vocab_size=it.vocab_size, eos_ids=[eos], forbidden_ids=special)
    drawn = engine.generate([group.prompt for group in padded.groups], 4, 1)
    assert max(int(group.ids_N.max()) for group in drawn) < it.vocab_size
    with torch.no_grad():
        logits_NV = torch.cat([plain_logits(it, s, r, ORIGINAL) for s, g in zip(small_examples(), drawn, strict=True) for r in g.responses])
    logits_NV[:, special] = -torch.inf
    logp_N = logits_NV.log_softmax(-1).gather(1, torch.cat([group.ids_N for group in drawn])[:, None])[:, 0]
    sampled = [group.sampler_logp_N for group in drawn]
    torch.testing.assert_close(torch.cat([x for x in sampled if x is not None]), logp_N, rtol=0, atol=2 * BOUND)
