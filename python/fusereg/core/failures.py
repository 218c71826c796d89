"""Errors that leave a model as it was, in place of ending its conversion."""

from __future__ import annotations

import logging
import os

_log = logging.getLogger("fusereg")


def reason(error: Exception) -> str:
    """Return why something is left alone after an error that nobody expected, and log the error.

    Raises:
        Exception: the error itself, if the environment has ``FUSEREG_RAISE=1``, as in the tests.
    """
    if os.environ.get("FUSEREG_RAISE") == "1":
        raise error
    return (
        f"fusereg failed on it ({type(error).__name__}: {logged(error)}); please report this, with "
        "the traceback that is logged at level DEBUG"
    )


def logged(error: Exception) -> str:
    """Return the first line of an error, and log its traceback at level DEBUG."""
    _log.debug("fusereg: left as it was because of this error:", exc_info=error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
