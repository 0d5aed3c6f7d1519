"""The command that measures on a GPU, run dry on the CPU: what was measured is kept, whatever happens to a part."""

import json
import math
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from experiments.benchmarks.gpu.__main__ import main
from experiments.benchmarks.gpu.agreement import Check, agree, relative
from experiments.benchmarks.gpu.cases import DIVERGENCES, FORMS, Setting
from experiments.benchmarks.gpu.correct import LENGTHS, risk_units
from experiments.benchmarks.gpu.crew import LATE, outcomes
from experiments.benchmarks.gpu.page import page, records_in
from experiments.benchmarks.gpu.parts import PARTS
from experiments.benchmarks.gpu.programs import call, run_until
from experiments.benchmarks.gpu.record import FINISHED, Record
from experiments.benchmarks.gpu.suite import outcomes_in
from experiments.benchmarks.gpu.trace import read
from experiments.benchmarks.measure import provenance

ROOT = Path(__file__).parents[1]
LIBRARY = ("correct", "correct-losses", "core", "calls", "contrastive", "tests")

# Ends a part's process, or stops it, once its record has a row; Python finds it at its start, in a --packages folder.
SABOTAGE = """
import os, pathlib, sys, threading, time
def wait():
    words = sys.orig_argv
    path = pathlib.Path(words[words.index("--out") + 1]) / "core.json"
    while not (path.exists() and '"losses"' in path.read_text()):
        time.sleep(0.002)
    os.kill(os.getpid(), {signal})
if "core" in sys.orig_argv and "--part" in sys.orig_argv:
    threading.Thread(target=wait, daemon=True).start()
"""
KILL, STOP = 9, 19


def dry(out, *words):
    """Run the command dry in a process."""
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--device", "cpu", "--small", "--out", str(out)]
    return subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=900)


def kept(out, part):
    return json.loads((out / f"{part}.json").read_text())


@pytest.fixture
def record(tmp_path):
    return Record.new(tmp_path / "gpu", "core", provenance("a command", ("torch",)))


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "nothing"], "no part is called 'nothing'"),
        (["--device", "cpu"], "give --small too"),
        (["--device", "cpu", "--small"], "give --out another folder"),
        (["--minutes", "0", "--out", "x"], "--minutes must be positive"),
        (["--unknown"], "unrecognized arguments"),
    ],
)
def test_what_the_user_can_correct_is_one_line_and_status_2(arguments, said, capsys):
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "gpu")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_part_has_the_function_that_measures_it():
    for part in PARTS.values():
        module, _, function = part.run.partition(":")
        assert callable(getattr(import_module(f"experiments.benchmarks.gpu.{module}"), function))
        assert part.seconds < 120


@pytest.mark.slow
def test_dry_run_of_the_library_then_nothing_is_left_to_resume(tmp_path):
    out = tmp_path / "gpu"
    done = dry(out, "--only", *LIBRARY, "--minutes", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: kept(out, name) for name in LIBRARY}
    assert {each["state"] for each in found.values()} == {FINISHED}
    assert found["correct"]["tables"]["Count"]["rows"][0]["checks"] > 300
    assert found["correct-losses"]["tables"]["Count"]["rows"][0]["checks"] > 50
    assert {row["risk"] for row in found["core"]["tables"]["Risks"]["rows"]} >= {"KL ball .5", "CVaR .1"}
    assert all(row["ms"] > 0 for row in found["core"]["tables"]["Risks"]["rows"])
    assert all(row["ms"] > 0 for row in found["contrastive"]["tables"]["Contrastive risk"]["rows"])
    text = (tmp_path / "gpu.md").read_text()
    assert "| part | what | measured | to reach | met |" in text
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert dry(out, "--only", *LIBRARY, "--resume").returncode == 0
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("signal, said", [(KILL, "ended with status -9"), (STOP, "did not end within")])
def test_part_that_dies_or_hangs_keeps_its_rows_and_loses_no_other(signal, said, tmp_path):
    folder, out = tmp_path / "packages", tmp_path / "gpu"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SABOTAGE.format(signal=signal))
    minutes = "1.5" if signal == KILL else "0.6"  # which the stopped one is given whole
    done = dry(out, "--only", "core", "contrastive", "--packages", str(folder), "--minutes", minutes)
    assert done.returncode == 1
    broken = kept(out, "core")
    assert said in broken["reason"]
    assert len(broken["tables"]["Yardsticks"]["rows"]) >= 1
    assert f"failed: {broken['reason']}" in (tmp_path / "gpu.md").read_text()
    if signal == KILL:
        assert kept(out, "contrastive")["state"] == FINISHED
        assert dry(out, "--only", "core", "contrastive", "--resume").returncode == 0


