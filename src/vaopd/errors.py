"""What a user can do wrong. The command line prints these without a traceback; everything else is our bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VaopdError(Exception):
    """A mistake that the user can fix: the message states the rule, the value found, and the fix."""

    exit_code = 1


class ConfigError(VaopdError):
    """A recipe, an override or a command-line value is wrong."""

    exit_code = 2


class DataError(VaopdError):
    """A row, an image or a whole data set can't be used; names the row."""

    exit_code = 3


class ModelError(VaopdError):
    """A model, a processor, or the agreement of student and teacher is wrong."""

    exit_code = 4


class CheckpointError(VaopdError):
    """A checkpoint is damaged or belongs to another run."""

    exit_code = 5


class TrainingStopped(VaopdError):
    """Training stopped itself because going on would have harmed the weights or wasted the time."""

    exit_code = 6


class EvaluationError(VaopdError):
    """A benchmark has no result, or one that can't be trusted."""

    exit_code = 7


class EngineError(VaopdError):
    """A rollout server can't be reached, is set up otherwise than training needs, or answered something else than was asked."""

    exit_code = 8


class StudyFailed(VaopdError):
    """A process of a study ended with an error."""

    exit_code = 9


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
