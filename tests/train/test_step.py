"""One step against a plain reference: transformers' logits row by row, the paper's equations as loops, KL over whole rows of logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from small_pair import Pair, make_group, random_responses, reference_logits
from vaopd.core import OPD, VAOPD, MaskTokens, RandomTokens, RolloutOnly, TokenOnly, Weighting
from vaopd.models.forward import rows
from vaopd.teachers.local import LocalTeacher
from vaopd.train.step import StudentLoss, Tools, advantages, drop_empty, layout, train_step
from vaopd.types import DEGRADED, ORIGINAL, Group, Prompt, Scores

DEADBAND = 1e-4
RAGGED = [(6, 2, 9), (3, 5, 4), (7, 1, 2), (5, 6, 3), (4, 8, 2)]
LOSS_KEYS = {"loss", "kl", "va", "va_top10", "effective_rollouts", "grad_norm"}


class Script:
    """An engine that gives prepared rollouts."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = {group.prompt.id: group for group in groups}

    def generate(self, prompts: Sequence[Prompt], k: int, step: int) -> list[Group]:
        return [self.groups[prompt.id] for prompt in prompts]


class Recorder(torch.optim.Optimizer):
    """Keeps the gradient that the optimiser would have used, and changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.gradients = model, {}
        super().__init__(model.parameters(), {})

    def step(self, closure: Any = None) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def make_tools(
    pair: Pair, model: Any, groups: Sequence[Group], *, loss: str = "reverse_kl", tokens: int = 100_000, **changes: Any
) -> Tools:
    teacher = LocalTeacher(pair.teacher, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=tokens)
    values: dict[str, Any] = {
        "engine": Script(groups),
        "teacher": None if loss == "nll" else teacher,
        "student_loss": StudentLoss(model, vocab_size=pair.vocab_size, forward=rows, loss=loss),
        "optimizer": Recorder(model),
        "accelerator": Accelerator(cpu=True),
        "views": (ORIGINAL, DEGRADED),
        "k": 3,
        "deadband": DEADBAND,
        "clip": 1e9,
        "tokens_per_forward": tokens,
        **changes,
    }
    return Tools(**values)


def run_step(pair: Pair, groups: Sequence[Group], weighting: Weighting, **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metrics of one step of a fresh student, and the gradient that reached the optimiser."""
    model = pair.fresh()
    tools = make_tools(pair, model, groups, **options)
    metrics = train_step([group.prompt for group in groups], 1, weighting, tools)
    return metrics, tools.optimizer.gradients  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def groups(prompts: list[Prompt]) -> list[Group]:
    return [make_group(prompt, lengths, seed) for seed, (prompt, lengths) in enumerate(zip(prompts, RAGGED, strict=True))]


# --- the reference ----------------------------------------------------------------------------------------------------


def plain_coefficients(method: str, a: list[list[float]], lam: float = 0.5, p_visual: float = 0.2, tau: float = 1.0) -> list[list[float]]:
    """Eq. 3-5 for one prompt: a[k][t] -> c[k][t]."""
    siblings = len(a)
    w = [1 / siblings] * siblings
    if method == "va_opd":
        means = [sum(row) / len(row) for row in a]
        mu = sum(means) / siblings
        sigma = math.sqrt(sum((mean - mu) ** 2 for mean in means) / siblings)
        e = [math.exp((mean - mu) / (sigma + 1e-6) / tau) for mean in means]
        w = [x / sum(e) for x in e]
    c = []
    for w_k, row in zip(w, a, strict=True):
        length = len(row)
        visual = sorted(range(length), key=lambda t: (-row[t], t))[: max(1, math.ceil(p_visual * length - 1e-9))]
        if method == "opd" or max(row) == 0 or len(visual) == length:
            c.append([w_k / length] * length)
        else:
            c.append([w_k * (lam / len(visual) if t in visual else (1 - lam) / (length - len(visual))) for t in range(length)])
    return c