def test_parts_are_not_started_without_time_for_them(tmp_path, capsys):
    arguments = ["--device", "cpu", "--small", "--out", str(tmp_path / "gpu"), "--minutes", "0.01"]
    assert main([*arguments, "--only", "core", "calls"]) == 1
    assert all("no time left" in kept(tmp_path / "gpu", name)["reason"] for name in ("core", "calls"))


# --- what is kept ---------------------------------------------------------------------------------------------


def test_every_row_is_in_the_file_at_once(record):
    for number in range(3):
        record.row("A table", losses=number)
        assert len(json.loads(record.path.read_text())["tables"]["A table"]["rows"]) == number + 1


def test_case_that_fails_is_a_line_and_those_after_it_are_measured(record):
    def fails():
        raise RuntimeError("of a reason. And more")

    record.attempt("first", fails)
    record.attempt("second", lambda: record.row("A table", losses=1))
    record.end(FINISHED)
    assert record.kept["failures"] == [{"case": "first", "problem": "RuntimeError: of a reason"}]
    assert not record.is_good
    assert record.kept["tables"]["A table"]["rows"] == [{"losses": 1}]


@pytest.mark.parametrize(
    "measured, at_least, met",
    [(1.0, False, "yes"), (3.0, False, "NO"), (1.0, True, "NO"), (3.0, True, "yes"), (None, True, "not measured")],
)
def test_figure_is_held_against_what_is_to_be_reached(record, measured, at_least, met):
    record.aim("a time", measured, 2.0, at_least=at_least, unit="x")
    assert record.kept["aims"][0]["met"] == met
    assert record.kept["aims"][0]["to reach"] == (">= 2 x" if at_least else "<= 2 x")


def test_page_has_aims_failures_and_the_tables_of_every_part(record):
    record.text("A table", "What it says.")
    record.row("A table", risk="KL", ms=1.25)
    record.row("A table", risk="CVaR", note="RuntimeError: x | y")
    record.aim("a time", 3.0, 2.0, unit="x")
    record.fail("a case", "it is wrong")
    record.fail("another", f"{LATE} 9 s")
    record.end(FINISHED)
    text = page(records_in(record.path.parent))
    for line in (
        "| core | a time | 3 | <= 2 x | NO |",
        "| a case | it is wrong |",
        "| core | finished | 1 | 1 |",
        "| risk | ms | note |",
        "| KL | 1.25 |  |",
        "| CVaR |  | RuntimeError: x / y |",
        "0 of 1 are met.",
    ):
        assert line in text
    assert page([]) == page(records_in(Path("nowhere")))


