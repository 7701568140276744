"""What is said where TRL, or the part of it that is needed, isn't installed."""

from __future__ import annotations

import importlib
import sys

import pytest

from vaopd.errors import ConfigError


def test_a_missing_trl_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "vaopd.integrations.trl", raising=False)
    with pytest.raises(ConfigError, match=r"needs TRL 1\.16 .*pip install 'trl==1\.16\.\*'"):
        importlib.import_module("vaopd.integrations.trl")
