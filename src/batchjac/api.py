"""The public functions."""

from collections.abc import Callable, Sequence
from typing import Any

from batchjac.planning import Planned, kinds, sketch
from batchjac.problem import pose
from batchjac.recompute import answer


def jacobian(
    f: Callable[..., Any],
    inputs: Any,
    *,
    of: str | None = None,
    wrt: str | Sequence[str] | None = None,
    outputs: Any = None,
    mode: str = "auto",
    coupling: str = "error",
    create_graph: bool = False,
    max_memory: int | str | None = None,
    out: Any = None,
    batched: bool = True,
    compile: bool = False,
) -> Any:
    """The derivative of every output of every sample by that sample's own input.

    Args:
        f: A module, or any callable on a batch. A tuple of inputs is called as ``f(*x)``, a dict
            as ``f(**x)``, anything else as ``f(x)``.
        inputs: A tensor ``[N, *in]``, or nested tuples, lists, dicts and dataclasses of them, each
            with the batch axis first. Integer and boolean tensors are passed on; they have no
            derivative and their place in the answer is ``None``.
        of: The dotted name of an inner layer, whose output is then differentiated instead of
            the function's own.
        wrt: With respect to what: ``"inputs"`` (default); the dotted name of a layer (its
            output) or of a parameter; ``"parameters"`` (all, frozen ones too); or a list of
            these, all from one walk, which gives a dict by name.
        outputs: Which outputs, along axis 1 of ``[N, classes, ...]``: an int (the axis goes), a
            list or slice (the axis stays), a ``LongTensor[N]`` or ``"argmax"`` (one per sample).
        mode: ``"reverse"`` pushes rows of the identity from the output down, ``"forward"``
            columns of it from the input up, ``"mixed"`` joins Jacobians at a tensor that every
            path passes. ``"auto"`` (default) predicts which is fastest on this machine, and says
            so in the log (level DEBUG); it stays with reverse unless another is clearly faster.
            It also sends a few rows through many small nodes one at a time through autograd's own
            engine, for all samples at once, where that is predicted to be clearly faster than all
            rows together; the other modes never do.
        coupling: What to do when the output of one sample depends on another sample, as with
            batch normalisation in training: ``"error"``; ``"frozen"``, batch statistics held
            constant; ``"sum"``, the derivative of the sum over samples; ``"full"``,
            ``[N, *out, N, *in]``.
        create_graph: Make the answer differentiable, any number of times, by inputs, parameters
            and whatever else the function reads. All that leads to the answer is then kept for the
            backward pass, unless ``max_memory`` does not hold it.
        max_memory: Bytes, or text such as ``"2GiB"``, that the call may take on top of what is
            there, the result included; default: half of what is free. Samples, then rows, are
            taken in chunks that keep it. Random layers draw anew for each chunk of samples; a
            value that depends on which samples come together is refused if they do not all fit.
            With ``create_graph`` it holds for the backward pass too, with the gradient of the
            result and the gradients that come of it: a history that would take more is not kept,
            but made again in the backward pass, for some samples at a time, with the same random
            numbers, modes and buffers as before. What the function reads must not be changed in
            between. A backward pass that is itself recorded keeps all of it.
        out: A tensor, NumPy array or memory map ``[N, *out, *in]`` to write the result to; not
            with ``create_graph``.
        batched: ``False`` when ``f`` takes one sample, without the batch axis.
        compile: Hand walks in reverse to torch's compiler, inductor. The function itself runs as
            it is. The first call on a graph of a kind (its nodes, shapes and the numbers beside
            tensors that they saved) takes seconds more: the walk is written down, compiled,
            compared with the walk and timed beside it and beside what was written down, run
            without a compiler. Later calls take the fastest of the three. It pays for many calls
            on batches of one size, mostly where tensors are small; large convolutions and matrix
            products gain nothing. Of several chunks, those are compiled that come again. Some
            64 kinds are remembered in a process. What cannot be compiled (nodes without a rule, a
            user's own function, a decision on a number, ``create_graph``, hooks, stages that go
            forward) is walked as without it, and the log (level WARNING) says so. ``max_memory``
            counts twice the room for each sample, and not the compiler's own memory.

    Returns:
        ``[N, *out, *in]`` for one output and one input; otherwise outputs nested over inputs, as
        they came. For a layer ``[N, *out, *layer]``, for a parameter ``[N, *out, *p]``. The
        result is signed and raw. What an output does not depend on has a Jacobian of zeros, and
        the log (``logging.getLogger("batchjac")``) says so.

    Raises:
        InputError: An argument has a value that cannot be used, or the batch is empty.
        InputTypeError: An argument of the wrong kind; complex, sparse or nested tensors.
        BatchAxisError: An input or output has no batch axis, or another batch size.
        SelectionError: ``outputs`` is out of range.
        NameNotFoundError: ``of`` or ``wrt`` names nothing in the module.
        OutError: ``out`` cannot take the result.
        UnsupportedError: ``mode="forward"`` or ``"mixed"`` where a node, hooks on gradients or
            ``coupling`` allow reverse only; a layer's name with ``batched=False``;
            ``coupling="frozen"`` with hooks on gradients; ``create_graph`` with a ``max_memory``
            that does not hold the history of a function with such hooks.
        CouplingError: Samples depend on each other; names the module and the remedy.
        BudgetError: ``max_memory`` does not hold one row of one sample; says what would.
        StateError: The function writes into its parameters, or a named layer runs never or twice;
            in the backward pass, made again, it read other tensors than before.

    Cost:
        One forward for each chunk of samples, and one walk over its graph with all rows,
        ``V = prod(out)`` of them: at most the work of ``V`` backward passes without weight
        gradients. The first time a function's graph is seen, one backward more, to compare.
        Peak bytes: result + samples x (saved activations + rows x widest two blocks). Going
        forward, ``prod(in)`` columns take the place of the rows; a mixed route also holds the
        Jacobians that it joins. With ``create_graph``: result and its gradient + samples x (saved
        activations + rows x all blocks) x about 2; where chunks are made again, that of one chunk,
        and one forward and walk more. Several goals: the walk to the deepest, and what is written.

    Threads: calls run one after another, because they share the flags of a model.

    Source:
        Griewank and Walther, Evaluating Derivatives, 2nd ed., 2008, section 3.2: vector reverse
        mode; the sum over samples: every row holds one cotangent for all samples at once, since
        the gradient of sample n's output by sample m's input is zero. Naumann, matrix-free Jacobian
        chaining, arXiv 2003.05755: where to go forward, and where to join.

    Example:
        >>> import torch, batchjac
        >>> model = torch.nn.Linear(3, 2)
        >>> J = batchjac.jacobian(model, torch.randn(5, 3))
        >>> J.shape, torch.equal(J[0], model.weight)
        (torch.Size([5, 2, 3]), True)
    """
    problem = pose(
        f, inputs, wrt=wrt, of=of, outputs=outputs, mode=mode, coupling=coupling,
        create_graph=create_graph, batched=batched, compile=compile,
    )  # fmt: skip
    return answer(problem, max_memory, out).jacobian