@pytest.mark.parametrize("processes", [[], ["--numprocesses", "2"]], ids=["one process", "two"])
def test_outcomes_of_tests_are_read_from_what_pytest_prints(processes, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', ['a b', 'FAILED', 'c'])\ndef test_right(x): assert x\n"
        "def test_wrong(): assert False\n"
        "@pytest.mark.skip(reason='of it')\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef broken(): raise RuntimeError\n"
        "def test_broken(broken): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *processes, "tests"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120).stdout
    counts, failed = outcomes_in(printed)
    assert counts == {"tests": 6, "failures": 1, "errors": 1, "skipped": 1}
    assert sorted(failed) == [f"tests/test_some.py::test_{name}" for name in ("broken", "wrong")]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kernels_are_checked_on_short_rows_first_and_then_with_other_numbers(device, tmp_path):
    units = risk_units(Setting(device, device == "cpu", tmp_path))
    risks = [unit.subject for unit in units if unit.kind == "risk"]
    assert len(set(risks)) == len(risks) > 100
    names, forms, dtypes, lengths = (set(each) for each in zip(*risks, strict=True))
    assert names == set(DIVERGENCES) and forms == set(FORMS)
    kinds = [(name, form.split()[0], dtype, length) for name, form, dtype, length in risks]
    first = len(set(kinds))
    assert len(set(kinds[:first])) == first  # every kernel once, before any again
    for part in (kinds[:first], kinds[first:]):
        assert [length for *_, length in part] == sorted((length for *_, length in part), key=LENGTHS.index)
    assert "bfloat16" in dtypes or device == "cpu"
    assert lengths == ({*LENGTHS} if device == "cuda" else {LENGTHS[0]})


def test_file_that_cannot_be_read_is_no_record(record):
    record.path.write_text('{"part": ')
    assert Record.load(record.path.parent, "core") is None


# --- processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_work_that_fails_dies_or_hangs_is_said_and_the_rest_is_done():
    found = {task: (result, problem) for task, result, problem in outcomes(math.sqrt, [4.0, -1.0, 9.0], 2, 60)}
    assert found[4.0] == (2.0, "")
    assert found[9.0] == (3.0, "")
    assert found[-1.0][1].startswith("ValueError")
    died = list(outcomes(os._exit, [3, 5], 1, 60))
    assert [problem for _, _, problem in died] == [f"its process ended with status {status}" for status in (3, 5)]
    late = list(outcomes(time.sleep, [60.0], 1, 3.0))
    assert late == [(60.0, None, "not done within 3 s")]


def test_program_is_ended_once_it_has_printed_enough(tmp_path):
    start = time.monotonic()
    run_until(["/bin/sh", "-c", "echo one; sleep 60"], tmp_path / "log", lambda text: "one" in text, 30)
    assert time.monotonic() - start < 30
    with pytest.raises(RuntimeError, match="did not get there"):
        run_until(["/bin/sh", "-c", "sleep 60"], tmp_path / "log", bool, 0.2)


def test_program_that_fails_is_quoted(tmp_path):
    with pytest.raises(RuntimeError, match="ended with status 3: the last line"):
        call(["/bin/sh", "-c", "echo first; echo the last line; exit 3"], tmp_path / "log", 30)
    call(["/bin/sh", "-c", "exit 3"], tmp_path / "log", 30, may_fail=True)
    call(["/bin/sh", "-c", "exit 0"], tmp_path / "log", 30)


# --- figures --------------------------------------------------------------------------------------------------


def event(kind, name, start, time, **arguments):
    return {"cat": kind, "name": name, "ts": start, "dur": time, "args": arguments}


def test_trace_counts_what_the_host_asks_and_how_long_the_device_is_busy():
    copy = "Memcpy HtoD (Pageable -> Device)"
    found = read(
        [
            event("user_annotation", "traced", 0, 100),
            event("cuda_runtime", "cudaLaunchKernel", 1, 2),
            event("cuda_driver", "cuLaunchKernelEx", 3, 2),
            event("cuda_runtime", "cudaStreamSynchronize", 10, 5),
            event("cuda_runtime", "cudaDeviceSynchronize", 101, 50),  # of the profiler itself
            event("cpu_op", "aten::_local_scalar_dense", 20, 1),
            event("kernel", "first", 30, 10),
            event("kernel", "second", 35, 10),
            event("kernel", "second", 60, 10),
            event("gpu_memcpy", copy, 110, 5, bytes=1000),
        ]
    )
    assert found.launches == 2
    assert found.items == 1
    assert found.waits == {"cudaStreamSynchronize": [1, 5.0]}
    assert found.busy == 15 + 10 + 5
    assert found.copies == {copy: [1, 1000.0, 5.0]}
    assert found.kernels == [("second", 2, 20.0), ("first", 1, 10.0)]
    assert found.per(2)["copies"] == {copy: [0.5, 500.0, 2.5]}


def test_differences_beyond_their_tolerance_are_problems():
    one = torch.tensor([1.0, math.inf, 2.0])
    assert agree(one, one) == 0
    assert agree(one, one[:2]) == math.inf
    assert agree(one + torch.tensor([0.0, 0.0, 0.5]), one) == 0.5
    assert agree(torch.tensor([math.nan]), torch.tensor([1.0])) == math.inf
    assert relative(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    held = Check("risk", "KL", "float64", "a case").held({"value": 1e-3, "gap": 1e-9}, {"value": 1e-6, "gap": 1e-6})
    assert held.problem == "value differs by 0.001, more than 1e-06"
    assert Check("risk", "KL", "float64", "a case").held({"value": math.nan}, {"value": 1.0}).problem
