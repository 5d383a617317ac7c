"""A map in the forms of other libraries: SciPy's operators, torch's sparse tensors."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchjac.errors import InputError, UnsupportedError
from batchjac.measures import Products

if TYPE_CHECKING:
    import numpy as np


def to_scipy(a: Products) -> Any:
    """A ``scipy.sparse.linalg.LinearOperator`` ``[N * O, N * I]``, samples one after the other."""
    from scipy.sparse.linalg import LinearOperator  # an extra: the core needs torch alone

    for axes in (a.inputs, a.outputs):
        if len({leaf.shared for leaf in axes.leaves}) > 1:
            raise UnsupportedError(
                f"to_scipy() of {axes.words}: some belong to one sample each and others to all "
                "samples, so there is no one matrix [N * O, I]; make an operator for each kind "
                "with wrt="
            )
    rows = a.outputs.width * (1 if a.outputs.shared else a.samples)
    columns = a.inputs.width * (1 if a.inputs.shared else a.samples)
    try:
        dtype = torch.empty(0, dtype=a.dtype).numpy().dtype
    except TypeError as error:
        raise UnsupportedError(
            f"NumPy has no {a.dtype}; make the model and its inputs float32"
        ) from error

    def through(b: Products, x: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        flat = torch.as_tensor(x.reshape(len(x), -1).copy()).T.to(a.device)
        split = b.inputs.split(flat.reshape(len(flat), -1, b.inputs.width))
        found = b.outputs.flat(b.in_turns(b.push, split, b.outputs))
        y: np.ndarray[Any, Any] = found.flatten(1).T.detach().cpu().numpy()
        return y.reshape(-1) if x.ndim == 1 else y

    return LinearOperator(
        (rows, columns), dtype=dtype,
        matvec=lambda x: through(a, x), rmatvec=lambda x: through(a.T, x),
        matmat=lambda x: through(a, x), rmatmat=lambda x: through(a.T, x),
    )  # fmt: skip


def to_sparse(a: Products, layout: torch.layout = torch.sparse_coo) -> Tensor:
    """The matrix ``[N * O, N * I]`` of all samples: their blocks along its diagonal."""
    if a.inputs.shared or a.outputs.shared:
        raise UnsupportedError(
            "parameters are shared by all samples, so their Jacobian has no blocks apart; "
            "A.matrix() is [N, O, P]"
        )
    n, o, i = a.shape
    blocks = a.matrix()
    if layout == torch.sparse_coo:
        own = torch.arange(n, device=a.device)[:, None, None]
        row = (own * o + torch.arange(o, device=a.device)[:, None]).expand(n, o, i)
        column = (own * i + torch.arange(i, device=a.device)).expand(n, o, i)
        index = torch.stack([row.reshape(-1), column.reshape(-1)])
        return torch.sparse_coo_tensor(
            index, blocks.reshape(-1), (n * o, n * i), is_coalesced=True, check_invariants=False
        )
    if layout == torch.sparse_bsr:
        with warnings.catch_warnings():  # that the layout is in beta; the caller asked for it
            warnings.filterwarnings("ignore", "Sparse BSR", UserWarning)
            return torch.sparse_bsr_tensor(
                torch.arange(n + 1, device=a.device), torch.arange(n, device=a.device), blocks,
                size=(n * o, n * i), check_invariants=False,
            )  # fmt: skip
    raise InputError(f"layout must be torch.sparse_coo or torch.sparse_bsr, got {layout}")