def plain_step(pair: Pair, groups: Sequence[Group], method: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of eq. 6 the long way: every row on its own, every logit kept."""
    student, loss = pair.fresh(), torch.zeros(())
    for group in groups:
        a: list[list[float]] = []
        terms = []
        for response in group.responses:
            student_logp = reference_logits(student, group.prompt, response).log_softmax(-1)
            with torch.no_grad():
                original, degraded = (
                    reference_logits(pair.teacher, group.prompt, response, view).log_softmax(-1) for view in (ORIGINAL, DEGRADED)
                )
            picked = [logp[torch.arange(len(response)), response] for logp in (original, degraded)]
            difference = (picked[0] - picked[1]).tolist() if group.prompt.images else [0.0] * len(response)
            a.append([x if x >= DEADBAND else 0.0 for x in difference])
            if method == "nll":
                terms.append(-student_logp[torch.arange(len(response)), response])
            else:
                terms.append((student_logp.exp() * (student_logp - original)).sum(-1))
        c = plain_coefficients("opd" if method == "nll" else method, a)
        for term, row in zip(terms, c, strict=True):
            loss = loss + (torch.tensor(row) * term).sum() / len(groups)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """|ours - theirs| / |theirs| over all parameters."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    return math.sqrt(difference / sum(float(grad.double().square().sum()) for grad in theirs.values()))


def assert_close(metrics: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same keys, the same numbers up to rounding, None where None is expected."""
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        assert metrics[key] is None if value is None else metrics[key] == pytest.approx(value, rel=1e-5), key


METHODS: dict[str, tuple[Weighting, str]] = {"va_opd": (VAOPD(), "reverse_kl"), "opd": (OPD(), "reverse_kl"), "nll": (OPD(), "nll")}


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_the_papers(pair: Pair, groups: list[Group], method: str) -> None:
    weighting, loss = METHODS[method]
    metrics, gradients = run_step(pair, groups, weighting, loss=loss)
    expected_loss, expected = plain_step(pair, groups, method)
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert relative(gradients, expected) <= 1e-5
    vision = {name: grad for name, grad in expected.items() if "visual" in name}
    assert relative({name: gradients[name] for name in vision}, vision) <= 1e-5
    total = math.sqrt(sum(float(grad.double().square().sum()) for grad in expected.values()))
    assert metrics["grad_norm"] == pytest.approx(total, rel=1e-5)


def test_the_methods_differ(pair: Pair, groups: list[Group]) -> None:
    """Else the test above could not tell them apart."""
    gradients = [run_step(pair, groups, METHODS[method][0], loss=METHODS[method][1])[1] for method in METHODS]
    assert relative(gradients[0], gradients[1]) > 0.05
    assert relative(gradients[0], gradients[2]) > 0.05


def test_opd_is_the_mean_over_prompts_of_rollouts_of_tokens_and_not_of_all_tokens(pair: Pair, groups: list[Group]) -> None:
    metrics, _ = run_step(pair, groups, OPD())
    tools = make_tools(pair, pair.fresh(), groups)
    kl, by_token = [], []
    for group in groups:
        (score,) = tools.teacher.score([group], (ORIGINAL,))  # type: ignore[union-attr]
        with torch.no_grad():
            _, kl_N, _ = tools.student_loss([group], score.hidden_NG, tools.teacher.head, torch.ones(len(group.ids_N)), 1.0)  # type: ignore[union-attr]
        kl.append(sum(float(part.mean()) for part in kl_N.split(group.lengths)) / 3)
        by_token += kl_N.tolist()
    assert metrics["loss"] == pytest.approx(sum(kl) / len(groups), rel=1e-5)
    assert metrics["kl"] == pytest.approx(sum(by_token) / len(by_token), rel=1e-5)
    assert abs(metrics["loss"] - metrics["kl"]) > 1e-4 * metrics["loss"], "the two means must differ here"


@pytest.mark.parametrize(
    ("loss", "tokens"), [("reverse_kl", 1), ("reverse_kl", 120), ("reverse_kl", 400), ("forward_kl", 120), ("jsd", 120), ("nll", 120)]
)
def test_micro_batches_do_not_matter(pair: Pair, groups: list[Group], loss: str, tokens: int) -> None:
    """One forward, or many: groups are split too, and the coefficients stay those of whole groups."""
    metrics, gradients = run_step(pair, groups, VAOPD(), loss=loss)
    split_metrics, split = run_step(pair, groups, VAOPD(), loss=loss, tokens=tokens)
    assert relative(split, gradients) <= 1e-5
    assert_close(split_metrics, metrics)


def test_the_number_of_forwards_follows_the_budget(pair: Pair, groups: list[Group]) -> None:
    calls = []

    def counting(model: Any, batch: Sequence[Group], view: str) -> Tensor:
        calls.append(len(batch))
        return rows(model, batch, view)

    for tokens, least, most in ((100_000, 1, 1), (120, 4, 14), (1, 15, 15)):
        calls.clear()
        model = pair.fresh()
        student_loss = StudentLoss(model, vocab_size=pair.vocab_size, forward=counting, loss="reverse_kl")
        train_step([g.prompt for g in groups], 1, OPD(), make_tools(pair, model, groups, tokens=tokens, student_loss=student_loss))
        assert least <= len(calls) <= most


@pytest.mark.parametrize("weighting", [VAOPD(), OPD(), RolloutOnly(), TokenOnly(), RandomTokens(seed=3), MaskTokens("top", 0.3)])
def test_every_weighting_trains(pair: Pair, groups: list[Group], weighting: Weighting) -> None:
    metrics, gradients = run_step(pair, groups, weighting)
    assert metrics["nonfinite"] == 0
    assert all(bool(grad.isfinite().all()) for grad in gradients.values())
    w_is_uniform = isinstance(weighting, OPD | TokenOnly | MaskTokens)
    assert metrics["effective_rollouts"] == pytest.approx(3.0) if w_is_uniform else 1 < metrics["effective_rollouts"] < 2.9


def test_without_the_degraded_view_nothing_is_said_about_it(pair: Pair, groups: list[Group]) -> None:
    metrics, gradients = run_step(pair, groups, OPD(), views=(ORIGINAL,))
    both, same = run_step(pair, groups, OPD())
    assert metrics["va"] is None
    assert metrics["va_top10"] is None
    assert both["va"] > 0.1
    assert relative(gradients, same) == 0.0


def test_advantages_have_the_sign_of_the_paper() -> None:
    """Original minus degraded, negative ones at zero, small ones in the deadband."""
    prompt = Prompt("p", torch.arange(2))
    group = Group(prompt, (torch.tensor([3, 4]), torch.tensor([5, 6])), (True, True))
    score = Scores(torch.zeros(4, 2), {ORIGINAL: torch.tensor([-1.0, -3.0, -1.0, -2.0]), DEGRADED: torch.tensor([-2.5, -1.0, -1.05, -2.0])})
    assert advantages([group], [score], VAOPD(), 0.1).tolist() == [1.5, 0.0, 0.0, 0.0]
    assert advantages([group], [score], VAOPD(), 0.01).tolist() == pytest.approx([1.5, 0.0, 0.05, 0.0])
    assert advantages([group], [score], VAOPD(absolute=True), 0.1).tolist() == [1.5, 2.0, 0.0, 0.0]
    assert layout([group, group])[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert layout([group, group])[1].tolist() == [0, 0, 1, 1]


# --- the teacher ------------------------------------------------------------------------------------------------------


def test_the_teacher_gets_no_gradient_and_does_not_change(pair: Pair, groups: list[Group]) -> None:
    before = {name: tensor.clone() for name, tensor in pair.teacher.state_dict().items()}
    run_step(pair, groups, VAOPD())
    assert all(parameter.grad is None for parameter in pair.teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.teacher.state_dict().items())


def test_a_student_that_is_the_teacher_has_nothing_to_learn(pair: Pair, groups: list[Group]) -> None:
    teacher = LocalTeacher(pair.fresh(), vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=100_000)
    metrics, gradients = run_step(pair, groups, VAOPD(), teacher=teacher)
    assert abs(metrics["loss"]) < 1e-6
    assert max(float(grad.abs().max()) for grad in gradients.values()) < 1e-4


# --- odd rollouts -----------------------------------------------------------------------------------------------------


def with_empty(group: Group, *places: int) -> Group:
    """The group with empty responses put in at these places."""
    responses, ended = list(group.responses), list(group.ended_K)
    for place in sorted(places):
        responses.insert(place, torch.empty(0, dtype=torch.long))
        ended.insert(place, False)
    return Group(group.prompt, tuple(responses), tuple(ended))


def test_empty_responses_are_dropped_before_their_siblings_are_weighted(pair: Pair, groups: list[Group]) -> None:
    metrics, gradients = run_step(pair, groups, VAOPD())
    gappy = [with_empty(groups[0], 0, 2), groups[1], with_empty(groups[2], 3), *groups[3:]]
    with_gaps, same = run_step(pair, gappy, VAOPD())
    assert relative(same, gradients) <= 1e-5
    assert with_gaps["empty"] == 3
    assert metrics["empty"] == 0
    assert_close(with_gaps, {**metrics, "empty": 3})


def test_a_prompt_without_rollouts_is_skipped_and_does_not_count(pair: Pair, groups: list[Group]) -> None:
    """The mean is over the prompts that are left: 4, not 5."""
    nothing = with_empty(Group(groups[1].prompt, (), ()), 0, 1, 2)
    metrics, gradients = run_step(pair, [groups[0], nothing, *groups[2:]], VAOPD())
    expected_loss, expected = plain_step(pair, [groups[0], *groups[2:]], "va_opd")
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert relative(gradients, expected) <= 1e-5
    assert metrics["skipped_prompts"] == 1
    assert metrics["empty"] == 3


def test_a_step_without_any_rollout_changes_nothing(pair: Pair, groups: list[Group]) -> None:
    nothing = [with_empty(Group(group.prompt, (), ()), 0, 1) for group in groups[:2]]
    model = pair.fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tools = make_tools(pair, model, groups, optimizer=optimizer)
    train_step([group.prompt for group in groups], 1, VAOPD(), tools)
    before = snapshot(model, optimizer)
    metrics = train_step([g.prompt for g in nothing], 2, VAOPD(), make_tools(pair, model, nothing, optimizer=optimizer))
    assert same(before, snapshot(model, optimizer))
    assert metrics["skipped_prompts"] == 2
    assert metrics["empty"] == 4
    assert metrics["nonfinite"] == 0
    assert metrics["tokens"] is None
    assert metrics["truncated"] is None
    assert all(metrics[key] is None for key in LOSS_KEYS), "a row of metrics has all keys, null where nothing was measured"


def test_one_token_alone(pair: Pair, prompts: list[Prompt]) -> None:
    group = Group(prompts[0], random_responses((1,)), (False,))
    metrics, gradients = run_step(pair, [group], VAOPD())
    expected_loss, expected = plain_step(pair, [group], "va_opd")
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert relative(gradients, expected) <= 1e-5
    assert metrics["truncated"] == 1.0
    assert metrics["tokens"] == 1.0


def test_truncated_rollouts_are_counted_and_trained_on(pair: Pair, groups: list[Group]) -> None:
    cut = [Group(g.prompt, g.responses, (False, True, False)) for g in groups]
    metrics, gradients = run_step(pair, cut, VAOPD())
    assert metrics["truncated"] == pytest.approx(2 / 3)
    assert relative(gradients, run_step(pair, groups, VAOPD())[1]) == 0.0


def test_padding_that_is_an_end_token_is_scored_where_it_was_sampled(pair: Pair, prompts: list[Prompt]) -> None:
    """Ids equal to the padding or the EOS are response tokens like others: lengths decide, never values."""
    tokenizer = pair.source.processor.tokenizer
    response = torch.tensor([tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id])
    group = Group(prompts[0], (response, random_responses((6,))[0]), (True, True))
    metrics, gradients = run_step(pair, [group], VAOPD())
    expected_loss, expected = plain_step(pair, [group], "va_opd")
    assert metrics["tokens"] == 4.5
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert relative(gradients, expected) <= 1e-5


def test_drop_empty_keeps_whole_groups_as_they_are(groups: list[Group]) -> None:
    assert all(kept is group for kept, group in zip(drop_empty(groups), groups, strict=True))
    (left,) = drop_empty([with_empty(groups[0], 1), Group(groups[1].prompt, (), ())])
    assert [r.tolist() for r in left.responses] == [r.tolist() for r in groups[0].responses]
    assert left.ended_K == groups[0].ended_K


# --- numbers that are not finite --------------------------------------------------------------------------------------


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that a step may change."""
    state = [tensor for slots in optimizer.state.values() for tensor in slots.values()]
    return [tensor.detach().clone() for tensor in (*model.state_dict().values(), *state)]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Equal to the bit."""
    return len(before) == len(after) and all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


class SickTeacher:
    """Spoils one number of the scores."""

    def __init__(self, teacher: LocalTeacher, where: str, value: float) -> None:
        self.teacher, self.where, self.value = teacher, where, value

    @property
    def head(self) -> Any:
        return self.teacher.head

    def score(self, groups: Sequence[Group], views: Sequence[str]) -> list[Scores]:
        scores = self.teacher.score(groups, views)
        target = scores[-1].hidden_NG if self.where == "hidden" else scores[-1].logp_N[self.where]
        target.view(-1)[-1] = self.value
        return scores


def sick_scores(where: str) -> Callable[..., Tools]:
    return lambda tools, value: dataclasses.replace(tools, teacher=SickTeacher(tools.teacher, where, value))


def sick_loss(tools: Tools, value: float) -> Tools:
    """The loss alone: its gradient stays finite."""

    class Sick(StudentLoss):
        def forward(self, *arguments: Any) -> tuple[Any, ...]:
            loss, *tokens = super().forward(*arguments)
            return loss + value, *tokens

    whole = tools.student_loss
    return dataclasses.replace(
        tools,
        student_loss=Sick(whole.model, vocab_size=whole.vocab_size, forward=rows, loss=whole.loss),  # type: ignore[arg-type]
    )


def sick_student(tools: Tools, value: float) -> Tools:
    """States that are not finite, as a bf16 overflow makes them."""

    def spoiled(model: Any, groups: Sequence[Group], view: str) -> Tensor:
        hidden_NH = rows(model, groups, view)
        return torch.cat([hidden_NH[:-1], hidden_NH[-1:] * value])

    whole = tools.student_loss
    return dataclasses.replace(
        tools,
        student_loss=StudentLoss(whole.model, vocab_size=whole.vocab_size, forward=spoiled, loss=whole.loss),  # type: ignore[arg-type]
    )


def sick_gradient(tools: Tools, value: float) -> Tools:
    """The loss is finite, one number of one gradient is not."""
    parameter = next(p for name, p in tools.student_loss.named_parameters() if "visual.patch_embed" in name)

    def spoil(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[0] = value
        return grad

    tools.student_loss.handle = parameter.register_hook(spoil)  # type: ignore[assignment]
    return tools


SICK: dict[str, Callable[..., Tools]] = {
    "teacher's states": sick_scores("hidden"),
    "teacher's score": sick_scores(ORIGINAL),
    "teacher's degraded score": sick_scores(DEGRADED),
    "loss": sick_loss,
    "student's states": sick_student,
    "gradient": sick_gradient,
}


@pytest.mark.parametrize(
    ("where", "value", "tokens"),
    [
        *((where, value, 100_000) for where in SICK for value in (math.nan, math.inf)),
        *((where, -math.inf, 100_000) for where in ("teacher's score", "teacher's degraded score", "gradient")),
        *((where, math.nan, 120) for where in ("loss", "student's states", "gradient")),  # in one micro-batch of several
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(pair: Pair, groups: list[Group], where: str, value: float, tokens: int) -> None:
    model = pair.fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tools = make_tools(pair, model, groups, tokens=tokens, optimizer=optimizer, clip=1.0)
    prompts = [group.prompt for group in groups[:2]]
    assert train_step(prompts, 1, VAOPD(), tools)["nonfinite"] == 0
    before = snapshot(model, optimizer)
    sick = SICK[where](tools, value)
    metrics = train_step(prompts, 2, VAOPD(), sick)
    assert metrics["nonfinite"] == 1
    assert same(before, snapshot(model, optimizer)), "weights and optimiser state are untouched to the bit"
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing of the bad gradient is left"
    assert metrics.keys() >= LOSS_KEYS

    # The next step is the one that would have been taken without the bad one.
    if where == "gradient":
        sick.student_loss.handle.remove()  # type: ignore[operator,union-attr]
    again = train_step(prompts, 2, VAOPD(), tools)
    assert again["nonfinite"] == 0
    assert not same(before, snapshot(model, optimizer))


def test_clipping_bounds_the_update_and_the_metric_is_before_it(pair: Pair, groups: list[Group]) -> None:
    metrics, gradients = run_step(pair, groups, VAOPD(), clip=0.5)
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in gradients.values()))
    assert norm == pytest.approx(0.5, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(run_step(pair, groups, VAOPD())[0]["grad_norm"])
    assert metrics["grad_norm"] > 1


def test_a_divergence_without_a_teacher_is_refused(pair: Pair, groups: list[Group]) -> None:
    with pytest.raises(ValueError, match="compares with a teacher"):
        run_step(pair, groups, OPD(), teacher=None)


def test_padded_heads_change_nothing(pair: Pair, groups: list[Group]) -> None:
    """A student and a teacher with rows beyond the tokenizer's ids, each another number of them, large enough to matter."""
    metrics, gradients = run_step(pair, groups, VAOPD())
    student, teacher = pair.fresh(), dataclasses.replace(pair, student=pair.teacher).fresh()
    for model, extra in ((student, 11), (teacher, 3)):
        model.requires_grad_(False).resize_token_embeddings(pair.vocab_size + extra, mean_resizing=False)
        with torch.no_grad():
            model.get_output_embeddings().weight[pair.vocab_size :] = 30.0
        model.requires_grad_(True)
    scorer = LocalTeacher(teacher, vocab_size=pair.vocab_size, forward=rows, tokens_per_forward=100_000)
    tools = make_tools(pair, student, groups, teacher=scorer)
    padded = train_step([group.prompt for group in groups], 1, VAOPD(), tools)
    assert_close(padded, metrics)
    wide = tools.optimizer.gradients  # type: ignore[attr-defined]
    name = "model.language_model.embed_tokens.weight"
    assert float(wide[name][pair.vocab_size :].abs().max()) == 0.0, "no gradient on padding"
    assert relative({**wide, name: wide[name][: pair.vocab_size]}, gradients) <= 1e-5
