"""What only a GPU can break: streams, graphs, more than 2^31 scores, the same bits 50 times, and
ids that only the device can see to be wrong.

The laws of test_ops.py run on the GPU as well where there is one.
"""

import pytest
import torch
from test_ops import LAW_CASES, all_cases, run
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import calm_rt
from calm_rt import ops
from calm_rt.reference import Stream
from calm_rt.testing import Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

RUNS = 50
DELAY_CYCLES = 50_000_000  # tens of milliseconds: far longer than it takes to issue an op
BEYOND_INT = 2**31


def tensors_of(arguments: dict) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor)]


def blank_copy(case: Case, arguments: dict) -> dict:
    """The same arguments with zeros in every tensor: any op takes them, and they mean something
    else."""
    blank = tree_map(
        lambda value: torch.zeros_like(value) if isinstance(value, Tensor) else value, arguments
    )
    for leaf in case.leaves(blank):
        leaf.requires_grad_()
    return blank


def fill(target: dict, source: dict) -> None:
    with torch.no_grad():
        for to, value in zip(tensors_of(target), tensors_of(source), strict=True):
            to.copy_(value)


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@all_cases
def test_cuda_stream_is_the_current_one(case: Case) -> None:
    """On a stream whose arguments arrive late, an op on any other stream would see zeros."""
    arguments = case.make(device="cuda")
    late = blank_copy(case, arguments)
    with calm_rt.backend("native"):
        expected = run(case, arguments)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(DELAY_CYCLES)
            fill(late, arguments)
            actual = run(case, late)
        side.synchronize()
    assert_equal(actual, expected)


@all_cases
def test_cuda_graph_replays_on_new_arguments(case: Case) -> None:
    """A capture fails on any synchronisation; a replay must not remember the captured values."""
    arguments = case.make(device="cuda")
    held = blank_copy(case, arguments)
    with calm_rt.backend("native"):
        expected = run(case, arguments)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as torch asks: libraries set themselves up outside
            for _ in range(2):
                run(case, held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run(case, held)
        fill(held, arguments)
        for _ in range(3):
            for output in outputs:
                output.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert_equal(outputs, expected)


@all_cases
def test_cuda_gives_the_same_bits_in_50_runs(case: Case) -> None:
    with calm_rt.backend("native"):
        arguments = case.make(device="cuda")
        first = run(case, arguments)
        for _ in range(RUNS - 1):
            assert_equal(run(case, arguments), first)


def spread_rows(rows: int) -> Tensor:
    """A few rows at both ends and around the places where 32 bits would wrap."""
    return torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device="cuda")


@pytest.mark.parametrize("hidden_size", [16, 17])  # rows that are aligned to 16 bytes or not
def test_cuda_argmax_beyond_int(hidden_size: int) -> None:
    vocabulary = 128257
    rows = BEYOND_INT // vocabulary + 100
    generator = torch.Generator("cuda").manual_seed(1)
    sizes = (rows + vocabulary, hidden_size)
    operands = torch.randn(sizes, device="cuda", dtype=torch.bfloat16, generator=generator)
    hidden, weight = operands[:rows].clone(), operands[rows:].clone()
    ids = ops.linear_argmax(hidden, weight)
    some = spread_rows(rows)
    exact = (hidden[some].double() @ weight.double().T).argmax(-1)
    assert torch.equal(ids[some], exact)


