"""WeightPenalty: parameters of the model that were replaced, and names in errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fusereg import WeightPenalty
from penalized_models import assert_same, mlp, obvious, strengths


def assigned(model: nn.Sequential) -> None:
    model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)


def a_new_layer(model: nn.Sequential) -> None:
    model[2] = copy.deepcopy(model[2])


def a_new_parameter(model: nn.Sequential) -> None:
    layer: Any = model[2]
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def a_layer_less(model: nn.Sequential) -> None:
    model[2] = nn.Identity()


def weight_norm_as_it_was(model: nn.Sequential) -> None:
    nn.utils.weight_norm(model[2])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "replace", [assigned, a_new_layer, a_new_parameter, a_layer_less, weight_norm_as_it_was]
)
@pytest.mark.parametrize("use", ["penalty", "add_grad_", "attach", "attach to the old"])
def test_replaced_parameters_are_noticed_until_the_penalty_is_refreshed(
    replace: Callable[[nn.Sequential], None], use: str
) -> None:
    """The old ones would be penalized, and nothing be seen of it."""
    model = mlp().double()
    penalty = WeightPenalty(model, l1=0.1)
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = penalty.attach(old)
    penalty.penalty()
    replace(model)
    new = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(3, 6).double()).sum().backward() if replace is not a_layer_less else None

    def attach_and_step() -> None:
        penalty.attach(new)
        new.step()

    uses: dict[str, Callable[[], Any]] = {
        "penalty": penalty.penalty,
        "add_grad_": penalty.add_grad_,
        "attach": attach_and_step,
        "attach to the old": old.step,
    }
    with pytest.raises(ValueError, match=r"replaced.* call refresh\(\)"):
        uses[use]()
    attached.remove()
    penalty.refresh()
    assert_same(penalty.penalty(), obvious(model, strengths(penalty)))


@pytest.mark.parametrize("how", ["wrapped", "parametrized", "moved", "cast", "loaded", "copied"])
def test_parameters_that_stay_are_found_wherever_they_are(how: str) -> None:
    model = mlp().double()
    penalty = WeightPenalty(model, l1=0.1)
    value = penalty.penalty()
    if how == "wrapped":
        model[2] = nn.Sequential(model[2])
    elif how == "parametrized":
        nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
    elif how == "moved":
        model.append(model[2])
        model[2] = nn.Identity()
    elif how == "cast":
        model.float().double()
    elif how == "loaded":
        model.load_state_dict(model.state_dict())
    else:
        penalty = copy.deepcopy(penalty)
    for _ in range(2):
        assert_same(penalty.penalty(), value, 1e-6)


def test_tensors_in_the_place_of_parameters_for_a_while_are_no_replacement() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    penalty = WeightPenalty(model, l1=0.1)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(penalty.penalty()))
    value = penalty.penalty()
    torch.func.functional_call(model, {"0.weight": torch.zeros(2, 2)}, torch.ones(1, 2))
    assert torch.equal(seen[0], value)


@pytest.mark.parametrize("kind", ["sparse gradient", "complex", "float8", "meta"])
def test_what_no_kernel_takes_is_named(kind: str) -> None:
    model = nn.ModuleDict({"first": nn.Linear(3, 2), "odd": nn.Embedding(4, 3)})
    layer: Any = model["odd"]
    dtypes = {"complex": torch.complex64, "float8": torch.float8_e4m3fn}
    layer.weight = nn.Parameter(layer.weight.detach().to(dtypes.get(kind, torch.float32)))
    if kind == "meta":
        layer.to("meta")
    penalty = WeightPenalty(model, l1=0.1)
    name = "odd.weight"
    if kind == "sparse gradient":
        layer.weight.grad = torch.eye(4, 3).to_sparse()
        name += ".grad"
    else:
        with pytest.raises(ValueError, match=rf"^fusereg.WeightPenalty: {name} (is|has) "):
            penalty.penalty()
    with pytest.raises(ValueError, match=rf"^fusereg.WeightPenalty: {name} (is|has) "):
        penalty.add_grad_()
    assert model["first"].weight.grad is None


def test_layers_that_are_added_are_penalized_from_the_next_refresh_on() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).double()
    penalty = WeightPenalty(model, l1=0.1)
    value = penalty.penalty()
    model.append(nn.Linear(2, 2).double())
    assert torch.equal(penalty.penalty(), value)
    penalty.refresh()
    assert_same(penalty.penalty(), obvious(model, strengths(penalty)))
    assert set(strengths(penalty)) == {"0.weight", "1.weight"}
