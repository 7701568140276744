"""The compiled elementwise part against plain operations, and what happens where a compiler fails or errs."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vaopd.core as core
from vaopd.core import compiled, fused
from vaopd.core.compiled import Compiled, elementwise_for, plain
from vaopd.core.divergence import as_divergence

DIVERGENCES = ["reverse_kl", "forward_kl", "jsd:0.3"]
N, V = 21, 300


def logits(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, V, generator=generator) * 3, torch.randn(n, V, generator=generator) * 3


def loss_and_gradients(divergence: str) -> list[Tensor]:
    """Of the fused loss in chunks of 8, 8 and 5 rows, with a cap, a scale, a bias and padded heads of two widths."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((N, 12), (V + 7, 12), (V + 7,)))
    teacher = core.Head(torch.randn(V + 2, 16, generator=generator), vocab_size=V)
    c_N = torch.rand(N, generator=generator)
    loss, kl_N = core.fused_weighted_divergence(
        hidden,
        core.Head(weight, bias, scale=0.7, softcap=9.0, vocab_size=V),
        torch.randn(N, 16, generator=generator),
        teacher,
        c_N,
        divergence=divergence,
        chunk=8,
    )
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    return [loss.detach(), kl_N, hidden.grad, weight.grad, bias.grad]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_plain_is_the_definition(divergence: str) -> None:
    """The derivative of the value by autograd, and neither operand changed."""
    student, teacher = logits()
    before = student.clone(), teacher.clone()
    measure = as_divergence(divergence)
    kl_N, grad_NV = plain(measure, student, teacher)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    x = student.clone().requires_grad_()
    value_N = measure.value(x.log_softmax(-1), teacher.log_softmax(-1))
    value_N.sum().backward()
    torch.testing.assert_close(kl_N, value_N.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_NV, x.grad, rtol=1e-4, atol=1e-6)


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler for a CPU needs g++")],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_compiled_loss_is_the_loss(
    divergence: str, backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Loss, divergences and all gradients, in chunks of two sizes; the traced function is used, not the fallback."""
    expected = loss_and_gradients(divergence)
    kernel = Compiled(as_divergence(divergence), functools.partial(torch.compile, backend=backend))
    sizes: list[int] = []

    def counting(student_nV: Tensor, teacher_nV: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(student_nV))
        return kernel(student_nV, teacher_nV)

    monkeypatch.setattr(fused, "elementwise_for", lambda measure, device: counting)
    with caplog.at_level(logging.WARNING):
        found = loss_and_gradients(divergence)
    assert sizes == [8, 8, 5]
    assert kernel.fast is not None
    assert not [record for record in caplog.records if record.name == compiled.__name__]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def raising(function: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*_: Tensor) -> Any:
        raise RuntimeError("no compiler here\nand a long story")

    return fail


def wrong_sign(function: Callable[..., Any]) -> Callable[..., Any]:
    def negated(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        kl_n, grad_nV = function(*arguments)
        return kl_n, -grad_nV

    return negated


def wrong_value(function: Callable[..., Any]) -> Callable[..., Any]:
    def larger(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        kl_n, grad_nV = function(*arguments)
        return kl_n * 1.01, grad_nV

    return larger


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [(raising, "RuntimeError: no compiler here."), (wrong_sign, "its derivative differs"), (wrong_value, "its divergence differs")],
)
def test_a_compiler_that_fails_or_errs_is_said_once_and_left(
    compiler: Callable[..., Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    measure = as_divergence("reverse_kl")
    kernel = Compiled(measure, compiler)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            for x, y in zip(kernel(*logits(seed)), plain(measure, *logits(seed)), strict=True):
                assert torch.equal(x, y)
    (message,) = caplog.messages
    assert reason in message
    assert kernel.fast is None


def test_a_student_that_is_not_finite_does_not_look_like_a_wrong_compiler(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = logits()
    student[3, 5] = torch.nan
    kernel = Compiled(as_divergence("reverse_kl"), lambda function: function)
    with caplog.at_level(logging.WARNING):
        kl_N, _ = kernel(student, teacher)
    assert not caplog.messages
    assert kl_N.isnan().tolist() == [index == 3 for index in range(N)]


def test_where_it_is_used() -> None:
    """On a GPU, one for each divergence; never on a CPU, where compiling would take longer than the demo."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert elementwise_for(as_divergence("jsd:0.3"), gpu) is elementwise_for(as_divergence("jsd:0.3"), gpu)
    assert elementwise_for(as_divergence("jsd:0.3"), gpu) is not elementwise_for(as_divergence("jsd:0.4"), gpu)
    assert elementwise_for(as_divergence("reverse_kl"), cpu) is None

    class Unhashable(core.ReverseKL):
        __hash__ = None  # type: ignore[assignment]

    assert elementwise_for(Unhashable(), gpu) is None
