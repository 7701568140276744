"""Sampling from the student: what is drawn, from which distribution, and that nothing but (seed, step, prompt, sibling) decides it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from small_pair import Pair
from vaopd.models import forward
from vaopd.models.forward import head_of, rows
from vaopd.models.load import control_ids
from vaopd.rollouts import hf
from vaopd.rollouts.hf import HFEngine, Sampling, rollout_seed, sample
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt

MAX_TOKENS = 8
PLAIN = Sampling(MAX_TOKENS, seed=3)


def make_engine(pair: Pair, sampling: Sampling = PLAIN, **options: Any) -> HFEngine:
    arguments: dict[str, Any] = {
        "vocab_size": pair.vocab_size,
        "eos_ids": pair.source.eos_ids,
        "forbidden_ids": control_ids(pair.source),
        **options,
    }
    return HFEngine(arguments.pop("model", pair.student), sampling, **arguments)


def ids(groups: Sequence[Group]) -> dict[str, list[list[int]]]:
    return {group.prompt.id: [response.tolist() for response in group.responses] for group in groups}


@pytest.fixture(scope="module")
def drawn(pair: Pair, prompts: list[Prompt]) -> list[Group]:
    """Four siblings for each prompt, all in one batch."""
    return make_engine(pair).generate(prompts, 4, 1)


# --- agreement with transformers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [ORIGINAL, DEGRADED])
def test_at_no_temperature_the_answers_are_those_of_generate(pair: Pair, prompts: list[Prompt], view: str) -> None:
    engine = make_engine(pair, replace(PLAIN, temperature=1e-5), view=view)
    groups = engine.generate(prompts, 2, 1)
    for prompt, group in zip(prompts, groups, strict=True):
        row = prompt.ids_P[None]
        images = prompt.images[view] if prompt.images else {}
        types = {"mm_token_type_ids": (row == pair.student.config.image_token_id).long()} if images else {}
        greedy = pair.student.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            **types,
            **images,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=sorted(pair.source.eos_ids),
            suppress_tokens=sorted(control_ids(pair.source)),
        )
        expected = greedy[0, len(prompt.ids_P) :].tolist()
        assert [response.tolist() for response in group.responses] == [expected, expected], prompt.id


def test_the_view_decides_the_pixels(pair: Pair, prompts: list[Prompt], drawn: list[Group]) -> None:
    degraded = ids(make_engine(pair, view=DEGRADED).generate(prompts, 4, 1))
    for group in drawn:
        same = degraded[group.prompt.id] == ids([group])[group.prompt.id]
        assert same == (not group.prompt.images)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.95), (1.3, 0.5)])
def test_the_recorded_log_probability_is_the_trainers(pair: Pair, prompts: list[Prompt], temperature: float, top_p: float) -> None:
    """The sampler is the policy that is trained: its probabilities are those of the teacher-forced forward, tempered and cut."""
    groups = make_engine(pair, replace(PLAIN, temperature=temperature, top_p=top_p)).generate(prompts, 3, 1)
    with torch.no_grad():
        logits_NV = head_of(pair.student, pair.vocab_size).logits(rows(pair.student, groups, ORIGINAL)) / temperature
    logits_NV[:, sorted(control_ids(pair.source))] = -torch.inf
    ids_N = torch.cat([group.ids_N for group in groups])
    expected = []
    for probabilities, chosen in zip(logits_NV.double().softmax(-1), ids_N.tolist(), strict=True):
        kept, mass = [], 0.0
        for index in probabilities.argsort(descending=True).tolist():  # the smallest set whose mass reaches top_p
            kept.append(index)
            mass += float(probabilities[index])
            if mass >= top_p and top_p < 1:
                break
        assert chosen in kept, "outside the nucleus"
        expected.append(math.log(float(probabilities[chosen]) / mass))
    recorded = torch.cat([group.sampler_logp_N for group in groups]).double()
    difference = (recorded - torch.tensor(expected, dtype=torch.float64)).abs()
    assert float(difference.max()) < 1e-5
    assert float((recorded - torch.tensor(expected)).exp().mean()) <= 1 + 1e-5


def test_recorded_log_probabilities_notice_a_shifted_forward(pair: Pair, drawn: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = forward._predicting
    monkeypatch.setattr(forward, "_predicting", lambda siblings, length: whole(siblings, length).roll(-1, dims=1))
    long = [Group(g.prompt, tuple(r for r in g.responses if len(r) > 1), (True,) * 9) for g in drawn]
    with torch.no_grad():
        logp_NV = head_of(pair.student, pair.vocab_size).logits(rows(pair.student, long, ORIGINAL)).log_softmax(-1)
    ids_N = torch.cat([group.ids_N for group in long])
    recorded = torch.cat(
        [part for g in drawn for part, response in zip(g.sampler_logp_N.split(g.lengths), g.responses, strict=True) if len(response) > 1]
    )
    assert float((logp_NV.gather(1, ids_N[:, None])[:, 0] - recorded).abs().mean()) > 0.5


# --- independence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_per_batch", [1, 4, 9, 64])
def test_a_rollout_does_not_depend_on_its_batch(pair: Pair, prompts: list[Prompt], drawn: list[Group], rows_per_batch: int) -> None:
    assert ids(make_engine(pair, rows=rows_per_batch).generate(prompts, 4, 1)) == ids(drawn)


def test_a_rollout_does_not_depend_on_the_other_prompts(pair: Pair, prompts: list[Prompt], drawn: list[Group]) -> None:
    turned = make_engine(pair).generate(prompts[::-1], 4, 1)
    assert [group.prompt.id for group in turned] == [prompt.id for prompt in prompts[::-1]]
    assert ids(turned) == ids(drawn)
    assert ids(make_engine(pair).generate(prompts[1:3], 4, 1)) == {p.id: ids(drawn)[p.id] for p in prompts[1:3]}


def test_the_first_siblings_do_not_depend_on_how_many_there_are(pair: Pair, prompts: list[Prompt], drawn: list[Group]) -> None:
    assert ids(make_engine(pair).generate(prompts, 2, 1)) == {name: responses[:2] for name, responses in ids(drawn).items()}


def test_seed_step_and_sibling_decide_the_noise(pair: Pair, prompts: list[Prompt], drawn: list[Group]) -> None:
    assert ids(make_engine(pair).generate(prompts, 4, 1)) == ids(drawn)
    for other in (
        make_engine(pair).generate(prompts, 4, 2),
        make_engine(pair, replace(PLAIN, seed=4)).generate(prompts, 4, 1),
    ):
        assert all(ids(other)[name] != responses for name, responses in ids(drawn).items())
    for responses in ids(drawn).values():
        assert len({tuple(response) for response in responses}) == 4


def test_the_global_random_state_is_neither_read_nor_changed(pair: Pair, prompts: list[Prompt], drawn: list[Group]) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert ids(make_engine(pair).generate(prompts, 4, 1)) == ids(drawn)
    assert torch.equal(torch.get_rng_state(), before)


def test_rollout_seeds_differ_in_every_part() -> None:
    base = rollout_seed(0, 1, "q", 2)
    seeds = [base, rollout_seed(1, 1, "q", 2), rollout_seed(0, 2, "q", 2), rollout_seed(0, 1, "r", 2), rollout_seed(0, 1, "q", 3)]
    assert len(set(seeds)) == 5
    assert base == 1187392819032085615, "a change of the hash changes every run: say so in the changelog"
    assert all(0 <= seed < 2**63 for seed in seeds)
    # No two fields run into each other: (step 1, sibling 12) is not (step 11, sibling 2), nor does an id imitate them.
    assert rollout_seed(0, 1, "q", 12) != rollout_seed(0, 11, "q", 2)
    assert rollout_seed(0, 1, "3|q", 2) != rollout_seed(0, 1, "q", 23)


def test_the_students_mode_is_put_back(pair: Pair, prompts: list[Prompt]) -> None:
    model = pair.fresh().train()
    make_engine(pair, model=model).generate(prompts[:1], 1, 1)
    assert model.training
    model.eval()
    make_engine(pair, model=model).generate(prompts[:1], 1, 1)
    assert not model.training


def test_the_students_present_weights_are_used(pair: Pair, prompts: list[Prompt], drawn: list[Group]) -> None:
    model = pair.fresh()
    engine = make_engine(pair, model=model)
    assert ids(engine.generate(prompts, 4, 1)) == ids(drawn)
    with torch.no_grad():
        model.model.language_model.norm.weight.neg_()
    assert ids(engine.generate(prompts, 4, 1)) != ids(drawn)


# --- ends, lengths, control ids ---------------------------------------------------------------------------------------


def test_a_response_ends_with_its_first_end_or_at_the_limit(pair: Pair, drawn: list[Group]) -> None:
    ends, seen = pair.source.eos_ids, set()
    for group in drawn:
        assert len(group.responses) == len(group.ended_K) == 4
        assert group.sampler_logp_N is not None
        assert len(group.sampler_logp_N) == len(group.ids_N) == sum(group.lengths)
        assert group.sampler_logp_N.dtype == torch.float32
        for response, ended in zip(group.responses, group.ended_K, strict=True):
            found = [place for place, token in enumerate(response.tolist()) if token in ends]
            assert found == ([len(response) - 1] if ended else [])
            assert 1 <= len(response) <= MAX_TOKENS
            assert ended or len(response) == MAX_TOKENS
            seen.add((ended, len(response)))
    assert {(False, MAX_TOKENS), (True, 1)} <= seen or len({ended for ended, _ in seen}) == 2, "the models must show both"


def test_an_end_at_the_very_limit_counts_as_an_end(pair: Pair, prompts: list[Prompt]) -> None:
    (group,) = make_engine(pair, replace(PLAIN, max_tokens=1), eos_ids=range(8, pair.vocab_size)).generate(prompts[:1], 3, 1)
    assert group.lengths == [1, 1, 1]
    assert group.ended_K == (True, True, True)


def test_rollouts_that_leave_the_batch_do_not_change_the_others(pair: Pair, prompts: list[Prompt]) -> None:
    """The same noise with and without ends: what was drawn up to the end is equal."""
    never = ids(make_engine(pair, eos_ids=[0]).generate(prompts, 4, 1))
    ending = ids(make_engine(pair).generate(prompts, 4, 1))
    ends, early = pair.source.eos_ids, 0
    for name, responses in never.items():
        for endless, response in zip(responses, ending[name], strict=True):
            stop = next((place + 1 for place, token in enumerate(endless) if token in ends), MAX_TOKENS)
            assert response == endless[:stop]
            early += stop < MAX_TOKENS
    assert 5 <= early <= 18, "some leave early, some stay"


def favour(patch: pytest.MonkeyPatch, favoured: Sequence[int]) -> None:
    """Make the student want these ids above all."""

    def biased(model: Any, vocab_size: int) -> Any:
        head = head_of(model, vocab_size)
        bias_V = torch.zeros(len(head.weight_VH))
        bias_V[list(favoured)] = 100.0
        return replace(head, bias_V=bias_V)

    patch.setattr(hf, "head_of", biased)


def test_control_ids_are_never_sampled_however_likely(pair: Pair, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    control = control_ids(pair.source)
    favour(monkeypatch, sorted(control))
    free = torch.cat([g.ids_N for g in make_engine(pair, forbidden_ids=()).generate(prompts, 4, 1)])
    assert set(free.tolist()) <= control, "without the mask nothing else is drawn"
    masked = torch.cat([g.ids_N for g in make_engine(pair).generate(prompts, 4, 1)])
    assert control.isdisjoint(masked.tolist())


def test_padded_rows_of_the_head_are_never_sampled(pair: Pair, prompts: list[Prompt], drawn: list[Group]) -> None:
    padded = pair.fresh()
    padded.resize_token_embeddings(pair.vocab_size + 11, mean_resizing=False)
    with torch.no_grad():
        padded.get_output_embeddings().weight[pair.vocab_size :] = 50.0
    assert ids(make_engine(pair, model=padded).generate(prompts, 4, 1)) == ids(drawn)


# --- the sampler itself -----------------------------------------------------------------------------------------------


def gumbel(count: int, vocab: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return hf._gumbel([generator] * count, vocab, torch.device("cpu"))


def test_gumbel_noise_is_standard() -> None:
    noise = gumbel(400, 500)
    assert abs(float(noise.mean()) - 0.5772) < 0.01  # Euler's constant
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    assert bool(noise.isfinite().all())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (2.0, 1.0), (1.0, 0.8), (0.7, 0.95)])
def test_frequencies_are_the_probabilities(temperature: float, top_p: float) -> None:
    """Chi-square with 40,000 draws of 10 ids; its 99.9 % quantile at 9 degrees of freedom is 27.9."""
    logits_V = torch.tensor([1.5, -0.3, 0.2, 0.9, -1.0, 0.0, 2.0, -2.0, 0.4, 1.0])
    draws = 40_000
    chosen, logp = sample(logits_V.expand(draws, -1), gumbel(draws, 10), temperature=temperature, top_p=top_p)
    p = [math.exp(z / temperature) for z in logits_V.tolist()]
    p = [x / sum(p) for x in p]
    if top_p < 1:
        kept, mass = set(), 0.0
        for index in sorted(range(10), key=lambda i: -p[i]):
            if mass < top_p:
                kept.add(index)
                mass += p[index]
        p = [x / mass if i in kept else 0.0 for i, x in enumerate(p)]
    counts = torch.bincount(chosen, minlength=10).tolist()
    assert all(count == 0 for count, x in zip(counts, p, strict=True) if x == 0), "outside the nucleus"
    assert sum((count - draws * x) ** 2 / (draws * x) for count, x in zip(counts, p, strict=True) if x) < 27.9
    expected = torch.tensor(p).log()[chosen]
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.45, [0]), (0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 2]), (0.99, [0, 1, 2, 3]), (1e-9, [0])],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, kept: list[int]) -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8 in shuffled places; exact in binary, so the bounds are exact too."""
    places = torch.tensor([2, 0, 1, 3])  # where the ids of rank 0..3 stand
    logits_V = torch.empty(4)
    logits_V[places] = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    found = set()
    for id_ in range(4):  # noise that wants one id alone: it is drawn exactly if it is in the nucleus
        noise = torch.zeros(1, 4)
        noise[0, id_] = 1e4
        found.add(int(sample(logits_V[None], noise, temperature=1.0, top_p=top_p)[0]))
    assert found == set(places[kept].tolist())


