"""linear_argmax where a rounded screen could go wrong: overflow, underflow, NaN and (near-)ties."""

import pytest
import torch

import calm_rt
from calm_rt import ops
from calm_rt.ops.linear_argmax import screen_vocabulary

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def ids(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The kernel's, which a screen made beforehand does not change, for many rows or for few."""
    with calm_rt.backend("native"):
        found = ops.linear_argmax(hidden, weight)
        if weight.dtype != torch.float64:
            screen = screen_vocabulary(weight)
            assert torch.equal(ops.linear_argmax(hidden, weight, screen), found)
            few = ops.linear_argmax(hidden[-2:], weight, screen)
            assert torch.equal(few, found[-2:])
    return found


def exact(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (hidden.double() @ weight.double().T).argmax(-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_differences_far_below_the_screen_decide(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(20, 64).to(dtype)
    weight = torch.randn(1, 64).repeat(3000, 1)
    weight[:, 7] += torch.randn(3000) * 1e-3  # all rows alike but for one number
    weight = weight.to(dtype)
    assert torch.equal(ids(hidden, weight), exact(hidden, weight))


def test_overflow_of_the_screen() -> None:
    hidden, weight = torch.full((3, 8), 1e20), torch.full((3, 8), 1e20)
    weight[1] *= 2
    assert ids(hidden, weight).tolist() == [1, 1, 1]
    assert ids(-hidden, weight).tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale", [1e-19, 1e-22])
def test_underflow_of_the_screen(scale: float) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(100, 64) * scale, torch.randn(2500, 64) * scale
    assert torch.equal(ids(hidden, weight), exact(hidden, weight))


def test_nan_wins_as_in_torch() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(6, 32), torch.randn(5000, 32)
    hidden[1] = float("nan")
    hidden[2, 3] = float("inf")
    weight[4700, 5] = weight[4100, 5] = float("nan")
    logits = hidden @ weight.T
    expected = logits.argmax(-1)
    assert torch.equal(ids(hidden, weight), expected) and expected[0] == 4100 and expected[1] == 0


def test_nothing_but_zeros_is_a_tie_of_all() -> None:
    zeros = torch.zeros(5, 16)
    assert ids(zeros, torch.randn(4000, 16)).tolist() == [0] * 5
    assert ids(torch.randn(5, 16), torch.zeros(4000, 16)).tolist() == [0] * 5


def test_a_row_is_its_own() -> None:
    torch.manual_seed(3)
    hidden, weight = torch.randn(1500, 24), torch.randn(3000, 24)
    together = ids(hidden, weight)
    assert torch.equal(torch.cat([ids(part, weight) for part in hidden.split(7)]), together)


def test_mixed_types_are_compared_exactly() -> None:
    torch.manual_seed(4)
    hidden, weight = torch.randn(9, 40).bfloat16(), torch.randn(700, 40)
    assert torch.equal(ids(hidden, weight), exact(hidden, weight))


@pytest.mark.parametrize("vocabulary", [1, 47, 48, 49, 1000])
@pytest.mark.parametrize("size", [1, 63, 64, 130])
def test_screen_of_odd_sizes(vocabulary: int, size: int) -> None:
    torch.manual_seed(5)
    hidden, weight = torch.randn(21, size), torch.randn(vocabulary, size)
    assert torch.equal(ids(hidden, weight), exact(hidden, weight))


def test_screen_of_a_strided_weight() -> None:
    torch.manual_seed(6)
    hidden, weight = torch.randn(3, 40), torch.randn(40, 500).T
    assert torch.equal(ids(hidden, weight), exact(hidden, weight))


def test_no_screen_where_no_kernel_takes_one() -> None:
    with calm_rt.backend("reference"):
        assert screen_vocabulary(torch.randn(5, 4)) is None
    assert screen_vocabulary(torch.randn(5, 4).double()) is None
    assert screen_vocabulary(torch.randn(2, 32769)) is None


def test_compiled_code_searches_without_a_screen() -> None:
    hidden, weight = torch.randn(2, 4), torch.randn(5, 4)

    def search(hidden, weight):
        return ops.linear_argmax(hidden, weight, screen_vocabulary(weight))

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight), search(hidden, weight))


def test_a_wrong_screen_is_refused() -> None:
    hidden, weight = torch.randn(3, 40), torch.randn(500, 40)
    for wrong in (torch.zeros(3, 4), torch.zeros(4, dtype=torch.int8)):
        with pytest.raises(ValueError, match="screen: expected what screen_vocabulary makes"):
            ops.linear_argmax(hidden, weight, wrong)
    for other in (torch.randn(400, 40), torch.randn(500, 400)):
        with pytest.raises(RuntimeError, match="screen must be what screen_vocabulary made"):
            ops.linear_argmax(hidden, weight, screen_vocabulary(other))
    with pytest.raises(RuntimeError, match="screen must be what screen_vocabulary made"):
        ops.linear_argmax(hidden, weight[:-1], screen_vocabulary(weight))  # as many panels
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="weight: expected"):
            screen_vocabulary(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("screened", [False, True])
def test_zeros_have_an_id_where_small_numbers_are_flushed(dtype, rows: int, screened: bool) -> None:
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    zeros, tiny = torch.zeros(rows, 64, dtype=dtype), torch.full((rows, 64), 1e-38, dtype=dtype)
    try:
        assert torch.set_flush_denormal(True)
        for hidden, matrix in ((zeros, weight), (tiny, weight), (tiny, torch.zeros_like(weight))):
            screen = screen_vocabulary(matrix) if screened else None
            with calm_rt.backend("native"):
                ids = ops.linear_argmax(hidden, matrix, screen)
            exact = (hidden.double() @ matrix.double().T).argmax(-1)
            assert torch.equal(ids, exact)
    finally:
        torch.set_flush_denormal(False)
