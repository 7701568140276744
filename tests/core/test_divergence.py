"""Heads, log-probabilities, named divergences and from_padded: what they accept and refuse; the values are in test_laws.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.autograd import gradcheck

import vaopd.core as core

from .test_laws import pair


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_log_probs_pass_gradcheck() -> None:
    x = pair(core, 4)
    head, ids_N = x.args[1], torch.tensor([0, 10, 4, 4])

    def function(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor) -> torch.Tensor:
        changed = core.Head(weight_VH, bias_V, head.scale, head.softcap, head.vocab_size)
        return core.token_log_probs(hidden_NH, changed, ids_N, chunk=3)

    assert gradcheck(function, x.student_side)


def test_log_probs_of_a_frozen_head_reach_the_hidden_states_only() -> None:
    hidden_NH, weight_VH = normal(5, 3).requires_grad_(), normal(7, 3, seed=1)
    core.token_log_probs(hidden_NH, core.Head(weight_VH), torch.tensor([0, 1, 2, 3, 6])).sum().backward()
    assert hidden_NH.grad is not None
    assert weight_VH.grad is None


def test_log_probs_are_fp32_under_bf16_and_autocast() -> None:
    hidden_NH, weight_VH, ids_N = normal(6, 32).bfloat16(), normal(50, 32, seed=1), torch.arange(6)
    exact_N = core.token_log_probs(hidden_NH.double(), core.Head(weight_VH.double()), ids_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp_N = core.token_log_probs(hidden_NH, core.Head(weight_VH), ids_N)
        direct_N = core.Head(weight_VH).logits(hidden_NH).log_softmax(-1)[torch.arange(6), ids_N]
    assert logp_N.dtype == direct_N.dtype == torch.float32
    torch.testing.assert_close(logp_N.double(), exact_N, rtol=0, atol=1e-5)
    torch.testing.assert_close(direct_N.double(), exact_N, rtol=0, atol=1e-5)


def test_no_tokens_no_log_probs() -> None:
    assert core.token_log_probs(normal(0, 3), core.Head(normal(7, 3)), torch.empty(0, dtype=torch.long)).shape == (0,)


def test_named_divergences() -> None:
    assert core.as_divergence("reverse_kl") == core.ReverseKL()
    assert core.as_divergence("forward_kl") == core.ForwardKL()
    assert core.as_divergence("jsd") == core.JSD(0.5)
    assert core.as_divergence("jsd:0.3") == core.as_divergence(core.JSD(0.3)) == core.JSD(beta=0.3)


def test_jsd_tends_to_the_two_kls() -> None:
    x = pair(core)
    for beta, factor, limit in ((1e-9, 1e-9, "forward_kl"), (1 - 1e-9, 1e-9, "reverse_kl")):
        jsd_N = core.token_divergence(*x.args, divergence=core.JSD(beta)) / factor
        torch.testing.assert_close(jsd_N, core.token_divergence(*x.args, divergence=limit), rtol=1e-3, atol=1e-5)


def test_one_declared_vocabulary_serves_both_heads() -> None:
    student, teacher = core.Head(normal(9, 3), vocab_size=7), core.Head(normal(12, 4))
    both = core.Head(normal(12, 4), vocab_size=7)
    hidden = normal(5, 3), normal(5, 4)
    declared, undeclared = (core.token_divergence(hidden[0], student, hidden[1], t) for t in (both, teacher))
    assert torch.equal(declared, undeclared)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_heads_are_refused(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ValueError, match="sharded"):
        core.Head(distribute_tensor(normal(8, 3), mesh, [Shard(0)]))


ids = torch.arange(4)
H4, HEAD = normal(4, 3), core.Head(normal(7, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: core.Head(normal(7)), r"\(V, H\)"),
        (lambda: core.Head(normal(7, 3), normal(6)), "bias_V"),
        (lambda: core.Head(normal(7, 3), vocab_size=8), r"1\.\.7.*is 8"),
        (lambda: core.Head(normal(7, 3), scale=0.0), "scale"),
        (lambda: core.Head(normal(7, 3), softcap=-1.0), "softcap"),
        (lambda: core.token_log_probs(normal(4, 2), HEAD, ids), r"\(N, 3\)"),
        (lambda: core.token_log_probs(normal(2, 4, 3), HEAD, ids), "from_padded"),
        (lambda: core.token_log_probs(H4, HEAD, ids[:3]), "one id per row"),
        (lambda: core.token_log_probs(H4, HEAD, ids + 4), r"0\.\.6.*from 4 to 7"),
        (lambda: core.token_log_probs(H4, HEAD, ids.float()), "integer"),
        (lambda: core.token_divergence(H4, HEAD, H4, core.Head(normal(9, 3))), "7 and 9 rows"),
        (lambda: core.token_divergence(H4, core.Head(normal(9, 3), vocab_size=5), H4, core.Head(normal(9, 3), vocab_size=6)), "5 and 6"),
        (lambda: core.token_divergence(H4, core.Head(normal(9, 3), vocab_size=8), H4, HEAD), "does not know all ids"),
        (lambda: core.token_divergence(H4, HEAD, H4[:3], HEAD), "lengths must agree"),
        (lambda: core.token_divergence(H4, HEAD, H4 / 0, HEAD), "teacher_hidden_NG must be finite"),
        (lambda: core.token_divergence(H4, HEAD, H4, HEAD, divergence="reverse_k"), "Did you mean 'reverse_kl'"),
        (lambda: core.as_divergence("jsd:1"), "jsd:0.3"),
        (lambda: core.as_divergence("jsd:x"), "jsd:0.3"),
        (lambda: core.as_divergence("reverse_kl:0.3"), "must be"),
        (lambda: core.as_divergence(core.JSD), "object"),  # type: ignore[arg-type]
        (lambda: core.JSD(0.0), "forward_kl"),
        (lambda: core.from_padded(normal(2, 3), torch.ones(2, 4)), "leading dimensions"),
        (lambda: core.from_padded(normal(2, 3), torch.full((2, 3), 0.5)), "0 and 1"),
        (lambda: core.from_padded(normal(2, 3), torch.tensor([[1, 0, 0], [0, 0, 0]])), r"rows \[1\] have none"),
    ],
)
def test_refuses(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_from_padded_keeps_trailing_dimensions() -> None:
    x_N, rollout_N = core.from_padded(normal(2, 3, 5), torch.tensor([[True, True, False], [False, True, True]]))
    assert x_N.shape == (4, 5)
    assert rollout_N.tolist() == [0, 0, 1, 1]
