"""Every bad input: the call, the error it must raise and what the message must say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchjac import jacobian
from batchjac.errors import (
    BatchAxisError,
    BatchjacError,
    BudgetError,
    CouplingError,
    InputError,
    InputTypeError,
    NameNotFoundError,
    OutError,
    SelectionError,
    StateError,
    UnsupportedError,
)

N = 4


def linear() -> nn.Module:
    return nn.Linear(3, 2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def batch() -> Tensor:
    return torch.randn(N, 3)


class Reuses(nn.Module):
    """One layer runs twice, the other never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(3, 3)
        self.never = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.twice(self.twice(x))
        return y


class Writes(nn.Module):
    """Scales its weight in every forward, seen by autograd or not."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.layer.weight.data if self.hidden else self.layer.weight
            weight.mul_(0.9)
        y: Tensor = self.layer(x)
        return y


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = mlp()
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x))
        return y


class BatchLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.turn(x).T
        return y


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.T * 2


@dataclass(frozen=True)
class Bad:
    """A call that must fail: what is wrong, the error and what its message must say."""

    name: str
    f: Callable[[], Any]
    inputs: Callable[[], Any]
    error: type[BatchjacError]
    says: str
    options: dict[str, Any] = field(default_factory=dict)

    def call(self) -> Any:
        options = {k: v() if callable(v) else v for k, v in self.options.items()}
        return jacobian(self.f(), self.inputs(), **options)


def bad(
    name: str,
    error: type[BatchjacError],
    says: str,
    f: Any = linear,
    inputs: Callable[[], Any] = batch,
    **options: Any,
) -> Bad:
    made = f if f in (linear, mlp, Reuses, Heads, BatchLast) else lambda: f
    return Bad(name, made, inputs, error, says, options)


def read_only() -> np.ndarray:
    array = np.empty((N, 2, 3), np.float32)
    array.flags.writeable = False
    return array


def under_inference() -> Tensor:
    with torch.inference_mode():
        return torch.empty(N, 2, 3)


def masked(x: Tensor) -> Tensor:
    found: Tensor = torch.masked.masked_tensor(x, x > 0)
    return found


def own_list(x: Tensor) -> list[Any]:
    found: list[Any] = [x]
    found.append({"again": found})
    return found


def levels(x: Any) -> Any:
    for _ in range(5000):
        x = [x]
    return x


def two_sizes(x: Tensor) -> dict[str, Any]:
    return {"large": x, "small": [x, x[:, :2]]}


def longs(*values: int) -> Callable[[], Tensor]:
    return lambda: torch.tensor(values)


WRONG_TYPES = [
    bad("f a number", InputTypeError, r"f must be an nn\.Module or a callable .* got int", f=3),
    bad("f a name", InputTypeError, "f must be .* got str", f="resnet"),
    bad("inputs None", InputTypeError, "at least one torch tensor, got NoneType",
        inputs=lambda: None),
    bad("inputs an array", InputTypeError, r"got ndarray; convert arrays with torch\.as_tensor",
        inputs=lambda: np.zeros((N, 3))),
    bad("inputs a list of numbers", InputTypeError, "at least one torch tensor, got float",
        inputs=lambda: [1.0, 2.0]),
    bad("inputs by number", InputTypeError, r"so keys must be names, got \[0\]",
        inputs=lambda: {0: batch()}),
    bad("inputs empty", InputTypeError, "at least one torch tensor, got nothing",
        inputs=lambda: ()),
    bad("wrt a number", InputTypeError, "wrt must be None, 'inputs'.* got int", wrt=3),
    bad("wrt a list with a number", InputTypeError, "wrt must be .* got list",
        f=mlp, wrt=["0", 3]),
    bad("wrt a set", InputTypeError, "wrt must be .* got set", f=mlp, wrt={"0"}),
    bad("wrt a tensor", InputTypeError, "wrt must be .* got Tensor", f=mlp, wrt=batch),
    bad("of a number", InputTypeError, "of must be the dotted name of a layer, got 3", f=mlp, of=3),
    bad("create_graph a text", InputTypeError, "create_graph must be True or False, got 'no'",
        create_graph="no"),
    bad("batched None", InputTypeError, "batched must be True or False, got None", batched=None),
    bad("compile by name", InputTypeError, "compile must be True or False, got 'inductor'",
        compile="inductor"),
    bad("max_memory a list", InputTypeError, "max_memory must be bytes or text .* got list",
        max_memory=[1]),
    bad("max_memory a flag", InputTypeError, "max_memory must be .* got bool", max_memory=True),
    bad("returns nothing", InputTypeError, "f must return tensors, it returned NoneType",
        f=lambda x: None),
    bad("returns a number", InputTypeError, "f must return tensors, it returned float",
        f=lambda x: 3.0),
    bad("returns an array", InputTypeError, "f must return tensors, it returned ndarray",
        f=lambda x: x.detach().numpy()),
    bad("returns integers", InputTypeError, r"no output has a floating dtype \(got torch\.int64\)",
        f=lambda x: x.argmax(1)),
]  # fmt: skip

BATCH_AXES = [
    bad("returns a scalar", BatchAxisError,
        r"output has shape \[\], expected \[4, \.\.\.\] for 4 samples: f sums or averages",
        f=lambda x: x.sum()),
    bad("returns no batch axis", BatchAxisError,
        r"output has shape \[3\], expected \[4, \.\.\.\].*batched=False when f takes one sample",
        f=lambda x: x.sum(0)),
    bad("returns another batch size", BatchAxisError, r"output has shape \[2, 3\], expected \[4",
        f=lambda x: x[:2]),
    bad("one of two outputs has no batch axis", BatchAxisError, r"output\['loss'\] has shape \[\]",
        f=lambda x: {"y": x, "loss": x.sum()}),
    bad("an input without axes", BatchAxisError, r"inputs\[1\] is a tensor without axes",
        f=torch.mul, inputs=lambda: (batch(), torch.tensor(2.0))),
    bad("inputs of two sizes", BatchAxisError,
        r"disagree on the number of samples: inputs\[0\] \(4, 3\), inputs\[1\] \(2, 3\)",
        f=torch.mul, inputs=lambda: (batch(), batch()[:2])),
    bad("a layer with the batch last", BatchAxisError,
        r"wrt='turn': the layer's output has shape \[3, 4\], whose first axis is not the 4",
        f=BatchLast, wrt="turn"),
]  # fmt: skip

VALUES = [
    bad("no sample", InputError, r"the batch is empty \(N = 0\)", inputs=lambda: torch.ones(0, 3)),
    bad("integers only", InputError,
        r"no input has a floating dtype \(got torch\.int64\).*the embedding, with wrt=",
        f=nn.Embedding(5, 2), inputs=lambda: torch.arange(N)),
    bad("booleans only", InputError, r"no input has a floating dtype \(got torch\.bool\)",
        inputs=lambda: torch.ones(N, 3, dtype=torch.bool)),
    bad("a list in itself", InputError,
        r"a list contains itself, at \[1\]\['again'\]; pass or return",
        f=lambda x: x[0], inputs=lambda: own_list(batch())),
    bad("returns a list in itself", InputError, "a list contains itself, at", f=own_list),
    bad("a list of lists without an end", InputError, "nested too deeply",
        f=lambda x: x, inputs=lambda: levels(batch())),
    bad("unknown mode", InputError,
        "mode must be one of 'auto', 'forward', 'reverse', 'mixed', got 'backward'",
        mode="backward"),
    bad("mode a number", InputError, "mode must be one of .* got 1", mode=1),
    bad("unknown coupling", InputError,
        "coupling must be one of 'error', 'frozen', 'sum', 'full', got 'none'", coupling="none"),
    bad("sum for parameters", InputError, 'coupling="sum" has no meaning for parameters.*"full"',
        wrt="parameters", coupling="sum"),
    bad("no parameters", InputError, "wrt='parameters': ReLU has no parameters",
        f=nn.ReLU(), wrt="parameters"),
    bad("an empty list", InputError, "wrt is an empty list; name at least one", f=mlp, wrt=[]),
    bad("no bytes", InputError, "max_memory must be at least one byte.* got 0", max_memory=0),
    bad("fewer than no bytes", InputError, "at least one byte.* got -5", max_memory=-5),
    bad("not a number of bytes", InputError, "at least one byte.* got nan",
        max_memory=float("nan")),
    bad("infinitely many bytes", InputError, "and finite, got inf", max_memory=float("inf")),
    *(
        bad(f"max_memory {text!r}", InputError,
            f'max_memory must be bytes or text such as "512MiB".* got {re.escape(repr(text))}',
            max_memory=text)
        for text in ("lots", "", "1e", ".", "1.2.3MB", "5 iB", "-5MB", "0GiB", "1 XB")
    ),
]  # fmt: skip

SELECTIONS = [
    bad("outputs past the end", SelectionError,
        "outputs=2 is out of range: axis 1 of the output has 2 entries, 0 to 1", outputs=2),
    bad("outputs before the start", SelectionError, "outputs=-3 is out of range", outputs=-3),
    bad("one of a list", SelectionError, "outputs=7 is out of range", outputs=[0, 7]),
    bad("one of a tensor", SelectionError, "outputs=2 is out of range",
        outputs=longs(0, 1, 0, 2)),
    bad("a tensor of another length", SelectionError,
        "outputs has 3 entries; .* one output for each sample.*pass a list",
        outputs=longs(0, 1, 0)),
    bad("a tensor that is too long", SelectionError,
        "outputs has 5 entries; .* one output for each sample, 4 here",
        outputs=longs(0, 1, 0, 1, 0)),
    bad("argmax of three axes", SelectionError,
        r'outputs="argmax" needs an output \[N, classes\], got \[4, 3, 1\]',
        f=lambda x: x.unsqueeze(2), outputs="argmax"),
    bad("one number per sample", SelectionError, "so there is nothing to select; leave outputs=",
        f=lambda x: x.sum(1), outputs=0),
    bad("outputs past the end of one of two", SelectionError,
        r"outputs=2 is out of range: axis 1 of output\['small'\]\[1\] has 2 entries, 0 to 1",
        f=two_sizes, outputs=[0, 2]),
    bad("a list past the end of one of two", SelectionError, r"axis 1 of output\['small'\]\[1\]",
        f=two_sizes, outputs=2),
    bad("a tensor past the end of one of two", SelectionError,
        r"axis 1 of output\['small'\]\[1\]", f=two_sizes, outputs=longs(0, 1, 0, 2)),
    bad("argmax of one of two", SelectionError, r"got \[4, 3, 1\] from output\[1\]",
        f=lambda x: (x, x.unsqueeze(2)), outputs="argmax"),
    bad("one number per sample in one of two", SelectionError,
        r"outputs=0: output\[1\] has shape \[4\], one number",
        f=lambda x: (x, x.sum(1)), outputs=0),
    bad("outputs a float", InputTypeError, "outputs must be int, list of int, .* got float",
        outputs=1.5),
    bad("outputs a list of floats", InputTypeError, "outputs must be .* got list", outputs=[0.5]),
    bad("outputs a flag", InputTypeError, "outputs must be int, list, slice", outputs=True),
    bad("outputs flags", InputTypeError, "outputs must be .* got list", outputs=[True, False]),
    bad("outputs another text", InputError, 'outputs must be indices or "argmax", got "?.max',
        outputs="max"),
    bad("outputs an array", InputTypeError, "outputs must be .* got ndarray",
        outputs=lambda: np.array([0, 1])),
    bad("outputs a slice of floats", InputTypeError, r"outputs as a slice must hold integers",
        outputs=slice(0.5, None)),
    bad("outputs a tensor of floats", InputTypeError,
        r"must be a LongTensor\[N\].* got torch.float32 \[4\]", outputs=lambda: torch.zeros(N)),
    bad("outputs a matrix", InputTypeError, r"must be a LongTensor\[N\].* got torch.int64 \[4, 1\]",
        outputs=lambda: torch.zeros(N, 1, dtype=torch.int64)),
]  # fmt: skip

NAMES = [
    bad("a layer misspelt", NameNotFoundError,
        r"wrt='feature\.1' is no layer or parameter of Heads; did you mean 'features\.1'",
        f=Heads, wrt="feature.1"),
    bad("a parameter misspelt", NameNotFoundError,
        r"wrt='head\.wieght' is no .*; did you mean 'head\.weight'", f=Heads, wrt="head.wieght"),
    bad("one name of a list", NameNotFoundError, r"wrt='heat' is no .* did you mean 'head'",
        f=Heads, wrt=["features", "heat"]),
    bad("of misspelt", NameNotFoundError, r"of='hed' is no layer of Heads; did you mean 'head'",
        f=Heads, of="hed"),
    bad("of a parameter", NameNotFoundError, r"of='0\.weight' is no layer of .*; it has '0'",
        f=mlp, of="0.weight"),
    bad("nothing near", NameNotFoundError, r"'zzz' is no layer or parameter .*it has '0', '1'",
        f=mlp, wrt="zzz"),
    bad("an empty name", NameNotFoundError, "wrt='' is no layer or parameter", f=mlp, wrt=""),
    bad("wrt of a function", NameNotFoundError,
        r"wrt= names a layer or parameters, but f is a plain function.*; pass the nn\.Module",
        f=lambda x: x, wrt="0"),
    bad("of of a function", NameNotFoundError, "of= names a layer .* but f is a plain function",
        f=lambda x: x, of="0"),
    bad("parameters of a function", NameNotFoundError, "wrt= names .* f is a plain function",
        f=lambda x: x, wrt="parameters"),
]  # fmt: skip

OUTS = [
    bad("out of another shape", OutError,
        r"out must be \[4, 2, 3\] of torch\.float32 on cpu, got \[4, 3\] of torch\.float32",
        out=lambda: torch.empty(N, 3)),
    bad("out of another dtype", OutError,
        r"out must be \[4, 2, 3\] of torch\.float32 on cpu, got \[4, 2, 3\] of torch\.float64",
        out=lambda: torch.empty(N, 2, 3, dtype=torch.float64)),
    bad("out a list", OutError, r"out must be a tensor or a NumPy array or memmap.* got list",
        out=[0.0]),
    bad("out a file name", OutError, "out must be a tensor or .* got str", out="jacobian.npy"),
    bad("out read-only", OutError, r"out is read-only; open the memory map with mode 'r\+'",
        out=read_only),
    bad("out not contiguous", OutError, "out has strides .* pass a contiguous tensor",
        f=lambda x: x.unsqueeze(2) * torch.ones(2),
        out=lambda: torch.empty(N, 2, 3, 3).transpose(1, 2)),
    bad("out expanded", OutError, r"out is an expanded tensor.* pass out\.contiguous\(\)",
        out=lambda: torch.empty(1, 2, 3).expand(N, 2, 3)),
    bad("out backwards", OutError, "torch cannot use this array: .*stride.*negative",
        out=lambda: np.empty((N, 2, 3), np.float32)[::-1]),
    bad("out of another byte order", OutError, "torch cannot use this array: .*byte order",
        out=lambda: np.empty((N, 2, 3), ">f4")),
    bad("out sparse", OutError, r"out must be dense.* got the layout torch\.sparse_coo",
        out=lambda: torch.empty(N, 2, 3).to_sparse()),
    bad("out recorded", OutError, "out requires grad; pass a plain buffer",
        out=lambda: torch.empty(N, 2, 3, requires_grad=True)),
    bad("out of inference mode", OutError, r"out was made under inference mode.*out\.clone\(\)",
        out=under_inference),
    bad("out with a history", OutError, "out= and create_graph=True exclude each other",
        out=lambda: torch.empty(N, 2, 3), create_graph=True),
    bad("out for several outputs", OutError, "out= takes one Jacobian, but this question has 2",
        f=lambda x: (x, 2 * x), out=lambda: torch.empty(N, 3, 3)),
    bad("out for several layers", OutError, "out= takes one Jacobian, .* has 2",
        f=mlp, wrt=["0", "1"], out=lambda: torch.empty(N, 2, 5)),
]  # fmt: skip

TENSORS = [
    bad("sparse", InputTypeError,
        r"inputs has the sparse layout torch\.sparse_coo; pass its \.to_dense\(\) form",
        inputs=lambda: batch().to_sparse()),
    bad("sparse rows", InputTypeError, r"the sparse layout torch\.sparse_csr",
        inputs=lambda: batch().to_sparse_csr()),
    bad("sparse output", InputTypeError, r"output\['y'\] has the sparse layout",
        f=lambda x: {"y": x.to_sparse()}),
    bad("nested", InputTypeError, "inputs is a nested tensor; pad it",
        inputs=lambda: torch.nested.nested_tensor([batch(), batch()])),
    bad("nested output", InputTypeError, "output is a nested tensor",
        f=lambda x: torch.nested.nested_tensor([x[0], x[1]])),
    bad("masked", InputTypeError, r"inputs\[1\] is a masked tensor.* torch\.where",
        f=torch.mul, inputs=lambda: (batch(), masked(batch()))),
    bad("masked output", InputTypeError, r"output\['y'\] is a masked tensor",
        f=lambda x: {"y": masked(x.detach())}),
    bad("complex", InputTypeError,
        r"inputs\[0\] is complex \(torch\.complex64\).*torch\.view_as_real\(z\)",
        f=torch.abs, inputs=lambda: (torch.randn(N, 3, dtype=torch.complex64),)),
    bad("complex output", InputTypeError, r"output is complex .* return torch\.view_as_real\(y\)",
        f=lambda x: torch.complex(x, x)),
    bad("without numbers", InputTypeError, "inputs is on the meta device and holds no numbers",
        f=lambda x: x, inputs=lambda: batch().to("meta")),
]  # fmt: skip

STATES = [
    bad("a layer that runs twice", StateError, r"wrt='twice': this layer ran 2 times in one forw",
        f=Reuses, wrt="twice"),
    bad("a layer that never runs", StateError, r"wrt='never': this layer did not run",
        f=Reuses, wrt="never"),
    bad("of a layer that runs twice", StateError, r"of='twice': this layer ran 2 times",
        f=Reuses, of="twice"),
    bad("of a layer that never runs", StateError, r"of='never': this layer did not run",
        f=Reuses, of="never"),
    bad("writes into a parameter", StateError,
        r"the function wrote into parameter 'layer\.weight'; .*Make it a buffer", f=Writes()),
    bad("writes behind autograd's back", StateError, r"wrote into parameter 'layer\.weight'",
        f=Writes(hidden=True)),
    bad("lazy", StateError, r"'0\.weight' of Sequential has no shape yet; call the module once",
        f=nn.Sequential(nn.LazyLinear(2))),
    bad("lazy statistics", StateError, "'running_mean' of LazyBatchNorm1d has no shape yet",
        f=nn.LazyBatchNorm1d(affine=False)),
    bad("lazy parameters asked for", StateError, "'weight' of LazyLinear has no shape yet",
        f=nn.LazyLinear(2), wrt="parameters"),
]  # fmt: skip

LATER = [
    bad("forward mode of coupled samples", UnsupportedError,
        'coupling="sum" goes in reverse; mode="forward" cannot answer it, use mode="auto"',
        mode="forward", coupling="sum"),
    bad("mixed mode", UnsupportedError,
        'mode="mixed" needs a tensor .* and there is none; use mode="auto"', mode="mixed"),
    bad("a layer of a function of one sample", UnsupportedError,
        "of= and wrt= with a layer's name need batched=True", f=mlp, wrt="0", batched=False),
    bad("of with a function of one sample", UnsupportedError, "need batched=True",
        f=mlp, of="0", batched=False),
]  # fmt: skip

OTHERS = [
    bad("coupled samples", CouplingError, r"0 \(BatchNorm1d\).* Use model\.eval\(\)",
        f=nn.Sequential(nn.BatchNorm1d(3))),
    bad("too little memory", BudgetError, "max_memory allows 1 bytes, but what is kept takes 96",
        max_memory=1),
]  # fmt: skip

EVERY = [
    *WRONG_TYPES, *BATCH_AXES, *VALUES, *SELECTIONS, *NAMES, *OUTS, *TENSORS, *STATES, *LATER,
    *OTHERS,
]  # fmt: skip
