"""The engine: who else is in a batch, a cache or a chunk, or fails in it, changes nobody's text."""

import pytest
import torch
from test_generation import PATCH, PROMPTS, build_model

from calm_rt import engine
from calm_rt.engine import Engine
from calm_rt.generation import GenerationError, Generator
from calm_rt.nn import KVCache
from calm_rt.sampling import sample_patches

BOS, EOS = 18, 19
LONGER = [[7] * 33, [16, 2], list(range(12)), [1], [3] * 70, [17, 0, 1]]
MANY = [[token % 18 for token in prompt] for prompt in [*PROMPTS, *LONGER]]


@pytest.fixture(scope="module")
def model():
    """Of few tokens, so that EOS comes often."""
    return build_model(vocab_size=20, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None)


@pytest.fixture(scope="module")
def alone(model):
    """What each of MANY is continued with by itself."""
    generator = Generator(model)
    return [
        generator.generate([prompt], max_new_tokens=22, seed=5, sequence_ids=[name])[0].ids
        for name, prompt in enumerate(MANY)
    ]


@pytest.fixture
def recorded(monkeypatch):
    """The hidden state and the patch of every row id that is drawn from here on."""
    seen = {}

    def draw(model, hidden, *, rows, **options):
        sample = sample_patches(model, hidden, rows=rows, **options)
        for row, *values in zip(rows.tolist(), hidden, sample.patches, strict=True):
            assert row not in seen
            seen[row] = values
        return sample

    monkeypatch.setattr(engine, "sample_patches", draw)
    return seen


# ---- what sequences were sure of ----


@pytest.mark.parametrize("sure", [False, True])
def test_tuples_come_first_while_they_decide(model, monkeypatch, sure: bool) -> None:
    """Once they have; the texts are the same."""
    firsts = []

    def draw(*arguments, tuples_first: bool, **options):
        firsts.append(tuples_first)
        sample = sample_patches(*arguments, tuples_first=tuples_first, **options)
        return sample._replace(sure=torch.full_like(sample.sure, sure))

    monkeypatch.setattr(engine, "sample_patches", draw)
    options = {"max_new_tokens": 60, "temperature": "1/2", "num_candidates": 64, "seed": 2}
    texts = [generation.ids for generation in Generator(model).generate(MANY[:3], **options)]
    assert len(firsts) >= 15 and firsts == sorted(firsts)
    assert (firsts[0], firsts[-1]) == (False, sure)
    monkeypatch.setattr(engine, "TUPLES_FIRST", 2)
    again = [generation.ids for generation in Generator(model).generate(MANY[:3], **options)]
    assert again == texts


# ---- who shares a batch ----


@pytest.mark.parametrize(("slots", "chunk"), [(1, 7), (2, 1), (3, 1024), (32, 20)])
def test_waiting_sequences_enter_where_others_leave(model, alone, slots, chunk):
    generator = Generator(model, max_batch_size=slots, prefill_chunk=chunk)
    results = generator.generate(MANY, max_new_tokens=22, seed=5)
    assert [result.ids for result in results] == alone
    assert len({len(ids) for ids in alone}) > 3  # they leave at different times


def test_results_come_as_they_finish(model, alone):
    generator = Generator(model, max_batch_size=3)
    finished = list(generator.results(MANY, max_new_tokens=22, seed=5))
    assert sorted(index for index, _ in finished) == list(range(len(MANY)))
    assert [index for index, _ in finished] != list(range(len(MANY)))
    assert all(result.ids == alone[index] for index, result in finished)


