"""PlannerErrors about what a planner was given."""

from __future__ import annotations

from torchrec.distributed.planner.types import PlannerError, PlannerErrorType

# TorchRec 1.6 has no type of its own for these.
_TYPE: PlannerErrorType = getattr(PlannerErrorType, "INPUT_VALIDATION", PlannerErrorType.OTHER)


def input_error(message: str) -> PlannerError:
    """The error that an argument, a model or a constraint cannot be planned with."""
    return PlannerError(message, _TYPE)
