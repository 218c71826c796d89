"""What the integrations share, the error when a library is missing, and Accelerate."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import fusereg
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


@pytest.mark.parametrize("attach", ["before", "after"])
def test_attached_before_or_after_accelerates_prepare_it_comes_after_clipping(attach: str) -> None:
    """With next to nothing left of the loss's gradient, the penalty's is all."""
    pytest.importorskip("other_libraries")
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = fusereg.WeightPenalty(model, l2=1.0)
    if attach == "before":
        penalty.attach(optimizer)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    if attach == "after":
        penalty.attach(prepared)
    weight, bias = (p.detach().clone() for p in model.parameters())
    accelerator.backward(wrapped(torch.randn(8, 6)).square().mean())
    accelerator.clip_grad_norm_(wrapped.parameters(), 1e-12)
    prepared.step()
    torch.testing.assert_close(model.weight.detach(), 0.9 * weight)
    torch.testing.assert_close(model.bias.detach(), bias)
    assert penalty.steps == 1
