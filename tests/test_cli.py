"""The command line: parsing, exit codes, `fusereg info`."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import forked
import fusereg
from fusereg import _C
from fusereg.cli import app, checks, info, machine, main
from fusereg.cli.checks import Inputs, Operation, Pairs
from fusereg.cli.errors import InputError, require_packages
from fusereg.core import processor


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("command", [[], *([name] for name in app.COMMANDS)], ids=str)
def test_help_of_every_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    assert "Usage: fusereg" in capsys.readouterr().out


def test_every_command_is_a_module_with_run() -> None:
    for name in app.COMMANDS:
        module = importlib.import_module(f"fusereg.{app.COMMANDS[name]}")
        assert callable(module.run)
        assert module.__doc__


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"fusereg {fusereg.__version__}"


def test_no_command_prints_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "demo" in printed.err
    assert "info" in printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["polish"],
        ["info", "--yaml"],
        ["info", "out.json"],
        ["verify", "--isa"],
        ["bench", "--threads", "0"],
        ["bench", "--min-time", "-1"],
        ["bench", "--compare", "one.json"],
        ["bench", "--fail-on-slower", "much"],
        ["demo", "--epochs", "0"],
        ["demo", "--epochs", "some"],
        ["demo", "--seed", "-1"],
        ["demo", "--device", "tpu"],
        ["demo", "--threads", "0"],
        ["demo", "--data"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    command = " ".join(["fusereg", *arguments[: len(arguments) > 1]])
    assert one_error_line(capsys).startswith(f"{command}: error: ")


def test_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fusereg", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("fusereg", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == f"fusereg {fusereg.__version__}"


def test_parsing_imports_nothing_heavy() -> None:
    program = (
        "import sys; import fusereg; before = 'typer' in sys.modules; "
        "from fusereg.cli import main; assert main(['bench', '--help']) == 0 and not before; "
        "print([m for m in ('rich', 'matplotlib', 'mlxtend', 'fusereg.demo.run', 'fusereg.bench') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


class _Fails:
    """A command that raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def run(self) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.gz: bad"), 2, "fusereg info: error: a.gz: bad"),
        (RuntimeError("two\nlines"), 1, "fusereg info: error: RuntimeError: two lines"),
        (
            PermissionError(13, "Permission denied", "x.png"),
            1,
            "fusereg info: error: x.png: Permission denied",
        ),
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (ValueError(), 1, "fusereg info: error: ValueError: ValueError"),
        (KeyboardInterrupt(), 130, "fusereg info: interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_one_line_and_an_exit_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(app, "COMMANDS", {"info": "cli.info"})
    monkeypatch.setattr(app, "_command", lambda name: _Fails(error))
    assert main(["info"]) == code
    assert line in one_error_line(capsys)


def test_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "COMMANDS", {"info": "cli.info"})
    monkeypatch.setattr(app, "_command", lambda name: _Fails(RuntimeError("why")))
    assert main(["--traceback", "info"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_traceback() -> None:
    program = (
        "import os, sys; from fusereg.cli import main; os.close(0); "
        "r, w = os.pipe(); os.close(r); os.dup2(w, 1); sys.exit(main(['info', '--json']))"
    )
    done = forked.run(program)
    assert done.returncode == 1
    assert done.stderr == ""


def test_missing_packages_are_named_all_at_once() -> None:
    require_packages("demo", "demo", "json", "argparse")
    with pytest.raises(InputError, match=r"needs no_such_a, no_such_b, .*'fusereg\[demo\]'"):
        require_packages("demo", "demo", "no_such_a", "json", "no_such_b")


def test_an_unknown_instruction_set_in_the_environment_is_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusereg", "info"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "FUSEREG_CPU_ISA": "no_such"},
    )
    assert done.returncode == 2
    assert "fusereg info: error: FUSEREG_CPU_ISA: unknown instruction set" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_interrupt_while_importing_is_no_traceback(tmp_path: Path) -> None:
    """A stand-in for torch, which is imported for seconds, gets the signal there."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "fusereg", "--version"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        # Where a shell starts the tests with "&", the signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_of_a_command_is_one_line(name: str) -> None:
    program = (
        "import os, signal, sys; sys.argv = ['fusereg', 'info']; import fusereg.cli.app as app; "
        "command = type(sys)('info'); "
        f"command.run = lambda: os.kill(os.getpid(), signal.{name}); "
        "app.COMMANDS = {'info': 'cli.info'}; app._command = lambda name: command; "
        "sys.exit(app.main())"
    )
    done = forked.run(program)
    assert done.returncode == 130
    assert done.stderr == "fusereg info: interrupted\n"


# --- info ---


@pytest.mark.parametrize("target", [["--json"], ["--json", "-"]], ids=" ".join)
def test_json_without_a_file_is_printed(
    target: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusereg.cli.checks._places.OPERATIONS", [])
    assert main(["info", *target]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == []


def test_json_in_a_file_leaves_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusereg.cli.checks._places.OPERATIONS", [])
    target = tmp_path / "info.json"
    assert main(["info", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["ok"] is True
    assert "0 of 0 kernel calls ok" in capsys.readouterr().out
    other = tmp_path / "new" / "info.json"  # its folder is made
    assert main(["info", "--json", str(other)]) == 0
    assert json.loads(other.read_text())["ok"] is True


@pytest.mark.parametrize("command", ["info", "verify", "bench", "demo"])
def test_a_file_that_cannot_be_written_is_an_error_before_anything_runs(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path, tmp_path / "file" / "info.json"):
        assert main([command, "--json", str(target)]) == 2
        line = one_error_line(capsys)
        assert f"fusereg {command}: error: --json {target}: cannot be written" in line


def test_info_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    isa = _C.cpu_isa()
    assert main(["info", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {
        "schema",
        "ok",
        "versions",
        "system",
        "cpu",
        "cuda",
        "openmp",
        "warnings",
        "kernels",
    }
    assert content["ok"] is True
    assert content["versions"]["fusereg"] == fusereg.__version__
    assert content["versions"]["torch"] == torch.__version__
    assert all(value and value != "unknown" for value in content["versions"].values())
    assert content["cpu"]["isa"] == isa
    assert content["cpu"]["isas_available"] == list(_C.cpu_isas())
    assert set(content["cpu"]["isas_available"]) <= set(content["cpu"]["isas_compiled"])
    assert content["cuda"]["built"] is bool(_C.build_info()["cuda"])
    kernels = content["kernels"]
    for name in _C.cpu_isas():
        called = [row["kernel"] for row in kernels if row["backend"] == f"cpu {name}"]
        assert called == [operation.name for operation in checks.OPERATIONS]
    assert all(row["ok"] and row["error"] <= row["tolerance"] for row in kernels)
    assert _C.cpu_isa() == isa, "the checks must put the instruction set back"


def test_info_table_has_every_kernel_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for operation in checks.OPERATIONS:
        assert operation.name in printed
    for isa in _C.cpu_isas():
        assert f"cpu {isa}" in printed
    assert "FAILED" not in printed
    assert re.search(r"\b(\d+) of \1 kernel calls ok", printed)


def test_info_has_a_check_for_every_public_kernel() -> None:
    names = {operation.name.split(",")[0] for operation in checks.OPERATIONS}
    wanted = set(fusereg.functional.__all__)
    wanted |= {f"prox.{name}" for name in fusereg.prox.__all__}
    wanted |= {"add_penalty_grad_", "sparsity", "optim.clip_grad_norm_"}
    wanted -= {"dropout1d", "dropout3d"}  # dropout2d's kernel
    # Of torch's operations.
    wanted -= {"orthogonality_penalty", "spectral_norm_penalty", "prox.max_norm_"}
    wanted -= {"prox.hierarchical_"}
    assert wanted <= names
    optimizers = {"SGD", "Adam", "AdamW", "Adagrad", "FTRL", "RMSprop", "NAdam", "Lion"}
    optimizers.add("LAMB")
    assert {f"optim.{name}" for name in optimizers} <= names


def _nan(inputs: Inputs) -> Pairs:
    return [(torch.tensor(float("nan")), torch.tensor(1.0))]


def _wrong(inputs: Inputs) -> Pairs:
    return [(torch.tensor([1.0, 2.001]), torch.tensor([1.0, 2.0]))]


def _raises(inputs: Inputs) -> Pairs:
    raise RuntimeError("no\nluck")


def _misshapen(inputs: Inputs) -> Pairs:
    return [(torch.zeros(2), torch.zeros(3))]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (_nan, "the result is NaN"),
        (_wrong, "relative error 5.0e-04"),
        (_raises, "RuntimeError: no luck"),
        (_misshapen, "ValueError: shape (2,) came, (3,) was wanted"),
    ],
)
def test_info_fails_when_a_kernel_does(
    call: Callable[[Inputs], Pairs],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = Operation(name="broken", formula="nothing", function=torch.ones, pairs=call)
    monkeypatch.setattr("fusereg.cli.checks._places.OPERATIONS", [broken])
    assert main(["info"]) == 1
    printed = capsys.readouterr()
    assert "FAILED" in printed.out
    assert f"failed: broken on cpu {_C.cpu_isas()[0]}: {reason}" in printed.err
    assert main(["info", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["ok"] is False
    assert content["kernels"][0]["ok"] is False


@pytest.mark.parametrize("factor", [1.0, 1.0001])
def test_the_checks_see_a_slightly_wrong_kernel(factor: float) -> None:
    right = {operation.name: operation for operation in checks.OPERATIONS}
    wrong = replace(
        right["l1_penalty"],
        function=lambda params, strength: factor * fusereg.functional.l1_penalty(params, strength),
    )
    found = {r.kernel: r.ok for r in checks.run_checks([wrong, right["l2_penalty"]])}
    assert found == {"l1_penalty": factor == 1.0, "l2_penalty": True}


MAPS = """\
7f01-7f02 r-xp 00000000 08:01 11 /env/torch/lib/libgomp.so.1
7f02-7f03 r--p 00001000 08:01 11 /env/torch/lib/libgomp.so.1
7f03-7f04 r-xp 00000000 08:01 12 /env/scikit_learn.libs/libgomp-a34b3233.so.1.0.0
7f04-7f05 r-xp 00000000 08:01 13 /opt/with space/libiomp5.so
7f05-7f06 r-xp 00000000 08:01 14 /usr/lib/libomp.so.5
7f06-7f07 r-xp 00000000 08:01 15 /usr/lib/libompl.so
7f07-7f08 rw-p 00000000 00:00 0
7f08-7f09 r-xp 00000000 08:01 16 /usr/lib/libgompertz.so
"""


def test_openmp_runtimes_are_found_in_a_memory_map() -> None:
    assert machine.parse_openmp_libraries(MAPS) == [
        "/env/torch/lib/libgomp.so.1",
        "/env/scikit_learn.libs/libgomp-a34b3233.so.1.0.0",
        "/opt/with space/libiomp5.so",
        "/usr/lib/libomp.so.5",
    ]


def test_two_openmp_runtimes_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "openmp_libraries", lambda: ["/a/libgomp.so.1", "/b/libomp.so"])
    assert main(["info"]) == 0
    assert "warning: 2 OpenMP runtimes are loaded" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_this_process_has_one_openmp_runtime() -> None:
    # In a process of its own: other tests may load packages that bring another runtime.
    program = (
        "from fusereg.cli import checks, machine; checks.run_checks(); "
        "print(len(machine.openmp_libraries()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "1", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [
        ("AuthenticAMD", 25, 17, "Some CPU (Zen 4)"),
        ("AuthenticAMD", 25, 1, "Some CPU (Zen 3)"),
        ("AuthenticAMD", 26, 2, "Some CPU (Zen 5)"),
        ("GenuineIntel", 6, 143, "Some CPU (Sapphire Rapids)"),
        ("GenuineIntel", 6, 167, "Some CPU"),
        ("AuthenticAMD", 6, 143, "Some CPU"),
    ],
)
def test_a_processor_is_named_by_its_family_and_model(
    vendor: str, family: int, model: int, name: str
) -> None:
    lines = [f"vendor_id\t: {vendor}", f"cpu family\t: {family}", f"model\t\t: {model}"]
    lines += ["model name\t: Some CPU", "", "model name\t: another", "model\t\t: 0"]
    assert processor.name("\n".join(lines)) == name


def test_a_processor_without_family_or_name_is_named_by_what_there_is() -> None:
    assert processor.name("processor\t: 0\nModel\t\t: Raspberry Pi 5") == "Raspberry Pi 5"
    assert processor.name("") != ""


@pytest.mark.parametrize(
    ("pages", "asks", "line"),
    [
        ("madvise", False, "madvise; torch does not ask (THP_MEM_ALLOC_ENABLE=1)"),
        ("madvise", True, "madvise; torch asks for them"),
        (None, False, "unknown"),
    ],
)
def test_info_says_who_asks_for_large_pages(pages: str | None, asks: bool, line: str) -> None:
    now = machine.read_machine()
    cpu = replace(now.cpu, large_pages=pages, torch_large_pages=asks)
    assert dict(info.facts(replace(now, cpu=cpu)))["large pages"] == line


def test_devices_are_listed_with_what_is_known_of_them() -> None:
    now = machine.read_machine()
    device: dict[str, object] = {"index": 0, "name": "Some GPU", "capability": "9.0", "driver": "1"}
    cuda = machine.Cuda(True, "13.0", "90", "13.0", "1", [device], None)
    lines = dict(info.facts(machine.Machine(now.versions, now.system, now.cpu, cuda, [])))
    assert lines["device 0"] == "Some GPU: capability 9.0, driver 1"
    assert lines["CUDA kernels"] == "yes, toolkit 13.0, architectures 90"
    none = machine.Cuda(True, "13.0", "90", "13.0", None, [], "no CUDA-capable device is detected")
    lines = dict(info.facts(machine.Machine(now.versions, now.system, now.cpu, none, [])))
    assert lines["devices"] == "no CUDA device (no CUDA-capable device is detected)"
