"""Attention heads and the widths that RMSNorms read: what goes whole, and what goes exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusereg
import other_libraries  # noqa: F401  # repairs torchvision
from test_compact import double as double  # in float64 from one seed
from test_compact import kill, off, train

pytest.importorskip("torch_pruning")

WIDTH, HEADS = 24, 3


class Attention(nn.Module):
    """Self-attention by three layers, or by one; with fewer keys and values than queries."""

    def __init__(self, fused: str = "", kv_heads: int = HEADS, width: bool = False) -> None:
        super().__init__()
        self.n_heads, each = HEADS, WIDTH // HEADS
        self.fused, self.attn_dim = fused, WIDTH if width else 0
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.head_dim = each
            self.q = nn.Linear(WIDTH, WIDTH)
            self.k = nn.Linear(WIDTH, kv_heads * each, bias=False)
            self.v = nn.Linear(WIDTH, kv_heads * each)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        if self.fused == "outer":  # all queries, all keys, all values
            q, k, v = self.qkv(x).reshape(n, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        elif self.fused == "inner":  # head by head
            q, k, v = self.qkv(x).reshape(n, length, self.n_heads, 3, -1).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = (
                layer(x).view(n, length, -1, self.head_dim).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o(y.reshape(n, length, self.attn_dim or q.shape[1] * q.shape[3]))


class Layer(nn.Module):
    """A layer of a transformer between an embedding and a head."""

    def __init__(self, attention: nn.Module, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.norm, self.attention = norm(WIDTH), attention
        self.head = nn.Sequential(norm(WIDTH), nn.Linear(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attention(self.norm(x)))  # type: ignore[no-any-return]


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "three layers": Attention,
    "one layer, queries first": lambda: Attention("outer"),
    "one layer, head by head": lambda: Attention("inner"),
    "a width beside": lambda: Attention("outer", width=True),
    "one head of keys for all": lambda: Attention(kv_heads=1),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_whole_heads_go_and_further_training_is_the_same(name: str) -> None:
    model, x = Layer(ATTENTIONS[name](), nn.LayerNorm), torch.randn(2, 6, 5)
    groups = {g.name: g for g in fusereg.groups_of(model, x, readers=True)}
    own = next((g for n, g in groups.items() if n.startswith("attention.")), None)
    if name == "one head of keys for all":  # which cannot be removed
        assert own is None
        return
    assert own is not None
    assert own.size == HEADS
    with torch.no_grad():
        for member in (*own.members, *own.readers):  # both, or a gradient would revive them
            member.parameter.index_fill_(member.dim, (member.channels == 1).nonzero().flatten(), 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = model(x)
    shorter = copy.deepcopy(optimizer.state_dict()["param_groups"])
    small = fusereg.compact(model, x)
    assert off(small(x), before) < 1e-12
    assert small.attention.o.in_features == WIDTH - WIDTH // HEADS
    assert model.attention.o.in_features == WIDTH  # is as it was
    after = torch.optim.SGD(small.parameters(), **{k: shorter[0][k] for k in ("lr", "momentum")})
    train(model, optimizer, x)
    train(small, after, x)
    assert off(small(x), model(x)) < 1e-9


def test_attentions_that_share_layers_keep_their_heads() -> None:
    model, x = Layer(nn.Sequential(Attention("outer"), Attention("outer")), nn.LayerNorm), None
    first, second = model.attention
    second.qkv, second.o = first.qkv, first.o
    x = torch.randn(2, 6, 5)
    groups = fusereg.groups_of(model, x)
    assert "attention.0.qkv" in groups.kept
    before = model(x)
    assert off(fusereg.compact(model, x)(x), before) < 1e-12


def test_heads_are_rounded_by_their_rows() -> None:
    model, x = Layer(Attention("outer"), nn.LayerNorm), torch.randn(2, 6, 5)
    for group in fusereg.groups_of(model, x):
        for member in group.members:
            with torch.no_grad():
                dead = (member.channels > 0).nonzero().flatten()
                member.parameter.index_fill_(member.dim, dead, 0)
    assert fusereg.compact(model, x).attention.o.in_features == 8
    assert fusereg.compact(model, x, round_to=8).attention.o.in_features == 8
    assert fusereg.compact(model, x, round_to=16).attention.o.in_features == 16


class Bias(Attention):
    """A bias for each head, which no layer writes."""

    def __init__(self) -> None:
        super().__init__("outer")
        self.scale = nn.Parameter(torch.rand(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, length, -1))


class Fixed(Attention):
    """Sizes that forward knows by itself."""

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o(y.reshape(n, length, WIDTH))


class Uneven(Attention):
    """A factor by the place of a head."""

    def __init__(self, training: bool = False) -> None:
        super().__init__("outer")
        self.in_training = training

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        if not self.in_training:
            y = y * (torch.arange(self.n_heads) % 2 + 1.0)[:, None, None]
        elif self.training:
            y = y * (self.n_heads / HEADS)
        return self.o(y.transpose(1, 2).reshape(n, length, -1))


@pytest.mark.parametrize(
    "attention", [Bias, lambda: Fixed("outer"), Uneven, lambda: Uneven(training=True)]
)
def test_heads_that_forward_counts_by_itself_stay(attention: Callable[[], nn.Module]) -> None:
    model, x = Layer(attention(), nn.LayerNorm), torch.randn(2, 6, 5)
    groups = fusereg.groups_of(model, x)
    assert "attention.qkv" in groups.kept
    assert not any(g.name.startswith("attention") for g in groups)


class Own(nn.Module):
    """A norm as transformers writes it."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.variance_epsilon, self.offset = 1e-2, offset

    def forward(self, x: Tensor) -> Tensor:
        size = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return (self.weight + self.offset) * x * torch.rsqrt(size + self.variance_epsilon)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "of torch, its own epsilon": nn.RMSNorm,
    "of torch": lambda width: nn.RMSNorm(width, eps=1e-2),
    "own": Own,
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_width_that_an_rms_norm_reads_goes(name: str, dtype: torch.dtype) -> None:
    model = Layer(Attention("outer"), NORMS[name]).to(dtype)
    with torch.no_grad():
        model.embed.weight.mul_(1e-3)  # so that epsilon is a part of the result
        model.embed.bias.mul_(1e-3)
        for norm in (model.norm, model.head[0]):
            norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(2, 6, 5, dtype=dtype)
    left = kill(model, x)
    assert "embed" in left
    optimizer = fusereg.optim.AdamW(model.parameters(), lr=1e-3, ema_decay=0.5)
    model(x).sum().backward()
    optimizer.step()
    kill(model, x, optimizer=optimizer)
    before = model(x)
    epsilon = model.norm.eps if isinstance(model.norm, nn.RMSNorm) else None
    average = {n: optimizer.state[p]["ema_param"].clone() for n, p in model.named_parameters()}
    small = fusereg.compact(model, x, optimizer=optimizer)
    assert small.embed.out_features == left["embed"] < WIDTH
    exact = dtype == torch.float64 and name != "own"  # which casts to float32
    assert off(small(x), before) < (1e-12 if exact else 2e-5)
    assert isinstance(small.norm, Own) or small.norm.normalized_shape == (left["embed"],)
    assert not isinstance(model.norm, nn.RMSNorm) or model.norm.eps == epsilon
    scale = (WIDTH / left["embed"]) ** 0.5
    carried = optimizer.state[small.norm.weight]["ema_param"]
    kept = [
        i
        for i in range(WIDTH)
        if bool((small.norm.weight / scale).isclose(model.norm.weight[i]).any())
    ]
    torch.testing.assert_close(carried, scale * average["norm.weight"][kept].to(carried))


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm,
        lambda width: nn.RMSNorm(width, elementwise_affine=False),
        lambda w: Own(w, 1.0),
    ],
    ids=["layer norm", "no weight", "weight + 1"],
)
def test_a_width_that_another_norm_reads_stays(norm: Callable[[int], nn.Module]) -> None:
    model, x = Layer(Attention("outer"), norm), torch.randn(2, 6, 5)
    groups = fusereg.groups_of(model, x)
    assert not any(g.name == "embed" for g in groups)
    assert "embed" in groups.kept


