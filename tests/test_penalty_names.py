"""Which parameters have a penalty or weight decay: names, types and wrappers, over a family."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fusereg
from fusereg import WeightPenalty, optim
from penalized_models import Net, Tied, strengths


def excluded(model: nn.Module, *words: Any) -> set[str]:
    return set(WeightPenalty(model, l1=1.0, exclude=words).excluded)


# --- wrappers -------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Any:
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    store = HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class ModelEmaV3(nn.Module):
    """As timm's: the model is its attribute ``module``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "ema": ModelEmaV3,
    "distributed and compiled": lambda m: torch.compile(
        nn.parallel.DistributedDataParallel(m), backend="eager"
    ),
}


class Whole(nn.Module):
    """A net whose parts are all used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_inside_wrappers(process_group: None, wrapper: str) -> None:
    plain = Whole()
    model = WRAPPERS[wrapper](plain)
    rules: dict[Any, Any] = {"head.*": {"l1": 2.0}, nn.LayerNorm: None}
    wanted = WeightPenalty(copy.deepcopy(plain), l1=1.0, rules={"head.*": {"l1": 2.0}})
    found = WeightPenalty(
        model, l1=1.0, exclude=("bias", "norm"), rules={"head.*": rules["head.*"]}
    )
    assert strengths(found) == strengths(wanted)
    assert found.excluded == wanted.excluded
    found.load_state_dict(wanted.state_dict())
    wanted.load_state_dict(found.state_dict())
    decay, _ = optim.param_groups_weight_decay(model, 0.1)
    assert [p.shape for p in decay["params"]] == [(5, 4), (2, 5)]
    optim.param_groups_weight_decay(model, 0.1, exclude="head.weight")
    # The names that torch gives go on working, in patterns and in states.
    by_torch = next(n for n, _ in model.named_parameters() if n.endswith("head.weight"))
    assert (
        strengths(WeightPenalty(model, l1=1.0, rules={by_torch: {"l1": 3.0}}))["head.weight"][0]
        == 3
    )
    state = found.state_dict()
    for group in state["groups"].values():
        group["names"] = [by_torch.replace("head.weight", name) for name in group["names"]]
    found.load_state_dict(state)


def test_a_wrapped_part_has_the_name_of_the_part() -> None:
    model = Whole()
    model.body = torch.compile(model.body, backend="eager")  # type: ignore[assignment]
    assert set(strengths(WeightPenalty(model, l1=1.0))) == {"body.0.weight", "head.weight"}


def test_a_module_that_is_called_module_is_none_of_the_wrappers() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert set(strengths(WeightPenalty(model, l1=1.0))) == {"module.weight"}


# --- tied parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["decoder.weight", "decoder.w*", nn.Linear])
@pytest.mark.parametrize("argument", ["rules", "exclude"])
def test_a_tied_name_says_what_it_is_tied_to(key: Any, argument: str) -> None:
    model = Tied()
    model.decoder.bias = None  # type: ignore[assignment]
    given: Any = {key: {"l1": 2.0}} if argument == "rules" else (key,)
    with pytest.raises(
        ValueError, match=r"decoder\.weight is tied to embedding\.weight, .* no parameter"
    ):
        WeightPenalty(model, l1=1.0, **{argument: given})
    assert "decoder.weight is embedding.weight" in repr(WeightPenalty(model, l1=1.0))


def test_a_rule_for_what_is_excluded_says_why() -> None:
    with pytest.raises(ValueError, match=r"head\.bias is excluded by 'bias'; no parameter"):
        WeightPenalty(Net(), l1=1.0, rules={"head.bias": {"l1": 1.0}})


# --- normalization layers and biases --------------------------------------------------------------


class EnormousLinear(nn.Linear):
    pass


class NormalizedLinear(nn.Linear):
    pass


class WeightNormLinear(nn.Linear):
    pass


class ConvNorm(nn.Conv2d):
    pass


class T5LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class layer_norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 4, 1, 1))


@pytest.mark.parametrize(
    "layer",
    [EnormousLinear(4, 4), NormalizedLinear(4, 4), WeightNormLinear(4, 4), ConvNorm(2, 2, 3)],
    ids=lambda m: type(m).__name__,
)
def test_norm_as_a_part_of_a_name_makes_no_normalization_layer(layer: nn.Module) -> None:
    assert excluded(nn.Sequential(layer), "norm") == set()


@pytest.mark.parametrize("layer", [T5LayerNorm(), layer_norm()], ids=lambda m: type(m).__name__)
def test_normalization_layers_of_other_libraries_are_known(layer: nn.Module) -> None:
    assert len(excluded(nn.Sequential(layer), "norm")) == 1


def test_biases_in_more_forms() -> None:
    model = nn.Module()
    model.relative_attention_bias = nn.Embedding(4, 2)  # T5's
    model.relative_position_bias_table = nn.Parameter(torch.ones(3, 2))  # Swin's
    model.attention_biases = nn.Parameter(torch.ones(3, 2))  # LeViT's
    model.weight = nn.Parameter(torch.ones(3, 2))
    assert excluded(model, "bias") == {n for n, _ in model.named_parameters() if n != "weight"}


# --- LayerScale, positions, class tokens, no_weight_decay -----------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))  # torchvision's
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.ones(1, 3, 4))
        self.prompt = nn.Parameter(torch.ones(1, 3, 4))
        self.mix = nn.Parameter(torch.ones(4))
        self.linear = nn.Linear(4, 4)


class Saying(Block):
    def no_weight_decay(self) -> set[str]:
        return {"prompt"}


def test_what_is_spared_by_default() -> None:
    assert excluded(Block(), *fusereg.penalty.names.SPARED) == {
        "gamma", "layer_scale", "cls_token", "pos_embed", "linear.bias",
    }  # fmt: skip
    # A model that says what is not to decay is taken at its word.
    assert excluded(Saying(), *fusereg.penalty.names.SPARED) == {
        "gamma", "layer_scale", "prompt", "linear.bias",
    }  # fmt: skip
    assert excluded(nn.Sequential(Saying()), "no_weight_decay") == {"0.prompt"}
    assert set(WeightPenalty(Block(), l1=1.0).excluded) == excluded(
        Block(), *fusereg.penalty.names.SPARED
    )
    assert WeightPenalty(Block(), l1=1.0, rules={"pos_embed": None}).excluded  # no mistake


def test_a_linear_model_that_is_a_vector_is_penalized() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.ones(4))
    assert WeightPenalty(model, l1=1.0).penalty() == 4.0


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "convnext_atto", "beit_base_patch16_224", "levit_128s", "resnet10t",
     "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"],
)  # fmt: skip
def test_param_groups_are_those_of_timm(name: str) -> None:
    pytest.importorskip("other_libraries")
    timm = pytest.importorskip("timm")
    theirs_of = pytest.importorskip("timm.optim").param_groups_weight_decay
    with torch.device("meta"):
        model = timm.create_model(name)
    model.get_parameter(next(iter(dict(model.named_parameters())))).requires_grad_(False)
    said = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = theirs_of(model, 0.1, no_weight_decay_list=said)
    ours = {g["weight_decay"]: g["params"] for g in optim.param_groups_weight_decay(model, 0.1)}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in theirs:
        own = {names[id(p)] for p in ours.get(group["weight_decay"], [])}
        assert own == {names[id(p)] for p in group["params"]}


# --- quantized, frozen ----------------------------------------------------------------------------


class Wrapped(nn.Parameter):
    """A tensor whose values its memory does not hold, as those of quantization libraries."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[no-any-return, unused-ignore]
            cls, data.shape, dtype=torch.float32, requires_grad=False
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(func)


