"""The number of threads: how it is chosen, and that results do not depend on it."""

import time

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import calm_rt
from calm_rt import inputs, ops, testing
from calm_rt.threads import faster_threads, restored_threads


@pytest.mark.parametrize("best", [1, 2, 4])
def test_the_fastest_number_is_set(best):
    with restored_threads():
        work = lambda: time.sleep(0.001 if torch.get_num_threads() == best else 0.02)  # noqa: E731
        assert faster_threads(work, 4) == best == torch.get_num_threads()


def test_one_thread_has_no_choice():
    with restored_threads():
        calls = []
        assert faster_threads(lambda: calls.append(torch.get_num_threads()), 1, repeats=3) == 1
        assert calls == [1, 1, 1]


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), restored_threads() as threads:
        assert threads == before
        torch.set_num_threads(before + 1)
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


def outputs(op: str, sizes: tuple[int, ...], gradients: bool) -> list[torch.Tensor]:
    """Of a call, and the gradients of its floating-point arguments."""
    torch.manual_seed(0)
    arguments = tree_map(
        lambda value: testing.move(value, torch.float32, "cpu"), getattr(inputs, op)(*sizes)
    )
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    leaves = [leaf.requires_grad_() for leaf in leaves if gradients and leaf.is_floating_point()]
    results = getattr(ops, op)(**arguments)
    results = list(results) if isinstance(results, tuple) else [results]
    if leaves:
        results += torch.autograd.grad(results[0].sum(), leaves)
    return results


@pytest.mark.parametrize(
    ("op", "sizes", "gradients"),
    [
        ("gated_mlp", (16, 24, 1000), True),
        ("gated_mlp", (300, 16, 2000), True),
        ("encode", (64, 500, 24, 1280, 16, 4), False),
        ("decode", (64, 500, 24, 1280, 16, 4), False),
        ("sample_latents", (128, 128, 8), True),
        ("linear_cross_entropy", (64, 256, 4096), True),
        ("linear_cross_entropy", (75, 24, 5000), True),
    ],
)
def test_products_that_the_library_shares_out_keep_their_bits(op, sizes, gradients):
    """It cuts long sums for the number of threads that it was given."""
    runs = []
    with restored_threads(), calm_rt.backend("native"):
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            runs.append(outputs(op, sizes, gradients))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
