"""The main job: train two small networks, differentiate all their samples, and look."""

import time
from dataclasses import dataclass
from pathlib import Path

from batchjac.demo.extras import require


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the samples and epochs of both parts of the demo."""

    digits: int | None
    digit_epochs: int
    digits_compared: int
    signals_trained: int
    signal_epochs: int
    signals: int
    signals_compared: int


FULL = Sizes(
    digits=None,
    digit_epochs=30,
    digits_compared=120,
    signals_trained=12_000,
    signal_epochs=6,
    signals=20_000,
    signals_compared=500,
)
QUICK = Sizes(
    digits=240,
    digit_epochs=4,
    digits_compared=24,
    signals_trained=1_500,
    signal_epochs=2,
    signals=2_500,
    signals_compared=40,
)


def run(out: Path, quick: bool = False) -> None:
    """Do the main job and write pictures, Jacobians and a summary into the folder `out`.

    Handwritten digits under a LeNet5 give ``[1797, 10, 1, 32, 32]``, planted signals under a
    1-D CNN ``[20000, 3, 1, 224]``; both are compared with the loops of the texts that batchjac
    started from. With `quick` a small version of the same runs in a few seconds. On one machine
    the numbers are the same each time to rounding, apart from the times.

    Raises `batchjac.demo.extras.MissingExtraError` if a package of the extra is missing.
    """
    require()
    # Imported only now: without the packages of the extra they cannot be.
    from batchjac.demo import summary
    from batchjac.demo.digits import run_digits
    from batchjac.demo.features import run_signals

    out.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if quick else FULL
    start = time.perf_counter()
    digits = run_digits(
        out, n=sizes.digits, epochs=sizes.digit_epochs, compared=sizes.digits_compared
    )
    print(summary.digits_text(digits), end="\n\n", flush=True)
    signals = run_signals(
        out,
        train=sizes.signals_trained,
        n=sizes.signals,
        epochs=sizes.signal_epochs,
        compared=sizes.signals_compared,
    )
    print(summary.signals_text(signals), end="\n\n")
    seconds = time.perf_counter() - start
    summary.write(out, digits, signals, seconds)
    print(f"Done in {seconds:.0f} s. Look at digits.png, signals.png and summary.md in {out}")
