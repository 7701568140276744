"""What a run says about itself before it goes wrong in silence."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vaopd.train.metrics import Metrics
from vaopd.types import ORIGINAL, Group, Teacher

TRUNCATED = 0.25  # share of rollouts cut at the length limit from which a run warns
APART = 1.05  # exp of the mean |Δ log p| between a rollout server and the trainer above which a run warns


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used so far, in MiB: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux carries ru_maxrss over from the process that started this one, so it is only the second choice.
    resident = process_status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20 if resident is None else resident


def process_status(key: str) -> float | None:
    """A size from Linux's account of this process, in MiB: VmRSS is the resident memory now, VmHWM its peak. None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)


def noise_floor(teacher: Teacher, groups: Sequence[Group]) -> float:
    """Largest difference, in nats, between two exact computations of the same score: all groups together, and each alone.

    It is about 1e-6 in fp32 and 1e-2 in bf16. An advantage below it is noise, which the cut at the top share of tokens and the z-score over
    siblings would turn into different weights, so the deadband has to be above it.
    """
    together = teacher.score(groups, (ORIGINAL,))
    alone = [teacher.score([group], (ORIGINAL,))[0] for group in groups]
    pairs = zip(together, alone, strict=True)
    return max((float((a.logp_N[ORIGINAL] - b.logp_N[ORIGINAL]).abs().max()) for a, b in pairs), default=0.0)


def noise_warning(floor: float, deadband: float) -> str | None:
    """A warning when the deadband is below the floor."""
    if floor <= deadband:
        return None
    return (
        f"the teacher's scores are exact to {floor:.1e} nats here, but deadband is {deadband:g}: advantages below that are noise and would "
        f"choose tokens and weights. Set deadband: {2 * floor:.1g}, or precision: fp32"
    )


def truncation_warning(row: Metrics, max_tokens: int) -> str | None:
    """A warning when many rollouts of a step were cut at the length limit."""
    if (row.get("truncated") or 0) <= TRUNCATED:
        return None
    return (
        f"step {row['step']}: {100 * row['truncated']:.0f} % of the rollouts were cut at {max_tokens} tokens. They are trained on as they "
        "are; raise rollouts.max_tokens if answers need more"
    )


def gap_warning(row: Metrics) -> str | None:
    """A warning when the rollout server is another model than the one that is trained; a ratio that is no number is one, too."""
    ratio = row.get("sampler_ratio", 1.0)
    if ratio <= APART:
        return None
    return (
        f"step {row['step']}: the server that sampled is not the model that is trained: log-probabilities of the same tokens differ by "
        f"{row['sampler_gap']:.3f} nats on average, {row['sampler_gap_max']:.2f} at most (ratio {ratio:.2f}, the bar is {APART}). Answers "
        "come from stale weights, other pixels or another precision: docs/vllm.md says what to look at"
    )