def test_cache_and_forward_passes_are_bounded(model, monkeypatch):
    passes, caches = [], []
    original = model.hidden_states

    def spy(ids, cache):
        passes.append(ids.shape[0] * ids.shape[1] // PATCH)
        caches.append(cache.storage.untyped_storage().data_ptr())
        assert cache.storage._base is not None  # a view of one allocation
        return original(ids, cache)

    monkeypatch.setattr(model, "hidden_states", spy)
    Generator(model, max_batch_size=3, prefill_chunk=6).generate(MANY, max_new_tokens=22)
    assert max(passes) == 6 and len(set(caches)) == 1


def test_known_tokens_of_one_sequence_leave_the_draws_of_others(model):
    """At temperature 1 known tokens take a pool, free draws do not."""
    free, bound = {"prompt": "align"}, {"prompt": "constrain"}
    options = {"max_new_tokens": 12, "seed": 2}
    generator = Generator(model)
    [alone] = generator.generate([[5, 6, 7, 8]], **options, **free, sequence_ids=[1])
    together = generator.generate([[9], [5, 6, 7, 8]], **options, **bound)
    assert together[1].ids == alone.ids and together[1].draws == alone.draws == alone.steps


# ---- failures ----


def poisoned(token):
    """A model in which whoever reads the token gets NaN."""
    model = build_model()
    model.transformer.embed_tokens.weight.data[token] = torch.nan
    return model


def test_no_nan_stays_where_several_sequences_failed():
    generator = Generator(poisoned(77), max_batch_size=3, max_patches=8)
    options = {"max_new_tokens": 8}
    sequences = generator.prefill([[77] * 9, [5], [77] * 12], **options)
    assert [sequence.error is not None for sequence in sequences] == [True, False, True]
    for sequence in sequences:
        generator.release(sequence)
    assert generator._engine.cache.storage.isfinite().all()


@pytest.mark.parametrize("slots", [2, 3, 32])
def test_states_that_are_not_finite_end_their_sequence_alone(slots):
    """The slot of what failed goes to others, whose masked attention reads what is left in it."""
    token = 77
    bad = [[token] * 40, [1, token, 3], [token]]
    good = [[5] * 60, [6] * 3, [7] * 20, [8], [9] * 50]
    prompts = [good[0], bad[0], *good[1:3], bad[1], *good[3:], bad[2]]
    clean = Generator(build_model()).generate(prompts, max_new_tokens=40)
    generator = Generator(poisoned(token), max_batch_size=slots)
    with pytest.raises(
        GenerationError, match=r"sequence 1, step 0: hidden states are NaN"
    ) as raised:
        generator.generate(prompts, max_new_tokens=40)
    for name, (prompt, result) in enumerate(zip(prompts, raised.value.generations, strict=True)):
        expected = clean[name].ids
        if prompt in bad:
            assert result.error.startswith(f"sequence {name}, step 0") and not result.ids
        elif token in expected[:-1]:  # drawn, and read at the next step
            assert result.error and result.ids == expected[: len(result.ids)]
        else:
            assert result.ids == expected and result.error is None


def test_a_failure_in_the_middle_names_its_step():
    """The model gets NaN from a token that it draws, so the state of the step behind is NaN."""
    [clean] = Generator(build_model()).generate([[5] * 8], max_new_tokens=40)
    place = next(i for i, token in enumerate(clean.ids[8:], 8) if token not in [5, *clean.ids[:i]])
    step = place // PATCH
    generator = Generator(poisoned(clean.ids[place]))
    with pytest.raises(GenerationError, match=f"sequence 0, step {step + 1}") as raised:
        generator.generate([[5] * 8], max_new_tokens=40)
    [result] = raised.value.generations
    assert result.ids == clean.ids[: (step + 1) * PATCH] and result.steps == step + 1
    assert not result.finished


def test_an_exceeded_budget_ends_its_sequence_alone(model):
    options = {"temperature": "1/40", "method": "exact", "max_draws": 45, "max_new_tokens": 8}
    prompts = [[1], [2], [3]]
    with pytest.raises(GenerationError, match=r"step 0: algorithm 1 .*max_draws.*2 more") as raised:
        Generator(model).generate(prompts, **options)
    for result in raised.value.generations:
        assert (result.ids, result.acceptance, result.draws) == ([], 0, 45)
        assert result.calls - result.spared == 45 and result.decoded_share > 0


# ---- the loop of one's own ----


def test_a_loop_of_ones_own_draws_what_generate_draws(model):
    """Sequences with settings of their own come and go between the steps of others."""
    generator = Generator(model, max_batch_size=3, max_patches=40)
    requests = [
        ([1, 2, 3], {"max_new_tokens": 17, "seed": 3}),
        ([4] * 20, {"max_new_tokens": 9, "temperature": "1/2", "num_candidates": 5}),
        ([], {"max_new_tokens": 30, "seed": 3}),
        ([8] * 5, {"max_new_tokens": 30, "temperature": 0, "num_candidates": 3}),
        ([9], {"max_new_tokens": 0}),
    ]
    waiting, running, results = list(enumerate(requests)), {}, {}
    while waiting or running:
        if waiting and generator.free_slots:
            name, (prompt, options) = waiting.pop(0)
            [running[name]] = generator.prefill([prompt], sequence_ids=[name], **options)
        assert set(generator.step()) <= set(running.values())
        for name, sequence in list(running.items()):
            if sequence.finished:
                results[name] = generator.release(running.pop(name))
    assert generator.step() == [] and generator.free_slots == 3
    for name, (prompt, options) in enumerate(requests):
        [expected] = Generator(model).generate([prompt], sequence_ids=[name], **options)
        assert results[name].ids == expected.ids and results[name].steps == expected.steps


def test_release_frees_a_slot_in_the_middle(model, alone):
    generator = Generator(model, max_batch_size=4)
    options = {"max_new_tokens": 22, "seed": 5}
    sequences = generator.prefill(MANY[:4], sequence_ids=range(4), **options)
    generator.step()
    assert generator.free_slots == 0
    with pytest.raises(ValueError, match="at most the 0 free slots, got 1"):
        generator.prefill([[1]], max_new_tokens=3)
    early = generator.release(sequences[1])
    assert early.ids == alone[1][: len(early.ids)] and early.steps == 1
    generator.release(sequences[1])  # twice is no harm
    sequences += generator.prefill([MANY[7]], sequence_ids=[7], **options)
    while generator.step():
        pass
    for name, place in ((0, 0), (2, 2), (3, 3), (7, 4)):
        assert sequences[place].result().ids == alone[name]


def test_prompts_that_come_again_get_new_draws(model):
    """Ids count on from call to call; a call that fails takes none."""
    generator, options = Generator(model, max_batch_size=4), {"max_new_tokens": 12}
    sequences = generator.prefill([[1], [1]], **options)
    with pytest.raises(ValueError, match="free slots"):
        generator.prefill([[1]] * 5, **options)
    sequences += generator.prefill([[1]], sequence_ids=[40], **options)
    sequences += generator.prefill([[1]], **options)
    while generator.step():
        pass
    ids = [0, 1, 40, 3]
    assert [sequence.name for sequence in sequences] == ids
    expected = generator.generate([[1]] * 4, sequence_ids=ids, **options)
    assert [sequence.result().ids for sequence in sequences] == [g.ids for g in expected]
    assert len({tuple(g.ids) for g in expected}) == 4


def test_bad_engines(model):
    for name, value in (("max_batch_size", 0), ("prefill_chunk", 0), ("max_patches", 41)):
        with pytest.raises(ValueError, match=f"{name}: expected .* got {value}"):
            Generator(model, **{name: value})
    small = Generator(model, max_patches=3)
    with pytest.raises(ValueError, match=r"prompts: .* max_patches = 3 patches"):
        small.prefill([[1] * 9], max_new_tokens=1)


# ---- prompts that are no whole patches ----


@pytest.mark.filterwarnings("ignore:prefix")  # where no draw begins with them, they are put in
@pytest.mark.parametrize("temperature", [1, "1/2"])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8])
def test_left_over_tokens_begin_the_first_patch(recorded, length, temperature):
    model = build_model(vocab_size=6, bos_token_id=4, eos_token_id=5, pad_token_id=None)
    prompts = [[(3 * i + start) % 4 for i in range(length)] for start in range(4)]
    options = {"temperature": temperature, "num_candidates": 50, "max_draws": 200, "seed": 1}
    generator = Generator(model)
    results = generator.generate(prompts, prompt="constrain", max_new_tokens=7, **options)
    left = length % PATCH
    for name, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        patches = [recorded[name << 32 | step][1].tolist() for step in range(result.steps)]
        drawn = [token for patch in patches for token in patch]
        assert drawn[:left] == prompt[length - left :]
        new = drawn[left : left + 7]
        new = new[: new.index(5) + 1] if 5 in new else new
        assert result.ids == new
        context = prompt[: length - left] or [4] * PATCH
        hidden = model.hidden_states(torch.tensor([context]))[:, -1]
        torch.testing.assert_close(recorded[name << 32][0], hidden[0])


