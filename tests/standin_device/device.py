"""torch's CUDA operators, computed by the CPU in the stand-in device's memory: the host's.

``install()`` overrides the CUDA kernel of every aten operator that has one: each runs, as soon as
it is called, as the CPU's operator on the same memory, or goes into the graph that is captured on
the current stream. What launches nothing (views, empty(), set_()) stays torch's own. To be imported
before the package under test.
"""

from __future__ import annotations

import contextlib
import ctypes
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Operators that launch nothing, or that are made of those that do.
OWN = {
    f"aten::{name}"
    for name in [
        "empty.memory_format",
        "empty_strided",
        "as_strided",
        "view",
        "_reshape_alias",
        "set_.source_Storage",
        "set_.source_Storage_storage_offset",
        "set_.source_Tensor",
        "set_",
        "resize_",
        "record_stream",
        "_efficientzerotensor",
        "_local_scalar_dense",
        "unfold",
        "view_as_real",
        "view_as_complex",
        "_pin_memory",
        "is_pinned",
        "_copy_from",
        "_copy_from_and_resize",
        "is_set_to",
        "view.dtype",
        "_has_compatible_shallow_copy_type",
        "_fused_sdp_choice",
    ]
}

#: Operators whose result has a shape that only the device knows, so that the host waits for it.
WAITS = {
    *("nonzero", "masked_select", "equal", "bincount", "unique_dim", "unique_consecutive"),
    *("_unique", "_unique2", "unique_dim_consecutive", "repeat_interleave", "histc"),
}
#: Those that wait if an index is a mask.
WAITS_FOR_MASKS = {"index", "index_put_", "_index_put_impl_"}

runtime = ctypes.CDLL("libcudart.so.13")
_WORK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_DROP = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_ON_WAIT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_RUN_NOW, _RECORDED = 0, -1
_LAUNCH_FAILURE = 719
for _name, _arguments in {
    "standin_enqueue": (ctypes.c_void_p, _WORK, _DROP, ctypes.c_void_p),
    "standin_wait": (ctypes.c_void_p, ctypes.c_char_p),
    "standin_is_memory": (ctypes.c_void_p,),
    "standin_access": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    "standin_check_order": (ctypes.c_int,),
    "standin_advance": (ctypes.c_void_p,),
    "standin_explain": (ctypes.c_char_p,),
    "standin_on_wait": (_ON_WAIT,),
    "cudaGetErrorString": (ctypes.c_int,),
}.items():
    getattr(runtime, _name).argtypes = _arguments
runtime.cudaGetErrorString.restype = ctypes.c_char_p
_captures = ctypes.c_int.in_dll(runtime, "standin_captures")
_raw_stream = torch._C._cuda_getCurrentRawStream


class Memory(NamedTuple):
    """Where a tensor lies. Keeps nothing alive, as the nodes of a graph do not."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> Memory:
        return cls(t.data_ptr(), tuple(t.shape), tuple(t.stride()), t.dtype)

    def bytes(self) -> int:
        """Return how many bytes lie between its first and its last."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def tensor(self) -> Tensor:
        """Return a tensor of the CPU over it."""
        size = self.bytes()
        if size == 0:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        memory = (ctypes.c_char * size).from_address(self.address)
        whole = torch.frombuffer(memory, dtype=torch.uint8).view(self.dtype)
        return whole.as_strided(self.shape, self.stride)

    def zeros(self) -> Tensor:
        """Return a tensor of zeros like it."""
        size = self.bytes() // self.dtype.itemsize
        return torch.zeros(size, dtype=self.dtype).as_strided(self.shape, self.stride)


def alias(t: Tensor) -> Tensor:
    """Return a tensor of the CPU over the memory of one of the device."""
    if t._is_zerotensor():
        return torch._efficientzerotensor(t.shape, dtype=t.dtype)
    return Memory.of(t).tensor()


class _Node:
    """Work in a graph."""

    alive: dict[int, _Node] = {}  # noqa: RUF012
    error: BaseException | None = None

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work
        self.alive[id(self)] = self

    @staticmethod
    @_WORK
    def run(address: int) -> int:
        node = _Node.alive[address]
        try:
            node.work()
        except BaseException as error:
            _Node.error = error
            runtime.standin_explain(f"{type(error).__name__}: {error}".encode())
            return _LAUNCH_FAILURE
        return 0

    @staticmethod
    @_DROP
    def drop(address: int) -> None:
        _Node.alive.pop(address, None)