@pytest.mark.parametrize(
    "frozen",
    [
        nn.Parameter(torch.ones(3, 2, dtype=torch.int8), requires_grad=False),
        nn.Parameter(torch.ones(3, 2, dtype=torch.uint8), requires_grad=False),
        nn.Parameter(torch.ones(3, 2).to(torch.float8_e4m3fn), requires_grad=False),
        nn.Parameter(torch.ones(3, 2, dtype=torch.complex64), requires_grad=False),
        Wrapped(torch.ones(3, 2)),
    ],
    ids=["int8", "uint8", "float8", "complex", "wrapper"],
)
def test_frozen_parameters_that_no_kernel_reads_are_skipped_by_name(
    frozen: nn.Parameter, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.ModuleDict({"base": nn.Module(), "adapter": nn.Linear(2, 2)})
    model["base"]._parameters["weight"] = frozen
    with caplog.at_level(logging.INFO, logger="fusereg"):
        penalty = WeightPenalty(model, l1=1.0)
    assert "base.weight has no penalty: frozen" in caplog.text
    assert penalty.excluded == ["base.weight", "adapter.bias"]
    penalty.penalty().backward()
    penalty.add_grad_()
    groups = optim.param_groups_weight_decay(model, 0.1, l1=0.1)
    assert sum(len(g["params"]) for g in groups) == 2


# --- parametrizations -----------------------------------------------------------------------------


class Normalizing(nn.Module):
    """Somebody's own: w / |w|."""

    def forward(self, w: Tensor) -> Tensor:
        normalized: Tensor = w / w.norm()
        return normalized


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


def _own(module: nn.Module) -> Callable[[nn.Module], nn.Module]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", module, unsafe=True)


DIVIDING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "own": _own(Normalizing()),
    "own after another": lambda layer: _own(Normalizing())(_own(Symmetric())(layer)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_optimizers_see_by_names_what_weight_norm_divides(wrap: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), wrap(nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"must have no l1 and group: weight_norm divides"):
        optim.SGD(model.named_parameters(), lr=0.1, l1=1.0)
    with pytest.raises(ValueError, match=r"param_groups_weight_decay"):
        optim.AdamW([{"params": list(model.named_parameters()), "group": 1.0}], lr=0.1)
    optim.AdamW(model.named_parameters(), l2=0.1)
    optimizer = optim.SGD(optim.param_groups_weight_decay(model, 0.0, l1=100.0), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert bool((model[0].weight == 0).all())
    assert bool(torch.isfinite(model(torch.ones(2, 3))).all())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", DIVIDING)
@pytest.mark.parametrize("strength", ["l1", "group"])
def test_parametrized_weights_never_become_nan(how: str, strength: str) -> None:
    torch.manual_seed(0)
    first, second = DIVIDING[how](nn.Linear(4, 4)), nn.Linear(4, 2)
    model = nn.Sequential(first, second)
    strengths: dict[str, Any] = {strength: 1e3}
    x = torch.randn(5, 4)
    groups = optim.param_groups_weight_decay(model, 0.0, **strengths)
    optimizer = optim.SGD(groups, lr=0.1)
    penalty = WeightPenalty(model, **strengths)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x).square().mean() + penalty.penalty()).backward()
        optimizer.step()
        fusereg.prox.l1_(model, 1e3)
        assert torch.isfinite(model(x)).all()
        assert isinstance(first.weight, Tensor)
        assert torch.isfinite(first.weight).all()
    assert torch.equal(second.weight, torch.zeros(2, 4))


def test_a_harmless_parametrization_is_penalized_under_both_names() -> None:
    model = nn.Sequential(_own(Symmetric())(nn.Linear(3, 3)))
    name = "0.parametrizations.weight.original"
    for pattern in (name, "0.weight", nn.Linear):
        penalty = WeightPenalty(model, l1=1.0, rules={pattern: {"l1": 2.0}})
        assert strengths(penalty) == {name: (2.0, 0.0, 0.0)}
    bias = parametrize.register_parametrization(nn.Linear(3, 3), "bias", nn.Tanh(), unsafe=True)
    assert excluded(bias, "bias") == {"parametrizations.bias.original"}
    norm = parametrize.register_parametrization(nn.LayerNorm(3), "weight", nn.Tanh(), unsafe=True)
    assert excluded(norm, "norm") == {"parametrizations.weight.original", "bias"}


# --- strengths ------------------------------------------------------------------------------------


def test_a_penalty_without_any_strength_is_an_error() -> None:
    cases: list[dict[str, Any]] = [{}, {"rules": {"head.*": None}}, {"exclude": ()}]
    for arguments in cases:
        with pytest.raises(ValueError, match="no strength is given; pass l1, l2 or group"):
            WeightPenalty(Net(), **arguments)
    WeightPenalty(Net(), l1=0.0)
    WeightPenalty(Net(), rules={"head.*": {"l1": 1.0}})


STEPS: dict[str, Any] = {
    "l1_": lambda params: fusereg.prox.l1_(params, 1e3),
    "elastic_net_": lambda params: fusereg.prox.elastic_net_(params, 1e3, 1.0),
    "group_lasso_": lambda params: fusereg.prox.group_lasso_(params, 1e3),
    "max_norm_": lambda params: fusereg.prox.max_norm_(params, 0.0),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_proximal_step_of_a_module_leaves_frozen_parameters_and_changes_the_rest(
    name: str,
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    STEPS[name](model)
    for key, p in model.named_parameters():
        stays = key.startswith("0.") or (name == "max_norm_" and p.dim() == 1)
        assert p.unique().tolist() == [float(stays)], key
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=f"prox.{name}: params must have a parameter that is not"):
        STEPS[name](model)
    STEPS[name]([p for p in model.parameters() if p.dim() > 1])  # as listed, frozen ones too
    assert not bool(model[0].weight.any())
    STEPS[name](nn.Sequential())  # nothing to do
