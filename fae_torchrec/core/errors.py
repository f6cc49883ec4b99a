"""The errors that name what went wrong, what was received, what is allowed and the remedy."""

from __future__ import annotations


class FAEError(Exception):
    """Base of every error this package raises for bad input.

    The command line prints the message alone (no traceback) and exits with code 2, so a message must say what is wrong, what was
    received, what is allowed and what to do about it.
    """


class ConfigError(FAEError, ValueError):
    """A run's description is wrong: an unknown key, a missing file, a value outside its range."""


class DataError(FAEError, ValueError):
    """The data disagree with their description: an id out of a table's range, a missing column, ragged lengths."""


class BudgetError(FAEError, ValueError):
    """The budget of fast memory cannot hold what must be in it."""


class FingerprintError(FAEError, ValueError):
    """Two saved values that belong together do not: a profile of other tables, a placement of another profile."""


class HotBatchError(FAEError, RuntimeError):
    """A batch promised to be hot is not, or the ranks disagree about the kind of a step."""


class StateError(FAEError, RuntimeError):
    """A saved state does not fit the model: a key is missing or unexpected, a tensor has another shape."""


class ReplicaError(FAEError, RuntimeError):
    """The replicas of the hot rows differ between ranks."""


class DivergedError(FAEError, RuntimeError):
    """The training loss is no longer a finite number."""


class StagingError(FAEError):
    """Batches are not trained one after the other, which rows in a staging area need."""
