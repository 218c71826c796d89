"""The benchmarks' work, and the command `fusereg bench`. Nothing here is timed."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fusereg.bench
from fusereg.bench import SUITES, collect_cases, provider_names, suites
from fusereg.bench.harness import (
    Accuracy,
    Options,
    command,
    largest,
    layers,
    report,
)
from fusereg.bench.harness import shapes as parameter_shapes
from fusereg.bench.suites import drop_block, penalty
from fusereg.cli import main
from fusereg.cli.checks import OPERATIONS
from fusereg.cli.errors import InputError

CPU = torch.device("cpu")


# --- the work -------------------------------------------------------------------------------------


def test_resnet50_shapes() -> None:
    shapes = parameter_shapes.resnet50()
    assert len(shapes) == 161
    assert parameter_shapes.count(shapes) == 25_557_032
    assert sum(len(shape) == 4 for shape in shapes) == 53


def test_gpt2_small_shapes() -> None:
    shapes = parameter_shapes.gpt2_small()
    assert len(shapes) == 148
    assert parameter_shapes.count(shapes) == 124_439_808


def test_bytes_by_contract() -> None:
    cases = collect_cases("penalty", Options(CPU, (torch.float32, torch.bfloat16)))
    per_element = {
        (case.mode, case.dtype_name): case.bytes_moved / case.elements
        for case in cases
        if not case.host
    }
    assert per_element == {
        ("value", "float32"): 4, ("value+gradient", "float32"): 12, ("prox", "float32"): 8,
        ("value", "bfloat16"): 2, ("value+gradient", "bfloat16"): 6, ("prox", "bfloat16"): 4,
        # a read and a write: a channel that is read again is in the cache
        ("group prox", "float32"): 8, ("group prox", "bfloat16"): 4,
    }  # fmt: skip
    assert {case.shape for case in cases} == {"resnet50", "2000x512", "64M", "gpt2", "host 2000x1"}
    assert len({case.id for case in cases}) == len(cases)


def test_the_benchmarks_are_the_modules_of_the_folder() -> None:
    folder = Path(suites.__file__).parent
    assert set(SUITES) == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert SUITES[-1] == "end_to_end"  # the longest


def test_a_new_module_is_a_benchmark_and_nothing_else_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snow.py").write_text(
        "from fusereg.bench.suites.dropout import cases as cases\n", encoding="utf-8"
    )
    try:
        with monkeypatch.context() as patch:
            patch.setattr(suites, "__path__", [*suites.__path__, str(tmp_path)])
            importlib.reload(fusereg.bench)
            assert "snow" in fusereg.bench.SUITES
            found = fusereg.bench.collect_cases("snow", Options(CPU, quick=True))
            assert {case.suite for case in found} == {"snow"}
    finally:
        importlib.reload(fusereg.bench)
    assert "snow" not in fusereg.bench.SUITES


def test_the_earlier_name_of_a_technique_still_works() -> None:
    cases = collect_cases("optimizer", Options(CPU, quick=True))
    assert {case.suite for case in cases} == {"optim"}


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_declares_its_providers_and_quick_leaves_out_compiling(suite: str) -> None:
    if suite == "end_to_end":
        pytest.importorskip("mlxtend")
    smallest = {}
    for case in collect_cases(suite, Options(CPU, quick=True)):
        key = case.op, case.mode
        if key not in smallest or case.elements < smallest[key].elements:
            smallest[key] = case
    for case in smallest.values():
        providers = case.setup().providers
        names = {p.name for p in providers}
        assert "fusereg" in names
        # What torchvision or timm draws for each sample is held against them.
        called = ("policy", "timm", "lsj", "scales", "augmix")
        assert "eager" in names or suite == "operations" or case.mode in called
        assert names <= set(provider_names(suite))
        assert not any(p.compiles for p in providers)
        assert case.suite == suite


@pytest.mark.parametrize(
    ("suite", "modes"),
    [("dropout", ("forward", "forward+backward")), ("drop_block", ("forward",))],
)
def test_the_check_of_a_mask_sees_what_is_wrong(suite: str, modes: tuple[str, ...]) -> None:
    x = torch.full((100_000,), 1.5)
    good = torch.nn.functional.dropout(x, layers.P)
    keep = drop_block._divisor if suite == "drop_block" else lambda kept: 1 - layers.P

    def checked(*results: torch.Tensor) -> Accuracy:
        return layers.check_kept(x, lambda: results, 1e-2, keep)

    accuracy = checked(good, (good != 0).float())
    assert accuracy.error <= accuracy.tolerance
    assert checked(good, torch.ones_like(x)).what == "gradient's mask"
    assert checked(good * 1.1).error == pytest.approx(0.1, rel=0.1)
    assert layers.is_keep_rate(good != 0)
    assert not layers.is_keep_rate(torch.nn.functional.dropout(x, 0.11) != 0)
    wrong = layers.check_kept(x, lambda: good, 1e-2, lambda kept: None)
    assert (wrong.error, wrong.what) == (math.inf, "keep rate")


def test_an_unknown_technique_is_named() -> None:
    with pytest.raises(InputError, match=r"no benchmark named 'x'; there are: .*, dropout, "):
        collect_cases("x", Options(CPU))
    assert "penalty" in SUITES


@pytest.mark.parametrize("mode", list(penalty.MODES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_does_the_same_work(mode: str, dtype: torch.dtype) -> None:
    """The function for torch.compile as well, here uncompiled."""
    work = parameter_shapes.Work("small", [(40, 50), (7,), (3, 2, 5)])
    data = penalty._Data(work, mode, dtype, CPU)
    check = {
        penalty.VALUE: penalty._check_value,
        penalty.VALUE_GRADIENT: penalty._check_value_gradient,
        penalty.PROX: penalty._check_prox,
    }[mode]
    formula = {
        penalty.VALUE: penalty._formula_value,
        penalty.VALUE_GRADIENT: penalty._formula_value_gradient,
        penalty.PROX: penalty._formula_prox,
    }[mode]
    providers = list(penalty._setup(work, mode, dtype, Options(CPU)).providers)
    assert {p.name for p in providers} >= {"eager", "foreach", "torch.compile", "fusereg"}
    makers = {
        penalty.VALUE: penalty._value_providers,
        penalty.VALUE_GRADIENT: penalty._value_gradient_providers,
        penalty.PROX: penalty._prox_providers,
    }
    calls = {p.name: p.make() for p in makers[mode](data) if not p.compiles}
    calls["formula"] = lambda: formula(data.detached, data.gradients)
    for name, call in calls.items():
        accuracy = check(data, call)
        assert accuracy.error <= accuracy.tolerance, f"{name}: {accuracy}"


@pytest.mark.parametrize("mode", list(penalty.MODES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_sees_a_provider_that_does_nothing(mode: str, dtype: torch.dtype) -> None:
    data = penalty._Data(parameter_shapes.Work("small", [(200, 500)]), mode, dtype, CPU)
    value = torch.tensor(penalty._reference_value(data))
    check = {
        penalty.VALUE: lambda: penalty._check_value(data, lambda: 0.5 * value),
        penalty.VALUE_GRADIENT: lambda: penalty._check_value_gradient(data, lambda: value),
        penalty.PROX: lambda: penalty._check_prox(data, lambda: None),
    }[mode]
    accuracy = check()
    assert not accuracy.error <= accuracy.tolerance


@pytest.mark.parametrize("mode", list(penalty.MODES))
def test_the_check_sees_a_nan_in_any_tensor_but_the_first(mode: str) -> None:
    data = penalty._Data(parameter_shapes.Work("small", [(3, 4), (5,)]), mode, torch.float32, CPU)
    value = torch.tensor(penalty._reference_value(data))

    def spoil(tensors: Any) -> torch.Tensor:
        tensors[-1][0] = math.nan
        return value

    accuracy = {
        penalty.VALUE: lambda: penalty._check_value(data, lambda: value * math.nan),
        penalty.VALUE_GRADIENT: lambda: penalty._check_value_gradient(
            data, lambda: spoil(data.gradients)
        ),
        penalty.PROX: lambda: penalty._check_prox(data, lambda: spoil(data.detached)),
    }[mode]()
    assert math.isnan(accuracy.error)


def test_the_largest_number_is_nan_if_one_is() -> None:
    nan = math.nan
    for values in ([nan, 1.0], [1.0, nan], [1.0, torch.tensor(nan), 2.0]):
        assert math.isnan(largest(values))
    assert largest([1.0, torch.tensor(3.0), 2.0]) == 3.0
    assert largest([]) == 0.0
    wanted = [torch.ones(3, dtype=torch.float64)] * 2
    assert math.isnan(layers.relative_error([torch.ones(3), torch.full((3,), nan)], wanted))


# --- the command ----------------------------------------------------------------------------------


def test_quick_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    words = ["penalty", "--quick", "--only", "tiny", "--device", "cpu", "--min-time", "0"]
    assert main(["bench", *words, "--json", str(out)]) == 0
    printed = capsys.readouterr()
    assert "[3/3]" in printed.err
    assert "vs eager" in printed.out
    rows, data = report.read_json(out)
    assert data["interrupted"] is False
    assert {r.mode for r in rows} == {"value", "value+gradient", "prox"}
    providers = "copy eager formula foreach fusereg WeightPenalty"
    assert {r.provider for r in rows} == set(providers.split())
    for measured in rows:
        assert not measured.failed
        assert measured.p20_us is not None
        assert measured.p50_us is not None
        assert measured.p80_us is not None
        assert 0 < measured.p20_us <= measured.p50_us <= measured.p80_us

    assert main(["bench", "--from", str(out), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| work | mode |")


def test_list_names_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "penalty", "--list", "--device", "cpu", "--only", "*/resnet50/*"]) == 0
    assert capsys.readouterr().out.split() == [
        "penalty/elastic-net/value/resnet50/float32",
        "penalty/elastic-net/value+gradient/resnet50/float32",
        "penalty/soft-threshold/prox/resnet50/float32",
        "penalty/group-lasso-of-channels/group-prox/resnet50/float32",
    ]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nothing"], "no benchmark named 'nothing'"),
        (
            ["penalty,dropuot"],
            "operations, optim, penalty, steps, end_to_end; did you mean dropout?",
        ),
        (["--only", "zzz"], "no case matches; --list shows them"),
        (["--only", "gtp2"], "no case matches; did you mean gpt2?"),
        (["--dtype", "bfloat61"], "did you mean bfloat16?"),
        (["dropout", "--providers", "foo"], "no provider named 'foo'; there are: copy, eager, "),
        (["--providers", "eager,fussreg"], "did you mean fusereg?"),
        (
            ["penalty", "--quick", "--only", "value/tiny", "--providers", "formula"],
            "--providers formula: no chosen case can run them here",
        ),
        (["--dtype", "int32"], "no floating-point dtype named"),
        (["--dtype", "float33"], "no floating-point dtype named"),
        (["--threads", "0"], "Invalid value for '--threads': "),
        (["--min-time", "-1"], "Invalid value for '--min-time': "),
        (["--json", "."], "cannot be written"),
        (["--from", "missing.json"], "missing.json"),
        (["--compare", "missing.json", "missing.json"], "missing.json"),
        (["--fail-on-slower"], "--fail-on-slower goes with --compare"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--device", "cpu", *words]) == 2
    printed = capsys.readouterr()
    *measured, last = printed.err.splitlines()
    assert last.startswith("fusereg bench: error: ")
    assert part in last
    assert all(line.startswith("[") for line in measured)
    assert printed.out == ""


def test_several_techniques_and_json_on_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["penalty", "dropout", "--quick", "--device", "cpu", "--min-time", "0"]
    words += ["--only", "*tiny*", "--providers", "eager,fusereg"]
    assert main(["bench", *words, "--list"]) == 0
    techniques = {line.split("/")[0] for line in capsys.readouterr().out.split()}
    assert techniques == {"penalty"}
    assert main(["bench", *words, "--json"]) == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert not data["interrupted"]
    assert {row["provider"] for row in data["rows"]} == {"copy", "eager", "fusereg"}
    assert "[3/3]" in printed.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_killed_run_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written after every case and says that it is not the whole run."""
    seen: list[bool] = []
    write = report.write_json

    def spy(path: str | Path, data: dict[str, Any]) -> None:
        seen.append(data["interrupted"])
        write(path, data)

    monkeypatch.setattr(command.report, "write_json", spy)
    words = ["penalty", "--quick", "--only", "tiny", "--device", "cpu", "--min-time", "0"]
    words += ["--providers", "eager,fusereg", "--json", str(tmp_path / "a.json")]
    assert main(["bench", *words]) == 0
    assert seen == [True, True, True, False]
    rows, _ = report.read_json(tmp_path / "a.json")
    assert {r.provider for r in rows} == {"copy", "eager", "fusereg"}


def test_the_benchmark_of_operations_has_each_function_of_the_inventory() -> None:
    found = collect_cases("operations", Options(CPU))
    functions = [operation.name for operation in OPERATIONS if operation.reference is not None]
    assert list(dict.fromkeys(case.op for case in found)) == functions
    case = next(c for c in found if (c.op, c.mode) == ("dropout", "forward+backward"))
    workload = case.setup()
    assert workload.check is not None
    (gradient,) = workload.providers[0].make()()  # type: ignore[misc, attr-defined]
    assert gradient.count_nonzero() < gradient.numel()
    accuracy = workload.check(lambda: None)
    assert accuracy.error <= accuracy.tolerance