def value_and_jacobian(
    f: Callable[..., Any],
    inputs: Any,
    *,
    of: str | None = None,
    wrt: str | Sequence[str] | None = None,
    outputs: Any = None,
    mode: str = "auto",
    coupling: str = "error",
    create_graph: bool = False,
    max_memory: int | str | None = None,
    out: Any = None,
    batched: bool = True,
    compile: bool = False,
) -> tuple[Any, Any]:
    """The function's value and the derivative of every output by its sample's own input.

    Arguments, other errors, cost and source are those of ``jacobian``; the value comes from the
    same forward.

    Returns:
        ``(y, J)``: ``y`` is what ``f(inputs)`` (or the layer named by ``of``) returns, detached
        unless ``create_graph``; ``J`` is what ``jacobian`` returns. Where the samples came in
        several chunks, so does ``y``, joined along the batch axis.

    Raises:
        BatchAxisError: Also when a part of ``y`` has no batch axis and differs between chunks.

    Example:
        >>> import torch, batchjac
        >>> y, J = batchjac.value_and_jacobian(torch.sin, torch.zeros(4, 2))
        >>> y.shape, J.shape, J[0].tolist()
        (torch.Size([4, 2]), torch.Size([4, 2, 2]), [[1.0, 0.0], [0.0, 1.0]])
    """
    problem = pose(
        f, inputs, wrt=wrt, of=of, outputs=outputs, mode=mode, coupling=coupling,
        create_graph=create_graph, batched=batched, compile=compile,
    )  # fmt: skip
    solution = answer(problem, max_memory, out, valued=True)
    return solution.value(), solution.jacobian


def plan(
    f: Callable[..., Any],
    inputs: Any,
    *,
    of: str | None = None,
    wrt: str | Sequence[str] | None = None,
    outputs: Any = None,
    mode: str = "auto",
    coupling: str = "error",
    create_graph: bool = False,
    max_memory: int | str | None = None,
    batched: bool = True,
    compile: bool = False,
) -> Planned:
    """How the derivative of every output by its sample's own input would be computed.

    Arguments and errors are those of ``jacobian``.

    Returns:
        What prints as a table: the axes in words; samples and rows in one go; each stage with its
        direction and why; the kernel of each kind of node that has several, as it was measured on
        this machine or is to be; the nodes without a rule; passes, multiply-adds, bytes and seconds
        as predicted, beside one backward pass for each output. Its ``plan`` holds the same as data.
        Called with inputs of the same kind it is ``jacobian`` with the same options; inputs of
        another kind are refused with one line for each field that differs.

    Cost:
        One forward, of the first chunk of samples; no walk, no result. Once a day the rates
        of this machine are measured, 0.1 s.

    Source:
        As for ``jacobian``. The times are work over measured rates, ``batchjac/cost.py``; they
        leave out the function's own forward. ``python -m benchmarks.prediction`` compares them
        with what is measured on the cases of the suite: within a factor of two.

    Example:
        >>> import torch, batchjac
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh())
        >>> planned = batchjac.plan(model, torch.zeros(5, 8))
        >>> print(planned)  # doctest: +ELLIPSIS
        axes          5 samples x 64 outputs x 8 inputs
        samples       5 of 5 in one forward
        ...
        >>> planned(torch.randn(5, 8)).shape
        torch.Size([5, 64, 8])
    """
    options = {
        "wrt": wrt, "of": of, "outputs": outputs, "mode": mode, "coupling": coupling,
        "create_graph": create_graph, "batched": batched, "compile": compile,
    }  # fmt: skip
    problem = pose(f, inputs, **options)
    return Planned(sketch(problem, max_memory), f, options, max_memory, kinds(problem.tree))
