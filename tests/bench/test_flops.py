"""The arithmetic of real models: formulas by hand, and against torch's own count at a small size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vaopd.bench.baseline import row_by_row
from vaopd.bench.flops import Load, decoder_flops, head_flops, rows_load, shared_load, step_flops, triangle, vision_flops
from vaopd.bench.gpu import GpuResult, gpu_table, load_of, peak_of, picture_side, real_config, variant_flops
from vaopd.bench.shapes import Shape, Size, build_model, make_group, model_config
from vaopd.models.shared_prompt import shared

SIZE = Size(hidden=32, layers=2, heads=4, key_heads=2, mlp=48, vision_hidden=16, vision_layers=2)
SHAPE = Shape(20, 6, 3)


def test_loads_by_hand() -> None:
    """P = 4, lengths 2 and 3: the prompt's 10 pairs, then 1 token with 4 + 1 keys, and 2 tokens with 4 + 1 and 4 + 2."""
    assert shared_load(4, (2, 3), 16) == Load(decoder_tokens=7, attended=10 + 5 + 11, patches=(16,), head_rows=5)
    assert rows_load(4, (2, 3), 16) == Load(decoder_tokens=12, attended=2 * 21, patches=(16, 16), head_rows=5)
    assert triangle(4) == 10


def test_formulas_by_hand() -> None:
    """hidden 32; queries 4 · 32 = 128, keys 2 · 32 = 64; MLP 48; two layers."""
    config, load = model_config(SIZE, 1024), Load(decoder_tokens=10, attended=55, patches=(16,), head_rows=5)
    weights = 32 * 128 * 2 + 32 * 64 * 2 + 3 * 32 * 48
    assert decoder_flops(config, load) == 2 * (2 * 10 * weights + 2 * 2 * 55 * 128)
    assert head_flops(config, load) == 2 * 5 * 32 * 1024


@pytest.mark.parametrize(("way", "load"), [(shared, shared_load), (row_by_row, rows_load)])
def test_projections_are_those_that_torch_counts(way: Callable[..., Any], load: Callable[..., Load]) -> None:
    """Attention aside, whose pairs a CPU kernel does not report."""
    config = model_config(SIZE, 1024)
    model, group = build_model(config, seed=0), make_group(SHAPE, 1024)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        way(model, [group], "original")
    operations = counter.get_flop_counts()["Global"]
    found = sum(count for operation, count in operations.items() if str(operation).split(".")[-1] in ("mm", "addmm", "convolution"))
    patches = len(group.prompt.images["original"]["pixel_values"])
    without_attention = load(SHAPE.P, group.lengths, patches)
    expected = decoder_flops(config, Load(without_attention.decoder_tokens, 0, (), 0)) + vision_flops(config, without_attention)
    attention = sum(4 * n**2 * SIZE.vision_hidden * SIZE.vision_layers for n in without_attention.patches)
    assert found == expected - attention


def test_a_step_by_hand() -> None:
    config, load = model_config(SIZE, 1024), shared_load(20, (6, 6, 6), 36)
    decoder, head, vision = (count(config, load) for count in (decoder_flops, head_flops, vision_flops))
    assert step_flops(config, config, load, views=1, log_probs=False) == 4 * decoder + 2 * vision + 4 * head
    assert step_flops(config, config, load, views=2, log_probs=True) == 5 * decoder + 3 * vision + 6 * head


@pytest.mark.parametrize(("size", "billions"), [("2B", (2.0, 2.3)), ("8B", (8.5, 9.0))])
def test_real_sizes(size: str, billions: tuple[float, float]) -> None:
    from transformers import Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(real_config(size))
    assert billions[0] < sum(parameter.numel() for parameter in model.parameters()) / 1e9 < billions[1]


def test_the_limit_at_real_sizes() -> None:
    """P = 600, T = 500, K = 4: VA-OPD with shared prompts is cheaper than OPD row by row, and twice the decoder work is saved."""
    shape, student, teacher = Shape(600, 500, 4), real_config("2B"), real_config("8B")
    ours, theirs = (variant_flops(name, shape, student, teacher) for name in ("shared va", "rows opd"))
    assert 0.8 < ours / theirs < 1.0
    assert load_of("rows va", shape).decoder_tokens == 4 * 1099
    assert load_of("shared va", shape).decoder_tokens == 600 + 4 * 499
    height, width = picture_side(600)
    assert 400 < height * width <= 500


def test_peaks() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("an unknown card") is None
    result = GpuResult("shared va", seconds=0.5, tokens=2000, gib=40.0, flops=100 * 10**12)
    assert result.tokens_per_second == 4000
    assert result.share(1000e12) == pytest.approx(0.2)
    assert result.share(None) is None
    assert gpu_table([result], None).row_count == 1
