"""What every test stands on: seeds, threads, the device, and a guard over torch's global state."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from batchjac.engines import compiled

settings.register_profile(
    "batchjac",
    deadline=None,  # the first call of an operator is slow; pytest-timeout guards against hangs
    derandomize=True,  # one commit, one verdict; explore with HYPOTHESIS_PROFILE=explore
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("explore", parent=settings.get_profile("batchjac"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "batchjac"))

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: one thread each, or they wait for one another.
    torch.set_num_threads(1)


@pytest.fixture
def device() -> torch.device:
    """The device under test: BATCHJAC_TEST_DEVICE, the CPU unless told."""
    return torch.device(os.environ.get("BATCHJAC_TEST_DEVICE", "cpu"))


@pytest.fixture
def float64() -> Iterator[None]:
    """What a test makes without naming a dtype is in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def global_state() -> dict[str, object]:
    """The switches of torch that no call of ours may leave flipped."""
    return {
        "default dtype": torch.get_default_dtype(),
        "grad enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "matmul precision": torch.get_float32_matmul_precision(),
        "flash attention": torch.backends.cuda.flash_sdp_enabled(),
        "saved-tensor hooks": torch._C._autograd._saved_tensors_hooks_is_enabled(),
    }


@pytest.fixture(autouse=True)
def _seeded_and_left_as_found() -> Iterator[None]:
    """Seed before each test; afterwards every global switch must stand where it stood."""
    torch.manual_seed(0)
    before = global_state()
    yield
    after = global_state()
    assert after == before, "the test left torch's global state changed"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts that tests recorded with `record_property("tally", "op_db: right")`.

    Properties travel from xdist's workers to this process, which a print or a global would not.
    """
    counts: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) != "call":
                continue
            counts.update(value for key, value in report.user_properties if key == "tally")
    if counts:
        terminalreporter.section("tally")
        for name, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:6d}  {name}")


@pytest.fixture
def routes_are_taken(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> Iterator[None]:
    """No test passes because rows went in reverse, or through autograd, in the end."""
    caplog.set_level(logging.INFO, logger="batchjac")
    yield
    if "falls_back" not in request.fixturenames:
        said = [r.getMessage() for r in caplog.get_records("call")]
        said = [m for m in said if "rows now go" in m]
        assert not said


@pytest.fixture
def falls_back() -> None:
    """Asked for by tests in which rows go another way in the end."""


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """No walk that another test had compiled."""
    compiled.forget()
    yield
    compiled.forget()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled is replayed, however long it takes."""
    monkeypatch.setattr(compiled, "_seconds", lambda act, noted: 1.0)
    monkeypatch.setattr(compiled, "_MARGIN", 2.0)
