"""The example for torchtitan, on a stand-in for its container of optimizers, with FSDP2.

torchtitan itself is not installed where these tests run. The stand-in follows the interface of
``OptimizersContainer`` in torchtitan/components/optimizer.py; what stands behind that interface,
torch's step hooks and ``torch.distributed.checkpoint``, is the real thing.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
from fusereg import WeightPenalty, optim
from ranks import Ranks, collect, fully_shard, on

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "torchtitan_optimizers.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torchtitan_optimizers", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class GroupConfig:
    """ParamGroupConfig: the first pattern that a name matches says how it is optimized."""

    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class Container(torch.optim.Optimizer):
    """OptimizersContainer: an optimizer that steps others, with names beside the parameters."""

    @staticmethod
    def _resolve_optimizer_cls(name: str) -> type:
        return {"AdamW": torch.optim.AdamW}[name]

    def __init__(self, groups: list[GroupConfig], model_parts: list[nn.Module]) -> None:
        self.optimizers: list[torch.optim.Optimizer] = []
        self.model_parts = model_parts
        for part in model_parts:
            made: dict[str, list[dict[str, Any]]] = defaultdict(list)
            left = dict(part.named_parameters())
            for group in groups:
                names = [name for name in left if re.search(group.pattern, name)]
                made[group.optimizer_name].append(
                    {
                        "params": [left.pop(name) for name in names],
                        "param_names": names,
                        "fused": True,
                        "foreach": False,
                        **group.optimizer_kwargs,
                    }
                )
            self.optimizers += [self._resolve_optimizer_cls(n)(g) for n, g in made.items()]
        super().__init__([p for part in model_parts for p in part.parameters()], {})

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).double()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def made(model: nn.Module, l1: float) -> Any:
    seam = example()
    return seam.with_fusereg(Container)(seam.param_groups(GroupConfig, 0.05, l1), [model])


def test_names_and_strengths_go_through_the_container() -> None:
    model = network()
    container = made(model, l1=0.5)
    (inner,) = container.optimizers
    assert type(inner) is optim.AdamW
    plain, penalized = inner.param_groups
    assert plain["param_names"] == ["0.bias", "1.bias", "3.bias"]
    assert (plain["l1"], penalized["l1"]) == (0.0, 0.5)
    for _ in range(5):
        container.zero_grad()
        loss_of(model, torch.randn(8, 6, dtype=torch.float64)).backward()
        container.step()
    assert fusereg.sparsity(model) > 0
    other = example().with_fusereg(Container)([GroupConfig(".*", "AdamW")], [model])
    assert type(other.optimizers[0]) is torch.optim.AdamW


def test_the_penalty_attaches_to_the_container() -> None:
    wanted = network()
    got = copy.deepcopy(wanted)
    groups = [GroupConfig(".*", "AdamW", {"lr": 0.05})]
    x = torch.randn(8, 6, dtype=torch.float64)
    for model, attached in ((wanted, False), (got, True)):
        container = Container(groups, [model])
        penalty = WeightPenalty(model, l1=0.1, group=0.1)
        if attached:
            penalty.attach(container)
        for _ in range(3):
            container.zero_grad()
            loss = loss_of(model, x)
            (loss if attached else loss + penalty.penalty()).backward()
            container.step()
    for p, q in zip(wanted.parameters(), got.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "l1": 0.1}),
    ("AdamW", {"lr": 0.1, "l1": 0.1, "l2": 0.1, "prox": "preconditioned"}),
    ("Adam", {"lr": 0.1, "amsgrad": True, "prox": False, "l1": 0.1}),
    ("Adagrad", {"lr": 0.1, "l1": 0.1}),
    ("FTRL", {"lr": 0.1, "l1": 0.1}),
]


def flat_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return dict(get_optimizer_state_dict(model, optimizer, options=options))


def load_flat(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    draw = torch.Generator().manual_seed(5)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(model, torch.randn(8, 6, dtype=torch.float64, generator=draw)).backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_asking_for_a_state_before_the_first_step_changes_no_weight(
    name: str, options: dict[str, Any]
) -> None:
    """torch.distributed.checkpoint makes states by a step with lr 0 and gradients of 0."""
    model = network()
    before = copy.deepcopy(model)
    flat_states(model, getattr(optim, name)(model.parameters(), **options))
    for p, q in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def check_that_states_go_out_and_in(name: str, options: dict[str, Any], shard: Any) -> None:
    whole = shard(network())
    first = getattr(optim, name)(whole.parameters(), **options)
    steps(whole, first, 3)
    state, weights = copy.deepcopy((flat_states(whole, first), whole.state_dict()))
    steps(whole, first, 2)
    other = shard(network())
    second = getattr(optim, name)(other.parameters(), **options)
    load_flat(other, second, state)
    other.load_state_dict(weights)
    steps(other, second, 2)
    for p, q in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(getattr(p, "_local_tensor", p), getattr(q, "_local_tensor", q))


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])
def test_states_go_through_distributed_checkpoints(name: str, options: dict[str, Any]) -> None:
    check_that_states_go_out_and_in(name, options, lambda model: model)


@on(2)
def fsdp_states_go_through_distributed_checkpoints(ranks: Ranks) -> None:
    def shard(model: nn.Sequential) -> nn.Sequential:
        assert fully_shard is not None
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=ranks.mesh)
        return model

    for name, options in OPTIMIZERS:
        check_that_states_go_out_and_in(name, options, shard)


test_on_ranks = collect(__name__, slow=False)
