"""Every method improves the built-in student: minutes of real training, run by `make test-slow`."""

import json

import pytest

from vaopd.config import WorldConfig, parse_config
from vaopd.train.loop import train
from vaopd.world.data import write_world

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "lr", "steps"), [("sft", 1e-3, 200), ("off_policy_kd", 1e-3, 200), ("opd", 3e-4, 200), ("va_opd", 3e-4, 250)]
)
def test_a_method_improves_the_student(tmp_path, method, lr, steps):
    """The 95 % interval of the gain, clustered by question, excludes zero."""
    data = write_world(WorldConfig(train=2048, eval=64, test=300, seed=0), tmp_path / "data")
    config = parse_config(
        {
            "run": str(tmp_path / "run"),
            "method": method,
            "student": "builtin:student",
            "teacher": "builtin:teacher-m",
            "data": data.model_dump(mode="json"),
            "rollouts": {"k": 4, "max_tokens": 64, "temperature": 1.0, "top_p": 1.0, "rows": 128},
            "optim": {"lr": lr, "prompts_per_step": 24, "steps": steps, "warmup": 0.1, "weight_decay": 0.01},
            "eval": {"every": steps, "k": 4},
        }
    )
    evaluation = json.loads((train(config) / "eval.json").read_text())
    assert evaluation["gain"]["low"] > 0
    assert evaluation["models"]["trained"]["accuracy"] < evaluation["models"]["teacher"]["accuracy"]
