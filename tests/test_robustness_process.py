"""What a process may do around the kernels: threads, forks, many steps, other interpreters."""

from __future__ import annotations

import ctypes
import sys
import sysconfig
import threading

import pytest
import torch
from torch import Tensor

import fusereg
from fusereg import functional
from test_module import MODULE, needs_openmp, on_linux, run_python

_C = fusereg._C

# --- threads of Python ----------------------------------------------------------------------------


def _penalty(size: int) -> list[Tensor]:
    w = torch.linspace(-2, 3, size, requires_grad=True)
    value = functional.elastic_net_penalty([w], 0.3, 0.7)
    return [value.detach(), *torch.autograd.grad(value, w)]


def _dropout(size: int) -> list[Tensor]:
    x = torch.linspace(-2, 3, size, requires_grad=True)
    y = functional.dropout(x, 0.3, seed=7)
    return [y.detach(), *torch.autograd.grad(y.sum(), x)]


def _batch_norm(size: int) -> list[Tensor]:
    x = torch.linspace(-2, 3, size // 64 * 64).view(-1, 8, 8).requires_grad_()
    layer = fusereg.nn.BatchNorm1d(8, activation="relu")
    y = layer(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return [y.detach(), grad, layer.running_mean]


def _norm(size: int) -> list[Tensor]:
    x = torch.linspace(-2, 3, size // 64 * 64).view(-1, 64).requires_grad_()
    weight = torch.linspace(0, 1, 64, requires_grad=True)
    y = functional.dropout_add_layer_norm(x, x.detach(), weight, p=0.2, seed=3)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))]


def _steps(size: int) -> list[Tensor]:
    w = torch.nn.Parameter(torch.linspace(-2, 3, size))
    optimizer = fusereg.optim.AdamW([w], lr=1e-2, l1=1e-3)
    for _ in range(3):
        w.grad = w.detach().sin()
        optimizer.step()
    return [w.detach()]


TASKS = [_penalty, _dropout, _batch_norm, _norm, _steps]


def test_threads_that_call_at_once_get_the_results_of_one_thread() -> None:
    """Small calls hold the GIL, large ones (here of several chunks) do not."""
    sizes = (700, 70_000)
    wanted = {(task, n): task(n) for task in TASKS for n in sizes}
    wrong: list[str] = []
    start = threading.Barrier(8)

    def work(first: int) -> None:
        start.wait()
        for i in range(2 * len(TASKS)):
            task, n = TASKS[(first + i) % len(TASKS)], sizes[(first + i) % 2]
            got = task(n)
            if not all(map(torch.equal, got, wanted[task, n])):
                wrong.append(f"{task.__name__}, {n} elements")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_a_list_that_another_thread_empties_is_read_as_it_was() -> None:
    weights = [torch.full((1 << 16,), 0.5) for _ in range(8)]
    wanted = 8 * (1 << 15)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            fresh = [torch.full((1 << 16,), 0.5) for _ in range(8)]
            weights.clear()
            weights.extend(fresh)  # a list at once; a generator would be seen half way

    disturber = threading.Thread(target=disturb)
    disturber.start()
    value = torch.zeros(())
    try:
        for _ in range(200):
            assert _C.penalty_forward(weights, value, 1.0, 0.0, 0.0, 0, None, "l1_penalty") == 0
            assert float(value) in (0.0, wanted)
    finally:
        stop.set()
        disturber.join()


@on_linux
@needs_openmp
def test_set_num_threads_is_honored_in_threads_that_have_not_asked_torch() -> None:
    code = """
        import os, threading
        import torch, fusereg
        torch.set_num_threads(3)
        weights = torch.ones(1 << 21)
        def first_call():
            before = len(os.listdir("/proc/self/task"))
            fusereg.functional.l1_penalty(weights, 1.0)
            print(len(os.listdir("/proc/self/task")) - before)
        thread = threading.Thread(target=first_call)
        thread.start()
        thread.join()
    """
    assert run_python(code, OMP_NUM_THREADS="5").stdout.split() == ["2"]


# --- fork -----------------------------------------------------------------------------------------

_FORK = """
    import os, signal
    import torch, fusereg
    torch.set_num_threads(4)
    def work():
        # The weights are made without torch's own threads, which do not survive a fork either.
        x = torch.frombuffer(bytearray(bytes(range(60)) * 70000), dtype=torch.uint8)
        out = torch.zeros(())
        w = x[: 1 << 20].view(torch.bfloat16)[: 1 << 18]
        status = fusereg._C.penalty_forward([w], out, 1.0, 1.0, 0.0, 0, None, "l1_penalty")
        y = torch.empty_like(w)
        fusereg._C.dropout_forward(y, w, 7, 0, 0.5, False, 0, 0, "dropout")
        return status, float(out).hex(), hash(bytes(y.view(torch.uint8).untyped_storage()))
    BEFORE
    wanted = work() if "USED" else None
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        got = work()
        threads = len(os.listdir("/proc/self/task"))
        os._exit(0 if threads == 1 and (wanted is None or got == wanted) else 3)
    print(os.waitpid(child, 0)[1])
    assert work()[0] == 0  # the parent goes on
"""


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("used", ["used", ""], ids=["after use", "after import"])
def test_a_forked_child_computes_with_one_thread_and_does_not_hang(used: str) -> None:
    code = _FORK.replace("USED", used).replace("BEFORE", "torch.ones(1 << 20).exp()")
    assert run_python(code, PYTHONHASHSEED="0").stdout.split() == ["0"]