def _record(stream: int, work: Callable[[], object]) -> None:
    node = _Node(work)
    done = runtime.standin_enqueue(stream, _Node.run, _Node.drop, id(node))
    assert done == _RECORDED, done


def _capturing(stream: int) -> bool:
    return _captures.value > 0 and bool(runtime.standin_is_capturing(ctypes.c_void_p(stream)))


def _wait(stream: int, what: str) -> None:
    if error := runtime.standin_wait(stream, what.encode()):
        raise RuntimeError(f"CUDA error: {runtime.cudaGetErrorString(error).decode()}")


class OrderError(RuntimeError):
    """Work on one stream that should have waited for another's."""


_order = False


def _access(stream: int, memory: Memory, writes: bool, what: str) -> None:
    other = runtime.standin_access(stream, memory.address, memory.bytes(), int(writes))
    if other:
        raise OrderError(
            f"{what} {'writes' if writes else 'reads'} memory of shape {memory.shape} that stream "
            f"number {other - 1000} may still be working on: no event orders the two"
        )


@contextlib.contextmanager
def order_checked() -> Iterator[None]:
    """Raise OrderError where an operator touches what another stream may still be working on."""
    global _order
    runtime.standin_check_order(1)
    _order = True
    try:
        yield
    finally:
        _order = False
        runtime.standin_check_order(0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_cuda and value.numel():
            yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)


