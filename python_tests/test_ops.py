"""The laws that every op obeys, checked on every case of calm_rt.testing; no op is named here.

Ops without a kernel run the reference; the laws that compare the two leave them out.
"""

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import calm_rt
from calm_rt import ops, testing
from calm_rt.testing import CASES, Case

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAW_CASES = [case for case in CASES if not case.benchmark]

all_cases = pytest.mark.parametrize("case", LAW_CASES, ids=str)
all_devices = pytest.mark.parametrize("device", DEVICES)


def kernel_dtypes(case: Case, device: str) -> tuple[torch.dtype, ...]:
    return inspect.getmodule(getattr(ops, case.op)).DTYPES.get(device, ())


def native_runs() -> list:
    """(case, device, dtype) for every kernel."""
    runs = []
    for case in LAW_CASES:
        for device in DEVICES:
            dtypes = kernel_dtypes(case, device)
            runs += [
                pytest.param(case, device, dtype, id=f"{case}-{device}-{dtype}") for dtype in dtypes
            ]
    return runs


def run(case: Case, arguments: dict) -> list[Tensor]:
    """The outputs of the case, then the gradients of the sum of the first one, weighted
    unevenly."""
    outputs = getattr(ops, case.op)(**arguments)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if case.gradients and torch.is_grad_enabled():
        weight = torch.linspace(
            0.5, 1.5, outputs[0].numel(), dtype=outputs[0].dtype, device=outputs[0].device
        )
        outputs += torch.autograd.grad(
            outputs[0], case.leaves(arguments), weight.view_as(outputs[0])
        )
    return [output.detach() for output in outputs]


def _detached(value):
    return value.detach() if isinstance(value, Tensor) else value


def cast(case: Case, arguments: dict, dtype: torch.dtype) -> dict:
    """The same values in another dtype on the CPU, as leaves of a new graph."""
    arguments = tree_map(lambda value: testing.move(value, dtype, "cpu"), arguments)
    arguments = tree_map(_detached, arguments)
    for leaf in case.leaves(arguments):
        leaf.requires_grad_()
    if "dtype" in inspect.signature(getattr(ops, case.op)).parameters:
        arguments["dtype"] = dtype
    return arguments


