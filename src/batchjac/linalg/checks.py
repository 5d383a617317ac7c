"""What is refused: dtypes, shapes, and Jacobians whose condition leaves no digit of the answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real  # also NumPy's
from typing import Literal

import torch
from torch import Tensor

from batchjac.errors import InputError, InputTypeError, LinAlgError

OnSingular = Literal["error", "nan"]
_CHOICES = ("error", "nan")
_SHOWN = 5  # samples named in a message, the worst first

# From Jacobians [n, o, i], and a right side if there is one, to results with the samples first and
# a condition number for each.
Compute = Callable[..., tuple[Sequence[Tensor], Tensor]]


def check_dtype(name: str, j: Tensor) -> None:
    """Refuse what LAPACK does not factorise."""
    if j.dtype in (torch.float32, torch.float64):
        return
    if j.is_complex():
        raise InputTypeError(
            f"linalg.{name} takes real Jacobians, got {j.dtype}; a complex matrix A + iB acts as "
            "the real one [[A, -B], [B, A]]"
        )
    why = ", which has too few digits to solve with" if j.is_floating_point() else ""
    raise InputTypeError(
        f"linalg.{name} needs float32 or float64, got {j.dtype}{why}; "
        "convert the model and its inputs with .float() or .double(), or J with J.float()"
    )


def check_square(name: str, j: Tensor, instead: str) -> None:
    """Refuse Jacobians that are wide or tall."""
    if j.shape[1] != j.shape[2]:
        raise InputError(
            f"linalg.{name} needs as many outputs as inputs, got Jacobians of "
            f"{j.shape[1]} x {j.shape[2]}; {instead}"
        )


def check_regularisation(value: float) -> float:
    """A number that is added to the diagonal, zero for none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(f"regularisation must be a number, got {type(value).__name__}")
    if not 0 <= value < float("inf"):
        raise InputError(f"regularisation must be zero or positive, and finite, got {value}")
    return float(value)


def check_choice(argument: str, value: str, valid: Sequence[str]) -> None:
    """Refuse a text that names nothing."""
    if value not in valid:
        listed = ", ".join(map(repr, valid))
        raise InputError(f"{argument} must be one of {listed}, got {value!r}")


def check_cut(rtol: float | None, regularisation: float) -> None:
    """Refuse a cut-off that is none."""
    if rtol is None:
        return
    if isinstance(rtol, bool) or not isinstance(rtol, Real):
        raise InputTypeError(f"rtol must be a number or None, got {type(rtol).__name__}")
    if not 0 <= rtol < 1:
        raise InputError(f"rtol is a part of the largest singular value, 0 <= rtol < 1, got {rtol}")
    if regularisation:
        raise InputError("rtol= cuts singular values off, regularisation= does not; pass one")


def cut(j: Tensor, rtol: float | None) -> float:
    """The part of the largest singular value up to which others count as zero."""
    return max(j.shape[1:]) * torch.finfo(j.dtype).eps if rtol is None else float(rtol)


def bounded(result: Tensor) -> tuple[list[Tensor], Tensor]:
    """A result that exists for every finite J, bar overflow, whose condition is then infinite."""
    finite = result.detach().flatten(1).isfinite().all(1)
    return [result], torch.where(finite, 1.0, float("inf"))


@dataclass(frozen=True)
class Guard:
    """What to do with samples that have no answer: an error, or NaN in their places.

    The limit is a condition number of 1/eps. The relative error of an inverse or a solution is
    bounded by a small multiple of ``eps * condition`` (Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd ed., 2002, theorem 9.4 and section 14.1), so beyond it no digit is left. It is
    where LAPACK's expert drivers, SciPy and MATLAB warn. The multiple, which grows with the size,
    is left out: in float32 it would refuse healthy networks.
    """

    name: str
    on_singular: OnSingular

    def __post_init__(self) -> None:
        check_choice("on_singular", self.on_singular, _CHOICES)

    def __call__(self, j: Tensor, first: int, compute: Compute, *right: Tensor) -> Sequence[Tensor]:
        """The results for Jacobians of samples ``first`` and on; NaN where there are none.

        A sample that holds NaN has a gradient of zero: its Jacobian takes no part.
        """
        finite = _finite(j)
        if finite is not None:
            if self.on_singular == "error":
                raise self._not_finite(~finite, first)
            j = _put_aside(j, ~finite)
        results, condition = compute(j, *right)
        bad = ~(condition.detach() <= limit(j.dtype))  # a NaN is no small number
        if bad.any():
            if self.on_singular == "error":
                raise self._singular(bad, condition, j.dtype, first)
            results, _ = compute(_put_aside(j, bad), *right)
        elif finite is None:
            return results
        lost = bad if finite is None else bad | ~finite
        return [_where(lost, r) for r in results]

    def _not_finite(self, bad: Tensor, first: int) -> LinAlgError:
        at = bad.nonzero().flatten() + first
        return LinAlgError(
            f"linalg.{self.name}: the Jacobians of {_count(at)} hold NaN or inf: "
            f"{_list(at[:_SHOWN].tolist(), len(at))}. Look for overflow or 0/0 in f there, or pass "
            'on_singular="nan" to have NaN in their places',
            at, torch.full((len(at),), float("nan")),
        )  # fmt: skip

    def _singular(
        self, bad: Tensor, condition: Tensor, dtype: torch.dtype, first: int
    ) -> LinAlgError:
        found = condition.detach().nan_to_num(nan=float("inf"), posinf=float("inf"))
        at = bad.nonzero().flatten()
        at = at[found[at].argsort(descending=True, stable=True)]
        worst = [f"{n + first} (condition {found[n]:.1e})" for n in at[:_SHOWN].tolist()]
        return LinAlgError(
            f"linalg.{self.name}: the Jacobians of {_count(at)} are singular in {dtype}: "
            f"{_list(worst, len(at))}; from {limit(dtype):.1e} = 1/eps on no digit is right. "
            "Pass regularisation=, use linalg.pinv or linalg.lstsq, compute in float64, or pass "
            'on_singular="nan" to have NaN in their places',
            at + first, found[at],
        )  # fmt: skip


def limit(dtype: torch.dtype) -> float:
    """The condition number from which on a matrix counts as singular."""
    return 1 / torch.finfo(dtype).eps


def _finite(j: Tensor) -> Tensor | None:
    """Which Jacobians are finite; None where all are, which takes one pass and makes nothing."""
    j = j.detach()
    if bool(j.sum().isfinite()):
        return None
    each = j.isfinite().flatten(1).all(1)
    return None if bool(each.all()) else each  # finite numbers may have an infinite sum


def _put_aside(j: Tensor, bad: Tensor) -> Tensor:
    """The identity in place of some Jacobians, from which no gradient comes."""
    one = torch.eye(j.shape[1], j.shape[2], dtype=j.dtype, device=j.device)
    return torch.where(bad[:, None, None], one, j)


def _where(bad: Tensor, result: Tensor) -> Tensor:
    nan = torch.full((), float("nan"), dtype=result.dtype, device=result.device)
    return torch.where(bad.view(-1, *(1,) * (result.dim() - 1)), nan, result)


def _count(at: Tensor) -> str:
    return f"{len(at)} sample{'s' if len(at) > 1 else ''}"


def _list(shown: Sequence[object], count: int) -> str:
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return ", ".join(map(str, shown)) + more
