"""Foreign text that must stay text, and a run full of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = [
    "</script><script>window.planted=1</script>",
    "<img src=x onerror='window.planted=1'>",
    "\u202egnp.exe",
    "x" * 20_000,
    "\x00\x07\x1b",
    "\ud83d",
    "{{ 7*7 }}",
    "--></style><style>body{display:none}</style>",
    "\n\n\n",
    "javascript:alert(1)",
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def poison(run: Path) -> None:
    """Foreign text wherever text can be."""
    rows = rows_of(run / "samples.jsonl")
    for row in rows:
        row |= {"id": HOSTILE[0] + row["id"], "problem": " ".join(HOSTILE), "answer": HOSTILE[1]}
        for rollout in row["rollouts"]:
            rollout["tokens"][: len(HOSTILE)] = HOSTILE
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"method": HOSTILE[0], "student": HOSTILE[1], "teacher": HOSTILE[3], HOSTILE[0]: HOSTILE}
    (run / "config.yaml").write_text(json.dumps(config))
