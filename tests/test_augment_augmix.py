"""AugMix: torchvision's, with the same numbers and the same distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from augment_peers import Torch, numbers_of, torchvision_module
from fusereg.augment import Compose, Normalize, ProgramParams, RandomHorizontalFlip, recipes
from fusereg.augment import program as P


def v2() -> Any:
    return torchvision_module("torchvision.transforms.v2")


def images(n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Smooth, as photographs are."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 9, 9, generator=generator)
    x = torch.nn.functional.interpolate(coarse, (60, 75), mode="bicubic").clamp(0, 1)
    return (x * 255).to(torch.uint8) if dtype is torch.uint8 else x.to(dtype)


def by_torchvision(transform: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What torchvision's own gives of each image with the numbers of its id."""
    module = __import__(type(transform).__module__, fromlist=["torch"])
    results = []
    for i, image in enumerate(x):
        numbers = numbers_of(3, i, 200)

        def dirichlet(of: Any, alphas: Tensor, numbers: P.Numbers = numbers) -> Tensor:
            waits = [-torch.tensor(1 - numbers.uniform()).double().log() for _ in alphas[0]]
            return torch.stack([w / sum(waits) for w in waits])[None].float()

        with monkeypatch.context() as patched:
            patched.setattr(module, "torch", Torch(numbers))
            patched.setattr(type(transform), "_sample_dirichlet", dirichlet)
            results.append(transform(image))
    return torch.stack(results)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"severity": 10, "mixture_width": 1, "all_ops": False},
        {"severity": 8, "chain_depth": 2, "mixture_width": 6, "fill": 40},
    ],
    ids=str,
)
def test_images_are_torchvisions_with_the_same_numbers(
    arguments: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for how in ("nearest", "bilinear"):
        if dtype is not torch.uint8 and "fill" in arguments:
            arguments = {**arguments, "fill": 0.2}
        transform = v2().AugMix(**arguments, interpolation=v2().InterpolationMode(how))
        x = images(60, dtype)
        chain = Compose([transform], seed=3)
        assert str(chain.plan()) == "1. AugMix"
        came = chain(x, sample_ids=range(60))
        assert came.dtype is dtype
        assert came.is_contiguous()
        wanted = by_torchvision(transform, x, monkeypatch)
        apart = (came.double() - wanted.double()).abs().flatten(1)
        level = 1.0 if dtype is torch.uint8 else 1e-3
        # Places at the middle between two pixels, and pixels at the rim, differ as in a policy.
        assert float((apart > level).double().mean()) < (0.02 if how == "nearest" else 0.05), how
        if how == "nearest":
            assert float((apart.amax(1) <= level).double().mean()) > 0.4


def test_shares_and_depths_have_torchvisions_distribution() -> None:
    from test_augment_distributions import assert_alike, assert_counted_alike

    (params,) = Compose([v2().AugMix()], seed=7).sample_params(4000, input_size=(60, 80))
    assert isinstance(params, ProgramParams)
    shares, chains = params.programs[:, 0], params.programs[:, 1:].unflatten(1, (3, 3))
    torch.manual_seed(3)
    for k, drawn in ((2, shares[:, :2]), (3, shares[:, 2:5])):
        theirs = torch._sample_dirichlet(torch.ones(4000, k))
        assert torch.allclose(drawn.sum(1), torch.ones(4000, dtype=torch.float64))
        for column in range(k):
            name = f"share {column} of {k}"
            assert_alike(name, drawn[:, column].tolist(), theirs[:, column].tolist())
    depths = (chains[..., 0] != P.IDENTITY).sum(-1).flatten().tolist()
    assert_counted_alike("depth", depths, torch.randint(1, 4, (12000,)).tolist())
    codes = chains[..., 0][chains[..., 0] != P.IDENTITY]
    assert float((codes == P.WARP).double().mean()) == pytest.approx(5 / 13, abs=0.02)


def test_it_is_part_of_lists_and_recipes_and_has_no_targets() -> None:
    tv = torchvision_module("torchvision.tv_tensors")
    x = images(6)
    chain = Compose(
        [RandomHorizontalFlip(), v2().RandomGrayscale(0.5), v2().AugMix(), Normalize(0.5, 0.2)],
        seed=1,
    )
    passes = chain.plan().passes
    assert [p.names for p in passes][2:] == [["AugMix"], ["Normalize"]]
    assert "AugMix mixes several programs" in str(chain.plan())
    params = chain.sample_params(6, input_size=(60, 75), sample_ids=range(6))
    y = chain(x, sample_ids=range(6))
    assert torch.equal(chain(x, params=params), y)
    assert torch.equal(chain(x[2:4], sample_ids=[2, 3]), y[2:4])
    labels = torch.arange(6)
    assert torch.equal(chain(x, labels)[1], labels)
    with pytest.raises(ValueError, match=r"Mask, would have to move .* and AugMix mixes"):
        chain(x, [tv.Mask(torch.zeros(60, 75, dtype=torch.uint8))] * 6)
    kept = Compose([v2().AugMix()], passthrough=True)
    mask = tv.Mask(torch.zeros(6, 60, 75, dtype=torch.uint8))
    assert torch.equal(kept(x, mask)[1], mask)
    with pytest.raises(ValueError, match="AugMix moves the images"):
        Compose([v2().AugMix()])(x, {"boxes": torch.rand(6, 1, 4)})
    last = Compose([v2().AugMix()], seed=1, out_dtype=torch.float32)
    out = torch.empty(6, 3, 60, 75)
    assert last(x, out=out) is out
    recipe = recipes.torchvision_classification(48, policy="augmix")
    assert "called" not in str(recipe.plan())
    assert recipe(x).shape == (6, 3, 48, 48)
    clip = x[None].expand(2, -1, -1, -1, -1)
    whole = Compose([v2().AugMix()], seed=1)(clip, sample_ids=[0, 1])
    assert whole.shape == clip.shape
