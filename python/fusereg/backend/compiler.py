"""The backend: rewrites the graph that Dynamo captured, and runs it or hands it on."""

from __future__ import annotations

import copy
import hashlib
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend, register_backend
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch._guards import CompileContext
from torch._inductor import config as inductor_config
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import checkpoint

from ..core import failures, operator
from ..core.version import __version__
from .nodes import CONVOLUTIONS, LEAVES
from .rewrite import Report, fuse, value

_log = logging.getLogger("fusereg")

_CHECKPOINT: Any = torch.ops.higher_order.tag_activation_checkpoint
_WITH_BODIES = (_CHECKPOINT, torch.ops.higher_order.cond)
_THEN = ("eager", "aot_eager", "inductor")
#: After so many compilations of one function its recompilations are reported.
_MANY = 4

# Native and converted layers are one node each; AOTAutograd traces through them as before.
torch.compiler.allow_in_graph(list(LEAVES))


def _digest(folder: Path) -> str:
    """Return a digest of the code in a folder, which decides what its functions are traced to."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


#: Their graphs may be cached: only the arguments and this package's code decide what they do.
_CODE = f"{__version__} {_digest(Path(__file__).parents[1])}"
_CACHEABLE = {f"{leaf.__module__}.{leaf.__name__}": _CODE for leaf in LEAVES}
# Dynamo, which does that where it traces into them, does not trace into leaves.
operator.tell_inductor()


def fusereg_backend(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of torch functions: fuse what this package has kernels for.

    This is ``torch.compile(model, backend="fusereg")``. Dropout, batch norm with the activation,
    sum and dropout that follow it, and dropout with what is before and after it become calls of
    :mod:`fusereg.functional`; all else runs as the model has written it. What was fused, and what
    was left and why, is logged at level INFO by the logger ``fusereg``, a line for each graph, and
    counted in ``torch._dynamo.utils.counters["fusereg"]`` and ``["fusereg left"]``.

    Args:
        graph_module: the graph, with torch's functions; it is rewritten in place.
        example_inputs: its inputs.
        mode: of Inductor; to be given as an option, since torch.compile takes only one of the two.
        options: ``{"then": backend}`` hands the rewritten graph to ``"aot_eager"`` or
            ``"inductor"``. Default: ``"eager"``, the graph runs as it is. Inductor's options are
            ``"mode"``, such as ``"max-autotune"``, and ``"channels_last"``, the layout of 2-d
            convolutions on CPUs: True for channels_last in forward and backward, False for what
            Inductor does by itself. By default it is True with depthwise convolutions, and others
            keep the layout that they have in the model.

    Raises:
        ValueError: an option or its value is unknown, or one of Inductor's is given without it.

    Example:
        >>> model.compile(backend="fusereg")
        >>> model = torch.compile(model, backend="fusereg", options={"then": "inductor"})
    """
    then, patches = _options(mode, options or {})
    report = Report()
    for module in list(_bodies(graph_module)):
        _fuse(module, report, then == "eager")
        if then == "eager":
            _repair_checkpoints(module)
        module.recompile()
    _tell(report)
    if then == "eager":
        return graph_module.forward
    compiler: Any = lookup_backend(then)
    if then == "aot_eager":
        return compiler(graph_module, example_inputs)  # type: ignore[no-any-return]
    patches = {**_layout(graph_module, (options or {}).get("channels_last")), **patches}
    known = inductor_config.unsafe_marked_cacheable_functions
    with inductor_config.patch(unsafe_marked_cacheable_functions={**known, **_CACHEABLE}):
        return compiler(  # type: ignore[no-any-return]
            graph_module, example_inputs, config_patches=patches
        )


# An entry point names the backend where the package is installed; elsewhere importing this does.
if "fusereg" not in torch.compiler.list_backends():
    register_backend(fusereg_backend, name="fusereg")


