"""Steps without a look by the host: the same texts, and nothing that a CUDA graph forbids."""

import copy

import pytest
import torch
from test_engine import MANY, model, poisoned  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from calm_rt.generation import Generator
from calm_rt.nn import KVCache
from calm_rt.replay import Steps
from calm_rt.sequence import Sampling

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
SETTINGS = {"max_new_tokens": 22, "seed": 5, "num_candidates": 20}
# what reads a value on the host, or makes a tensor as large as values say
LOOKS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "repeat_interleave",
}


class NoLook(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        assert name not in LOOKS, name
        if name in ("index", "index_put_"):
            masks = [i for i in arguments[1] if i is not None and i.dtype == torch.bool]
            assert not masks, "an index of booleans"
        return function(*arguments, **(keywords or {}))


def check_texts(model, steps, temperature, **single):  # noqa: F811
    """single: options of what takes single steps."""
    expected = Generator(model, **single).generate(MANY, temperature=temperature, **SETTINGS)
    generator = Generator(model, max_batch_size=3, steps_per_read=steps)
    results = generator.generate(MANY, temperature=temperature, **SETTINGS)
    for one, other in zip(results, expected, strict=True):
        assert (one.ids, one.finished, one.steps) == (other.ids, other.finished, other.steps)
        assert one.draws == other.draws and one.exact == other.exact
    assert len({one.steps for one in results}) > 2  # they end at different times


@pytest.mark.parametrize("temperature", [1, "1/2", 0])
@pytest.mark.parametrize("steps", [2, 5, 100])
def test_texts_are_those_of_single_steps(model, steps, temperature):  # noqa: F811
    check_texts(model, steps, temperature)


@needs_cuda
@pytest.mark.parametrize("temperature", [1, "1/2", 0])
def test_cuda_texts_are_those_of_single_steps(model, temperature):  # noqa: F811
    """In batches of one size, for a row's rounding depends on it there."""
    check_texts(copy.deepcopy(model).to("cuda"), 5, temperature, max_batch_size=3)


@needs_cuda
@pytest.mark.parametrize("temperature", [1, "1/2"])
def test_cuda_replays_are_the_steps_that_were_captured(model, monkeypatch, temperature):  # noqa: F811
    check_replays(copy.deepcopy(model).to("cuda"), monkeypatch, temperature)


def check_replays(model, monkeypatch, temperature):  # noqa: F811
    """Steps with a graph and without draw the same, in a second run from new states too."""
    weight = model.transformer.norm.weight
    device, capture = weight.device, Steps._capture
    sampling = Sampling(temperature, 20, "pool", 100, "raise", 7)
    runs = []
    for graph in (True, False):
        monkeypatch.setattr(Steps, "_capture", capture if graph else lambda steps: None)
        cache = KVCache(model.config, 3, 12, weight.dtype, device)
        with torch.no_grad():
            steps = Steps(model, cache, sampling, 4)
            assert (steps._graph is not None) == (graph and device.type == "cuda")
            last = torch.ones(3, model.config.patch_size, dtype=torch.int64, device=device)
            rows, drawn = torch.arange(3, device=device) << 32, []
            for count in (4, 2):
                patches, finite = (part.clone() for part in steps.run(last, rows, count))
                last, rows = patches[-1], rows + count
                drawn += [patches, finite]
        assert cache.lengths.tolist() == [6, 6, 6]
        runs.append(drawn)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert runs[0][1].all() and runs[0][0].unique().numel() > 2


def test_several_steps_are_run_at_once(model, monkeypatch):  # noqa: F811
    counts = []
    run = Steps.run

    def spy(steps, patches, rows, count):
        counts.append(count)
        return run(steps, patches, rows, count)

    monkeypatch.setattr(Steps, "run", spy)
    generator = Generator(model, steps_per_read=4)
    [result] = generator.generate([MANY[0]], **SETTINGS)
    assert sum(counts) >= result.steps - 1 and 4 in counts  # the first follows the prompt
    assert max(counts) <= 4


@pytest.mark.parametrize("temperature", [1, "1/3"])
def test_nothing_is_looked_at(model, monkeypatch, temperature):  # noqa: F811
    sampling = Sampling(temperature, 20, "pool", 100, "raise", 7)
    weight = model.transformer.norm.weight
    cache = KVCache(model.config, 3, 12, weight.dtype)
    steps = Steps(model, cache, sampling, 4)
    last = torch.ones(3, model.config.patch_size, dtype=torch.int64)
    rows = torch.arange(3) << 32
    eager = [part.clone() for part in steps.run(last, rows, 4)]
    assert cache.lengths.tolist() == [4, 4, 4]
    cache.lengths.zero_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU: never look
    with torch.no_grad(), NoLook():
        blind = steps.run(last, rows, 4)
    assert all(torch.equal(a, b) for a, b in zip(eager, blind, strict=True))


def test_a_failure_ends_its_sequence_alone():
    bad = poisoned(5)
    prompts = [[1, 2, 3], [5, 5, 5], [7]]
    expected = dict(Generator(bad).results(prompts, **SETTINGS))
    found = dict(Generator(bad, steps_per_read=6).results(prompts, **SETTINGS))
    for index, one in expected.items():
        assert (one.ids, one.error) == (found[index].ids, found[index].error)
    assert found[1].error and not found[0].error


def test_known_tokens_and_other_methods_take_single_steps(model):  # noqa: F811
    exact = {"method": "exact", "temperature": 0.9, "max_draws": 100, "on_budget": "pool"}
    for options in ({"prompt": "constrain"}, exact):
        settings = SETTINGS | options
        expected = Generator(model).generate(MANY[:3], **settings)
        results = Generator(model, steps_per_read=5).generate(MANY[:3], **settings)
        assert [one.ids for one in results] == [one.ids for one in expected]


def test_bad_steps_per_read(model):  # noqa: F811
    with pytest.raises(ValueError, match="steps_per_read: expected at least 1, got 0"):
        Generator(model, steps_per_read=0)
