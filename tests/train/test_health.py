import subprocess
import sys

import pytest
import torch

from vaopd.train.health import noise_floor, noise_warning, peak_memory, process_status, truncation_warning
from vaopd.types import ORIGINAL, Group, Prompt, Scores


class Drifting:
    """A teacher whose scores depend on how many groups are scored together, as those of a batched computation do."""

    def __init__(self, drift):
        self.drift = drift

    def score(self, groups, views):
        return [Scores(torch.zeros(2, 3), {ORIGINAL: torch.tensor([-1.0, -2.0]) + self.drift * len(groups)}) for _ in groups]


def two_groups():
    return [Group(Prompt(str(index), torch.tensor([1])), (torch.tensor([1, 2]),), (True,)) for index in range(2)]


def test_the_floor_is_the_largest_difference_between_together_and_alone():
    assert noise_floor(Drifting(0.01), two_groups()) == pytest.approx(0.01)
    assert noise_floor(Drifting(-0.02), two_groups()) == pytest.approx(0.02)
    assert noise_floor(Drifting(0.0), two_groups()) == 0
    assert noise_floor(Drifting(0.01), []) == 0


def test_a_deadband_below_the_floor_is_called_out_with_one_above_it():
    assert noise_warning(1e-6, 1e-4) is None
    assert "deadband: 0.02" in noise_warning(0.01, 1e-4)


def test_truncation_warns_above_a_quarter():
    assert truncation_warning({"step": 3, "truncated": 0.25}, 8) is None
    assert truncation_warning({"step": 3, "truncated": None}, 8) is None
    assert "67 % of the rollouts were cut at 8 tokens" in truncation_warning({"step": 3, "truncated": 0.67}, 8)


def test_peak_memory_sees_a_large_tensor():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(int((before + 200) * 2**20 / 4))  # larger by 200 MiB than anything this process has held
    assert peak_memory(torch.device("cpu")) > before + 150
    del block


@pytest.mark.skipif(process_status("VmHWM") is None, reason="only Linux tells")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    block = torch.ones(200 * 2**20)  # 800 MiB
    code = "import torch; from vaopd.train.health import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 700
    del block
