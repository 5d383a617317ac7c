"""The doctor says what is there, and fails when a result is wrong, in every way it can be wrong."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from batchjac import calibration, doctor, kernels
from batchjac.api import jacobian
from batchjac.rules import registry

MODELS = [name for name, _, _ in doctor.models()]


def page(engine: doctor.Engine = jacobian) -> tuple[int, str]:
    lines: list[str] = []
    code = doctor.run(lines.append, engine)
    return code, "\n".join(lines)


def test_the_engines_pass_on_every_model():
    code, text = page()
    assert code == 0, text
    assert f"all {len(MODELS)} models agree" in text
    assert text.count("PASS") == len(MODELS) == 4
    assert "FAIL" not in text


def changed(change: Callable[[Tensor], Tensor]) -> doctor.Engine:
    return lambda model, x: change(jacobian(model, x))


def raising(model: nn.Module, x: Tensor) -> Tensor:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("engine", "note"),
    [
        (changed(torch.zeros_like), ""),
        (changed(lambda j: j * (1 + 1e-6)), ""),
        (changed(lambda j: j.roll(1, 0)), ""),
        (changed(lambda j: j.masked_fill(j == j.max(), torch.nan)), ""),
        (changed(lambda j: j[:, :1]), "expected"),
        (changed(lambda j: j.float()), ""),
        (raising, "RuntimeError: no such kernel"),
    ],
    ids=["zeros", "scaled", "other sample", "nan", "shape", "float32", "raises"],
)
def test_a_wrong_engine_fails_on_every_model(engine: doctor.Engine, note: str):
    verdicts = doctor.self_check(engine)
    assert [verdict.model for verdict in verdicts] == MODELS
    assert not any(verdict.passed for verdict in verdicts)
    assert all(note in verdict.note for verdict in verdicts)
    code, text = page(engine)
    assert code == 1
    assert text.count("FAIL") == len(MODELS)
    assert "not to be trusted" in text


def test_one_wrong_model_is_enough_to_fail():
    def wrong_for_recurrence(model: nn.Module, x: Tensor) -> Tensor:
        j = jacobian(model, x)
        return j + 1e-3 if any(isinstance(m, nn.GRU) for m in model.modules()) else j

    code, text = page(wrong_for_recurrence)
    assert code == 1
    assert f"1 of {len(MODELS)} models fail" in text
    assert text.count("FAIL") == 1
    assert text.count("PASS") == len(MODELS) - 1


def test_a_wrong_rule_fails_although_autograd_saves_the_answer(monkeypatch: pytest.MonkeyPatch):
    right = registry._RULES["AddmmBackward0"]

    def doubled(step, blocks):
        out = right.reverse(step, blocks)
        return [b and dataclasses.replace(b, data=2 * b.data) for b in out]

    wrong = dataclasses.replace(right, reverse=doubled)
    monkeypatch.setitem(registry._RULES, "AddmmBackward0", wrong)
    mlp = doctor.self_check()[0]
    assert mlp.model == "MLP"
    assert mlp.difference <= doctor.TOLERANCE
    assert not mlp.passed
    assert any("disagree" in remark for remark in mlp.remarks)
    code, text = page()
    assert code == 1
    assert "disagree" in text


def test_what_the_engine_logs_is_printed_and_the_logger_left_alone(
    caplog: pytest.LogCaptureFixture,
):
    log = logging.getLogger("batchjac")
    before = (log.level, log.propagate, list(log.handlers))

    def talkative(model: nn.Module, x: Tensor) -> Tensor:
        log.info("took the long way")
        return jacobian(model, x)

    code, text = page(talkative)
    assert code == 0
    assert text.count("took the long way") == len(MODELS)
    assert (log.level, log.propagate, list(log.handlers)) == before
    assert "took the long way" not in caplog.text


def test_versions_name_what_is_installed_and_how_to_get_what_is_not(
    monkeypatch: pytest.MonkeyPatch,
):
    real = doctor.version

    def without_zarr(name: str) -> str:
        if name == "zarr":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", without_zarr)
    found = {finding.name: finding for finding in doctor.versions()}
    assert found["torch"].detail == torch.__version__
    assert found["numpy"].detail == metadata.version("numpy")
    assert not found["zarr"].present
    assert found["zarr"].detail == 'missing: pip install "batchjac[data]"'


def test_every_extra_it_names_exists():
    declared = set(metadata.metadata("batchjac").get_all("Provides-Extra"))
    assert set(doctor.EXTRAS.values()) <= declared


def test_the_ground_of_this_torch_is_all_there():
    missing = [finding for finding in doctor.ground() if not finding.present]
    # Kernels differ between machines; what the walk cannot do without may not be missing.
    assert {finding.name for finding in missing} <= {
        "oneDNN",
        "MKL",
        "OpenMP",
        "mkldnn._linear_pointwise",
    }


@pytest.mark.parametrize("answer", [False, RuntimeError("two\nlines")])
def test_a_missing_feature_is_reported_as_missing(
    monkeypatch: pytest.MonkeyPatch, answer: bool | Exception
):
    def probe() -> bool:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(doctor, "_linear_pointwise", probe)
    (found,) = [f for f in doctor.ground() if f.name == "mkldnn._linear_pointwise"]
    assert not found.present
    assert found.detail == ("no" if answer is False else "no: RuntimeError: two")


def test_the_machine_is_described():
    found = {finding.name: finding.detail for finding in doctor.machine()}
    assert list(found) == ["cpu", "threads", "devices", "memory free"]
    assert found["cpu"].endswith(torch.backends.cpu.get_cpu_capability())
    assert found["threads"].startswith(f"{torch.get_num_threads()} in an operator")
    assert found["devices"].startswith("cpu")
    assert 0 < float(found["memory free"].removesuffix(" GiB")) < 2**20


def test_rules_are_counted_and_named_missing_where_there_are_none(monkeypatch: pytest.MonkeyPatch):
    counted = doctor._rules()
    assert counted.present
    assert counted.detail.startswith(f"{len(registry.names())} ")
    monkeypatch.setattr(registry, "names", list)
    assert not doctor._rules().present


def test_the_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    page()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_runs_without_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "batchjac.doctor"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "models agree" in done.stdout


def test_kernels_that_were_measured_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration._choices.cache_clear()
    kernels.fastest.cache_clear()
    for k, name in enumerate(("columns", "posed", "columns")):
        calibration.note(f"Convolution {k}", name)
    found = {finding.name: finding.detail for finding in doctor.products()}
    assert found["matrix product"] in kernels.LINEAR
    assert found["convolutions"] == (
        "3 shapes measured in a day; product and shifted adds 2; transposed convolution 1"
    )
    assert found["kept in"] == str(tmp_path / "batchjac")
    text = page()[1]
    assert f"kept in                   {tmp_path / 'batchjac'}" in text
    calibration._choices.cache_clear()
