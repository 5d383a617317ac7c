"""Kernels chosen by measuring: kept from process to process, and never trusted blindly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from batchjac import calibration, convolutions, cost, kernels, pace
from batchjac.calibration import FRESH, note, recalled
from batchjac.convolutions import Convolution

LAYER = Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
SIZES = (32, 3, 16, 16)


def forget() -> None:
    """As a new process starts."""
    kernels.fastest.cache_clear()
    convolutions._fastest_convolution.cache_clear()
    calibration._choices.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "batchjac"
    forget()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kernels were compared, one entry for each time that some were."""
    found: list[int] = []

    def seconds(those: list[Callable[..., Tensor]], *_: object) -> list[float]:
        found.append(len(those))
        return [2.0] * (len(those) - 1) + [1.0]

    monkeypatch.setattr(kernels, "seconds", seconds)
    return found


def ask() -> Tensor:
    """A product and a convolution that are large enough to be measured."""
    g, w = torch.ones(512, 256), torch.ones(256, 256)
    assert torch.allclose(kernels.linear(g, w), torch.full((512, 256), 256.0))
    g = torch.randn(32, 16, 16, 16)
    w = torch.randn(16, 3, 3, 3)
    found = convolutions.convolution(g, w, SIZES, LAYER)
    torch.testing.assert_close(
        found, convolutions.backward(g, w, SIZES, LAYER), rtol=1e-4, atol=1e-4
    )
    return found


# oneDNN's linear is there or not; the convolution is measured everywhere.
TWICE = 1 + (kernels._onednn() is not None)

COUNTED = """
import torch
from batchjac import convolutions, kernels
seconds, count = kernels.seconds, [0]
def counted(*given):
    count[0] += 1
    return seconds(*given)
kernels.seconds = counted
kernels.linear(torch.ones(512, 256), torch.ones(256, 256))
layer = convolutions.Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
g, w = torch.ones(32, 16, 16, 16), torch.ones(16, 3, 3, 3)
convolutions.convolution(g, w, (32, 3, 16, 16), layer)
print(count[0])
"""


