"""What the integrations share: the error when a library is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