@pytest.mark.parametrize(("case", "device", "dtype"), native_runs())
def test_error_at_most_twice_the_reference(case: Case, device: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:  # an op on ids: nothing to round
        dtype = torch.float32
    arguments = case.make(dtype, device)
    if "dtype" in inspect.signature(getattr(ops, case.op)).parameters:
        arguments["dtype"] = dtype
    with calm_rt.backend("native"):
        ours = run(case, arguments)
    # float64 has no wider type to be measured against: there the reference's error is that of
    # float32, scaled by eps
    narrow = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(narrow).eps
    with calm_rt.backend("reference"):
        exact_arguments = cast(case, arguments, torch.float64)
        truth = run(case, exact_arguments)
        reference = run(case, cast(case, arguments, narrow))
        exact = run(case, cast(case, cast(case, arguments, narrow), torch.float64))
    magnitudes = (
        case.magnitudes(exact_arguments)
        if case.magnitudes
        else [value.abs() + 1 for value in truth]
    )
    few_eps = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for output, value, expected, wide, magnitude in zip(
        ours, truth, reference, exact, magnitudes, strict=True
    ):
        assert output.shape == value.shape
        if not output.is_floating_point() and case.scores:
            check_scores(case, exact_arguments, output.cpu(), expected, dtype)
            continue
        if not output.is_floating_point():  # ids are those of exact arithmetic, not almost
            assert torch.equal(output.cpu(), value)
            continue
        error = (output.cpu().double() - value).abs()
        allowed = 2 * scale * (expected.double() - wide).abs().max() + few_eps * magnitude
        if (
            output.dtype.itemsize == 2
        ):  # rounded once in the kernel and once when the gradient is scaled
            normal = value.abs().clamp(min=torch.finfo(output.dtype).smallest_normal)
            allowed = allowed + torch.finfo(output.dtype).eps * normal
        worst = (error / allowed).max().item() if error.numel() else 0.0
        assert (error <= allowed).all(), f"{worst:.2f} times the error that is allowed"


def check_scores(
    case: Case, arguments: dict, ids: Tensor, reference_ids: Tensor, dtype: torch.dtype
) -> None:
    """Each id's exact score is the best one, up to twice what the reference misses and rounding."""
    scores, magnitudes = case.scores(arguments)

    def missed(chosen: Tensor) -> Tensor:
        return scores.amax(-1) - scores.gather(-1, chosen[..., None]).squeeze(-1)

    allowed = 2 * missed(reference_ids).max() + torch.finfo(dtype).eps * magnitudes.amax(-1)
    assert (missed(ids) <= allowed).all()


@pytest.mark.parametrize(
    "case", [case for case in LAW_CASES if case.smooth and case.gradients], ids=str
)
def test_gradcheck(case: Case) -> None:
    arguments = case.make(torch.float64)
    leaves = case.leaves(arguments)

    def first_output(*values: Tensor) -> Tensor:
        def replaced(value):
            matches = [new for old, new in zip(leaves, values, strict=True) if old is value]
            return matches[0] if matches else value

        return first(getattr(ops, case.op)(**tree_map(replaced, arguments)))

    with calm_rt.backend("native"):
        # fast mode: a random projection of the Jacobian instead of every column
        assert torch.autograd.gradcheck(first_output, leaves, fast_mode=True)


class _Recorder(TorchDispatchMode):
    """Remembers the calls of our own ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "calm_rt":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@all_cases
@all_devices
def test_opcheck(case: Case, device: str) -> None:
    with calm_rt.backend("native"), _Recorder() as recorder:
        getattr(ops, case.op)(**case.make(torch.float32, device))
    assert recorder.calls, "the public function never reached its op"
    for op, args, kwargs in recorder.calls:
        torch.library.opcheck(op, args, kwargs)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _sliced(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]


def _offset(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)


@pytest.mark.parametrize("view", [_transposed, _sliced, _offset])
@all_cases
@all_devices
def test_views_equal_contiguous(case: Case, device: str, view) -> None:
    def changed(value):
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return view(value.detach()).requires_grad_(value.requires_grad)

    with calm_rt.backend("native"):
        expected = run(case, case.make(device=device))
        actual = run(case, tree_map(changed, case.make(device=device)))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@all_cases
@all_devices
def test_expanded_rows_equal_contiguous(case: Case, device: str) -> None:
    expanded, copied = case.make(device=device), case.make(device=device)
    for name, dim in case.row_dims.items():
        first = expanded[name].detach().narrow(dim, 0, 1)
        expanded[name] = first.expand_as(expanded[name]).requires_grad_(
            expanded[name].requires_grad
        )
        copied[name] = expanded[name].detach().clone().requires_grad_(expanded[name].requires_grad)
    with calm_rt.backend("native"):
        actual, expected = run(case, expanded), run(case, copied)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@all_cases
@all_devices
def test_compiles_into_one_graph_for_all_seeds(case: Case, device: str) -> None:
    torch._dynamo.reset()
    compiles = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(getattr(ops, case.op), fullgraph=True, backend=compiles)
    with calm_rt.backend("native"):
        for seed in (3, 4):
            arguments = case.make(device=device)
            if "seed" in arguments:
                arguments["seed"] = torch.tensor(seed, device=device)
            expected = getattr(ops, case.op)(**arguments)
            actual = compiled(**arguments)
            torch.testing.assert_close(actual, expected)
            if case.gradients:
                gradients = [
                    torch.autograd.grad(first(output).sum(), case.leaves(arguments))
                    for output in (actual, expected)
                ]
                torch.testing.assert_close(*gradients)
    assert compiles.frame_count == 1


def first(output):
    return output[0] if isinstance(output, tuple) else output


@all_cases
@all_devices
def test_two_runs_are_bitwise_equal(case: Case, device: str) -> None:
    with calm_rt.backend("native"):
        runs = [run(case, case.make(device=device)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@all_cases
def test_thread_count_does_not_change_bits(case: Case) -> None:
    """With gradients at 1 and 4, for encode then takes two products of torch."""
    threads, runs = torch.get_num_threads(), {}
    try:
        with calm_rt.backend("native"):
            for count in (1, 2, 3, 4, 7):
                torch.set_num_threads(count)
                for grad in (True, False) if count in (1, 4) else (False,):
                    with torch.set_grad_enabled(grad):
                        runs[count, grad] = run(case, case.make())
    finally:
        torch.set_num_threads(threads)
    for (_, grad), outputs in runs.items():
        assert all(torch.equal(a, b) for a, b in zip(outputs, runs[1, grad], strict=True))


@pytest.mark.parametrize("case", [case for case in LAW_CASES if case.gradients], ids=str)
@all_devices
def test_checkpointing_gives_the_same_gradients(case: Case, device: str) -> None:
    def gradients(call) -> list[Tensor]:
        arguments = case.make(device=device)
        return torch.autograd.grad(call(arguments).sum(), case.leaves(arguments))

    def op(arguments: dict) -> Tensor:
        return first(getattr(ops, case.op)(**arguments))

    with calm_rt.backend("native"):
        expected = gradients(op)
        actual = gradients(lambda arguments: checkpoint(op, arguments, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("case", [case for case in LAW_CASES if case.gradients], ids=str)
def test_other_ways_to_differentiate_take_the_reference(case: Case) -> None:
    """A kernel has no tangents, and its gradient no rule of torch.func."""
    arguments = case.make(torch.float64)
    leaf, *_ = case.leaves(arguments)

    def op(value: Tensor) -> Tensor:
        changed = tree_map(lambda other: value if other is leaf else other, arguments)
        return first(getattr(ops, case.op)(**changed)).sum()

    tangent = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view_as(leaf)
    value = leaf.detach()
    with calm_rt.backend("reference"):
        expected = torch.func.jvp(op, (value,), (tangent,))[1], torch.func.grad(op)(value)
    actual = torch.func.jvp(op, (value,), (tangent,))[1], torch.func.grad(op)(value)
    torch.testing.assert_close(actual, expected)
    with calm_rt.backend("native"):
        for transform in (torch.func.grad(op), lambda x: torch.func.jvp(op, (x,), (tangent,))):
            with pytest.raises(calm_rt.NativeUnavailable, match="has no kernel for"):
                transform(value)


def wrong_arguments(case: Case) -> list[tuple[str, dict]]:
    """(argument, arguments with one tensor of it wrong): other dimensions, dtype or device."""
    arguments, wrongs = case.make(), []
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    for name, value in arguments.items():
        for leaf in tree_leaves(value):
            if not isinstance(leaf, Tensor):
                continue
            changes = [leaf.detach()[None] if leaf.dim() == 0 else leaf.detach().flatten()[0]]
            if len(tensors) > 1:  # alone it cannot disagree
                changes.append(leaf.detach().to("meta"))
            if isinstance(value, Tensor):
                changes.append(leaf.detach().to(torch.int32))  # neither a float nor an int64
                changes.append(leaf.flatten().tolist())
            for change in changes:
                changed = tree_map(
                    lambda other, old=leaf, new=change: new if other is old else other, value
                )
                wrongs.append((name, {**arguments, name: changed}))
    return wrongs


@pytest.mark.parametrize("backend", ["auto", "reference"])
@all_cases
def test_wrong_arguments_are_named(case: Case, backend: str) -> None:
    names = list(case.make())
    for name, arguments in wrong_arguments(case):
        with calm_rt.backend(backend), pytest.raises(ValueError, match=r"expected .*got ") as error:
            getattr(ops, case.op)(**arguments)
        named = str(error.value).split(":")[0].split(".")[0]
        # what disagrees with the first argument is named instead of the first argument
        assert named == name or (name == names[0] and named in names)


@all_cases
def test_wrong_numbers_are_named(case: Case) -> None:
    """Where an integer or a number is asked for, numpy's are taken, and text and fractions not."""
    arguments = case.make()
    parameters = inspect.signature(getattr(ops, case.op)).parameters
    for name, parameter in parameters.items():
        annotation = str(parameter.annotation)
        is_int = annotation in ("<class 'int'>", "int | None") or name == "seed"
        if not (is_int or name in ("beta", "eps")):
            continue
        given = arguments.get(name, parameter.default)
        for wrong in ("1", [1], *([2.5] if is_int else [])):
            with pytest.raises(ValueError, match=rf"^{name}: expected .*got "):
                getattr(ops, case.op)(**{**arguments, name: wrong})
        if is_int and isinstance(given, int):
            getattr(ops, case.op)(**{**arguments, name: np.int64(given)})


@all_cases
@all_devices
def test_zero_rows(case: Case, device: str) -> None:
    arguments = case.make(device=device)
    for name, dim in case.row_dims.items():
        value = arguments[name]
        arguments[name] = value.detach().narrow(dim, 0, 0).requires_grad_(value.requires_grad)
    if arguments.get("target") is not None:
        arguments["reduction"] = "sum"  # the mean over nothing is NaN, as in torch
    with calm_rt.backend("native"):
        outputs = run(case, arguments)
    with calm_rt.backend("reference"):
        expected = run(case, arguments)
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.shape == wanted.shape and output.dtype == wanted.dtype
        assert torch.equal(output, wanted)  # gradients of weights are zero