def test_generate_returns_the_prompts_it_was_given(prompts: list[Prompt], drawn: list[Group]) -> None:
    assert all(group.prompt is prompt for group, prompt in zip(drawn, prompts, strict=True))


def test_no_prompts_no_groups(pair: Pair) -> None:
    assert make_engine(pair).generate([], 4, 1) == []


@pytest.mark.parametrize("fault", ["cache of the neighbour", "positions from the token count"])
def test_a_planted_fault_of_decoding_shows(pair: Pair, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The recorded log-probabilities no longer agree with the teacher-forced ones."""
    prefill: Callable[..., Any] = hf._prefill

    def wrong(*arguments: Any) -> Any:
        state = prefill(*arguments)
        if fault == "cache of the neighbour":
            state.cache.batch_select_indices(torch.arange(len(state.next_R)).roll(3))
        else:
            state.next_R = state.attention_RL.sum(dim=1)
        return state

    monkeypatch.setattr(hf, "_prefill", wrong)
    groups = make_engine(pair, eos_ids=[0]).generate([prompts[0], prompts[4]], 3, 1)
    with torch.no_grad():
        logits_NV = head_of(pair.student, pair.vocab_size).logits(rows(pair.student, groups, ORIGINAL))
    logits_NV[:, sorted(control_ids(pair.source) - {0})] = -torch.inf
    ids_N = torch.cat([group.ids_N for group in groups])
    expected = logits_NV.log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    recorded = torch.cat([group.sampler_logp_N for group in groups])
    assert float((recorded - expected).abs().max()) > 1e-2
