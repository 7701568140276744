"""Planted mistakes: each mutant is a copy of the core with a line or two replaced, and the laws must tell it from the method.

Many are mistakes that other implementations made. A law counts only when it fails by assertion: a mutant that crashes proves nothing.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import vaopd.core

from . import test_laws

SOURCE = Path(vaopd.core.__file__).parent
LAWS: dict[str, Callable[[ModuleType], None]] = {name: law for name, law in vars(test_laws).items() if name.startswith("test_")}

GROUPS = "torch.unique(group_R.detach().cpu(), return_inverse=True)[1])"

# what is wrong -> (file, what stands there, what the mistake writes), ...
MUTATIONS: dict[str, list[tuple[str, str, str]]] = {
    "views swapped": [
        ("advantage.py", "logp_original_N.detach() - logp_degraded_N.detach()", "logp_degraded_N.detach() - logp_original_N.detach()")
    ],
    "absolute difference": [("advantage.py", ".clamp(min=0.0)", ".abs()")],
    "no maximum with 0": [("advantage.py", ".clamp(min=0.0)", ""), ("advantage.py", "a_N < deadband", "a_N.abs() < deadband")],
    "deadband ignored": [("advantage.py", "torch.where(a_N < deadband, 0.0, a_N)", "a_N")],
    "deadband swallows its own edge": [("advantage.py", "a_N < deadband", "a_N <= deadband")],
    "deadband shifts the advantage": [("advantage.py", "deadband, 0.0, a_N)", "deadband, 0.0, a_N - deadband)")],
    "sample standard deviation": [("weighting.py", "groups) / size_B).sqrt()", "groups) / (size_B - 1).clamp(min=1)).sqrt()")],
    "K times the softmax": [("weighting.py", "    return w_R.to(", "    w_R = w_R * torch.bincount(group_R)[group_R]\n    return w_R.to(")],
    "temperature ignored": [("weighting.py", "len(groups), eps) / tau", "len(groups), eps)")],
    "sum in place of the mean advantage": [("weighting.py", "len(self.group_R)) / self.length_R", "len(self.group_R))")],
    "softmax over the whole batch": [("weighting.py", GROUPS, "torch.zeros_like(group_R))")],
    "row ids for group ids": [("weighting.py", GROUPS, "torch.arange(rollouts))")],
    "weights per micro-batch of two siblings": [
        (
            "weighting.py",
            "groups, group_R = torch.unique(group_R.detach().cpu(), return_inverse=True)\n    z_R",
            "groups, group_R = torch.unique(torch.arange(len(group_R)) // 2, return_inverse=True)\n    z_R",
        )
    ],
    "every sibling gets the first one's weight": [("weighting.py", "rollout_shares(batch)[batch.rollout_N]", "rollout_shares(batch)[0]")],
    "rollout index off by one": [
        ("weighting.py", "rollout_shares(batch)[batch.rollout_N]", "rollout_shares(batch).roll(1)[batch.rollout_N]")
    ],
    "mean over all tokens of the batch": [
        (
            "weighting.py",
            "(1.0 / batch.length_R.double())[batch.rollout_N]",
            "torch.full_like(batch.a_N, len(batch.group_R) / len(batch.a_N))",
        )
    ],
    "floor for the size of V_k": [("weighting.py", ".ceil()", ".floor()")],
    "7.000000000000001 rounded up to 8": [("weighting.py", " - 1e-9)", ")")],
    "λ on the language tokens": [
        ("weighting.py", "torch.full_like(visual_R, lam)", "torch.full_like(visual_R, 1 - lam)"),
        ("weighting.py", "torch.full_like(visual_R, 1.0 - lam)", "torch.full_like(visual_R, lam)"),
    ],
    "ties to the later token": [
        (
            "weighting.py",
            "order = torch.sort(score_N, descending=True, stable=True).indices",
            "order = len(score_N) - 1 - torch.sort(score_N.flip(0), descending=True, stable=True).indices",
        )
    ],
    "lowest advantages for the highest": [("weighting.py", "torch.sort(score_N, descending=True", "torch.sort(score_N, descending=False")],
    "top share of a response without advantage": [
        ("weighting.py", "return member_N & batch.depends_on_image_R[batch.rollout_N]", "return member_N")
    ],
    "mass of an empty L_k lost": [("weighting.py", "(visual_R == 0) | (language_R == 0)", "visual_R == 0")],
    "masked tokens without renormalisation": [("weighting.py", "(batch.length_R - masked_R).double()", "batch.length_R.double()")],
    "seed ignored": [("weighting.py", ".manual_seed(seed)", ".manual_seed(0)")],
    "KL directions swapped": [
        ("divergence.py", '"reverse_kl": ReverseKL, "forward_kl": ForwardKL', '"reverse_kl": ForwardKL, "forward_kl": ReverseKL')
    ],
    "reverse KL not centred": [("divergence.py", "ratio_NV -= kl_N[:, None]", "pass")],
    "JSD not centred": [("divergence.py", "ratio_NV -= student_N[:, None]", "pass")],
    "β on the student": [
        ("divergence.py", "math.log1p(-self.beta), math.log(self.beta)\n", "math.log(self.beta), math.log1p(-self.beta)\n")
    ],
    "labels shifted by one": [("divergence.py", "z_nV.gather(-1, ids_N[rows, None])", "z_nV.gather(-1, ids_N.roll(1)[rows, None])")],
    "padding mask dropped": [
        ("divergence.py", "keep_RT = mask_RT.bool()", "keep_RT = mask_RT.bool() | True"),
        ("divergence.py", "(mask_RT != keep_RT).any()", "False"),
    ],
    "columns for rows": [("divergence.py", "keep_RT.nonzero()[:, 0]", "keep_RT.nonzero()[:, 1]")],
    "padded head rows in the softmax": [("divergence.py", "size = declared.pop() if declared else rows[0]", "size = min(rows)")],
    "gradient through the teacher": [("divergence.py", "with torch.no_grad():", "with torch.enable_grad():")],
    "teacher temperature": [("fused.py", "teacher.logits(teacher_nG, out=z_nV)", "teacher.logits(teacher_nG, out=z_nV).div_(0.7)")],
    "normalizer ignored": [("fused.py", "self.c_N.to(hidden_NH.device, dtype) / self.normalizer", "self.c_N.to(dtype)")],
    "upstream gradient ignored": [("fused.py", "g.mul_(grad_loss)", "g")],
    "gradient without its coefficient": [("head.py", "(c_n * self.projection.scale)", "(torch.ones_like(c_n) * self.projection.scale)")],
    "gradient without the scale": [("head.py", "(c_n * self.projection.scale)", "c_n")],
    "gradient without the cap's slope": [("head.py", "grad_nV *= slope_nV", "pass")],
    "head gradient of the last chunk only": [("head.py", "addmm_(grad_nV.T, weighted_nH)", "addmm_(grad_nV.T, weighted_nH, beta=0)")],
}


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Callable[..., ModuleType]]:
    """Imports a copy of the core with replacements, each of which must fit exactly one place."""
    name = "core_under_mutation"

    def load(replacements: list[tuple[str, str, str]]) -> ModuleType:
        folder = Path(shutil.copytree(SOURCE, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")))
        for file, old, new in replacements:
            text = (folder / file).read_text()
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
            (folder / file).write_text(text.replace(old, new))
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
        del sys.modules[loaded]


def broken_laws(core: ModuleType) -> list[str]:
    broken = []
    for name, law in LAWS.items():
        try:
            law(core)
        except AssertionError:
            broken.append(name)
    return broken


def test_an_unchanged_copy_keeps_every_law(plant: Callable[..., ModuleType]) -> None:
    assert len(LAWS) >= 25
    assert broken_laws(plant([])) == []


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_a_law_tells_the_mutant(plant: Callable[..., ModuleType], mistake: str) -> None:
    assert broken_laws(plant(MUTATIONS[mistake])), f"no law notices: {mistake}"
