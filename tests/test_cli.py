"""The command line: what it prints, the exit codes, and what it says where something is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from batchjac import cli, doctor
from batchjac.demo import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.application(), list(arguments))


@pytest.fixture
def demo_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bool]]:
    """Stand in for the demo, whose minutes belong to its own tests; record how it is called."""
    calls: list[tuple[Path, bool]] = []
    monkeypatch.setattr(main, "run", lambda out, quick: calls.append((out, quick)))
    return calls


def test_version_is_the_installed_one():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"batchjac {version('batchjac')}\n"


def test_the_installed_script_answers():
    script = Path(sys.executable).parent / "batchjac"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"batchjac {version('batchjac')}\n"), done.stderr


def test_help_lists_exactly_the_commands_there_are():
    result = run("--help")
    assert result.exit_code == 0
    commands = {command.callback.__name__ for command in cli.application().registered_commands}
    assert commands == {"doctor", "demo", "plan"}
    assert all(f" {command} " in result.output for command in commands)


def test_an_unknown_command_is_refused():
    result = run("dance")
    assert result.exit_code == 2
    assert "No such command 'dance'" in result.output


def test_demo_passes_its_options_on(demo_calls: list[tuple[Path, bool]]):
    assert run("demo").exit_code == 0
    assert run("demo", "--out", "elsewhere", "--quick").exit_code == 0
    assert demo_calls == [(Path("runs/demo"), False), (Path("elsewhere"), True)]


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "tqdm"])
def test_demo_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
):
    monkeypatch.setitem(sys.modules, package, None)  # makes importing it fail
    result = run("demo", "--out", str(tmp_path / "demo"), "--quick")
    assert result.exit_code == 1
    assert package.removeprefix("sk") in result.output
    assert 'pip install "batchjac[demo]"' in result.output
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_is_the_doctor_s(monkeypatch: pytest.MonkeyPatch, code: int):
    def examination(write) -> int:
        write("examined")
        return code

    monkeypatch.setattr(doctor, "run", examination)
    result = run("doctor")
    assert (result.exit_code, result.output) == (code, "examined\n")


def test_without_typer_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "typer", None)  # makes `import typer` fail
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == cli.MISSING  # a text as code: printed on stderr, exit code 1
    assert 'pip install "batchjac[cli]"' in cli.MISSING


def test_main_runs_the_arguments_it_is_given(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"batchjac {version('batchjac')}\n"


def test_plan_prints_how_a_model_would_be_computed():
    result = run("plan", "benchmarks.models:lenet5", "--input", "1,32,32", "--batch", "12")
    assert result.exit_code == 0, result.output
    assert "12 samples x 10 outputs x 1 x 32 x 32 inputs" in result.output
    assert "12 of 12 in one forward" in result.output
    assert "multiply-adds" in result.output


def test_plan_takes_its_options():
    line = ("plan", "benchmarks.models:lenet5", "--input", "1,32,32", "--outputs", "3")
    assert "1 samples x 1 outputs x 1 x 32 x 32 inputs" in run(*line).output
    forward = run(*line, "--mode", "forward")
    assert "forward: 1024 columns up" in forward.output
    small = run(*line, "--max-memory", "1KiB")
    assert small.exit_code == 1
    assert "the least that would do" in small.output


def test_plan_of_a_model_that_looks_at_values_runs_it_on_zeros(tmp_path, monkeypatch):
    text = """
import torch
class Branching(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) if bool((x == 0).all()) else x
def make():
    return Branching(3, 2)
number = 3
class Numpy(Branching):
    def forward(self, x):
        return super().forward(x) + float(x.detach().numpy().sum())
made = Numpy(3, 2)
"""
    (tmp_path / "looking.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    result = run("plan", "looking:make", "--input", "3")
    assert "1 samples x 2 outputs x 3 inputs" in result.output, result.output
    assert "must give an nn.Module" in run("plan", "looking:number", "--input", "3").output
    made = run("plan", "looking:made", "--input", "3")
    assert "1 samples x 2 outputs x 3 inputs" in made.output, made.output
    assert not sys.modules["looking"].made.weight.is_meta
    wrong = run("plan", "looking:make", "--input", "5")
    assert wrong.exit_code == 1
    assert "the model fails on inputs [1, 5]: mat1 and mat2" in wrong.output


@pytest.mark.parametrize(
    ("factory", "shape", "said"),
    [
        ("benchmarks.models", "3", "must be module:name"),
        ("benchmarks.nowhere:lenet5", "3", "no module 'benchmarks.nowhere'"),
        ("benchmarks.models:lenet6", "3", "has no 'lenet6'"),
        ("benchmarks.models:lenet5", "1,a", "must be numbers"),
        ("benchmarks.models:lenet5", "1:number", "torch has no dtype 'number'"),
    ],
)
def test_plan_says_what_is_wrong(factory, shape, said):
    result = run("plan", factory, "--input", shape)
    assert result.exit_code == 1
    assert said in result.output
