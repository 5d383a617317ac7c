"""Figures of the machine that outlive a process: kept, renewed, never in the way."""

import json
from pathlib import Path

import pytest

from batchjac import calibration
from batchjac.calibration import FRESH, remembered


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "batchjac"


class Clock:
    """Counts what is measured; the figure is what it is told."""

    def __init__(self) -> None:
        self.measured = 0
        self.rate = 2.0

    def __call__(self) -> dict[str, float]:
        self.measured += 1
        return {"rate": self.rate}


def test_it_is_measured_once(folder: Path) -> None:
    clock = Clock()
    assert remembered("one", clock) == remembered("one", clock) == {"rate": 2.0}
    assert clock.measured == 1
    assert remembered("other", clock) == {"rate": 2.0}
    assert clock.measured == 2
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".json"]


def test_another_machine_or_another_number_of_threads_is_measured_by_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    remembered("one", clock)
    monkeypatch.setattr(calibration.torch, "get_num_threads", lambda: 77)
    remembered("one", clock)
    assert clock.measured == 2


def test_after_a_day_the_better_of_both_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    remembered("one", clock)
    now = calibration.time.time()
    monkeypatch.setattr(calibration.time, "time", lambda: now + FRESH + 1)
    clock.rate = 1.0
    assert remembered("one", clock) == {"rate": 2.0}
    assert clock.measured == 2
    monkeypatch.setattr(calibration.time, "time", lambda: now + 3 * FRESH)
    clock.rate = 3.0
    assert remembered("one", clock) == {"rate": 3.0}


def test_a_disturbed_measurement_is_soon_outdone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    now = calibration.time.time()

    def after(seconds: float) -> dict[str, float]:
        monkeypatch.setattr(calibration.time, "time", lambda: now + seconds)
        return remembered("one", clock)

    assert after(0) == after(59) == {"rate": 2.0}
    assert clock.measured == 1
    clock.rate = 200.0
    assert after(61) == {"rate": 200.0}
    assert after(660) == {"rate": 200.0}  # good for ten minutes
    assert clock.measured == 2
    clock.rate = 1.0
    assert after(662) == {"rate": 200.0}
    assert after(662 + 5999) == {"rate": 200.0}
    for k in range(2, 9):
        assert after(k * FRESH) == after((k + 0.1) * FRESH) == {"rate": 200.0}
    assert clock.measured == 3 + 7


def test_a_folder_of_somebody_else_is_no_hindrance(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    for name in ("write_text", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    clock = Clock()
    assert remembered("one", clock) == remembered("one", clock) == {"rate": 2.0}
    assert clock.measured == 2


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "no json", '{"key": 1}', "null",
        '{"key": "KEY", "when": 1e12, "figures": {"rate": -1}}',
        '{"key": "KEY", "when": NOW, "figures": {"rate": Infinity}}',
        '{"key": "KEY", "when": NOW, "figures": {"rate": "fast"}}',
        '{"key": "other", "when": NOW, "figures": {"rate": 9}}',
        '{"key": "KEY", "when": "NOW", "figures": {"rate": 9}}',
        '{"key": "KEY", "when": 1' + 400 * "0" + ', "figures": {"rate": 9}}', 9999 * "[",
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_measured_over(folder: Path, text: str) -> None:
    clock = Clock()
    remembered("one", clock)
    (file,) = folder.iterdir()
    key = json.dumps(json.loads(file.read_text())["key"])[1:-1]
    when = str(json.loads(file.read_text())["when"])
    file.write_text(text.replace('"NOW"', '"then"').replace("KEY", key).replace("NOW", when))
    assert remembered("one", clock) == {"rate": 2.0}
    assert clock.measured == 2
    assert json.loads(file.read_text())["figures"] == {"rate": 2.0}


def test_a_folder_that_cannot_be_written_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "batchjac").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clock = Clock()
    assert remembered("one", clock) == {"rate": 2.0}
    assert [p.name for p in tmp_path.iterdir()] == ["batchjac"]
