"""Policies, which draw the programs of images: color jitter, torchvision's and timm's.

Draws are made in the order of the library whose policy it is, each image's by its own id.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from .. import _C
from . import program as P
from .program import Numbers, Policy, Row

Size: TypeAlias = tuple[int, int]


def jitter(values: Mapping[int, Sequence[float] | None]) -> Policy:
    """Return color jitter: instructions with a number of (from, to), in an order that is drawn.

    Those that are not asked for are None.
    """
    ranges = tuple((code, float(v[0]), float(v[1])) for code, v in values.items() if v is not None)
    codes = frozenset(code for code, *_ in ranges)
    return Policy(partial(_jitter, ranges), codes, 2 * len(ranges))


def _jitter(
    ranges: tuple[tuple[int, float, float], ...], numbers: Numbers, size: Size
) -> list[Row]:
    places = [numbers.uniform() for _ in ranges]
    made = [(float(code), numbers.between(low, high)) for code, low, high in ranges]
    return [made[i] for i in sorted(range(len(made)), key=places.__getitem__)]


def always(code: int, *arguments: tuple[float, float], last_alike: bool = False) -> Policy:
    """Return one instruction, whose arguments are drawn from intervals.

    ``last_alike``: the last two arguments are the same number.
    """
    rows = partial(_always, code, arguments, last_alike)
    return Policy(rows, frozenset({code}), len(arguments), first=code == P.GRAY and bool(arguments))


def _always(
    code: int,
    arguments: tuple[tuple[float, float], ...],
    last_alike: bool,
    numbers: Numbers,
    size: Size,
) -> list[Row]:
    values = [numbers.between(low, high) for low, high in arguments]
    if last_alike:
        values[-1] = values[-2]
    return [(float(code), *values)]


def maybe(p: float, *policies: Policy) -> Policy:
    """Return other policies, with a probability."""
    return Policy(
        partial(_maybe, p, policies),
        frozenset(code for policy in policies for code in policy.codes if p > 0),
        1 + sum(policy.uniforms for policy in policies),
        sum(policy.normals for policy in policies),
    )


def _maybe(p: float, policies: tuple[Policy, ...], numbers: Numbers, size: Size) -> list[Row]:
    if numbers.uniform() >= p:
        return []
    return [row for policy in policies for row in policy.rows(numbers, size)]


# --- operations by the names that the policies have for them ---


def _rotate(v: float, size: Size, how: float) -> Row:
    sine, cosine = _C.augment_elementary(v)[:2]
    y, x = (size[0] - 1) / 2, (size[1] - 1) / 2
    return (
        *(P.WARP, cosine, -sine, x - (cosine * x - sine * y)),
        *(sine, cosine, y - (sine * x + cosine * y), how),
    )


_GEOMETRY: dict[str, Callable[[float, Size, float], Row]] = {
    "ShearX": lambda v, size, how: (P.WARP, 1.0, v, v / 2, 0.0, 1.0, 0.0, how),
    "ShearY": lambda v, size, how: (P.WARP, 1.0, 0.0, 0.0, v, 1.0, v / 2, how),
    "TranslateX": lambda v, size, how: (P.WARP, 1.0, 0.0, -v, 0.0, 1.0, 0.0, how),
    "TranslateY": lambda v, size, how: (P.WARP, 1.0, 0.0, 0.0, 0.0, 1.0, -v, how),
    "Rotate": _rotate,
}
_VALUES = {
    "Identity": P.IDENTITY,
    "Brightness": P.BRIGHTNESS,
    "Color": P.SATURATION,
    "Contrast": P.CONTRAST,
    "Sharpness": P.SHARPNESS,
    "Posterize": P.POSTERIZE,
    "Solarize": P.SOLARIZE,
    "AutoContrast": P.AUTOCONTRAST,
    "Equalize": P.EQUALIZE,
    "Invert": P.INVERT,
    "SolarizeAdd": P.SOLARIZE_ADD,
}


def _codes(names: Iterable[str]) -> frozenset[int]:
    """Return the instructions of operations."""
    return frozenset(P.WARP if name in _GEOMETRY else _VALUES[name] for name in names)


_FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")

# --- torchvision's: magnitudes in bins ---

#: The last magnitude of each operation; the first is 0. Translations are shares of the side.
_AUTO = {
    **dict.fromkeys(("ShearX", "ShearY"), 0.3),
    **dict.fromkeys(("TranslateX", "TranslateY"), 150.0 / 331.0),
    "Rotate": 30.0,
    **dict.fromkeys(_FACTORS, 0.9),
    "Posterize": 4.0,
}
#: Translations are pixels.
_WIDE = {
    **dict.fromkeys(("ShearX", "ShearY"), 0.99),
    **dict.fromkeys(("TranslateX", "TranslateY"), 32.0),
    "Rotate": 135.0,
    **dict.fromkeys(_FACTORS, 0.99),
    "Posterize": 6.0,
}
#: AugMix's, whose translations are shares of the side.
_MIXED = {**_AUTO, **dict.fromkeys(("TranslateX", "TranslateY"), 1.0 / 3.0)}
_TABLE_OF = {"auto": _AUTO, "wide": _WIDE, "mixed": _MIXED}
_SIGNED = (*_GEOMETRY, *_FACTORS)
#: The operations of RandAugment and TrivialAugmentWide, in the order of torchvision's table.
_OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)


#: Whatever the defaults are.
_FLOAT32: Any = {"dtype": torch.float32, "device": "cpu"}


@functools.lru_cache(maxsize=1024)
def _magnitudes(name: str, table: str, bins: int, size: Size) -> list[float]:
    """Return the magnitudes of an operation, in float32 as torchvision has them."""
    last = _TABLE_OF[table].get(name, 0.0)
    if name == "Posterize":
        step = torch.arange(bins, **_FLOAT32) / ((bins - 1) / last)
        return ((4 if table == "mixed" else 8) - step).round().tolist()
    if name == "Solarize":
        return torch.linspace(1.0, 0.0, bins, **_FLOAT32).tolist()
    if name in ("TranslateX", "TranslateY") and table != "wide":
        last = last * (size[1] if name == "TranslateX" else size[0])
    return torch.linspace(0.0, last, bins, **_FLOAT32).tolist()


def _operation(name: str, v: float, size: Size, how: float) -> Row:
    """Return torchvision's operation of this name and magnitude."""
    if name in _GEOMETRY:
        whole = float(int(v)) if name.startswith("Translate") else v
        return _GEOMETRY[name](whole, size, how)
    if name in _FACTORS:
        v = 1.0 + v
    elif name == "Solarize":
        v = 255.0 * v
    return (float(_VALUES[name]), v)


