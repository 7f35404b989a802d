"""Generation against a loop without a cache, and its handling of prompts, ends and text."""

import codecs
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from calm_rt import engine, generation
from calm_rt.generation import GenerationError, Generator
from calm_rt.nn import AutoencoderConfig, Calm, CalmConfig
from calm_rt.sampling import PatchSample, sample_patches

BOS, EOS, PAD = 257, 256, 258
PATCH = 4
SIZES = {"patch_size": PATCH, "vocab_size": 260, "hidden_size": 16, "intermediate_size": 16}


class Bytes:
    """A tokenizer whose tokens are the bytes of a text."""

    path, fingerprint = Path("bytes"), "bytes"
    vocab_size, bos_id, eos_id, pad_id = 260, BOS, EOS, PAD

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def stream(self):
        return ByteStream()


class ByteStream:
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token):
        return self.decoder.decode(bytes([token]) if token < 256 else b"")

    def finish(self):
        return self.decoder.decode(b"", True)


def build_model(**changes):
    """A small model in float64 with large weights, whose draws depend on all that came before."""
    torch.manual_seed(0)
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    sizes = SIZES | special | {"latent_size": 6} | changes
    config = CalmConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_mlp_layers=1,
        noise_size=4,
        max_position_embeddings=40,
        **sizes,
    )
    model = Calm(config, AutoencoderConfig(**sizes)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def scripted(monkeypatch, model):
    """Makes the model draw the bytes of given texts: script[sequence id], EOS where they end."""

    def play(*script):
        tokens = [t if isinstance(t, list) else list(t.encode()) for t in script]

        def draw(model, hidden, *, rows, **_):
            patches = []
            for row in rows.tolist():
                text, first = tokens[row >> 32], (row & 0xFFFFFFFF) * PATCH
                patch = text[first : first + PATCH]
                patches.append(patch + [EOS] + [65] * (PATCH - len(patch) - 1))
            count, every = torch.ones_like(rows), torch.ones_like(rows, dtype=torch.bool)
            patches = torch.tensor([patch[:PATCH] for patch in patches]).view(-1, PATCH)
            counts = dict.fromkeys(("trials", "calls", "spared"), 0 * count)
            counts |= {"draws": count, "slots": PATCH * count}
            return PatchSample(patches=patches, exact=every, matched=every, sure=~every, **counts)

        for module in (engine, generation):
            monkeypatch.setattr(module, "sample_patches", draw)
        return Generator(model, Bytes())

    return play


PROMPTS = [[1, 2, 3], [], [5, 6, 7, 8], list(range(40, 62)), [9] * 9]


@pytest.mark.parametrize("temperature", [1, "1/2"])
def test_equals_a_loop_without_cache(model, temperature):
    options = {"temperature": temperature, "num_candidates": 8, "seed": 11}
    results = Generator(model).generate(PROMPTS, max_new_tokens=22, **options)
    for name, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        missing = -len(prompt) % PATCH if prompt else PATCH
        ids = [BOS] * missing + prompt
        start = len(ids)
        for step in range(6):
            hidden = model.hidden_states(torch.tensor([ids]))[:, -1]
            rows = torch.tensor([name << 32 | step])
            ids += sample_patches(model, hidden, rows=rows, **options).patches[0].tolist()
        expected = ids[start : start + 22]
        if EOS in expected:
            expected = expected[: expected.index(EOS) + 1]
        assert result.ids == expected


def test_a_sequence_does_not_depend_on_its_batch(model):
    generator = Generator(model)
    together = generator.generate(PROMPTS, max_new_tokens=20, seed=3)
    for name, prompt in enumerate(PROMPTS):
        [alone] = generator.generate([prompt], max_new_tokens=20, seed=3, sequence_ids=[name])
        assert alone.ids == together[name].ids


def test_seed_and_sequence_id_change_the_draws(model):
    first, second = Generator(model).generate([[1], [1]], max_new_tokens=12)
    [other] = Generator(model).generate([[1]], max_new_tokens=12, seed=1)
    assert first.ids != second.ids and first.ids != other.ids


@pytest.mark.parametrize("count", range(10))
def test_exactly_max_new_tokens(model, scripted, count):
    [result] = scripted("no end in sight").generate(["?"], max_new_tokens=count)
    assert result.text == "no end in sight"[:count]
    assert len(result.ids) == count and not result.finished
    assert result.steps == -(-count // PATCH)


@pytest.mark.parametrize("length", range(9))
def test_nothing_after_eos(scripted, length):
    text = "abcdefgh"[:length]
    [result] = scripted(text).generate(["x"], max_new_tokens=30)
    assert result.ids == [*text.encode(), EOS] and result.text == text
    assert result.finished and result.steps == length // PATCH + 1


def test_eos_at_the_limit_is_an_end(scripted):
    [result] = scripted("abc").generate(["x"], max_new_tokens=4)
    assert result.finished and result.text == "abc"


def test_finished_sequences_leave_the_batch(scripted, model, monkeypatch):
    sizes = []
    original = model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda ids, cache: sizes.append(len(ids)) or original(ids, cache)
    )
    texts = ["abcdefghij", "", "abcde", "abcdefghijklmn"]
    results = scripted(*texts).generate(["q"] * 4, max_new_tokens=40)
    assert [result.text for result in results] == texts
    assert sizes == [4, 3, 2, 1]


def test_stop_text_ends_and_is_left_out(scripted):
    texts = ["one. two", "one two.", "\n\nend", "plain"]
    results = scripted(*texts).generate(["x"] * 4, max_new_tokens=8, stop=[".", "\n\n", ". t"])
    assert [result.text for result in results] == ["one", "one two", "", "plain"]
    assert [result.finished for result in results] == [True, True, True, True]
    assert results[0].ids == list(b"one.")


@pytest.mark.parametrize("text", ["a€😀é", "ööööööö", "€" * 5, "xy😀😀"])
@pytest.mark.parametrize("limit", [3, 5, 10, 40])
def test_stream_yields_whole_characters(scripted, text, limit):
    generator = scripted(text)
    pieces = list(generator.stream("x", max_new_tokens=limit))
    [whole] = generator.generate(["x"], max_new_tokens=limit)
    assert "".join(pieces) == whole.text
    assert all(pieces) and "\ufffd" not in whole.text
    assert text.startswith(whole.text)
    assert len(text.encode()[:limit]) - len(whole.text.encode()) < 4


def test_stream_holds_back_what_may_begin_a_stop_text(scripted):
    text = "start <st start <stop> never"
    options = {"max_new_tokens": 40, "stop": ["<stop>", "stopper"]}
    generator = scripted(text)
    pieces = list(generator.stream("x", **options))
    assert "".join(pieces) == "start <st start "
    assert not any(piece.endswith(("<", "<s")) for piece in pieces[:-1])
    assert generator.generate(["x"], **options)[0].text == "start <st start "


def test_stop_ids_end_like_stop_texts(scripted, model):
    """Across the ends of patches, inside a character, beside texts, and without a tokenizer."""
    texts = ["one. two", "ab€cd", "abcdefgh", "plain", "aaaab"]
    stops = [[*b". "], [*"€".encode()[1:]], [*b"def"], [*b"aab"]]
    generator = scripted(*texts)
    results = generator.generate(["x"] * 5, max_new_tokens=8, stop=[*stops, "gh"])
    assert [result.text for result in results] == ["one", "ab", "abc", "plain", "aa"]
    assert [result.finished for result in results] == [True] * 5
    assert results[0].ids == list(b"one. ") and results[1].ids == list("ab€".encode())
    generator.tokenizer = None
    without = generator.generate([[1]] * 5, max_new_tokens=8, stop=np.array([[*b"def"]]))
    assert without[2].ids == list(b"abcdef") and without[2].text is None
    assert without[0].ids == list(b"one. two")[:8]


def test_stream_holds_back_what_may_begin_stop_ids(scripted):
    generator = scripted("start <st start <stop> never")
    options = {"max_new_tokens": 40, "stop": [[*b"<stop>"], [*b"<s", 0]]}
    pieces = list(generator.stream("x", **options))
    assert "".join(pieces) == "start <st start "
    assert not any(piece.endswith(("<", "<s")) for piece in pieces[:-1])


def test_stream_is_lazy_and_checks_at_once(scripted, model):
    generator = scripted("abcdefghijkl")
    with pytest.raises(ValueError, match="max_new_tokens"):
        generator.stream("x", max_new_tokens=-1)
    assert next(generator.stream("x", max_new_tokens=12)) == "abcd"
    with pytest.raises(ValueError, match="tokenizer"):
        Generator(model).stream([1], max_new_tokens=4)


def test_prompts_fill_their_first_patch_at_the_left(model, monkeypatch):
    seen = []
    original = model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda ids, cache: seen.append(ids) or original(ids, cache)
    )
    Generator(model, Bytes()).generate(["", "abcde", "abcd"], max_new_tokens=1)
    assert [ids[:, :4].tolist() for ids in seen[:1]] == [[[BOS] * 3 + [97], [BOS] * 4, [*b"abcd"]]]
    assert seen[0][0].tolist() == [BOS] * 3 + list(b"abcde")  # the longest stands first