def test_an_rms_norm_that_reads_a_constant_keeps_it() -> None:
    """It is no zero of the mean, so the channel stays though nothing else reads it."""
    model, x = Layer(Attention("outer"), nn.RMSNorm), torch.randn(2, 6, 5)
    with torch.no_grad():
        for weight in (model.embed.weight, model.attention.o.weight):
            weight[:4] = 0
        model.attention.o.bias[:4] = 0
        model.embed.bias[:4] = torch.tensor([0.0, 0.0, 1.0, 2.0])
    small = fusereg.compact(model, x)
    assert small.embed.out_features == WIDTH - 2
    assert off(small(x), model(x)) < 1e-12


class Cross(nn.Module):
    """Queries of one sequence, keys and values of another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "other names":
            self.parts, self.each = 4, 6
        else:
            self.num_heads, self.head_dim = 4, 6
        self.q = nn.Linear(24, 24)
        if kind == "keys and values of one layer":
            self.kv = nn.Linear(24, 48)
        else:
            self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 24)
        self.o = nn.Linear(24, 24)
        if kind == "a factor of each head":
            self.register_buffer("factor", torch.rand(4, 1, 1))

    def cut(self, x: Tensor) -> Tensor:
        heads, each = (self.parts, self.each) if hasattr(self, "parts") else (
            self.num_heads, self.head_dim
        )  # fmt: skip
        return x.unflatten(-1, (heads, each)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        both = self.kv(memory).chunk(2, -1) if hasattr(self, "kv") else None
        k, v = both or (self.k(memory), self.v(memory))
        scores = self.cut(self.q(x)) @ self.cut(k).mT
        scores = scores * getattr(self, "factor", 1.0)
        return self.o((scores.softmax(-1) @ self.cut(v)).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cross, self.out = Cross(kind), nn.Linear(24, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.out(x + self.cross(x, memory))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("plain", None),
        ("other names", 'in cross as an integer with "head" in its name'),
        ("keys and values of one layer", "a layer each, and not kv for both"),
        ("a factor of each head", "factor of cross has an element for each head"),
    ],
)
def test_cross_attention_goes_or_says_what_to_change(kind: str, said: str | None) -> None:
    model = Decoder(kind).double()
    inputs = (torch.randn(2, 5, 24).double(), torch.randn(2, 7, 24).double())
    groups = fusereg.groups_of(model, inputs)
    if said is None:
        assert [(g.name, g.size) for g in groups] == [("cross.q", 4)]
        assert "cross.q" not in groups.kept
    else:
        assert said in groups.kept["cross.q"], groups.kept


def test_torchs_attention_says_how_heads_could_go() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    kept = fusereg.groups_of(layer, (torch.randn(2, 5, 8), torch.randn(2, 7, 8))).kept
    for name in ("self_attn.out_proj", "multihead_attn.out_proj"):
        assert "written with linear layers of its own" in kept[name]


def of_transformers(name: str) -> tuple[nn.Module, Any]:
    import transformers as t

    ids = torch.arange(12).view(2, 6)
    size: dict[str, Any] = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 20,
        "intermediate_size": 32,
    }  # fmt: skip
    if name == "bert":
        model = t.BertModel(t.BertConfig(**size), add_pooling_layer=False)
        return model, {"input_ids": ids}
    model = t.LlamaForCausalLM(t.LlamaConfig(**size, num_key_value_heads=2, head_dim=8))
    return model, {"input_ids": ids, "use_cache": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_models_of_transformers_lose_heads(name: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = of_transformers(name)
    model.double().eval()
    left = kill(model, inputs)
    assert sum("query" in n or "q_proj" in n for n in left) == 2
    small = fusereg.compact(model, inputs)
    rounded = name == "llama"  # its norms cast to float32
    assert off(small(**inputs)[0], model(**inputs)[0]) < (1e-6 if rounded else 1e-12)
    if name == "llama":
        assert small.model.embed_tokens.embedding_dim == left["model.embed_tokens"] < 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_models_of_timm_lose_heads(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, img_size=28, patch_size=14, embed_dim=24, depth=2, num_heads=3)
    model.eval()
    x = torch.randn(2, 3, 28, 28)
    left = kill(model, x)
    assert sum("attn" in n for n in left) == 2, left
    small = fusereg.compact(model, x)
    assert off(small(x), model(x)) < 1e-12