def bins(layers: int, magnitude: int | None, count: int, wide: bool, how: int) -> Policy:
    """Return RandAugment (Cubuk et al. 2020) or TrivialAugmentWide (Mueller, Hutter 2021).

    ``layers`` operations in turn, each of ``magnitude``, or one that is drawn where that is None.
    """
    rows = partial(_bins, layers, magnitude, count, wide, how)
    return Policy(rows, _codes(_OPERATIONS if layers else ()), 3 * layers)


def _bins(
    layers: int,
    magnitude: int | None,
    count: int,
    wide: bool,
    how: int,
    numbers: Numbers,
    size: Size,
) -> list[Row]:
    made = []
    for _ in range(layers):
        name = _OPERATIONS[numbers.below(len(_OPERATIONS))]
        v = 0.0
        if name not in ("Identity", "AutoContrast", "Equalize"):
            at = numbers.below(count) if magnitude is None else magnitude
            v = _magnitudes(name, "wide" if wide else "auto", count, size)[at]
            if name in _SIGNED:
                v *= numbers.sign()
        made.append(_operation(name, v, size, how))
    return made


#: Pairs of an AutoAugment policy, of (operation, probability, magnitude).
PairsOf: TypeAlias = "Sequence[Sequence[tuple[str, float, int | None]]]"


def auto_augment(pairs: PairsOf, how: int) -> Policy:
    """Return AutoAugment (Cubuk et al. 2019): one of several pairs of operations."""
    codes = _codes(name for pair in pairs for name, p, _ in pair if p > 0)
    return Policy(partial(_pairs, pairs, how), codes, 1 + 2 * max(len(pair) for pair in pairs))


