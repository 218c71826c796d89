"""Early stopping: states encoded as JSON and tensors are decoded unchanged."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusereg.core.encoding import Encoder, decode

safetensors_torch = pytest.importorskip("safetensors.torch")


def round_trip(tree: Any, folder: Path) -> Any:
    encoder = Encoder()
    text = json.dumps(encoder.encode(tree, "x"), allow_nan=False)
    safetensors_torch.save_file(encoder.tensors, folder / "x.safetensors")
    return decode(json.loads(text), safetensors_torch.load_file(folder / "x.safetensors"))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.stride() == b.stride()
            and torch.equal(
                a.contiguous().reshape(-1).view(torch.uint8),
                b.contiguous().reshape(-1).view(torch.uint8),
            )
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.sampled_from(["$tensor", torch.float16, torch.device("cpu"), frozenset]).filter(
        lambda v: v is not frozenset
    ),
)
KEYS = st.one_of(
    st.text(max_size=4), st.sampled_from(["$tensor", "$dict"]), st.integers(), st.none()
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(TREES)
def test_plain_data_comes_back_as_it_was(tree: Any) -> None:
    encoder = Encoder()
    text = json.dumps(encoder.encode(tree, "x"), allow_nan=False)
    assert encoder.tensors == {}
    assert same(decode(json.loads(text), {}), tree)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 3).t(),
        torch.randn(5, dtype=torch.float64),
        torch.randn(5).to(torch.bfloat16),
        torch.randn(5).to(torch.float16),
        torch.randn(5).to(torch.float8_e4m3fn),
        torch.randn(3, 2, dtype=torch.complex128),
        torch.randn(3, 2, dtype=torch.complex64).t(),
        torch.tensor([True, False]),
        torch.tensor(7),
        torch.tensor(2.5, dtype=torch.complex128),
        torch.empty(0, 3),
        torch.arange(5, dtype=torch.uint8),
        torch.tensor([math.nan, math.inf, -0.0]),
    ],
    ids=lambda t: f"{t.dtype} {tuple(t.shape)}",
)
def test_tensors_come_back_bit_by_bit(tensor: torch.Tensor, tmp_path: Path) -> None:
    assert same(round_trip({"t": tensor}, tmp_path), {"t": tensor})


def test_shared_tensors_are_one_again_and_views_are_apart(tmp_path: Path) -> None:
    shared, base = torch.randn(3), torch.randn(6)
    tree = {"a": shared, 1: (shared, base), "views": [base[:3], base[3:], base[2:5]]}
    encoder = Encoder()
    encoder.encode(tree, "x")
    assert len(encoder.tensors) == 5
    found = round_trip(tree, tmp_path)
    assert same(found, tree)
    assert found["a"] is found[1][0]
    # Two paths that read alike have two keys.
    assert same(
        round_trip({"a": {"b": base}, "a.b": shared}, tmp_path), {"a": {"b": base}, "a.b": shared}
    )


def test_other_containers(tmp_path: Path) -> None:
    tree = {"c": Counter({3: 2}), "s": {1, 2}, "n": torch.tensor(1.5).numpy()[()]}
    found = round_trip(tree, tmp_path)
    assert found == tree
    assert type(found["c"]) is Counter
    assert list(found["c"].elements()) == [3, 3]


@pytest.mark.parametrize(
    "thing",
    [
        pytest.param({1, 2}, id="set"),
        pytest.param(frozenset({1, "a"}), id="frozenset"),
        torch.Size([2, 3]),
        (1, (2.5, None)),
        *(kind(2.5) for kind in (np.float16, np.float32, np.float64)),
        *(kind(2) for kind in (np.int8, np.int32, np.int64, np.uint8, np.uint64, np.bool_)),
        np.array(2.5, dtype=np.float32),
        np.arange(6).reshape(2, 3),
        np.float32(math.inf),
        np.uint64(2**64 - 1),
    ],
    ids=repr,
)
def test_what_comes_back_has_the_type_that_it_had(tmp_path: Path, thing: Any) -> None:
    """A float in place of a float32 makes later numbers wider, and a set has no hash."""
    found = round_trip([thing], tmp_path)[0]
    assert type(found) is type(thing)
    assert getattr(found, "dtype", None) == getattr(thing, "dtype", None)
    assert np.array_equal(found, thing) if isinstance(thing, np.ndarray) else found == thing


def test_a_number_of_no_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="'object' is no dtype of a number"):
        decode({"$number": ["object", 1]}, {})


@pytest.mark.parametrize(
    ("thing", "error", "text"),
    [
        (object(), TypeError, r"cannot write also.deep.0 .* object is neither a tensor nor plain"),
        (lambda: 0, TypeError, "function is neither a tensor nor plain data"),
        (torch.eye(2).to_sparse(), ValueError, "only dense tensors can be written, got layout"),
    ],
)
def test_what_has_no_place_in_a_file_is_refused(
    thing: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Encoder().encode({"deep": [thing]}, "also")


def test_a_tag_of_a_later_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds \$quaternion, which this version does not know"):
        decode({"$quaternion": 1}, {})
