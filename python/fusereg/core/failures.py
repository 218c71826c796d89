"""What becomes of an error of this package where a model can be left alone instead."""

from __future__ import annotations

import logging
import os

_log = logging.getLogger("fusereg")


def reason(error: Exception) -> str:
    """Return why something is left alone after an error that nobody expected; log its traceback.

    Raises:
        Exception: the error itself, if the environment has ``FUSEREG_RAISE=1``, as in the tests.
    """
    if os.environ.get("FUSEREG_RAISE") == "1":
        raise error
    _log.debug("fusereg: the error that left something as it was:", exc_info=error)
    first = (str(error).strip().splitlines() or ["no text"])[0]
    return (
        f"fusereg failed on it ({type(error).__name__}: {first}); please report this, with the "
        "traceback that is logged at level DEBUG"
    )
