"""The benchmark's tables for people: what was compared, how exact it is, and whether it is what it should be."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vaopd.bench.loss import LossResult
from vaopd.bench.results import GRADIENT_BAR, MEMORY_BARS, STEP_BARS, TIME_BARS, Results, bars
from vaopd.bench.run import machine
from vaopd.bench.step import StepResult, scaling_formula
from vaopd.bench.timing import Ratio

KERNELS = {"fused": "vaopd", "materialised": "whole logits", "trl": "TRL", "liger": "Liger"}


def show(results: Results, console: Console) -> None:
    """All tables, and at the end what is missed."""
    for part in (_heading, _work, _steps, _losses, _memory, _rest, _verdict):
        part(results, console)


def _heading(results: Results, console: Console) -> None:
    plan, host = results.plan, machine()
    console.print(f"\n[bold]{escape(str(host['processor']))}[/], one thread, CPU time, torch {host['torch']}")
    console.print(f"student  {plan.student}\nteacher  {plan.teacher}")
    console.print(f"fp32, V = {plan.vocab:,}, random weights, vision towers frozen; {plan.rounds} rounds in turns: fastest (middle)\n")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _work(results: Results, console: Console) -> None:
    table = _table("Work of a VA-OPD step, counted: shared prompt / row by row", "", "decoder tokens", "head rows", "pictures", "formula")
    shape = results.plan.shapes[0]
    for result in results.work:
        pairs = zip(vars(result.shared).values(), vars(result.rows).values(), strict=True)
        counts = [f"{ours:,} / {theirs:,} = {ours / theirs:.2f}" for ours, theirs in pairs]
        lengths = "ragged" if result.ragged else f"P={shape.P} T={shape.T} K={shape.K}"
        table.add_row(lengths, *counts, "[green]exact[/]" if result.matches_formula else "[red]differs[/]")
    console.print(table)
    console.print("[dim]Both put response tokens alone through the head.[/]\n")


def _steps(results: Results, console: Console) -> None:
    columns = ("", "VA / rows OPD", "bar", "arithmetic", "VA / our OPD", "rows VA / OPD", "VA ms", "grad error")
    table = _table("Step: teacher, coefficients, student's forward and backward", *columns)
    for step in results.steps:
        ratios = [step.ratio(*pair) for pair in (("shared va", "rows opd"), ("shared va", "shared opd"), ("rows va", "rows opd"))]
        bar = None if step.ragged else STEP_BARS.get((step.shape.P, step.shape.T))
        milliseconds = f"{1000 * step.times['shared va'].least:.0f}"
        error = _judged(f"{step.max_grad_rel_error:.0e}", step.max_grad_rel_error <= GRADIENT_BAR)
        table.add_row(
            _step_name(step),
            _ratio(ratios[0], bar),
            _bar(bar),
            f"{step.arithmetic:.2f}",
            _ratio(ratios[1]),
            _ratio(ratios[2]),
            milliseconds,
            error,
        )
    console.print(table)
    console.print("[dim]Arithmetic: floating-point operations of our VA-OPD over those of row-by-row OPD, what the time can come to.[/]")
    console.print(f"[dim]Gradients: at fixed coefficients, against row by row through whole logits; bar {GRADIENT_BAR:.0e}.[/]\n")


def _step_name(step: StepResult) -> str:
    return f"P={step.shape.P} T={step.shape.T} K={step.shape.K}{' ragged' if step.ragged else ''}"


def _losses(results: Results, console: Console) -> None:
    for loss in results.losses:
        _one_loss(loss, results, console)


def _one_loss(loss: LossResult, results: Results, console: Console) -> None:
    hidden = " → ".join(str(width) for width in reversed(results.plan.loss_hidden))
    title = f"Loss, forward and backward: N={loss.N:,} V={loss.V:,} hidden {hidden} fp32"
    table = _table(title, "kernel", "tokens a block", "seconds", "ours / it", "bar", "peak MiB", "ours / it", "bar", "grad error")
    for name, label in KERNELS.items():
        found = loss.best(name)
        if found is None:
            table.add_row(label, "not installed")
            continue
        time_bar, memory_bar = TIME_BARS.get(name), MEMORY_BARS.get((loss.N, loss.V)) if name == "materialised" else None
        time, memory = (None, None) if name == "fused" else (loss.time_over(name), loss.memory_over(name))
        table.add_row(
            label,
            str(found.tile or "default"),
            f"{found.times.least:.2f} ({found.times.median:.2f})",
            "" if time is None else _ratio(time, time_bar),
            _bar(time_bar),
            "-" if found.peak_mib is None else f"{found.peak_mib:.0f}",
            "" if memory is None else _judged(f"{memory:.3f}", memory_bar is None or memory <= memory_bar, memory_bar is not None),
            _bar(memory_bar),
            f"{found.error:.0e}",
        )
    console.print(table)
    others = [f"{KERNELS[k.kernel]} at {k.tile or 'default'}: {k.times.least:.2f} s" for k in loss.kernels if k != loss.best(k.kernel)]
    console.print(f"[dim]Each in its own process; the fastest block of each. Also measured: {', '.join(others)}.[/]\n")


def _memory(results: Results, console: Console) -> None:
    N = results.plan.memory[0]
    table = _table(f"Loss, peak MiB by vocabulary: N={N:,}", "V", "vaopd", "of it, the head's gradient", "whole logits", "ours / whole")
    for at in results.memory:
        known = at.fused is not None and at.materialised is not None
        ratio = f"{at.fused / at.materialised:.2f}" if known and at.materialised else "-"  # type: ignore[operator]
        peaks = ["-" if peak is None else f"{peak:.0f}" for peak in (at.fused, at.gradient, at.materialised)]
        table.add_row(f"{at.V:,}", *peaks, ratio)
    console.print(table)
    console.print()


def _rest(results: Results, console: Console) -> None:
    rollout, scaling, trainer = results.rollout, results.scaling, results.trainer
    table = _table("Rollouts, siblings, whole steps", "", "ratio", "")
    shape = rollout.shape
    table.add_row(f"prompt tokens prefilled / generate, K={shape.K}", f"{rollout.prefill_ratio:.2f}", f"1/K = {1 / shape.K:.2f}")
    table.add_row(f"rollouts: tokens/s / generate, P={shape.P} T={shape.T}", _ratio(rollout.speed), "above 1 is faster")
    table.add_row("VA-OPD step: K=8 / K=1", _ratio(scaling.ratio), f"(P+8T)/(P+T) = {scaling_formula(scaling.shape):.2f}")
    if trainer is None:
        table.add_row("whole step / TRL's", "-", "TRL is not installed")
    else:
        for ours, label in (("opd", "OPD / TRL's OPD"), ("va", "VA-OPD / TRL's OPD")):
            table.add_row(f"whole step with generation: {label}", _ratio(trainer.over_trl(ours)), f"{trainer.times[ours].least:.2f} s")
    console.print(table)
    if trainer is None or any(loss.best("liger") is None for loss in results.losses):
        console.print("For the comparison with TRL and Liger: [bold]pip install 'vaopd\\[bench]'[/]")
    console.print()


def _verdict(results: Results, console: Console) -> None:
    all_bars = list(bars(results))
    missed = [bar for bar in all_bars if not bar.met]
    console.print(f"{len(all_bars) - len(missed)} of {len(all_bars)} bars met")
    for bar in missed:
        console.print(f"  [red]missed[/] {bar.name}: {bar.value:.3g}, at most {bar.at_most:g}")


def _ratio(ratio: Ratio, bar: float | None = None) -> str:
    text = f"{ratio.least:.2f} ({ratio.median:.2f})"
    return _judged(text, bar is None or ratio.least <= bar, bar is not None)


def _judged(text: str, met: bool, has_bar: bool = True) -> str:
    return text if not has_bar else f"[green]{text}[/]" if met else f"[red]{text}[/]"


def _bar(bar: float | None) -> str:
    return "" if bar is None else f"≤ {bar:g}"
