"""Ways to call a Generator: modes of torch, interruptions, iterators, types, vocabularies."""

import pickle

import numpy as np
import pytest
import torch
from test_generation import Bytes, build_model

from calm_rt import replay
from calm_rt.evaluation import brier_lm
from calm_rt.generation import GenerationError, Generator
from calm_rt.nn import screen_decoder


@pytest.fixture(scope="module")
def model():
    return build_model()


def ids_of(generator: Generator, **options) -> list[int]:
    [generation] = generator.generate([[1, 2, 3]], **{"max_new_tokens": 20, **options})
    return generation.ids


class FewBytes(Bytes):
    """Texts of half the model's tokens, as beside a vocabulary that was padded for the hardware."""

    vocab_size = 100

    def stream(self):
        return FewStream()


class FewStream:
    def step(self, token):
        if not 0 <= token < FewBytes.vocab_size:
            raise ValueError("token: expected an id of the tokenizer")
        return chr(token)


def test_tokens_that_the_tokenizer_lacks_have_no_text(model):
    [generation] = Generator(model, FewBytes()).generate([[1, 2, 3]], max_new_tokens=20)
    assert generation.ids == ids_of(Generator(model)) and max(generation.ids) >= 100
    assert generation.text == "".join(chr(i) for i in generation.ids if i < 100)


@pytest.mark.parametrize("steps", [1, 4])
def test_calls_in_inference_mode_and_outside_may_follow_each_other(model, steps):
    generator = Generator(model, steps_per_read=steps)
    with torch.inference_mode():
        inside = ids_of(generator)
        [sequence] = generator.prefill([[1, 2, 3]], max_new_tokens=20, sequence_ids=[0])
    assert ids_of(generator) == inside
    while not sequence.finished:
        generator.step()
    assert sequence.result().ids == inside


def test_a_model_of_inference_mode_generates(model):
    with torch.inference_mode():
        other = build_model()
        assert ids_of(Generator(other)) == ids_of(Generator(model))
    assert ids_of(Generator(other)) == ids_of(Generator(model))


@pytest.mark.parametrize("failing", range(1, 6))
@pytest.mark.parametrize("steps", [1, 4])
def test_an_interrupted_step_leaves_the_text(model, monkeypatch, steps, failing):
    """Wherever it was interrupted: the next call goes on from what the sequences hold."""
    expected, calls = ids_of(Generator(model)), 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise KeyboardInterrupt
        return sample(*arguments)

    sample = replay.sample_blindly
    monkeypatch.setattr(replay, "sample_blindly", interrupted)
    generator = Generator(model, steps_per_read=steps)
    [sequence] = generator.prefill([[1, 2, 3]], max_new_tokens=20)
    while not sequence.finished:
        try:
            generator.step()
        except KeyboardInterrupt:
            continue
    assert sequence.result().ids == expected
    assert steps == 1 or calls > failing or failing > 4


def test_step_returns_what_grew_before_it_failed():
    model = build_model()
    ids = ids_of(Generator(model))
    with torch.no_grad():
        model.transformer.embed_tokens.weight[ids[7]] = torch.nan  # of the second patch
    generator = Generator(model, steps_per_read=8)
    [sequence] = generator.prefill([[1, 2, 3]], max_new_tokens=20)
    grown = [generator.step(), generator.step()]
    assert grown == [[sequence], [sequence]] and sequence.error
    assert sequence.result().ids == ids[: len(sequence.result().ids)]


def test_stops_of_any_iterable(model):
    stop = ids_of(Generator(model))[4:6]
    listed = ids_of(Generator(model), stop=[stop])
    assert listed == ids_of(Generator(model), stop=iter([stop])) and len(listed) < 20


def test_what_may_begin_a_stop_is_given_after_release(model):
    generator = Generator(model, Bytes())
    [sequence] = generator.prefill([[1, 2, 3]], max_new_tokens=20)
    generator.step()
    held = generator.release(sequence).text
    [sequence] = generator.prefill(
        [[1, 2, 3]], max_new_tokens=20, sequence_ids=[0], stop=[held[-1] + "never"]
    )
    generator.step()
    first = sequence.unsent()
    assert first == held[:-1]
    assert first + (generator.release(sequence) and sequence.unsent()) == held


