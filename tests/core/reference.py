"""Eq. 1-6 of arXiv 2605.21924 as plain loops over Python floats: slow, obvious, and written from the paper rather than from the package."""

from __future__ import annotations

import math
from fractions import Fraction

import torch


def visual_advantage(original: list[float], degraded: list[float], deadband: float) -> list[float]:
    advantages = []
    for with_image, without in zip(original, degraded, strict=True):
        a = max(with_image - without, 0.0)
        advantages.append(a if a >= deadband else 0.0)
    return advantages


def rollout_weights(means: list[float], tau: float, eps: float) -> list[float]:
    """w_k of one prompt."""
    mu = sum(means) / len(means)
    sigma = math.sqrt(sum((m - mu) ** 2 for m in means) / len(means))
    z = [(m - mu) / (sigma + eps) for m in means]
    e = [math.exp((x - max(z)) / tau) for x in z]
    return [x / sum(e) for x in e]


def ceil_share(share: float, length: int) -> int:
    """max(1, ceil(share · length)) with the share as it is written, 0.07 being 7/100."""
    return max(1, math.ceil(Fraction(str(share)) * length))


def top(scores: list[float], count: int) -> set[int]:
    """Positions of the `count` largest, the earlier one first among equals."""
    chosen: set[int] = set()
    for _ in range(count):
        best = None
        for t, score in enumerate(scores):
            if t not in chosen and (best is None or score > scores[best]):
                best = t
        assert best is not None
        chosen.add(best)
    return chosen


def two_means(length: int, visual: set[int], lam: float) -> list[float]:
    if not visual or len(visual) == length:
        return [1 / length] * length
    return [lam / len(visual) if t in visual else (1 - lam) / (length - len(visual)) for t in range(length)]


def token_shares(kind: str, a: list[float], random: list[float], o: dict) -> list[float]:
    """What the tokens of one rollout weigh inside it."""
    length, uniform = len(a), [1 / len(a)] * len(a)
    if kind in ("OPD", "RolloutOnly") or not any(x > 0 for x in a):
        return uniform
    if kind in ("VAOPD", "TokenOnly"):
        return two_means(length, top(a, ceil_share(o["p_visual"], length)), o["lam"])
    if kind == "RandomTokens":
        return two_means(length, top(random, ceil_share(o["p_visual"], length)), o["lam"])
    assert kind == "MaskTokens"
    scores = {"top": a, "lowest": [-x for x in a], "random": random}[o["which"]]
    masked = top(scores, min(ceil_share(o["share"], length), length - 1))
    return [0.0 if t in masked else 1 / (length - len(masked)) for t in range(length)]


def token_coefficients(a: list[float], rollout: list[int], group: list[int], weighting: object) -> list[float]:
    """c_t, `weighting` being one of the package's frozen dataclasses, read for its name and numbers only."""
    kind, o = type(weighting).__name__, vars(weighting)
    random = torch.rand(len(a), dtype=torch.float64, generator=torch.Generator().manual_seed(o.get("seed", 0))).tolist()
    c = [0.0] * len(a)
    for prompt in set(group):
        siblings = [k for k, g in enumerate(group) if g == prompt]
        tokens = {k: [i for i, r in enumerate(rollout) if r == k] for k in siblings}
        if kind in ("VAOPD", "RolloutOnly", "RandomTokens"):
            means = [sum(a[i] for i in tokens[k]) / len(tokens[k]) for k in siblings]
            w = rollout_weights(means, o["tau"], o["eps"])
        elif o.get("per_token"):
            w = [len(tokens[k]) / sum(len(tokens[j]) for j in siblings) for k in siblings]
        else:
            w = [1 / len(siblings)] * len(siblings)
        for k, w_k in zip(siblings, w, strict=True):
            shares = token_shares(kind, [a[i] for i in tokens[k]], [random[i] for i in tokens[k]], o)
            for i, share in zip(tokens[k], shares, strict=True):
                c[i] = w_k * share
    return c


def log_softmax(logits: list[float]) -> list[float]:
    top_logit = max(logits)
    lse = top_logit + math.log(sum(math.exp(z - top_logit) for z in logits))
    return [z - lse for z in logits]


def kl(first: list[float], second: list[float]) -> float:
    """KL of two distributions given as log-probabilities."""
    return sum(math.exp(x) * (x - y) for x, y in zip(first, second, strict=True))


def divergence(name: str, student: list[float], teacher: list[float]) -> float:
    """One token's divergence from two rows of logits. JSD as in GKD (arXiv 2306.13649) with P the teacher, Q the student."""
    q, p = log_softmax(student), log_softmax(teacher)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "forward_kl":
        return kl(p, q)
    beta = float(name.partition(":")[2] or 0.5)
    m = [math.log(beta * math.exp(x) + (1 - beta) * math.exp(y)) for x, y in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)