def _pairs(pairs: PairsOf, how: int, numbers: Numbers, size: Size) -> list[Row]:
    made = []
    for name, p, at in pairs[numbers.below(len(pairs))]:
        if numbers.uniform() >= p:
            continue
        v = 0.0 if at is None else _magnitudes(name, "auto", 10, size)[at]
        if name in _SIGNED:
            v *= numbers.sign()
        made.append(_operation(name, v, size, how))
    return made


def aug_mix(severity: int, width: int, depth: int, all_ops: bool, how: int) -> Policy:
    """Return AugMix (Hendrycks et al. 2020) with alpha 1: the image and chains of it, mixed.

    Its first row has the shares of the image and of all chains, and of each chain in the latter; as
    many rows for each chain follow. ``depth``: operations of a chain; below 1: from 1 to 3.
    """
    kept = [name for name in _OPERATIONS[1:] if name not in _FACTORS]
    names = [*kept, *(_FACTORS if all_ops else ())]
    rows = partial(_aug_mix, severity, width, depth, names, how)
    deepest = depth if depth > 0 else _DEEPEST
    uniforms = 2 + width + width * (1 + 3 * deepest)
    return Policy(rows, _codes(names), uniforms, chains=width)


#: The most operations of AugMix's chains where their number is drawn.
_DEEPEST = 3


def _aug_mix(
    severity: int,
    width: int,
    depth: int,
    names: list[str],
    how: int,
    numbers: Numbers,
    size: Size,
) -> list[Row]:
    def shares(count: int) -> list[float]:
        waits = [-_C.augment_elementary(1.0 - numbers.uniform())[2] for _ in range(count)]
        return [w / max(sum(waits), 1e-300) for w in waits]

    made: list[Row] = [(*shares(2), *shares(width))]
    for _ in range(width):
        count = depth if depth > 0 else 1 + numbers.below(_DEEPEST)
        for _ in range(count):
            name, v = names[numbers.below(len(names))], 0.0
            if name not in ("AutoContrast", "Equalize"):
                v = _magnitudes(name, "mixed", 10, size)[numbers.below(severity)]
                if name in _SIGNED:
                    v *= numbers.sign()
            made.append(_operation(name, v, size, how))
        made += [(float(P.IDENTITY),)] * ((depth if depth > 0 else _DEEPEST) - count)
    return made


# --- timm's: levels from 0 to 10 ---

#: Of AutoAugment's "original", "originalr", "v0" and "v0r": operation, probability, level.
_ORIGINAL = (
    "Posterize .4 8 Rotate .6 9|Solarize .6 5 AutoContrast .6 5|Equalize .8 8 Equalize .6 3|"
    "Posterize .6 7 Posterize .6 6|Equalize .4 7 Solarize .2 4|Equalize .4 4 Rotate .8 8|"
    "Solarize .6 3 Equalize .6 7|Posterize .8 5 Equalize 1 2|Rotate .2 3 Solarize .6 8|"
    "Equalize .6 8 Posterize .4 6|Rotate .8 8 Color .4 0|Rotate .4 9 Equalize .6 2|"
    "Equalize 0 7 Equalize .8 8|Invert .6 4 Equalize 1 8|Color .6 4 Contrast 1 8|"
    "Rotate .8 8 Color 1 2|Color .8 8 Solarize .8 7|Sharpness .4 7 Invert .6 8|"
    "ShearX .6 5 Equalize 1 9|Color .4 0 Equalize .6 3|Equalize .4 7 Solarize .2 4|"
    "Solarize .6 5 AutoContrast .6 5|Invert .6 4 Equalize 1 8|Color .6 4 Contrast 1 8|"
    "Equalize .8 8 Equalize .6 3"
)
_V0 = (
    "Equalize .8 1 ShearY .8 4|Color .4 9 Equalize .6 3|Color .4 1 Rotate .6 8|"
    "Solarize .8 3 Equalize .4 7|Solarize .4 2 Solarize .6 2|Color .2 0 Equalize .8 8|"
    "Equalize .4 8 SolarizeAdd .8 3|ShearX .2 9 Rotate .6 8|Color .6 1 Equalize 1 2|"
    "Invert .4 9 Rotate .6 0|Equalize 1 9 ShearY .6 3|Color .4 7 Equalize .6 0|"
    "Posterize .4 6 AutoContrast .4 7|Solarize .6 8 Color .6 9|Solarize .2 4 Rotate .8 9|"
    "Rotate 1 7 TranslateYRel .8 9|ShearX 0 0 Solarize .8 4|ShearY .8 0 Color .6 4|"
    "Color 1 0 Rotate .6 2|Equalize .8 4 Equalize 0 8|Equalize 1 4 AutoContrast .6 2|"
    "ShearY .4 7 SolarizeAdd .6 7|Posterize .8 2 Solarize .6 10|Solarize .6 8 Equalize .6 1|"
    "Color .8 6 Rotate .4 5"
)
_RAND = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
_WITH_INCREASING = ("Posterize", "Solarize", *_FACTORS)