def _options(mode: str | None, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the backend to hand on to, and Inductor's settings."""
    unknown = sorted(set(options) - {"then", "mode", "channels_last"})
    if unknown:
        raise ValueError(
            "fusereg.backend: options must be among 'then', 'mode', 'channels_last', got "
            f"{', '.join(unknown)}"
        )
    then = options.get("then", "eager")
    if then not in _THEN:
        raise ValueError(
            f"fusereg.backend: the option 'then' must be one of {', '.join(_THEN)}, got {then!r}"
        )
    channels_last = options.get("channels_last")
    if channels_last is not None and (type(channels_last) is not bool or then != "inductor"):
        raise ValueError(
            "fusereg.backend: the option 'channels_last' must be True or False, with "
            f'"then": "inductor", got {channels_last!r} with {then!r}'
        )
    mode = options.get("mode", mode)
    if mode is None:
        return then, {}
    if then != "inductor":
        raise ValueError(
            f"fusereg.backend: mode {mode!r} is Inductor's: give "
            f'options={{"then": "inductor", "mode": {mode!r}}}'
        )
    try:
        return then, torch._inductor.list_mode_options(mode)
    except RuntimeError as error:
        raise ValueError(f"fusereg.backend: {error}") from None


def _layout(module: GraphModule, channels_last: bool | None) -> dict[str, bool]:
    """Return Inductor's settings for the layout of convolutions on CPUs.

    Inductor gives them channels_last, as oneDNN does. In the backward graph it finds only their
    gradients, and asks each weight for a layout; that of a depthwise one, of one input channel, has
    strides that are any layout's, and three copies of activations follow. Others gain nothing by
    another layout than the model's: its own convolutions are as fast, and nothing is copied.
    """
    nodes = [node for node in module.graph.nodes if node.target in CONVOLUTIONS]
    tensors = [[value(n) for n in node.all_input_nodes[:2]] for node in nodes]
    known = all(len(ts) == 2 and all(map(_is_on_cpu, ts)) for ts in tensors)
    mkldnn = torch.backends.mkldnn
    if channels_last is False or not (nodes and known and mkldnn.enabled and mkldnn.is_available()):
        return {}
    if any(w.shape[1] == 1 and not statically_known_true(x.shape[1] == 1) for x, w in tensors):
        return {"force_layout_optimization": True}
    as_rows = all(
        node.target is torch.conv2d and all(t.is_contiguous() for t in ts)
        for node, ts in zip(nodes, tensors, strict=True)
    )
    return {"layout_optimization": False} if as_rows and channels_last is None else {}


def _is_on_cpu(t: object) -> bool:
    return isinstance(t, Tensor) and t.device.type == "cpu"


def _fuse(module: GraphModule, report: Report, eager: bool) -> None:
    """Fuse what a graph has; leave it as it was if an error is raised."""
    before, own = copy.deepcopy(module.graph), Report()
    try:
        fuse(module.graph, own, eager=eager)
    except Exception as error:
        module.graph = before
        own = Report(left=Counter({f"all: {failures.reason(error)}": 1}))
    report.fused.update(own.fused)
    report.left.update(own.left)


# --- graphs within the graph ----------------------------------------------------------------------


def _bodies(module: GraphModule) -> Iterator[GraphModule]:
    """Yield a graph, and those of the checkpoints and branches that it calls."""
    yield module
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _WITH_BODIES:
            for argument in node.args:
                if isinstance(argument, Node) and argument.op == "get_attr":
                    body = module.get_submodule(str(argument.target))
                    if isinstance(body, GraphModule):
                        yield from _bodies(body)


def _repair_checkpoints(module: GraphModule) -> None:
    """Let activation checkpoints of a graph that is run as it is draw the same numbers twice.

    torch's operator leaves the random state to AOTAutograd. Without that, backward would compute
    the gradient of another dropout mask.
    """
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is _CHECKPOINT:
            node.target = _checkpointed


def _checkpointed(body: GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Run the body of an activation checkpoint as torch does outside of compiled code."""
    kwargs, more = _CHECKPOINT.divide_kwargs(kwargs)
    kwargs.update(use_reentrant=False, preserve_rng_state=True)
    if "_checkpoint_context_fn" in body.meta:
        kwargs["context_fn"] = body.meta["_checkpoint_context_fn"]
    # Without the tensors themselves, which it would keep and find changed: buffers are written to.
    # It infers from its arguments which devices' random states are to be restored.
    devices = {t.device for t in args if isinstance(t, Tensor)}
    return checkpoint(
        lambda *_: body(*args, **more), *(torch.empty(0, device=d) for d in devices), **kwargs
    )


# --- what the user is told ------------------------------------------------------------------------

_reported: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _tell(report: Report) -> None:
    """Count and log what was done with a graph; warn of what is likely not to be wanted."""
    counters["fusereg"]["graphs"] += 1
    counters["fusereg"].update(report.fused)
    counters["fusereg left"].update(report.left)
    frame = InstructionTranslator.current_tx() if CompileContext.try_get() else None
    name = "a graph" if frame is None else f"a graph of {_name(frame.f_code)}"
    fused = ", ".join(f"{n} {what}" for what, n in sorted(report.fused.items())) or "nothing"
    left = "; ".join(f"{n} {what}" for what, n in sorted(report.left.items())) or "nothing"
    _log.info("fusereg.backend: %s: fused %s; left: %s", name, fused, left)
    if frame is None:
        return
    compiled: Any = CompileContext.current_compile_id()
    times = (compiled.frame_compile_id or 0) + 1
    warned = counters["fusereg warned"]  # DDP compiles one function in pieces
    if times == _MANY + 1 and not warned[str(compiled)]:
        warned[str(compiled)] += 1
        _log.warning(
            "fusereg.backend: %s is compiled for the %dth time, as when a number that it reads, "
            "such as a dropout's p, changes at every step. Change it once an epoch, or raise "
            "torch._dynamo.config.recompile_limit (%d): beyond it torch runs this code uncompiled",
            name,
            times,
            torch._dynamo.config.recompile_limit,
        )
    root = None
    caller = sys._getframe()
    while caller.f_back is not None:
        caller = caller.f_back
        found = caller.f_locals.get("self")
        root = found if isinstance(found, nn.Module) else root
    if root is not None:
        _notice_skipped(root)


def _name(code: Any) -> str:
    return str(getattr(code, "co_qualname", code.co_name))  # new in Python 3.11


def _notice_skipped(module: nn.Module) -> None:
    """Warn of torch.nn's containers under ``fully_shard``, which Dynamo does not compile.

    Their hooks end the graph before them, and Dynamo begins none in torch.nn's own code.
    """
    for path, part in module.named_modules():
        sharded = type(part).__name__.startswith("FSDP") and hasattr(part, "unshard")
        forward = getattr(type(part).forward, "__module__", "")
        if sharded and forward.startswith("torch.nn.") and part not in _reported:
            _reported.add(part)
            _log.warning(
                "fusereg.backend: %s, a %s under fully_shard, is not compiled: torch.compile skips "
                "torch.nn's own classes there. Make it a class of your own, or use fusereg.convert",
                path.removeprefix("_orig_mod.") or "the model",
                type(part).__name__.removeprefix("FSDP"),
            )
