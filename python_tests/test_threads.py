"""The choice of the number of threads."""

import time

import pytest
import torch

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