def test_eos_fills_where_there_is_no_bos():
    model = build_model(bos_token_id=None)
    assert Generator(model).start_id == EOS
    without = build_model(bos_token_id=None, eos_token_id=None)
    assert len(Generator(without).generate([[1, 2, 3, 4]], max_new_tokens=9)[0].ids) == 9
    with pytest.raises(ValueError, match="whole patches"):
        Generator(without).generate([[1, 2, 3]], max_new_tokens=4)


def test_longest_text(model):
    generator = Generator(model)
    [result] = generator.generate([[1] * 4 * 38], max_new_tokens=8)
    assert result.ids and not any(i < 0 for i in result.ids)
    for prompt, count in (([1] * 4 * 38, 9), ([], 160), ([1] * 161, 0)):
        message = r"prompts\[0\].*max_position_embeddings = 40 patches"
        with pytest.raises(ValueError, match=message):
            generator.generate([prompt], max_new_tokens=count)


def test_no_prompts(model):
    assert Generator(model).generate([], max_new_tokens=5) == []


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[260]], {}, r"prompts: expected token ids in \[0, 260\), got 260"),
        ([[-1]], {}, "prompts"),
        (["text"], {}, "no tokenizer"),
        ("text", {}, "list of prompts"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"max_new_tokens": 1.5}, "max_new_tokens: expected an int, got 1.5"),
        ([1, 2, 3], {}, "prompts: expected texts or lists of token ids, got 1"),
        (5, {}, "prompts: expected a list of prompts, got 5"),
        ([None], {}, "prompts: .* got None"),
        ([[None]], {}, r"prompts: expected token ids in \[0, 260\), got None"),
        ([["a"]], {}, "prompts: .* got 'a'"),
        ([[1.7]], {}, "prompts: .* got 1.7"),
        ([torch.tensor([1.5])], {}, r"prompts: .* got tensor\(1.5"),
        ([[1]], {"max_draws": 1.5}, "max_draws: .* got 1.5"),
        ([[1]], {"seed": 1.5}, "seed: .* got 1.5"),
        ([[1]], {"stop": None}, "stop: expected a list of texts or lists of token ids, got None"),
        ([[1]], {"stop": [None]}, r"stop: .* got \[None\]"),
        ([[1]], {"stop": [5, 6]}, r"stop: .* lists of token ids, got \[5, 6\]"),
        ([[1]], {"stop": [[]]}, "not empty"),
        ([[1]], {"stop": [[5, 260]]}, r"stop: expected token ids in \[0, 260\), got 260"),
        ([[1]], {"stop": [[1.5]]}, "stop: .* got 1.5"),
        ([[1]], {"stop": [["a"]]}, "stop: .* got 'a'"),
        ([[1]], {"sequence_ids": [3.5]}, "sequence_ids: .* got 3.5"),
        ([[1]], {"sequence_ids": 3}, "sequence_ids: .* got 3"),
        ([[1]], {"temperature": 1e-20, "method": "exact"}, "temperature: .* got 1e-20"),
        ([[1]], {"temperature": 0.3}, "nearest are 1/4 and 1/3"),
        ([[1]], {"temperature": 2}, "temperature"),
        ([[1]], {"num_candidates": 0}, "num_candidates"),
        ([[1]], {"stop": ["x"]}, "tokenizer"),
        ([[1]], {"stop": "x"}, "list of texts"),
        ([[1]], {"stop": [""]}, "not empty"),
        ([[1]], {"sequence_ids": [1, 2]}, "sequence_ids"),
        ([[1]], {"sequence_ids": [2**31]}, "sequence_ids"),
        ([[1]], {"seed": 2**64}, "seed"),
        ([[1]], {"method": "best"}, "method"),
        ([[1]], {"on_budget": "stop"}, "on_budget"),
        ([[1]], {"prompt": "pad"}, "prompt: expected one of align, constrain"),
    ],
)
def test_bad_requests(model, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        Generator(model).generate(prompts, **({"max_new_tokens": 4} | changes))


@pytest.mark.parametrize("wrong", [20.0, "20", None])
@pytest.mark.parametrize("temperature", [1, "1/2"])
def test_pools_that_are_no_number(model, wrong, temperature):
    options = {"num_candidates": wrong, "temperature": temperature}
    with pytest.raises(ValueError, match=f"num_candidates: expected an int, got {wrong!r}"):
        Generator(model).generate([[1]], max_new_tokens=4, **options)
    with pytest.raises(ValueError, match=f"num_candidates: expected an int, got {wrong!r}"):
        sample_patches(model, torch.zeros(1, 16).double(), **options)


@pytest.mark.parametrize(
    "name", ["max_batch_size", "max_patches", "prefill_chunk", "steps_per_read"]
)
def test_settings_that_are_no_number(model, name):
    for wrong in (2.5, "2"):
        with pytest.raises(ValueError, match=f"{name}: expected an int, got {wrong!r}"):
            Generator(model, **{name: wrong})


def test_integers_of_every_library(model):
    generator = Generator(model, max_batch_size=np.int64(2), max_patches=torch.tensor(20))
    options = {"temperature": "1/2", "max_draws": np.int32(50), "num_candidates": np.uint8(5)}
    numbers = {"max_new_tokens": np.int64(4), "seed": np.int64(3), "sequence_ids": np.arange(2)}
    results = generator.generate([np.arange(4), torch.arange(4)], **numbers, **options)
    plain = {"max_new_tokens": 4, "seed": 3, "temperature": "1/2", "num_candidates": 5}
    expected = Generator(model).generate([[0, 1, 2, 3]] * 2, **plain)
    assert [result.ids for result in results] == [result.ids for result in expected]


def test_foreign_models_and_tokenizers(model):
    with pytest.raises(ValueError, match="not an autoencoder"):
        Generator(model.ae_model)
    small = build_model(vocab_size=259)
    with pytest.raises(ValueError, match="use the tokenizer it was trained with"):
        Generator(small, Bytes())
    other = build_model(eos_token_id=3)
    message = f"tokenizer: .*config.eos_token_id = 3, got eos_id = {EOS}"
    with pytest.raises(ValueError, match=message):
        Generator(other, Bytes())
    Generator(build_model(eos_token_id=None), Bytes())


def test_a_compiled_model_is_its_module(model):
    [expected] = Generator(model).generate([[1]], max_new_tokens=4)
    [result] = Generator(torch.compile(model)).generate([[1]], max_new_tokens=4)
    assert result.ids == expected.ids


def test_what_a_tokenizer_lacks_is_named(model):
    with pytest.raises(ValueError, match=r"tokenizer: .*got str without stream, vocab_size"):
        Generator(model, "tokenizer.model")


def test_damaged_weights_are_reported():
    damaged = build_model()
    damaged.transformer.norm.weight.data[3] = torch.nan
    with pytest.raises(GenerationError, match=r"sequence 0, step 0: .* NaN or inf .*1 more"):
        Generator(damaged).generate([[1], [2]], max_new_tokens=4)


@pytest.mark.parametrize(
    "name", ["generative_head.mlp_blocks.0.in_ln.bias", "ae_model.decoder.lm_head_weight"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights_behind_the_hidden_states_are_reported(name, value):
    damaged = build_model()
    damaged.get_parameter(name).data.flatten()[1] = value
    with pytest.raises(ValueError, match=f"model: expected finite .*NaN or inf in {name}"):
        Generator(damaged)


def test_a_stream_ends_with_the_error_behind_its_text(scripted, monkeypatch):
    generator = scripted("abcdefghijkl")
    extend_well = engine.TokenSequence.extend

    def extend(self, *drawn):
        extend_well(self, *drawn)
        if self.steps == 2:
            self.fail("planted")

    monkeypatch.setattr(engine.TokenSequence, "extend", extend)
    pieces = []
    with pytest.raises(GenerationError, match="sequence 0, step 2: planted"):
        for piece in generator.stream("x", max_new_tokens=12):
            pieces.append(piece)
    assert "".join(pieces) == "abcdefgh"