def test_whole_prompts_and_none_have_nothing_left_over(model):
    generator = Generator(model)
    for prompt in ([], [1, 2, 3, 4], [2] * 12):
        options = {"max_new_tokens": 10, "seed": 4}
        aligned, constrained = (
            generator.generate([prompt], prompt=mode, **options)[0].ids
            for mode in ("align", "constrain")
        )
        assert aligned == constrained


def test_a_constrained_prompt_without_whole_patch_needs_bos():
    without = build_model(bos_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match="whole patches"):
        Generator(without).generate([[1, 2, 3]], max_new_tokens=4, prompt="constrain")
    options = {"max_new_tokens": 3, "num_candidates": 2, "max_draws": 2}
    with pytest.warns(UserWarning, match=f"prefix.* row ids {3 << 32};"):
        bound = {"prompt": "constrain", "sequence_ids": [3]}
        [result] = Generator(without).generate([[1] * 7], **bound, **options)
    assert len(result.ids) == 3 and result.steps == 2 and not result.constrained
    assert Generator(without).generate([[1] * 4], **options)[0].constrained


# ---- statistics and the cache ----


def test_statistics(model):
    options = {"max_new_tokens": 22, "num_candidates": 30}
    [one] = Generator(model).generate([[1, 2]], **options)
    assert one.draws == one.steps and one.decoded_share == 1 and one.exact
    [pool] = Generator(model).generate([[1, 2]], temperature="1/2", **options)
    assert pool.draws == 30 * pool.steps and 0 < pool.decoded_share <= 1 and not pool.exact
    assert one.seconds > 0 and pool.error is None
    [none] = Generator(model).generate([[1, 2]], max_new_tokens=0)
    assert (none.steps, none.draws, none.seconds, none.ids) == (0, 0, 0, [])