@pytest.mark.parametrize("wrong", [dict(prompts=[b"ab"]), dict(stop=[b"ab"])])
def test_bytes_are_no_ids(model, wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=f"{name}: expected .*b'ab'"):
        Generator(model).generate(**{"prompts": [[1]], "max_new_tokens": 4, **wrong})


@pytest.mark.parametrize("temperature", [1, 0.5])
def test_a_model_and_an_autoencoder_of_two_types(temperature):
    model = build_model()
    model.bfloat16()
    model.ae_model.float()
    options = {"temperature": temperature, "num_candidates": 20}
    assert len(ids_of(Generator(model), **options)) == 20


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_that_torch_does_not_count_ends_a_screen(inference):
    with torch.inference_mode(inference):
        autoencoder = build_model().float().ae_model
        screen_decoder(autoencoder)
        assert autoencoder.decoder.weights().screen is not None
        weight = autoencoder.decoder.lm_head_weight
        weight.data.copy_(torch.randn_like(weight))
        assert autoencoder.decoder.weights().screen is None


def test_a_language_model_is_evaluated_without_dropout():
    torch.manual_seed(0)
    layers = torch.nn.Embedding(40, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 40)
    model, documents = torch.nn.Sequential(*layers), [list(range(1, 33))]
    in_training = brier_lm(model, documents)
    assert model.training and model[1].training
    assert in_training.brier == brier_lm(model.eval(), documents).brier


def test_a_loop_goes_on_with_a_model_of_another_type():
    changed = build_model()
    generator = Generator(changed, max_batch_size=1)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        changed.to(dtype)
        [sequence] = generator.prefill([[1, 2, 3]], max_new_tokens=6)
        while not sequence.finished:
            generator.step()
        assert len(generator.release(sequence).ids) == 6
    generator.prefill([[1, 2, 3]], max_new_tokens=6)
    changed.to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"model: expected as it was while sequences .* in progress"
    ):
        generator.prefill([[1, 2, 3]], max_new_tokens=6)


def test_an_error_comes_back_from_another_process_with_its_texts(model):
    with pytest.raises(GenerationError) as caught:
        exact = {"method": "exact", "temperature": 0.1, "max_draws": 1}
        Generator(model).generate([[1]], max_new_tokens=6, **exact)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.generations == caught.value.generations


class Interrupted(Bytes):
    """Ctrl-C while the tokens of a patch become text."""

    def stream(self):
        return self

    def step(self, token):
        raise KeyboardInterrupt


def test_a_patch_that_was_not_taken_whole_ends_its_sequence(model):
    generator = Generator(model, Interrupted())
    [sequence] = generator.prefill([[]], max_new_tokens=20)
    with pytest.raises(KeyboardInterrupt):
        generator.step()
    assert sequence.finished and "exception" in sequence.result().error
    assert generator.step() == []


def test_odd_arguments_are_taken_or_named(model):
    generator = Generator(model)
    expected = ids_of(generator, temperature=0.5)
    assert ids_of(generator, temperature=np.array(0.5)) == expected
    assert ids_of(generator, temperature="1/2", seed=torch.tensor(0)) == expected
    with pytest.raises(ValueError, match="prompts: expected texts or lists of token ids"):
        generator.generate(torch.tensor([5, 6]), max_new_tokens=2)
    with pytest.raises(ValueError, match="stop: expected text of whole characters"):
        generator.generate([[1]], max_new_tokens=2, stop=["\udcff"])
    with pytest.raises(ValueError, match=r"model: expected one with values, got .*meta"):
        Generator(build_model().to("meta"))


@pytest.mark.parametrize("method", ["results", "stream", "prefill"])
def test_unknown_options_are_named_as_arguments_of_the_method(model, method):
    call = getattr(Generator(model, Bytes()), method)
    prompt = "a" if method == "stream" else ["a"]
    expected = rf"^{method}\(\) got an unexpected option 'temprature'; the options are max_new_tok"
    with pytest.raises(TypeError, match=expected):
        call(prompt, max_new_tokens=2, temprature=0.5)
    with pytest.raises(TypeError, match=rf"^{method}\(\) needs the option 'max_new_tokens'"):
        call(prompt, temperature=0.5)