# --- many steps -----------------------------------------------------------------------------------


@pytest.mark.slow
@on_linux
def test_ten_thousand_steps_leave_no_object_and_no_memory_behind() -> None:
    code = """
        import gc, os
        import torch, fusereg
        torch.set_num_threads(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 8),
            fusereg.nn.BatchNorm1d(8, activation="relu", dropout=0.1),
            torch.nn.Linear(8, 4),
            fusereg.nn.Dropout(0.2),
        )
        penalty = fusereg.WeightPenalty(model, l1=1e-4, l2=1e-4)
        optimizer = fusereg.optim.AdamW(model.parameters(), lr=1e-3, l1=1e-4, prox=True)
        x = torch.randn(5, 6)
        def steps(n):
            for _ in range(n):
                optimizer.zero_grad()
                (model(x).square().mean() + penalty.penalty()).backward()
                penalty.add_grad_()
                fusereg.optim.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                fusereg.prox.l1_(model[0].weight, 1e-6)
                try:
                    fusereg._C.prox_(["no tensor"], -1.0, 0.0, 0.0, 0, None, "prox.l1_")
                except ValueError:
                    pass
        def in_use():
            gc.collect()
            with open("/proc/self/statm") as f:
                return len(gc.get_objects()), int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        steps(500)
        objects = in_use()[0]
        steps(4500)  # the heap grows to its size, by some 2 MB
        resident = in_use()[1]
        steps(5000)
        print(in_use()[0] - objects, in_use()[1] - resident)
    """
    objects, resident = map(int, run_python(code).stdout.split())
    assert objects < 50
    assert resident < 100 * 5000  # less than two small objects a step


# --- interpreters ---------------------------------------------------------------------------------


#: moduleobject.h. Slots of a module; an absent one of the last two means 0, as declared here.
MOD_EXEC, MOD_MULTIPLE_INTERPRETERS, MOD_GIL = 2, 3, 4


def _module_slots() -> dict[int, int]:
    """The slots of the module's definition: PyModuleDef, up to and with m_slots, is 10 words."""
    initialize = getattr(ctypes.PyDLL(str(MODULE)), f"PyInit_{MODULE.name.split('.')[0]}")
    initialize.restype = ctypes.c_void_p
    words = (ctypes.c_void_p * 10).from_address(initialize())
    slots, at = {}, words[9]
    while slot := ctypes.c_int.from_address(at).value:
        slots[slot] = ctypes.c_void_p.from_address(at + 8).value or 0
        at += 16
    return slots


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="another layout")
def test_the_module_declares_that_it_needs_the_gil_and_the_main_interpreter() -> None:
    slots = _module_slots()
    assert MOD_EXEC in slots, "the definition was read wrong"
    assert slots.get(MOD_GIL, 0) == 0
    assert slots.get(MOD_MULTIPLE_INTERPRETERS, 0) == 0
    if sys.version_info >= (3, 12):
        assert MOD_MULTIPLE_INTERPRETERS in slots


@pytest.mark.skipif(
    not hasattr(sys, "_is_gil_enabled") or sys._is_gil_enabled(),
    reason="this interpreter has a GIL anyway",
)
def test_a_free_threaded_interpreter_turns_the_gil_on() -> None:
    code = """
        import sys, warnings
        import torch
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            import fusereg
        print(sys._is_gil_enabled(), any("GIL" in str(w.message) for w in warned))
    """
    assert run_python(code, PYTHON_GIL="").stdout.split() == ["True", "True"]


@on_linux
def test_a_subinterpreter_is_refused_by_an_error_before_torch_is_imported() -> None:
    """Importing torch there may hang."""
    code = """
        import os, signal
        try:
            import _interpreters as interpreters
        except ImportError:
            import _xxsubinterpreters as interpreters
        signal.alarm(120)
        interpreters.run_string(interpreters.create(), '''if True:
            try:
                import fusereg
            except ImportError as error:
                print(error, flush=True)
        ''')
        os._exit(0)  # interpreters that are left cannot disturb the end
    """
    said = run_python(code).stdout
    assert said.strip() == "fusereg runs in the main interpreter alone, as torch does"