def test_a_second_process_measures_nothing(tmp_path: Path) -> None:
    def process() -> int:
        said = subprocess.run(
            [sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        )  # fmt: skip
        return int(said.stdout)

    assert process() == TWICE
    assert process() == 0


def test_what_was_chosen_is_chosen_again(folder: Path, measured: list[int]) -> None:
    ask()
    ask()
    assert len(measured) == TWICE
    assert [p.suffix for p in folder.iterdir()] == [".json"]
    forget()
    ask()
    assert len(measured) == TWICE
    assert kernels.chosen_linear() in (*kernels.LINEAR, None)
    shapes = ((32, 16, 16, 16), (16, 3, 3, 3), SIZES)
    assert convolutions.chosen_convolution(LAYER, *shapes, torch.float32, False) == ["backward"]
    assert convolutions.chosen_convolution(LAYER, *shapes, torch.float64, False) == []
    assert convolutions.chosen_convolution(LAYER, (1, 1, 2, 2), *shapes[1:], torch.float32, False)


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "no json", '{"key": KEY}', '{"key": KEY, "choices": 3}',
        '{"key": KEY, "choices": {"linear": "oneDNN linear"}}',
        '{"key": KEY, "choices": {"linear": [3, 1e12]}}',
        '{"key": KEY, "choices": {"linear": ["oneDNN linear", "then"]}}',
        '{"key": "other", "choices": CHOICES}',
        '{"key": KEY, "choices": NEVER}',
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_measured_over(folder: Path, measured: list[int], text: str) -> None:
    ask()
    (file,) = folder.iterdir()
    held = json.loads(file.read_text())
    never = {question: ["no kernel", when] for question, (_, when) in held["choices"].items()}
    for word, value in (("KEY", held["key"]), ("CHOICES", held["choices"]), ("NEVER", never)):
        text = text.replace(word, json.dumps(value))
    file.write_text(text)
    forget()
    ask()
    assert len(measured) == 2 * TWICE
    assert json.loads(file.read_text())["choices"].keys() == held["choices"].keys()


def test_another_torch_or_another_number_of_threads_is_measured_by_itself(
    folder: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    monkeypatch.setattr(calibration.torch, "__version__", "9.9")
    forget()
    ask()
    assert len(measured) == 2 * TWICE
    monkeypatch.setattr(calibration.torch, "get_num_threads", lambda: 77)
    forget()
    ask()
    assert len(measured) == 3 * TWICE
    assert len(list(folder.iterdir())) == 3


def test_after_a_day_it_is_measured_again(
    folder: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    now = calibration.time.time()
    monkeypatch.setattr(calibration.time, "time", lambda: now + FRESH + 1)
    forget()
    ask()
    assert len(measured) == 2 * TWICE


def test_a_folder_that_cannot_be_written_is_no_hindrance(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "batchjac").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    ask()
    ask()
    assert len(measured) == TWICE  # the process remembers by itself
    assert [p.name for p in tmp_path.iterdir()] == ["batchjac"]
    forget()


def test_a_folder_to_read_alone_is_read(
    folder: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    (file,) = folder.iterdir()
    before = file.read_text()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    forget()
    ask()
    note("something else", "a kernel")
    assert recalled("something else") == "a kernel"
    assert len(measured) == TWICE
    assert file.read_text() == before
    assert list(folder.iterdir()) == [file]


def test_a_choice_that_computes_something_else_now_is_not_used(
    folder: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    (file,) = folder.iterdir()
    held = json.loads(file.read_text())
    held["choices"] = {
        question: ["oneDNN linear" if question == "linear" else "columns", when]
        for question, (_, when) in held["choices"].items()
    }
    file.write_text(json.dumps(held))
    wrong = {
        "columns": lambda g, w, sizes, layer: torch.zeros(sizes),
        "_onednn": lambda: lambda g, w: torch.zeros(len(g), len(w)),
    }
    for name, kernel in wrong.items():
        monkeypatch.setattr(kernels if name == "_onednn" else convolutions, name, kernel)
    forget()
    ask()  # compares with autograd's own
    assert kernels.fastest() is kernels._mm
    assert len(measured) == TWICE + 1


def test_a_choice_that_nobody_knows_is_none(folder: Path) -> None:
    shape, weight = (32, 16, 16, 16), (16, 3, 3, 3)
    trial = convolutions._trial(LAYER, shape, weight, SIZES, torch.float32)
    asked = (LAYER, shape, weight, SIZES, torch.float32, False)
    for name, found in (("polyphase", []), ("columns", ["columns"]), ("backward", ["backward"])):
        note(convolutions._question(*trial, convolutions.Around()), name)
        assert convolutions.chosen_convolution(*asked) == found


def test_the_later_of_two_choices_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process read the file before another one wrote to it."""
    now = calibration.time.time()
    monkeypatch.setattr(calibration.time, "time", lambda: now - FRESH / 2)
    note("a", "old")
    (file,) = folder.iterdir()
    held = json.loads(file.read_text())
    held["choices"]["a"] = ["new", now - 1]
    file.write_text(json.dumps(held))
    monkeypatch.setattr(calibration.time, "time", lambda: now)
    note("b", "mine")
    assert recalled("a") == "new"
    assert json.loads(file.read_text())["choices"]["a"][0] == "new"


@pytest.mark.parametrize("around", ["autocast", "default device"])
def test_what_is_measured_does_not_depend_on_the_caller(
    around: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its autocast nor its default device, on which nothing of ours runs."""
    seen: list[bool] = []
    for module in (cost.speed, pace, kernels):
        for name in ("_best", "_seconds", "seconds"):
            if hasattr(module, name):
                real = getattr(module, name)

                def watched(*given: object, real: Callable[..., object] = real) -> object:
                    seen.append(torch.is_autocast_enabled("cpu"))
                    return real(*given)

                monkeypatch.setattr(module, name, watched)
    context = torch.autocast("cpu") if around == "autocast" else torch.device("meta")
    for cached in (cost.rates, pace.clock):
        cached.cache_clear()
    with context:
        assert cost.rates(torch.get_num_threads()).product > 0
        assert pace.clock(torch.get_num_threads()).engine > 0
        ask_on_the_cpu = torch.ones(512, 256, device="cpu"), torch.ones(256, 256, device="cpu")
        assert kernels.linear(*ask_on_the_cpu).shape == (512, 256)
    for cached in (cost.rates, pace.clock):
        cached.cache_clear()
    assert len(seen) > 5
    assert not any(seen)


def test_old_choices_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST", 3)
    now = calibration.time.time()
    for k in range(5):
        monkeypatch.setattr(calibration.time, "time", lambda k=k: now + k)
        note(f"layer {k}", "posed")
    assert [recalled(f"layer {k}") for k in range(5)] == [None, None, "posed", "posed", "posed"]
    (file,) = folder.iterdir()
    assert sorted(json.loads(file.read_text())["choices"]) == ["layer 2", "layer 3", "layer 4"]


def test_two_processes_keep_each_others_choices(folder: Path) -> None:
    note("mine", "posed")
    (file,) = folder.iterdir()
    held = json.loads(file.read_text())
    held["choices"]["theirs"] = ["columns", held["choices"]["mine"][1]]
    file.write_text(json.dumps(held))
    note("mine too", "posed")
    assert sorted(json.loads(file.read_text())["choices"]) == ["mine", "mine too", "theirs"]
    assert recalled("theirs") == "columns"