def _base_name(name: str) -> str:
    """Return the name of an operation without timm's endings."""
    return name.removesuffix("Increasing").removesuffix("Original").removesuffix("Rel")


def _level_row(name: str, level: float, numbers: Numbers, size: Size, how: float) -> Row:
    """Return timm's operation of this name and level."""
    base = _base_name(name)
    share = level / 10.0
    if base in _GEOMETRY:
        most = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3}.get(base, 0.45)
        v = share * most * numbers.sign()
        if base.startswith("Translate"):
            v *= -(size[1] if base == "TranslateX" else size[0])
        return _GEOMETRY[base](v, size, how)
    if base in _FACTORS:
        if name == base:
            return (float(_VALUES[base]), share * 1.8 + 0.1)
        return (float(_VALUES[base]), max(0.1, 1.0 + share * 0.9 * numbers.sign()))
    if base == "Posterize":
        bits = int(share * 4)
        bits = {"Posterize": bits, "PosterizeOriginal": bits + 4}.get(name, 4 - bits)
        return (P.POSTERIZE, float(min(max(bits, 1), 8)))
    if base == "Solarize":
        above = min(256, int(share * 256))
        return (P.SOLARIZE, float(above if name == base else 256 - above))
    if base == "SolarizeAdd":
        return (P.SOLARIZE_ADD, float(min(128, int(share * 110))), 128.0)
    return (float(_VALUES[base]),)


#: timm's sequences of (operation, probability, level).
Choices: TypeAlias = tuple[tuple[tuple[str, float, float], ...], ...]


def levels(
    choices: Choices,
    layers: int = 1,
    deviation: float = 0.0,
    highest: float = 10.0,
    hows: tuple[int, ...] = (1, P.PIL_BICUBIC),
) -> Policy:
    """Return a policy of timm.

    Args:
        choices: to draw from, ``layers`` times.
        layers: how often.
        deviation: of the level, which is normal; infinite: it is uniform from 0 to the level.
        highest: the levels end there.
        hows: interpolations, of which each operation draws one.
    """
    most = layers * max(len(parts) for parts in choices)
    names = (_base_name(n) for parts in choices for n, p, _ in parts if p > 0 and layers)
    return Policy(
        partial(_levels, choices, layers, deviation, highest, hows),
        _codes(names),
        layers + 4 * most,
        most if 0.0 < deviation < math.inf else 0,
    )


def _levels(
    choices: Choices,
    layers: int,
    deviation: float,
    highest: float,
    hows: tuple[int, ...],
    numbers: Numbers,
    size: Size,
) -> list[Row]:
    made = []
    for _ in range(layers):
        for name, p, level in choices[numbers.below(len(choices))]:
            if numbers.uniform() >= p:
                continue
            if deviation == math.inf:
                level = numbers.between(0.0, level)
            elif deviation > 0.0:
                level += deviation * numbers.normal()
            level = max(0.0, min(level, highest))
            how = hows[numbers.below(len(hows))]
            made.append(_level_row(name, level, numbers, size, how))
    return made


