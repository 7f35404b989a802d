"""What `generate` of a patched model reads, and what a patched model cannot do: be pickled."""

import io
import pickle
import warnings

import pytest
import torch
from official_standin import AE, build, token_ids
from torch import nn

import calm_rt

PAD = AE["pad_token_id"]


@pytest.fixture
def model() -> nn.Module:
    model = build(vocab_size=8)
    calm_rt.patch(model)
    return model


@pytest.fixture
def settings(monkeypatch) -> list[dict]:
    """The settings of every call of Generator.generate."""
    seen, generate = [], calm_rt.Generator.generate

    def recording(self, prompts, **options):
        seen.append(options | {"prompts": prompts})
        return generate(self, prompts, **options)

    monkeypatch.setattr(calm_rt.Generator, "generate", recording)
    return seen


def prompt(seed: int = 1) -> torch.Tensor:
    return 4 + token_ids(batch=1, patches=2, seed=seed) % 4


def test_method_and_pool_are_read(model, settings):
    with pytest.raises(ValueError, match='method="exact" takes any'):
        model.generate(prompt(), max_new_tokens=4, temperature=0.3)
    exact = {"method": "exact", "max_draws": 50, "on_budget": "pool"}
    ids = model.generate(prompt(), max_new_tokens=4, temperature=0.3, num_candidates=20, **exact)
    assert ids.shape[1] <= 12
    assert {name: settings[-1][name] for name in exact} == exact
    for options in ({"num_samples": 20}, {"num_candidates": 20}):
        model.generate(prompt(), max_new_tokens=4, **options)
        assert settings[-1]["num_candidates"] == 20
    model.generate(prompt(), max_new_tokens=4)
    assert settings[-1]["num_candidates"] == 200
    with pytest.raises(ValueError, match="num_candidates: expected None beside num_samples"):
        model.generate(prompt(), max_new_tokens=4, num_samples=20, num_candidates=20)


def test_what_nothing_reads_is_named(model):
    with pytest.warns(UserWarning, match="generate: nothing reads attention_mask, top_p") as seen:
        model.generate(prompt(), max_new_tokens=4, top_p=0.9, attention_mask=None)
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(prompt(), max_length=12, temperature=1.0, seed=1)


@pytest.mark.parametrize("pad", [2, PAD], ids=["eos", "pad"])
def test_pads_are_stripped_at_the_ends_only(pad, settings):
    model = build(vocab_size=8, pad_token_id=pad, eos_token_id=2)
    calm_rt.patch(model)
    rows = [[pad, 5, pad, 6, 7, pad, pad, pad], [5, 6, 7, 4, 5, 6, 7, 4], [pad] * 8]
    ids = model.generate(torch.tensor(rows), max_new_tokens=4, temperature=1.0, seed=1)
    assert settings[-1]["prompts"] == [[5, pad, 6, 7], rows[1], []]
    assert ids[0, :4].tolist() == [5, pad, 6, 7] and ids[1, :8].tolist() == rows[1]


def test_lengths_beyond_what_was_trained_are_refused(model):
    report = calm_rt.patch(build())
    assert "max_position_embeddings" in report.replaced["generate"]
    expected = "expected at most max_position_embeddings = 64 patches of 4 tokens .*, got 65"
    with pytest.raises(ValueError, match=f"max_length: {expected}"):
        model.generate(prompt(), max_length=4 * 64 + 4)
    with pytest.raises(ValueError, match=f"max_new_tokens: {expected}"):
        model.generate(prompt()[:, :7], max_new_tokens=4 * 62 + 1)
    assert model.generate(prompt()[:0]).shape == (0, 8)


def test_shapes_and_lengths_that_do_not_fit(model):
    with pytest.raises(ValueError, match="max_length: expected a number of tokens, or max_new_tok"):
        model.generate(prompt(), max_length=None)
    assert model.generate(prompt(), max_length=None, max_new_tokens=4).shape[0] == 1
    with pytest.raises(ValueError, match=r"input_ids: expected shape \[B, T\], got \[8\]"):
        model.generate(prompt()[0], max_new_tokens=4)
    assert model.generate(prompt()[:0], max_new_tokens=4).shape == (0, 8)
    with pytest.raises(ValueError, match="temperature"):
        model.generate(prompt()[:0], temperature=None)


@pytest.mark.parametrize("value", [12.0, "12"])
@pytest.mark.parametrize("name", ["max_length", "max_new_tokens"])
def test_errors_name_what_was_given(model, name, value):
    with pytest.raises(ValueError, match=f"{name}: expected an int, got {value!r}"):
        model.generate(prompt(), **{name: value})
    with pytest.raises(ValueError, match="input_ids: expected a tensor, got list"):
        model.generate(prompt().tolist(), **{name: value})
    with pytest.raises(
        ValueError, match=r"input_ids: expected token ids, int64, got torch\.float32"
    ):
        model.generate(prompt().float(), **{name: value})
    assert model.generate(prompt().int(), max_new_tokens=4).dtype == torch.int64


def test_the_eos_of_the_model_ends_texts(model):
    """Whatever its configuration says, and also where it is set behind the patch."""
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 1}
    model.eos_token_id = -1
    [row] = model.generate(prompt(), **options).tolist()
    assert len(row) == 48
    model.eos_token_id = row[20]
    [ended] = model.generate(prompt(), **options).tolist()
    assert ended == row[: row.index(row[20], 8) + 1]
    model.eos_token_id = [1, 2]
    with pytest.raises(ValueError, match=r"model.eos_token_id: expected an int, got \[1, 2\]"):
        model.generate(prompt(), **options)


def test_a_patched_model_is_not_pickled(model):
    with pytest.raises(pickle.PicklingError, match=r"unpatch .* first, or save its state_dict\(\)"):
        torch.save(model, io.BytesIO())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    calm_rt.unpatch(model)
    torch.save(model, whole := io.BytesIO())
    loaded = torch.load(io.BytesIO(whole.getvalue()), weights_only=False)
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert calm_rt.patch(loaded).replaced
