"""What Linux does to this process when its parent ends."""

from __future__ import annotations

import ctypes

_PR_GET_PDEATHSIG = 2


def death_signal() -> int:
    """The signal that this process gets then; 0 for none."""
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(number))
    return number.value
