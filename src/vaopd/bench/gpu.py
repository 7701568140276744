"""On a GPU: the step at the sizes of real models, Qwen3-VL-8B teaching the 2B, with random weights. Times, tokens per second, memory, and
the share of the card's arithmetic peak.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vaopd.bench.flops import Load, rows_load, shared_load, step_flops
from vaopd.bench.shapes import MERGE, Setting, Shape, random_group, random_prompt
from vaopd.bench.step import step_variants
from vaopd.rollouts.hf import HFEngine, Sampling

SHAPE = Shape(P=600, T=500, K=4)
IMAGE_SHARE = 500 / 600  # of the prompt's tokens
IDS: dict[str, Any] = {
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}
TEXTS = 151_643  # ids below it are text
VOCAB = 151_936
# Dense bf16 TFLOP/s by what the name of the card contains, the longest match first.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "RTX 4090": 165, "L4": 121}


# Hidden size, MLP, layers, query heads of the decoder; tied head; small vision tower (the published config.json of each Instruct model).
_REAL = {
    "2B": (2048, 6144, 28, 16, True, True),
    "4B": (2560, 9728, 36, 32, True, True),
    "8B": (4096, 12_288, 36, 32, False, False),
    "32B": (5120, 25_600, 64, 64, False, False),
}


def real_config(size: str) -> Qwen3VLConfig:
    """The published configuration of Qwen3-VL-2B, 4B, 8B or 32B."""
    hidden, inner, layers, heads, tied, small = _REAL[size]
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 24 if small else 27,
        "hidden_size": 1024 if small else 1152,
        "intermediate_size": 4096 if small else 4304,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "deepstack_visual_indexes": [5, 11, 17] if small else [8, 16, 24],
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": MERGE,
        "num_position_embeddings": 2304,
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **IDS)


@dataclass(frozen=True)
class GpuResult:
    """One variant of the step."""

    name: str
    seconds: float  # the middle round
    tokens: int  # response tokens
    gib: float  # peak, weights included
    flops: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def share(self, peak: float | None) -> float | None:
        """Of the card's arithmetic peak (FLOP/s)."""
        return None if peak is None else self.flops / self.seconds / peak


def peak_of(card: str) -> float | None:
    """FLOP/s in bf16; None for a card that is not listed."""
    names = sorted((name for name in PEAKS if name in card), key=len, reverse=True)
    return PEAKS[names[0]] * 1e12 if names else None


def picture_side(prompt_tokens: int) -> tuple[int, int]:
    """Height and width in image tokens, about five sixths of the prompt."""
    height = max(1, int((IMAGE_SHARE * prompt_tokens * 0.8) ** 0.5))
    return height, max(1, int(IMAGE_SHARE * prompt_tokens) // height)


def load_of(name: str, shape: Shape) -> Load:
    """What a variant of `step_variants` sends through a model."""
    height, width = picture_side(shape.P)
    count = shared_load if name.startswith("shared") else rows_load
    return count(shape.P, shape.lengths(False), height * width * MERGE**2)


def variant_flops(name: str, shape: Shape, student: Any, teacher: Any) -> int:
    """Of a variant of `step_variants`."""
    both = name.endswith("va")
    return step_flops(student, teacher, load_of(name, shape), views=1 + both, log_probs=both)


def show_gpu(console: Console, *, P: int | None, T: int | None, K: int | None, rounds: int) -> None:
    """Measure and print; a card that is too small is said so."""
    shape = Shape(P or SHAPE.P, T or SHAPE.T, K or SHAPE.K)
    card = torch.cuda.get_device_name()
    console.print(
        f"[bold]{card}[/], Qwen3-VL-8B teaches 2B, random weights, bf16 (student's weights fp32), P={shape.P} T={shape.T} K={shape.K}"
    )
    try:
        setting = build_setting(shape)
        results = list(measure_gpu(setting, shape, rounds))
        speed = rollout_speed(setting, shape)
    except torch.OutOfMemoryError:
        console.print("[yellow]The card's memory is too small for it.[/] Give a smaller --p, --t or --k.")
        return
    finally:
        torch.cuda.empty_cache()
    console.print(gpu_table(results, peak_of(card)))
    console.print(f"rollouts of {shape.T} tokens, {shape.K} side by side: {speed:,.0f} tokens/s\n")


def build_setting(shape: Shape) -> Setting:
    """Both models on the card and one group of responses."""
    student, teacher = (_model(size, dtype) for size, dtype in (("2B", torch.float32), ("8B", torch.bfloat16)))
    student.model.visual.requires_grad_(False)
    prompt = random_prompt(shape.P, picture_side(shape.P), IDS, TEXTS)
    return Setting(student, teacher.requires_grad_(False), (random_group(prompt, shape.lengths(False), TEXTS),), VOCAB)


def _model(size: str, dtype: torch.dtype) -> Any:
    with torch.device("cuda"):
        return Qwen3VLForConditionalGeneration._from_config(real_config(size), dtype=dtype, attn_implementation="sdpa").eval()


def measure_gpu(setting: Setting, shape: Shape, rounds: int) -> Iterator[GpuResult]:
    """Every variant of the step, in bf16 as training computes."""
    for name, run in step_variants(setting).items():
        with torch.autocast("cuda", torch.bfloat16):
            torch.cuda.reset_peak_memory_stats()
            seconds = [_clock(run) for _ in range(rounds + 1)][1:]  # the first one warms up
        flops = variant_flops(name, shape, setting.student.config, setting.teacher.config)
        gib = torch.cuda.max_memory_allocated() / 2**30
        yield GpuResult(name, statistics.median(seconds), sum(setting.groups[0].lengths), gib, flops)


def rollout_speed(setting: Setting, shape: Shape) -> float:
    """Tokens per second of the package's own engine."""
    sampling = Sampling(shape.T, bf16=True)
    control = list(range(TEXTS, VOCAB))
    engine = HFEngine(setting.student, sampling, vocab_size=VOCAB, eos_ids=control[:1], forbidden_ids=control)
    prompt = setting.groups[0].prompt
    engine.generate([prompt], shape.K, step=0)
    return shape.K * shape.T / _clock(lambda: engine.generate([prompt], shape.K, step=1))


def _clock(run: Callable[[], object]) -> float:
    """Seconds until the card is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def gpu_table(results: list[GpuResult], peak: float | None) -> Table:
    """One line per variant; the first one, row-by-row OPD, is what the others are compared with."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("step")
    for column in ("seconds", "/ rows opd", "tokens/s", "GiB", "TFLOP", "of peak"):
        table.add_column(column, justify="right")
    for result in results:
        share = result.share(peak)
        row = (f"{result.seconds:.3f}", f"{result.seconds / results[0].seconds:.2f}", f"{result.tokens_per_second:,.0f}")
        work = (f"{result.gib:.1f}", f"{result.flops / 1e12:.1f}", "-" if share is None else f"{100 * share:.0f} %")
        table.add_row(result.name, *row, *work)
    return table
