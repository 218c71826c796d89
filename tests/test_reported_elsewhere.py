"""What users have reported of other optimizers, tried with these; each test names a report."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import lr_scheduler

from fusereg import optim
from test_optim_state import NAMES, SCHEDULES

dcp: Any = checkpoint
#: Those of torch that take a learning rate in a tensor without being compiled, here and there.
PAIRS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.02},
    "AdamW": {"lr": 0.02},
    "Adagrad": {"lr": 0.1},
}


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def copies(params: list[Tensor]) -> list[Tensor]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def give_grads(*lists: list[Tensor]) -> None:
    for own in zip(*lists, strict=True):
        grad = torch.randn_like(own[0])
        for p in own:
            p.grad = grad.clone()


def assert_close(a: list[Tensor], b: list[Tensor], atol: float = 2e-6) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=atol)


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_ftrl_keeps_weights_whose_first_gradient_is_zero(strength: float) -> None:
    """tensorflow#50118: there they become 0."""
    (p,) = weights((40,))
    before = p.detach().clone()
    optimizer = optim.FTRL([p], lr=0.1, l1=strength, l2=strength)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        if not strength:
            torch.testing.assert_close(p.detach(), before, rtol=1e-6, atol=0.0)
    # The first step is the proximal step from them, those after it change nothing.
    wanted = before.sign() * (10 * before.abs() - strength).clamp_min(0) / (10 + strength)
    torch.testing.assert_close(p.detach(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("name", list(PAIRS))
def test_schedulers_drive_numbers_and_tensors_as_torchs(
    name: str, schedule: str, as_tensor: bool
) -> None:
    """pytorch#126854, #162359, #163103: with a tensor the rates of several groups became one."""
    ours, theirs = weights((5, 7), (40,)), []
    theirs = copies(ours)

    def make(of: Any, params: list[Tensor], tensor: bool) -> Any:
        lr = PAIRS[name]["lr"]
        rates = [torch.tensor(r) if tensor else r for r in (lr, lr / 2)]
        groups = [{"params": [p], "lr": rate} for p, rate in zip(params, rates, strict=True)]
        optimizer = getattr(of, name)(groups, **PAIRS[name])
        return optimizer, SCHEDULES[schedule](optimizer)

    own, drives = make(optim, ours, as_tensor)
    other, drives_other = make(torch.optim, theirs, False)
    for turn in range(12):
        give_grads(ours, theirs)
        own.step()
        other.step()
        for one in (drives, drives_other):
            one.step(*[1.0] * (schedule == "ReduceLROnPlateau"))
        if turn == 5:  # killed, and started again
            saved = copy.deepcopy((own.state_dict(), drives.state_dict()))
            own, drives = make(optim, ours, as_tensor)
            own.load_state_dict(saved[0])
            if schedule not in ("LRScheduler", "LambdaLR", "MultiplicativeLR", "CyclicLR"):
                drives.load_state_dict(saved[1])
            else:  # torch does not save functions
                drives.__dict__.update(
                    {k: v for k, v in saved[1].items() if not isinstance(v, list | dict)}
                )
    rates = [[float(g["lr"]) for g in o.param_groups] for o in (own, other)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)
    assert_close(ours, theirs, 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_joins_later_has_states_of_its_own(name: str) -> None:
    """pytorch#53712, #17679, #32903: Adagrad raised KeyError 'sum'."""
    first, second = weights((4, 3), (4, 3))
    alone = copies([second])
    optimizer = getattr(optim, name)([first], lr=0.1)
    give_grads([first])
    optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.05})
    other = getattr(optim, name)(alone, lr=0.05)
    for _ in range(2):
        give_grads([first])
        give_grads([second], alone)
        optimizer.step()
        other.step()
    assert torch.equal(second, alone[0])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("SGD", {"lr": 0.1, "weight_decay": 0.1, "l1": 0.05}),
        ("Adagrad", {"lr": 0.1}),
        ("Adagrad", {"lr": 0.1, "weight_decay": 0.1, "l2": 0.2}),
        ("FTRL", {"lr": 0.1, "l1": 0.2}),
    ],
    ids=str,
)
def test_a_sparse_gradient_is_the_dense_one(
    name: str, options: dict[str, Any], maximize: bool
) -> None:
    """pytorch#110444: torch's raise for some of these."""
    embedding = nn.Embedding(6, 3, sparse=True)
    ours, dense = embedding.weight, copies([embedding.weight])[0]
    theirs = copies([embedding.weight])[0]
    own, other = (getattr(optim, name)([p], maximize=maximize, **options) for p in (ours, dense))
    plain = name != "FTRL" and not options.keys() & {"weight_decay", "l1", "l2"}
    torchs = getattr(torch.optim, name)([theirs], maximize=maximize, **options) if plain else None
    for rows in ([1, 4, 1], [4, 0]):
        own.zero_grad()
        embedding(torch.tensor(rows)).square().sum().backward()
        assert ours.grad is not None
        dense.grad = ours.grad.to_dense()
        own.step()
        other.step()
        if torchs is not None:
            theirs.grad = dense.grad.to_sparse()
            torchs.step()
    assert_close([ours], [dense], 0.0)
    if torchs is not None:
        assert_close([ours], [theirs])


@pytest.mark.parametrize("to_torch", [True, False])
def test_checkpoints_of_the_fused_optimizer_of_torch_go_both_ways(to_torch: bool) -> None:
    ours = weights((5, 7), (33,))
    theirs = copies(ours)
    own = optim.AdamW(ours, lr=0.01)
    other = torch.optim.AdamW(theirs, lr=0.01, fused=True)
    source, target = (own, other) if to_torch else (other, own)
    for _ in range(3):
        give_grads(ours, theirs)
        own.step()
        other.step()
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(3):
        give_grads(ours, theirs)
        own.step()
        other.step()
    assert_close(ours, theirs, 1e-6)


def test_a_grad_scaler_without_any_gradient_says_what_it_says_of_torchs() -> None:
    """nerfstudio#1919: "No inf checks were recorded"."""
    said = []
    for make in (lambda p: optim.AdamW(p), lambda p: torch.optim.AdamW(p, fused=True)):
        optimizer = make(weights((3,)))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        with pytest.raises(AssertionError) as caught:
            scaler.update()
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("of", [optim, torch.optim], ids=["fusereg", "torch"])
def test_a_checkpoint_without_the_state_of_a_parameter_is_torchs_error(
    of: Any, tmp_path: Path
) -> None:
    """pytorch#192202: of a parameter that never had a gradient."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def state(used: int) -> dict[str, Any]:
        optimizer = of.AdamW(model.parameters(), lr=0.1)
        for p in model[:used].parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
        return {"o": get_optimizer_state_dict(model, optimizer)}

    dcp.save(state(1), checkpoint_id=tmp_path)
    with pytest.raises(dcp.api.CheckpointException, match="Missing key"):
        dcp.load(state(2), checkpoint_id=tmp_path)


def test_a_schedule_of_a_tensor_writes_into_that_tensor() -> None:
    """A captured CUDA graph follows the rate only where the tensor stays the same."""
    rate = torch.tensor(0.1)
    (p,) = weights((3,))
    optimizer = optim.SGD([p], lr=rate)
    schedule = lr_scheduler.StepLR(optimizer, 1, 0.5)
    give_grads([p])
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.05)
