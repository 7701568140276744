"""The fused loss: exact derivatives, precision, bounded memory, and what it refuses; the laws are in test_laws.py."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import vaopd.core as core
from vaopd.core import head as head_module

from .test_laws import DIVERGENCES, pair, two_prompts, weightings


@pytest.mark.parametrize("weighting", weightings(core), ids=repr)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str, weighting: core.Weighting) -> None:
    """Finite differences in float64, every divergence with the coefficients of every weighting."""
    batch = two_prompts()
    c_N = core.token_coefficients(batch.a_N, batch.rollout_N, batch.group_R, weighting)[5:13]
    x = pair(core, len(c_N), padded=1)
    _, head, teacher_NG, teacher = x.args

    def loss(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor) -> torch.Tensor:
        student = core.Head(weight_VH, bias_V, head.scale, head.softcap, head.vocab_size)
        return core.fused_weighted_divergence(hidden_NH, student, teacher_NG, teacher, c_N, divergence=divergence, normalizer=2, chunk=3)[0]

    assert gradcheck(loss, x.student_side)


def real_sized(dtype: torch.dtype, peak: float, n: int = 192) -> tuple[Any, ...]:
    """(student hidden, its weight, teacher hidden, its weight) over 2,000 ids; `peak` sharpens both distributions."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, 48), (2000, 48), (n, 64), (2000, 64))
    tensors = [torch.randn(*shape, generator=generator).to(dtype) * (peak if shape[0] == n else 0.3) for shape in shapes]
    return tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]


def loss_and_gradients(hidden_NH: Any, weight_VH: Any, teacher_NG: Any, teacher_VG: Any, divergence: str) -> tuple[torch.Tensor, ...]:
    c_N = torch.rand(len(hidden_NH), generator=torch.Generator().manual_seed(1)) / len(hidden_NH)
    loss, _ = core.fused_weighted_divergence(
        hidden_NH, core.Head(weight_VH), teacher_NG, core.Head(teacher_VG), c_N, divergence=divergence, chunk=50
    )
    return loss, *torch.autograd.grad(loss, (hidden_NH, weight_VH))


@pytest.mark.parametrize("peak", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_error(divergence: str, peak: float) -> None:
    tensors = real_sized(torch.float32, peak)
    exact = loss_and_gradients(*(x.detach().double().requires_grad_(x.requires_grad) for x in tensors), divergence)
    for actual, expected, bar in zip(loss_and_gradients(*tensors, divergence), exact, (1e-5, 1e-4, 1e-4), strict=True):
        assert float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm()) < bar


def test_bf16_operands_are_computed_in_fp32_and_give_bf16_gradients() -> None:
    tensors = real_sized(torch.bfloat16, 1.0)
    exact = loss_and_gradients(*(x.detach().double().requires_grad_(x.requires_grad) for x in tensors), "reverse_kl")
    loss, *gradients = loss_and_gradients(*tensors, "reverse_kl")
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact[0].detach()), rel=1e-5)
    for actual, expected in zip(gradients, exact[1:], strict=True):
        assert actual.dtype == torch.bfloat16
        assert float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm()) < 2**-8  # rounding of the result


def test_bf16_products_with_fp32_output_differ_by_the_rounding_of_the_logit_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of GPUs, with their product written out."""
    mm, used = torch.mm, []

    def mm_with_fp32_output(a: torch.Tensor, b: torch.Tensor, *, out: Any = None, out_dtype: Any = None) -> torch.Tensor:
        used.append(out_dtype)
        assert a.dtype == b.dtype
        return mm(a, b, out=out) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype), out=out)

    tensors = real_sized(torch.bfloat16, 1.0)
    loss, *plain = loss_and_gradients(*tensors, "reverse_kl")
    monkeypatch.setattr(head_module, "has_fp32_output", lambda device: True)
    monkeypatch.setattr(torch, "mm", mm_with_fp32_output)
    other, *gradients = loss_and_gradients(*tensors, "reverse_kl")
    assert set(used) == {torch.float32}
    assert float(other.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    for actual, expected in zip(gradients, plain, strict=True):
        assert float((actual - expected).float().norm() / expected.float().norm()) < 2**-7


def test_autocast_changes_nothing() -> None:
    tensors = real_sized(torch.float32, 1.0)
    plain = loss_and_gradients(*tensors, "reverse_kl")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss_and_gradients(*tensors, "reverse_kl")
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


class Largest(TorchDispatchMode):
    """Notes the size of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tensor_grows_with_n_times_v(divergence: str) -> None:
    n, v, chunk = 64, 1000, 4
    hidden, weight = torch.randn(n, 3).requires_grad_(), torch.randn(v, 3).requires_grad_()
    head, ids_N = core.Head(weight, torch.zeros(v).requires_grad_(), softcap=5.0), torch.arange(n)
    with Largest() as seen:
        core.fused_weighted_divergence(hidden, head, hidden, head, torch.ones(n), divergence=divergence, chunk=chunk)[0].backward()
        core.token_log_probs(hidden, head, ids_N, chunk=chunk).sum().backward()
        with torch.no_grad():
            core.fused_weighted_divergence(hidden, head, hidden, head, torch.ones(n), divergence=divergence, chunk=chunk)
    assert seen.elements == 3 * chunk * v


def test_default_chunk_bounds_the_elements() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [head_module.default_chunk(v, cpu) for v in (600, 32768, 151936)] == [1024, 80, 40]
    assert [head_module.default_chunk(v, gpu) for v in (600, 32768, 151936)] == [8192, 2048, 441]