def test_what_algorithm_1_took_is_reported(model, monkeypatch):
    """Sums over the patches of a text; a patch that a pool chose was not accepted."""
    samples = []

    def draw(*arguments, **options):
        samples.append(sample_patches(*arguments, **options))
        return samples[-1]

    monkeypatch.setattr(engine, "sample_patches", draw)
    options = {"max_new_tokens": 22, "temperature": "0.4", "num_candidates": 30}
    exact = options | {"method": "exact", "max_draws": 150, "on_budget": "pool"}
    [result] = Generator(model).generate([[1, 2]], **exact)
    for name in ("draws", "calls", "spared"):
        assert getattr(result, name) == sum(int(getattr(sample, name)) for sample in samples)
    trials = sum(int(sample.trials) for sample in samples)
    accepted = sum(bool(sample.exact) for sample in samples)
    assert 0 < accepted < len(samples) == result.steps  # both ways were taken
    assert result.acceptance == accepted / trials and result.calls >= 2 * trials
    [pool] = Generator(model).generate([[1, 2]], **options | {"temperature": "1/2"})
    assert (pool.acceptance, pool.calls, pool.spared) == (None, 0, 0)


def test_slots_of_a_cache_share_its_memory(model):
    cache = KVCache(model.config, 3, 4, torch.float64)
    ids = torch.arange(24).view(2, 12) % 20
    part = cache.slots(1, 3)
    hidden = model.hidden_states(ids, part)
    part.advance(torch.tensor([3, 2]))
    assert cache.lengths.tolist() == [0, 3, 2]
    assert cache.storage[:, :, 0].eq(0).all() and cache.storage[:, :, 1:, :2].ne(0).any(-1).all()
    cache.move(1, 0)
    assert cache.lengths.tolist() == [3, 3, 2]
    more = torch.arange(4)[None]
    moved, kept = (model.hidden_states(more, cache.slots(i, i + 1)) for i in (0, 1))
    assert torch.equal(moved, kept) and not torch.equal(moved[0, 0], hidden[0, 2])
    cache.storage[:, :, 2] = torch.nan
    cache.clear(2)
    assert cache.lengths[2] == 0 and cache.storage.isfinite().all()


def test_engine_without_sequences(model):
    engine = Engine(model, max_batch_size=2, max_patches=4)
    engine.prefill([])
    assert engine.step() == [] and engine.free == 2