def test_cuda_cross_entropy_beyond_int() -> None:
    vocabulary, size = 128257, 8
    rows = BEYOND_INT // vocabulary + 100
    generator = torch.Generator("cuda").manual_seed(2)
    hidden = torch.randn(rows, size, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(vocabulary, size, device="cuda", generator=generator).bfloat16()
    target = torch.randint(vocabulary, (rows,), device="cuda", generator=generator)
    at_once = 2 * rows * vocabulary  # one chunk of all rows
    loss = ops.linear_cross_entropy(
        hidden, weight, target, reduction="none", max_workspace_bytes=at_once
    )
    some = spread_rows(rows)
    logits = hidden[some].double() @ weight.double().T
    exact = torch.nn.functional.cross_entropy(logits, target[some], reduction="none")
    # the loss is a logit minus a mean of logits in the exponent, each rounded to bfloat16
    magnitude = (hidden[some].double().abs() @ weight.double().abs().T).amax(-1)
    assert ((loss[some] - exact).abs() <= 2 * torch.finfo(torch.bfloat16).eps * magnitude).all()


def test_cuda_noise_beyond_int() -> None:
    draws, length = 3, 700
    rows = torch.arange(BEYOND_INT // (draws * length) + 10, device="cuda")
    seed = torch.tensor(5, device="cuda")
    noise = ops.noise(rows, draws, length, seed=seed, stream=Stream.HEAD)
    some = spread_rows(rows.numel())
    alone = ops.noise(rows[some], draws, length, seed=seed, stream=Stream.HEAD)
    assert torch.equal(noise[:, some], alone)


def assert_alive() -> None:
    """A fault ends the context: whatever is called next would fail."""
    torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").sum().item() == 3


def wrong_ids(ids: Tensor, vocabulary: int) -> list[Tensor]:
    """The ids with one in the second row that is none, [R, ...] each."""
    limits, wrongs = torch.iinfo(torch.int64), []
    for wrong in (-1, vocabulary, limits.min, limits.max):
        wrongs.append(ids.clone())
        wrongs[-1].view(len(ids), -1)[1, -1] = wrong
    return wrongs


def assert_marked(output: Tensor, right: Tensor) -> None:
    """The second row is NaN, the others are what they were."""
    assert output[1].isnan().all()
    others = [row for row in range(len(right)) if row != 1]
    assert torch.equal(output[others], right[others])


@pytest.mark.parametrize("case", [case for case in LAW_CASES if case.op == "encode"], ids=str)
def test_cuda_encode_marks_wrong_ids(case: Case) -> None:
    arguments = case.make(torch.float32, "cuda")
    ids, weights = arguments["ids"], arguments["weights"]
    with calm_rt.backend("native"), torch.no_grad():
        expected = ops.encode(ids, weights)
        for wrong in wrong_ids(ids, weights[0].shape[-2]):  # of the tables or the embedding
            for output, right in zip(ops.encode(wrong, weights), expected, strict=True):
                assert_marked(output, right)
    assert_alive()


def test_cuda_cross_entropy_marks_wrong_targets() -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    hidden, weight = (
        torch.randn(rows, 16, device="cuda", generator=generator, requires_grad=True)
        for rows in (5, 30)
    )
    target = torch.tensor([3, 29, 0, -100, 7], device="cuda")
    with calm_rt.backend("native"):
        expected = ops.linear_cross_entropy(hidden, weight, target, reduction="none")
        for wrong in wrong_ids(target, 30):
            loss = ops.linear_cross_entropy(hidden, weight, wrong, reduction="none")
            assert_marked(loss, expected)
            mean = ops.linear_cross_entropy(hidden, weight, wrong)
            assert mean.isnan()
            grad_hidden, _ = torch.autograd.grad(mean, (hidden, weight))
            assert grad_hidden[1].isnan().all()
    assert_alive()


@all_cases
def test_cuda_refuses_arguments_on_the_cpu(case: Case) -> None:
    """Each of them beside a first argument on the device, before anything is launched."""
    for name in list(case.make(device="cuda"))[1:]:
        arguments = case.make(device="cuda")
        if not tensors_of(arguments[name]):
            continue
        arguments[name] = tree_map(
            lambda value: value.detach().cpu() if isinstance(value, Tensor) else value,
            arguments[name],
        )
        with calm_rt.backend("native"), pytest.raises(ValueError, match="got one on"):
            getattr(ops, case.op)(**arguments)
    assert_alive()