def test_a_frozen_head_and_no_grad_form_no_head_gradient() -> None:
    n, v = 8, 5000
    hidden, frozen = torch.randn(n, 40), core.Head(torch.randn(v, 40))
    with Largest() as seen:
        loss, kl_N = core.fused_weighted_divergence(hidden.requires_grad_(), frozen, hidden.detach(), frozen, torch.ones(n), chunk=2)
        loss.backward()
    assert seen.elements == v * 40  # views of the weight itself; no buffer beside the three of the chunk
    assert hidden.grad is not None
    with torch.no_grad():
        trained = core.Head(torch.randn(v, 40).requires_grad_())
        loss, kl_N = core.fused_weighted_divergence(hidden, trained, hidden, frozen, torch.ones(n))
    assert not loss.requires_grad
    assert not kl_N.requires_grad


def test_evaluation_equals_training() -> None:
    x = pair(core)
    with torch.no_grad():
        evaluated, _ = core.fused_weighted_divergence(*x.args, x.c_N)
    trained, kl_N = core.fused_weighted_divergence(*x.args, x.c_N)
    torch.testing.assert_close(evaluated, trained.detach(), rtol=1e-12, atol=0)
    assert not kl_N.requires_grad


def test_chunk_size_is_free() -> None:
    x = pair(core)
    whole, _ = core.fused_weighted_divergence(*x.args, x.c_N, chunk=7)
    for chunk in (1, 2, 6, 100):
        torch.testing.assert_close(core.fused_weighted_divergence(*x.args, x.c_N, chunk=chunk)[0], whole, rtol=1e-12, atol=0)


def test_a_process_without_rollouts_joins_the_backward() -> None:
    x = pair(core, 0)
    loss, kl_N = core.fused_weighted_divergence(*x.args, x.c_N)
    loss.backward()
    assert float(loss.detach()) == 0
    assert kl_N.shape == (0,)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in x.student_side)


def test_a_tied_weight_collects_both_gradients() -> None:
    x = pair(core)
    weight_VH = x.student_side[1].detach().clone().requires_grad_()
    ids_N = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    tied = core.Head(weight_VH, vocab_size=11)
    fused = core.fused_weighted_divergence(weight_VH[ids_N], tied, *x.args[2:], x.c_N)[0]
    plain = (x.c_N * core.token_divergence(weight_VH[ids_N], tied, *x.args[2:])).sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight_VH)[0] for loss in (fused, plain)))


def test_one_graph_may_be_walked_twice_but_not_differentiated_twice() -> None:
    x = pair(core)
    loss, _ = core.fused_weighted_divergence(*x.args, x.c_N)
    first = torch.autograd.grad(loss, x.student_side, retain_graph=True)
    second = torch.autograd.grad(loss, x.student_side, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    logp_N = core.token_log_probs(*x.args[:2], torch.arange(7))
    for output in (loss, logp_N.sum()):
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(output, x.student_side, create_graph=True)


def test_a_broken_student_shows_in_the_loss() -> None:
    x = pair(core)
    with torch.no_grad():
        x.args[0][2, 1] = float("nan")
    loss, kl_N = core.fused_weighted_divergence(*x.args, x.c_N)
    assert loss.isnan()
    assert kl_N.isnan().tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, c: (a, c.requires_grad_(), {}), "c_N must not require grad"),
        (lambda a, c: (a, c * float("nan"), {}), "c_N must be finite"),
        (lambda a, c: (a, c.bfloat16(), {}), "float32 or float64"),
        (lambda a, c: (a, c[:6], {}), "lengths must agree"),
        (lambda a, c: (a, c[:, None], {}), "c_N must be flat"),
        (lambda a, c: ((a[0], a[1], a[2][:6], a[3]), c, {}), "lengths must agree"),
        (lambda a, c: ((a[0], a[1], a[2] * float("inf"), a[3]), c, {}), "teacher_hidden_NG must be finite"),
        (lambda a, c: ((a[2], a[1], a[2], a[3]), c, {}), r"student_hidden_NH must be \(N, 4\)"),
        (lambda a, c: ((a[0], a[1], a[2], core.Head(a[3].weight_VH, vocab_size=10)), c, {}), "11 and 10"),
        (lambda a, c: ((a[0], core.Head(a[1].weight_VH), a[2], core.Head(a[3].weight_VH)), c, {}), "14 and 17 rows"),
        (lambda a, c: (a, c, {"normalizer": 0}), "normalizer"),
        (lambda a, c: (a, c, {"chunk": 0}), "chunk"),
        (lambda a, c: (a, c, {"divergence": "forward"}), "Did you mean 'forward_kl'"),
    ],
)
def test_refuses(change: Any, message: str) -> None:
    x = pair(core)
    args, c_N, options = change(x.args, x.c_N)
    with pytest.raises(ValueError, match=message):
        core.fused_weighted_divergence(*args, c_N, **options)


def test_the_core_loads_torch_and_nothing_heavier() -> None:
    """And nothing of the package beside itself, so that it can be used inside anybody's trainer."""
    code = (
        "import sys, torch; before = set(sys.modules); import vaopd.core; new = set(sys.modules) - before;"
        "print(sorted(m for m in new if m.partition('.')[0] not in sys.stdlib_module_names and not m.startswith(('vaopd.core', 'torch'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['vaopd']"