def _table(text: str, posterize: str) -> Choices:
    """Return the pairs of a policy's text, with the name of its operation of posterizing."""
    choices = []
    for pair in text.split("|"):
        words = pair.split()
        parts = zip(words[::3], words[1::3], words[2::3], strict=True)
        choices.append(
            tuple((posterize if n == "Posterize" else n, float(p), float(v)) for n, p, v in parts)
        )
    return tuple(choices)


_TABLES = {
    "original": (_ORIGINAL, "PosterizeOriginal"),
    "originalr": (_ORIGINAL, "PosterizeIncreasing"),
    "v0": (_V0, "Posterize"),
    "v0r": (_V0, "PosterizeIncreasing"),
}


def timm_policy(config: str, hows: tuple[int, ...], op: str) -> Policy:
    """Return the policy of one of timm's strings.

    Raises:
        ValueError: there is no such policy, or a section that is not understood.
    """
    name, *sections = config.split("-")
    values: dict[str, float] = {}
    keys = {"rand": ("m", "n", "p", "mstd", "mmax", "inc")}.get(name, ("mstd",))
    if name != "rand" and name not in _TABLES:
        known = ", ".join(repr(k) for k in ("rand", *_TABLES))
        raise ValueError(f"fusereg.{op}: config must begin with one of {known}, got {config!r}")
    for section in sections:
        found = re.fullmatch(r"([a-z]+)([0-9.]+|inf)", section)
        if found is None or found[1] not in keys:
            raise ValueError(
                f"fusereg.{op}: config has the section {section!r}; known are "
                f"{', '.join(keys)}, each followed by a number"
            )
        whole = found[1] in ("m", "n", "mmax", "inc")
        try:
            values[found[1]] = float(int(found[2]) if whole else found[2])
        except ValueError:
            wanted = "an integer" if whole else "a number"
            raise ValueError(
                f"fusereg.{op}: config must have {wanted} in the section {section!r}"
            ) from None
    deviation = values.get("mstd", 0.0)
    if name != "rand":
        return levels(_table(*_TABLES[name]), deviation=deviation, hows=hows)
    increasing = bool(values.get("inc"))
    names = [n + "Increasing" * (increasing and n in _WITH_INCREASING) for n in _RAND]
    part = values.get("p", 0.5), values.get("m", 10.0)
    return levels(
        tuple(((n, *part),) for n in names),
        layers=int(values.get("n", 2)),
        deviation=math.inf if deviation > 100 else deviation,
        highest=values.get("mmax") or 10.0,
        hows=hows,
    )


def of_timm(transform: Any) -> tuple[Policy, Any] | None:
    """Return the policy and fill of timm's RandAugment or AutoAugment, None of another one."""
    layers = getattr(transform, "num_layers", None)
    if layers is None:
        choices = list(transform.policy)
    elif transform.choice_weights is not None:
        return None
    else:
        choices = [[op] for op in transform.ops]
    parts = [op for choice in choices for op in choice]
    known = {*_RAND, *(n + "Increasing" for n in _WITH_INCREASING), "PosterizeOriginal"}
    shared = {
        (op.magnitude_std, op.magnitude_max, str(op.kwargs), op.hparams.get("translate_pct", 0.45))
        for op in parts
    }
    first = parts[0]
    if len(shared) != 1 or not {op.name for op in parts} <= known:
        return None
    if first.hparams.get("translate_pct", 0.45) != 0.45:
        return None
    how = first.kwargs["resample"]
    numbers = {0: 0, 2: 1, 3: P.PIL_BICUBIC}
    hows = [numbers.get(int(h)) for h in (how if isinstance(how, (list, tuple)) else [how])]
    if None in hows:
        return None
    policy = levels(
        tuple(tuple((op.name, float(op.prob), float(op.magnitude)) for op in c) for c in choices),
        layers=1 if layers is None else layers,
        deviation=float(first.magnitude_std),
        highest=float(first.magnitude_max or 10),
        hows=tuple(h for h in hows if h is not None),
    )
    return policy, first.kwargs["fillcolor"]
