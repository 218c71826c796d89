"""What the integrations share: the error when a library is missing."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from fusereg.integrations._shared import PenaltyArguments

NAMES = {"lightning": "lightning", "transformers": "transformers", "ignite": "ignite"}


@pytest.mark.slow
@pytest.mark.parametrize("extra", NAMES)
def test_a_missing_library_is_named_with_its_extra(extra: str) -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["{NAMES[extra]}", "pytorch_lightning"]))
import fusereg, fusereg.integrations
try:
    import fusereg.integrations.{extra}
except ImportError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == (
        f"fusereg.integrations.{extra} needs the package {NAMES[extra]}, which is not installed; "
        f'do: pip install "fusereg[{extra}]"\n'
    )


def test_the_arguments_of_a_penalty_are_checked_without_a_model_and_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PenaltyArguments(l1=0.1, group=0.1, rules={"head.*": None})
        PenaltyArguments(rules={"head.*": {"l1": 0.1}})
    with pytest.raises(ValueError, match="l1 must be finite and not negative"):
        PenaltyArguments(l1=-0.1)
    with pytest.raises(TypeError, match="schedule must be a function"):
        PenaltyArguments(l1=0.1, schedule=3)  # type: ignore[arg-type]
