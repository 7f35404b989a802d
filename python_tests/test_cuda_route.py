"""The Python in front of CUDA kernels, on tensors without values that claim to be on a GPU.

No device is needed: an op's public function checks, routes and calls the fake kernel.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from planted import PlantedDraws
from test_ops import all_cases
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import calm_rt
from calm_rt import _native, ops, reference
from calm_rt.testing import CASES, Case

ENERGY = next(case for case in CASES if case.op == "energy_score")
MLP = next(case for case in CASES if case.op == "gated_mlp")


@pytest.fixture
def claimed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors made here have no values; a GPU of compute capability 9.0 seems to be there."""
    monkeypatch.setattr(_native, "_has_cuda", True)
    monkeypatch.setattr(_native, "_capability", lambda index: (9, 0))
    with FakeTensorMode(), calm_rt.backend("native"):
        yield


def on_cuda(case: Case, device: str = "cuda") -> dict[str, Any]:
    def claim(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    return tree_map(claim, case.make())


@all_cases
def test_every_op_reaches_its_kernel(case: Case, claimed: None) -> None:
    outputs = getattr(ops, case.op)(**on_cuda(case))
    for output in outputs if isinstance(outputs, tuple) else [outputs]:
        assert output.device.type == "cuda"


@all_cases
def test_every_op_compiles_into_one_graph(case: Case, claimed: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, case.op), fullgraph=True, backend="eager")
    compiled(**on_cuda(case))


def test_numbers_of_choices_are_drawn_by_the_kernel(claimed: None) -> None:
    patches, weights = (torch.empty(2, size, device="cuda") for size in (3, 5))
    seed, rows = (torch.empty(s, dtype=torch.int64, device="cuda") for s in ((), 2))
    draws = PlantedDraws(patches, weights, seed, rows)
    for numbers in (draws.choice(), draws.places(1, 4, 2), draws.acceptance(1, 5)):
        assert numbers.device.type == "cuda" and numbers.dtype == torch.float64


def test_an_older_gpu_takes_the_reference_and_says_why(
    claimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(_native, "_capability", capabilities.__getitem__)
    arguments = on_cuda(ENERGY)
    ops.energy_score(**arguments)
    older = tree_map(
        lambda value: value.to("cuda:1") if isinstance(value, torch.Tensor) else value, arguments
    )
    with pytest.raises(calm_rt.NativeUnavailable, match=r"capability 7\.5, and .* need 8\.0"):
        ops.energy_score(**older)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_compiled_code_knows_an_older_gpu(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch is asked while dynamo traces, in one graph; the graph holds the kernel or does not."""

    def get_device_capability(device: int | None = None) -> tuple[int, int]:
        return capability if device == 1 else (9, 0)

    monkeypatch.setattr(_native, "_has_cuda", True)
    monkeypatch.setattr(_native, "_capability", functools.cache(_native._capability.__wrapped__))
    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    def why_reference(x: torch.Tensor) -> tuple[torch.Tensor, str | None]:
        dtypes = {"cuda": (x.dtype,)}
        return x + 1, _native.why_reference("energy_score", "cuda", x.dtype, dtypes, 1)

    torch._dynamo.reset()
    _, reason = torch.compile(why_reference, fullgraph=True, backend="eager")(torch.ones(1))
    assert reason == why_reference(torch.ones(1))[1]
    assert reason is None if capability == (8, 0) else "compute capability 7.5" in reason
    with FakeTensorMode():
        arguments = on_cuda(MLP, "cuda:1")
        torch.compile(ops.gated_mlp, fullgraph=True, backend=keep)(**arguments)
    assert len(graphs) == 1 and ("calm_rt.gated_mlp" in graphs[0]) == (capability == (8, 0))


def test_tensors_of_a_model_that_was_moved_in_part_are_named(claimed: None) -> None:
    case = next(case for case in CASES if case.op == "decode")
    arguments = on_cuda(case)
    weights = arguments["weights"]
    half = weights.latent._replace(bias=torch.empty(weights.latent.bias.shape))
    arguments["weights"] = weights._replace(latent=half)
    expected = "weights.latent.bias: expected a tensor on cuda:0, got one on cpu"
    with pytest.raises(ValueError, match=expected):
        ops.decode(**arguments)


def test_an_id_of_no_token_is_embedded_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(5, 3, requires_grad=True)
    ids = torch.tensor([[4, -1], [5, 0]])
    with pytest.raises(IndexError):
        reference.embed(ids, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU: never look
    rows = reference.embed(ids, table)
    known = torch.tensor([[True, False], [False, True]])
    assert rows[~known].isnan().all()
    assert torch.equal(rows[known], table[[4, 0]])
    rows[known].sum().backward()
    assert torch.equal(table.grad[:, 0], torch.tensor([1.0, 0, 0, 0, 1]))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_wrong_id_spoils_its_own_patch_only(
    backend: str, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in CASES if case.op == "encode" and case.gradients)
    arguments = case.make()
    if not trained:
        arguments = tree_map(
            lambda value: value.detach() if isinstance(value, torch.Tensor) else value, arguments
        )
    expected = ops.encode(**arguments)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ids = arguments["ids"].clone()
    ids[1, 0] = 2**40
    with calm_rt.backend(backend):
        outputs = ops.encode(**{**arguments, "ids": ids})
    for output, clean in zip(outputs, expected, strict=True):
        assert output[1].isnan().all()
        torch.testing.assert_close(output[2:], clean[2:])
