"""Steps without a look by the host: the same texts, and nothing that a CUDA graph forbids."""

import contextlib
import copy

import pytest
import torch
from test_engine import MANY, model, poisoned  # noqa: F401
from test_generation import build_model
from torch.utils._python_dispatch import TorchDispatchMode

from calm_rt import engine, generation, pool, sampling
from calm_rt.draws import Draws
from calm_rt.generation import Generator
from calm_rt.nn import KVCache
from calm_rt.replay import Steps
from calm_rt.sampling import sample_patches
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


@pytest.fixture(params=["whole", "lazy"])
def pools(request, monkeypatch):
    """Small ones are decoded whole, unless nothing is said to be gained by that."""
    if request.param == "lazy":
        monkeypatch.setattr(sampling, "WHOLE_SEARCH", 0)
        for device in ("cpu", "cuda"):
            monkeypatch.setitem(pool.PASS_ROWS, device, -1)
    return request.param


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
def test_texts_are_those_of_single_steps(model, pools, steps, temperature):  # noqa: F811
    check_texts(model, steps, temperature)


@needs_cuda
@pytest.mark.parametrize("temperature", [1, "1/2", 0])
def test_cuda_texts_are_those_of_single_steps(model, pools, temperature):  # noqa: F811
    """In batches of one size, for a row's rounding depends on it there."""
    check_texts(copy.deepcopy(model).to("cuda"), 5, temperature, max_batch_size=3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device here")
def test_cuda_texts_on_a_second_device(model):  # noqa: F811
    check_texts(copy.deepcopy(model).to("cuda:1"), 5, "1/2", max_batch_size=3)


def test_steps_are_taken_on_their_own_device(model, monkeypatch):  # noqa: F811
    """Not on the current one, whose stream a graph would be captured on and replayed in."""
    current = []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    take, devices = Steps._take, []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(Steps, "_take", lambda steps: (devices.extend(current), take(steps)))
    check_texts(model, 5, "1/2")
    assert set(devices) == {torch.device("cpu")} and not current


def test_several_steps_are_run_at_once(model, monkeypatch):  # noqa: F811
    counts = []
    run = Steps.run

    def spy(steps, patches, rows, seed, count):
        counts.append(count)
        return run(steps, patches, rows, seed, count)

    monkeypatch.setattr(Steps, "run", spy)
    generator = Generator(model, steps_per_read=4)
    [result] = generator.generate([MANY[0]], **SETTINGS)
    assert sum(counts) >= result.steps - 1 and 4 in counts  # the first follows the prompt
    assert max(counts) <= 4


@pytest.mark.parametrize("temperature", [1, "1/3"])
def test_nothing_is_looked_at(model, pools, monkeypatch, temperature):  # noqa: F811
    settings = Sampling(temperature, 20, "pool", 100, "raise", 7)
    weight = model.transformer.norm.weight
    cache = KVCache(model.config, 3, 12, weight.dtype)
    steps = Steps(model, cache, settings, 4)
    last = torch.ones(3, model.config.patch_size, dtype=torch.int64)
    rows = torch.arange(3) << 32
    eager = steps.run(last, rows, 7, 4).clone()
    assert torch.equal(cache.lengths, eager[..., -1].sum(0))
    cache.lengths.zero_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU: never look
    if pools == "lazy":
        monkeypatch.delattr(Draws, "whole_patches")
    with torch.no_grad(), NoLook():
        blind = steps.run(last, rows, 7, 4)
    assert torch.equal(eager, blind)


def test_sequences_end_and_stand_still_on_the_device(model):  # noqa: F811
    """By EOS; the rows behind the batch never go."""
    sampling = Sampling("1/2", 20, "pool", 100, "raise", 0)
    size, number = model.config.patch_size, 6
    cache = KVCache(model.config, 8, 40)
    steps = Steps(model, cache, sampling, 24)
    drawn = steps.run(torch.ones(number, size).long(), torch.arange(number) << 32, 5, 24)
    patches, finite, taken = drawn[..., :size], drawn[..., size].bool(), drawn[..., size + 1].bool()
    met = (patches == model.config.eos_token_id).any(-1)
    before = met.cumsum(0) - met.long()  # [steps, N], patches with EOS in earlier steps
    assert finite.all() and torch.equal(taken, before == 0)
    assert 1 < len(taken.sum(0).unique()) and (before > 0).any()
    assert cache.lengths.tolist() == [*taken.sum(0).tolist(), 0, 0]


def test_nothing_is_read_behind_a_state_that_is_not_finite():
    bad = poisoned(5)
    steps = Steps(bad, KVCache(bad.config, 2, 12), Sampling("1/2", 20, "pool", 100, "raise", 0), 4)
    last = torch.tensor([[5], [7]]).expand(2, bad.config.patch_size)
    drawn = steps.run(last, torch.arange(2) << 32, 5, 4)
    finite, taken = drawn[..., -2].tolist(), drawn[..., -1].tolist()
    assert [row[0] for row in finite] == [0, 0, 0, 0] and finite[0][1] == 1
    assert [row[0] for row in taken] == [1, 0, 0, 0]


def captures(monkeypatch):
    """The sizes of the steps that are made from here on."""
    made, make = [], Steps.__init__

    def spy(steps, model, cache, *arguments):  # noqa: F811
        made.append(len(cache.lengths))
        make(steps, model, cache, *arguments)

    monkeypatch.setattr(Steps, "__init__", spy)
    return made


def test_captured_steps_serve_the_next_call(model, monkeypatch):  # noqa: F811
    made = captures(monkeypatch)
    generator = Generator(model, steps_per_read=4)
    for seed in (5, 6, 5):
        settings = SETTINGS | {"seed": seed, "temperature": "1/2", "num_candidates": 40}
        expected = Generator(model).generate(MANY, **settings)
        results = generator.generate(MANY, **settings)
        assert [one.ids for one in results] == [one.ids for one in expected]
        assert [one.draws for one in results] == [one.draws for one in expected]
    generator.generate(MANY[:3], **SETTINGS)
    assert len(made) == len(set(made)) > 1  # one of each size, whatever the seed
    assert all(size & (size - 1) == 0 for size in made)


def test_a_call_knows_nothing_of_what_the_last_was_sure_of(model, monkeypatch):  # noqa: F811
    firsts = []

    def draw(*arguments, tuples_first, **options):
        firsts.append(tuples_first)
        sample = sample_patches(*arguments, tuples_first=tuples_first, **options)
        return sample._replace(sure=torch.full_like(sample.sure, True))

    monkeypatch.setattr(engine, "sample_patches", draw)
    generator = Generator(model, max_batch_size=1, steps_per_read=4)
    for _ in range(2):
        generator.generate(MANY, **SETTINGS | {"temperature": "1/2", "num_candidates": 64})
    half = len(firsts) // 2
    assert firsts[:half] == firsts[half:] and (firsts[0], firsts[half - 1]) == (False, True)


def test_an_engine_that_no_longer_fits_is_given_up(model, monkeypatch):  # noqa: F811
    monkeypatch.setattr(generation, "WHOLE_PATCHES", 16)
    made = captures(monkeypatch)
    small = build_model(vocab_size=20, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    generator = Generator(small, steps_per_read=4)
    generator.generate([MANY[0]], **SETTINGS)
    generator.generate([MANY[0]], **SETTINGS)
    assert made == [1]
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.data = parameter.data.clone()  # as loading in place of them does
    generator.generate([MANY[0]], **SETTINGS)
    assert made == [1, 1]
    generator.generate([MANY[0]], **SETTINGS | {"max_new_tokens": 100})  # a longer cache
    assert made == [1, 1, 1]
    texts = generator.results(MANY[:2], **SETTINGS | {"max_new_tokens": 100})
    next(texts)
    texts.close()  # in the middle
    expected = Generator(small).generate(MANY[:2], **SETTINGS)
    assert [one.ids for one in generator.generate(MANY[:2], **SETTINGS)] == [
        one.ids for one in expected
    ]


def test_steps_per_read_by_device(model, monkeypatch):  # noqa: F811
    assert generation.STEPS_PER_READ == {"cpu": 1, "cuda": 8}
    assert Generator(model).steps_per_read == 1
    monkeypatch.setitem(generation.STEPS_PER_READ, "cpu", 6)
    assert Generator(model).steps_per_read == 6
    assert Generator(model, steps_per_read=2).steps_per_read == 2


def test_batch_invariance_takes_single_steps(model, monkeypatch):  # noqa: F811
    made = captures(monkeypatch)
    options = {"batch_invariant": True, "steps_per_read": 8}
    together = Generator(model, **options).generate(MANY[:3], **SETTINGS)
    alone = Generator(model, **options).generate(MANY[1:2], sequence_ids=[1], **SETTINGS)
    assert not made and together[1].ids == alone[0].ids


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


@needs_cuda
@pytest.mark.parametrize("temperature", [1, "1/2"])
def test_cuda_replays_are_the_steps(pools, monkeypatch, temperature):
    """On a device: a captured step and the same step issued op by op, twice each."""
    replayed = build_model().float().cuda()
    sampling = Sampling(temperature, 20, "pool", 100, "raise", 0)
    last = torch.ones(3, replayed.config.patch_size, dtype=torch.int64, device="cuda")
    rows = torch.arange(3, device="cuda") << 32

    @torch.no_grad()
    def run():
        steps = Steps(replayed, KVCache(replayed.config, 4, 12, torch.float32, "cuda"), sampling, 4)
        return [steps.run(last, rows, seed, 4).tolist() for seed in (5, 6)]

    captured = run()
    monkeypatch.setattr(Steps, "_capture", lambda steps: None)
    assert captured == run() and captured[0] != captured[1]