@contextlib.contextmanager
def kernels_noted(module: Any, kept: Callable[[], Any]) -> Iterator[None]:
    """Have the functions of a compiled module tell order_checked() of the tensors they are given.

    Those whose bytes change are written, and so are those of ``kept()``: memory for kernels, which
    may leave it as it was.
    """

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            own = list(_tensors([*args, *kwargs.values()]))
            memory = [Memory.of(t) for t in own]
            before = [ctypes.string_at(m.address, m.bytes()) for m in memory]
            result = function(*args, **kwargs)
            scratch = {t.data_ptr() for t in _tensors(kept())}
            for stream in {_raw_stream(t.device.index) for t in own}:
                runtime.standin_advance(stream)
            for t, m, bytes_ in zip(own, memory, before, strict=True):
                written = m.address in scratch or ctypes.string_at(m.address, m.bytes()) != bytes_
                _access(_raw_stream(t.device.index), m, written, function.__name__)
            return result

        return call

    functions = {
        k: v for k, v in vars(module).items() if type(v).__name__ == "builtin_function_or_method"
    }
    for name, function in functions.items():
        setattr(module, name, noted(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(module, name, function)


class Wait(NamedTuple):
    """A wait of the host: for what, and the lines of code that it comes from, the last first."""

    what: str
    where: tuple[str, ...]


@contextlib.contextmanager
def waits() -> Iterator[list[Wait]]:
    """Give a list of the waits of the host, which grows with each."""
    found: list[Wait] = []

    def note(what: bytes) -> None:
        stack = traceback.extract_stack()[:-1]
        lines = [f"{f.filename}:{f.lineno} {f.line}" for f in reversed(stack)]
        found.append(Wait(what.decode(), tuple(line for line in lines if __file__ not in line)))

    callback = _ON_WAIT(note)
    runtime.standin_on_wait(callback)
    try:
        yield found
    finally:
        runtime.standin_on_wait(_ON_WAIT())


def _number(value: complex, tensors: list[Tensor]) -> Tensor:
    """Return a tensor that stands for a Python number, and promotes as a number does."""
    if any(t.dim() for t in tensors):
        floating = any(t.is_floating_point() for t in tensors)
        dtype = torch.float64 if floating and isinstance(value, float) else None
        return torch.tensor(value, dtype=dtype)
    return torch.tensor(value, dtype=torch.result_type(tensors[0], value) if tensors else None)


def _drawn(generator: torch.Generator) -> torch.Generator:
    """Return a generator of the CPU for the next numbers of one of the device."""
    cpu = torch.Generator()
    cpu.manual_seed((generator.initial_seed() * 2654435761 + generator.get_offset()) % 2**63)
    generator.set_offset(generator.get_offset() + 4)
    return cpu


class _Operator:
    """The kernel of one operator."""

    def __init__(self, op: Any, name: str) -> None:
        self.op, self.name = op, name
        schema = op._schema.arguments
        self.takes_tensor = [str(a.type) in ("Tensor", "Optional[Tensor]") for a in schema]
        self.writes = [a.alias_info is not None and a.alias_info.is_write for a in schema]
        self.written = {a.name for a, w in zip(schema, self.writes, strict=True) if w}
        base = name.partition(".")[0]
        self.waits = base in WAITS
        self.waits_for_masks = base in WAITS_FOR_MASKS
        self.draws = torch.Tag.nondeterministic_seeded in op.tags
        self.generator = any(a.name == "generator" for a in schema)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given: list[Tensor] = []
        generators: list[torch.Generator] = []
        devices: list[torch.device] = []
        tensors = [a for a in args if isinstance(a, Tensor)]
        args = tuple(
            _number(a, tensors) if wants and isinstance(a, (bool, int, float, complex)) else a
            for a, wants in zip(args, self.takes_tensor, strict=False)
        )
        args = tuple(_down(a, given, generators, devices) for a in args)
        kwargs = {k: _down(a, given, generators, devices) for k, a in kwargs.items()}
        devices = [t.device for t in given] + devices
        where = torch.cuda.current_device()
        if devices and devices[0].index is not None:
            where = devices[0].index
        if self.draws and not generators:
            generators.append(torch.cuda.default_generators[where])
            if self.generator:
                kwargs["generator"] = _Place(-1)
        stream = _raw_stream(where)
        if self.waits or (self.waits_for_masks and _has_mask(args[1], given)):
            _wait(stream, self.name)
        if _order:
            self._note_accesses(stream, args, kwargs, given)
        if _capturing(stream):
            return self._record(stream, args, kwargs, given, generators, where)
        own = [alias(t) for t in given]
        result = self._run(args, kwargs, own, [_drawn(g) for g in generators])
        return _up(result, given, own, where)

    def _run(
        self, args: Any, kwargs: Any, own: list[Tensor], generators: list[torch.Generator]
    ) -> Any:
        """Run the CPU's operator on these tensors and generators in their places."""
        values = [_filled(a, own, generators) for a in args]
        named = {k: _filled(a, own, generators) for k, a in kwargs.items()}
        if self.draws and not self.generator:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.set_state(generators[0].get_state())
                return self.op(*values, **named)
        return self.op(*values, **named)

    def _record(
        self,
        stream: int,
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        generators: list[torch.Generator],
        where: int,
    ) -> Any:
        # Run on zeros for the shapes of the results; the work itself is for the replay. (Zeros are
        # indices too, which what lies in the memory by now may not be.)
        memory = [Memory.of(t) for t in given]
        args, kwargs = _frozen(args), {k: _frozen(a) for k, a in kwargs.items()}
        copies = [m.zeros() for m in memory]
        result = self._run(args, kwargs, copies, [torch.Generator() for _ in generators])
        result = _up(result, given, copies, where, recording=True)
        targets = [None if any(t is g for g in given) else Memory.of(t) for t in _flat(result)]

        def replay() -> None:
            own = [m.tensor() for m in _all_there(memory, self.name)]
            made = self._run(args, kwargs, own, [_drawn(g) for g in generators])
            for target, t in zip(targets, _flat(made), strict=True):
                if target is not None:
                    _all_there([target], self.name)[0].tensor().copy_(t)

        _record(stream, replay)
        return result

    def _note_accesses(self, stream: int, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        runtime.standin_advance(stream)
        written: set[int] = set()
        for a, writes in zip(args, self.writes, strict=False):
            if writes:
                written.update(_places(a))
        for name, a in kwargs.items():
            if name in self.written:
                written.update(_places(a))
        for i, t in enumerate(given):
            _access(stream, Memory.of(t), i in written, self.name)


class _Place(int):
    """The place of a tensor among those given; from -1 down, that of a generator."""


def _down(
    a: Any,
    given: list[Tensor],
    generators: list[torch.Generator],
    devices: list[torch.device],
) -> Any:
    """Return an argument with places for the device's tensors and generators, which are listed."""
    if isinstance(a, Tensor):
        if not a.is_cuda:
            return a
        for i, t in enumerate(given):
            if t is a:
                return _Place(i)
        given.append(a)
        return _Place(len(given) - 1)
    if isinstance(a, (list, tuple)):
        return [_down(b, given, generators, devices) for b in a]
    if isinstance(a, torch.device) and a.type == "cuda":
        devices.append(a)
        return torch.device("cpu")
    if isinstance(a, torch.Generator) and a.device.type == "cuda":
        generators.append(a)
        return _Place(-len(generators))
    return a


def _filled(a: Any, own: list[Tensor], generators: list[torch.Generator]) -> Any:
    """Return an argument with these tensors and generators in their places."""
    if isinstance(a, _Place):
        return own[a] if a >= 0 else generators[-a - 1]
    return [_filled(b, own, generators) for b in a] if isinstance(a, list) else a


def _places(a: Any) -> list[int]:
    if isinstance(a, list):
        return [place for b in a for place in _places(b)]
    return [a] if isinstance(a, _Place) else []


def _has_mask(indices: Any, given: list[Tensor]) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(given[i].dtype in masks for i in _places(indices) if i >= 0)


def _frozen(a: Any) -> Any:
    """Return it with copies of the CPU's tensors: a kernel has their values from its launch on."""
    if isinstance(a, list):
        return [_frozen(b) for b in a]
    return a.clone() if isinstance(a, Tensor) else a


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, (list, tuple)):
        return [t for r in result for t in _flat(r)]
    return [result] if isinstance(result, Tensor) else []


def _all_there(memory: list[Memory], what: str) -> list[Memory]:
    for m in memory:
        if m.bytes() and not runtime.standin_is_memory(m.address):
            raise RuntimeError(f"{what} in a graph uses memory that has been freed")
    return memory


def _up(
    result: Any, given: list[Tensor], own: list[Tensor], device: int, recording: bool = False
) -> Any:
    """Return the result on the device: tensors that were given, or new ones."""
    if isinstance(result, (list, tuple)):
        return type(result)(_up(r, given, own, device, recording) for r in result)
    if not isinstance(result, Tensor):
        return result
    for t, cpu in zip(given, own, strict=True):
        if result is cpu:
            if t.shape != cpu.shape or t.stride() != cpu.stride():  # out=
                t.resize_(cpu.shape)
                if not recording:
                    alias(t).copy_(cpu)
            return t
    if result.layout is torch.sparse_coo:
        parts = (
            _up(t, given, own, device, recording) for t in (result._indices(), result._values())
        )
        return torch.sparse_coo_tensor(*parts, result.shape, is_coalesced=result.is_coalesced())
    if result.layout is torch.sparse_csr:
        held = result.crow_indices(), result.col_indices(), result.values()
        parts = (_up(t, given, own, device, recording) for t in held)
        return torch.sparse_csr_tensor(*parts, result.shape, check_invariants=False)
    made = torch.empty_strided(
        result.shape, result.stride(), dtype=result.dtype, device=torch.device("cuda", device)
    )
    if not recording and result.numel():
        alias(made).copy_(result)
        if _order:
            _access(_raw_stream(device), Memory.of(made), True, "a result")
    return made


def _read(values: Tensor, conjugated: bool, negated: bool) -> Tensor:
    values = torch.conj_physical(values) if conjugated else values
    return -values if negated else values


def _copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy to, from or on the device."""
    if self.numel() == 0:
        return self
    on_device = [t for t in (source, self) if t.is_cuda]
    on_host = [t for t in (source, self) if not t.is_cuda]
    stream = _raw_stream(on_device[0].device.index)
    pinned = all(runtime.standin_is_memory(t.data_ptr()) for t in on_host)
    if on_host and not (non_blocking and pinned):
        _wait(stream, "a copy between host and device" + ("" if pinned else ", of pageable memory"))
    memory = [Memory.of(self), Memory.of(source)]
    bits = source.is_conj() != self.is_conj(), source.is_neg() != self.is_neg()
    if _order:
        runtime.standin_advance(stream)
        for t in on_device:
            _access(stream, Memory.of(t), t is self, "a copy")
    if source._is_zerotensor():
        self.zero_()
    elif _capturing(stream):

        def replay() -> None:
            to, of = (m.tensor() for m in _all_there(memory, "a copy"))
            to.copy_(_read(of, *bits))

        _record(stream, replay)
    else:
        memory[0].tensor().copy_(_read(memory[1].tensor(), *bits))
    return self


_library: torch.library.Library | None = None


def install() -> int:
    """Override the operators; return how many they are."""
    global _library
    torch.cuda.init()
    torch.backends.cudnn.enabled = False
    for attention in ("flash", "mem_efficient", "cudnn"):  # of which the CPU has none
        getattr(torch.backends.cuda, f"enable_{attention}_sdp")(False)
    _library, count = torch.library.Library("aten", "IMPL"), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for full_name in torch._C._dispatch_get_all_op_names():
            name = full_name.removeprefix("aten::")
            if name == full_name or full_name in OWN or name == "copy_":
                continue
            if not torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CUDA"):
                continue
            base, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
            if op is None:
                continue
            _library.impl(name, _Operator(op, name), "CUDA", allow_override=True)
            count += 1
        _library.impl("copy_", _copy_, "CUDA", allow_override=True)
    return count + 1
