"""What is said where TRL, or the part of it that is needed, isn't installed."""

from __future__ import annotations

import importlib
import sys

import pytest

from vaopd.errors import ConfigError


@pytest.mark.parametrize(
    ("module", "message"),
    [("trl", r"needs TRL 1\.16 .*pip install 'trl==1\.16\.\*'"), ("grpo", r"needs TRL with its GRPOTrainer .*pip install 'vaopd\[trl\]'")],
)
def test_a_missing_trl_is_told(monkeypatch: pytest.MonkeyPatch, module: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, f"vaopd.integrations.{module}", raising=False)
    with pytest.raises(ConfigError, match=message):
        importlib.import_module(f"vaopd.integrations.{module}")
