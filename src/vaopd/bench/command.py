"""`vaopd bench`: measure, show, write; on a GPU the real models' sizes first."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from vaopd.bench.gpu import show_gpu
from vaopd.bench.page import show
from vaopd.bench.run import make_plan, run_bench, write_details, write_json


def bench(
    *,
    p: int | None,
    t: int | None,
    k: int | None,
    v: int | None,
    rounds: int,
    json_file: Path | None,
    details: Path | None,
    console: Console,
) -> None:
    """Raises ConfigError for sizes that cannot be."""
    plan = make_plan(p, t, k, v, rounds)
    if torch.cuda.is_available():
        show_gpu(console, P=p, T=t, K=k, rounds=rounds)
    with console.status("measuring") as status:
        results = run_bench(plan, on_part=lambda part: status.update(f"measuring: {part}"))
    if json_file:
        write_json(results, json_file)
    if details:
        write_details(results, details)
    show(results, console)
