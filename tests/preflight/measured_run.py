"""One process of the memory test: train a few steps and print the peak above what the interpreter and the packages take, in MiB.

python measured_run.py RECIPE.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from vaopd.config import load_config
from vaopd.models.load import open_source
from vaopd.preflight.memory import measure
from vaopd.train.health import peak_memory
from vaopd.train.loop import Progress, train


def main() -> None:
    """What torch and the models' packages need to be ready is the baseline's."""
    recipe = load_config(Path(sys.argv[1]))
    torch.ones(64, 64).matmul(torch.ones(64, 64)).sum()
    for name in (recipe.student, str(recipe.teacher)):
        measure(open_source(name).config, recipe)
    baseline = peak_memory(torch.device("cpu"))

    def stop(peak: float) -> None:
        """Training is over; the model's export and evaluation are not what is measured."""
        print(f"PEAK {peak - baseline:.1f} {baseline:.1f}", flush=True)
        raise SystemExit

    train(recipe, progress=Progress(on_peak=stop))


if __name__ == "__main__":
    main()
