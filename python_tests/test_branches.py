"""Models of `transformers` are read through their key-value cache, with the same scores."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

import calm_rt
from calm_rt import branches

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 23
KINDS = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 256}),
    "short sight": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 24}),
}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 256}


def make_model(kind="llama", dtype=torch.float32):
    """Random, with weights large enough that the context matters."""
    name, own = KINDS[kind]
    torch.manual_seed(0)
    sizes = own if kind == "gpt2" else SIZES | own
    config = getattr(transformers, name)(vocab_size=VOCAB_SIZE, initializer_range=0.3, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)


def make_documents(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]


class Counter:
    """Sees every call: how many tokens, and how many rows of logits at most."""

    def __init__(self, model):
        self.tokens = self.rows = 0
        model.register_forward_hook(self.see, with_kwargs=True)

    def see(self, module, arguments, options, output):
        self.tokens += arguments[0].numel()
        self.rows = max(self.rows, output.logits.shape[:2].numel())


def reread(model):
    """Logits as a plain function gives them, without anything to hold on to."""
    return lambda ids: model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch_size", [1, 4, 6])
def test_the_cache_changes_no_score(kind, patch_size, monkeypatch):
    # in float32 a path may part where its random number meets an edge between two tokens
    model, documents = make_model(kind, torch.float64), make_documents(97, 60, 33, 60)
    options = {"patch_size": patch_size, "num_draws": 2, "num_bootstrap": 20, "seed": 3}
    options["max_patches"] = 100
    expected = calm_rt.brier_lm(reread(model), documents, **options)
    monkeypatch.setattr(branches, "MOST_ROWS", 10)  # pieces of texts, parts of the branches
    for batch_size in (1, 3, 8):
        result = calm_rt.brier_lm(model, documents, batch_size=batch_size, **options)
        assert result.brier == pytest.approx(expected.brier, rel=1e-4, abs=1e-6)
        assert result.score == pytest.approx(expected.score, rel=1e-3)
    monkeypatch.undo()
    counter = Counter(model)
    calm_rt.brier_lm(model, documents, batch_size=1, **options)
    text, starts = sum(map(len, documents)), result.num_patches
    # whose attention sees less than a window cannot leave its mask to others
    assert (counter.tokens < 3 * text + 6 * starts) == (kind != "short sight")


@pytest.mark.parametrize(("length", "multiple"), [(512, 2.5), (4096, 2)])
def test_tokens_are_read_once_and_paths_cost_three(length, multiple):
    """1.75 times the text, and 3 PROBED for the proof that the model can be read so."""
    model, counter = make_model(), None
    model.config.max_position_embeddings = 1024
    counter = Counter(model)
    result = calm_rt.brier_lm(model, make_documents(length), num_bootstrap=1)
    assert result.num_patches == length // 4 - math.ceil(length / 1024)
    assert counter.tokens < multiple * length


def test_logits_are_bounded_where_a_vocabulary_is_large(monkeypatch):
    monkeypatch.setattr(branches, "LOGIT_BYTES", 8 * VOCAB_SIZE * 40)
    for name in ("cached", "anew"):
        model = make_model()
        if name == "anew":
            model.config.sliding_window = 16  # as one whose mask must be its own
        counter = Counter(model)
        calm_rt.brier_lm(model, make_documents(200), num_bootstrap=1, batch_size=4, max_patches=30)
        # reading anew gives all logits of a window once; of the 90 contexts it gives a few each
        assert counter.rows <= (40 if name == "cached" else 200)


def test_a_window_of_the_language_part_counts():
    model, seen = make_model(), []
    counter = Counter(model)
    inner = SimpleNamespace(sliding_window=16, max_position_embeddings=40, vocab_size=VOCAB_SIZE)
    model.config.get_text_config = lambda *_, **__: seen.append(1) or inner
    with pytest.raises(ValueError, match=r"block_size: .*the model's longest 40, got 44"):
        calm_rt.brier_lm(model, make_documents(44), block_size=44)
    score = calm_rt.brier_lm(model, make_documents(200), num_bootstrap=1, max_patches=10)
    assert score.block_size == 40 and counter.tokens > 10 * 40  # read anew


def test_16_bit_models_use_the_cache():
    model = make_model(dtype=torch.bfloat16)
    counter = Counter(model)
    calm_rt.brier_lm(model, make_documents(240), num_bootstrap=1)
    assert counter.tokens < 4 * 240


@pytest.mark.parametrize("fault", ["attention_mask", "position_ids", "cache", "raises"])
def test_a_model_that_leaves_something_out_is_read_anew(fault):
    """It takes the argument and gives other logits: the scores are those of its texts."""
    model, documents = make_model(), make_documents(61, 44)
    expected = calm_rt.brier_lm(reread(model), documents, num_bootstrap=1)
    forward, calls = model.forward, []

    def changed(input_ids, **options):
        calls.append(input_ids.shape)
        if fault == "raises" and "attention_mask" in options:
            raise NotImplementedError("no such mask")
        name = next((name for name in branches.CACHE_NAMES if name in options), None)
        if fault == "cache" and name:
            options[name] = type(options[name])()  # as if nothing had been read
            return forward(input_ids, use_cache=True, **{name: options[name]})
        return forward(input_ids, **{k: v for k, v in options.items() if k != fault})

    changed.__signature__ = inspect.signature(forward)
    model.forward = changed
    result = calm_rt.brier_lm(model, documents, num_bootstrap=1)
    assert result.brier == pytest.approx(expected.brier, rel=1e-5, abs=1e-7)


def test_documents_of_any_length_are_taken_as_they_are():
    model = reread(make_model())
    [long] = make_documents(257)
    odd, even = (calm_rt.brier_lm(model, [ids], num_bootstrap=1) for ids in (long, long[:256]))
    assert odd.brier == even.brier and odd.num_patches == 63
    assert calm_rt.brier_lm(model, [long[:5]], patch_size=1, num_bootstrap=1).num_patches == 1


def test_the_default_window_is_said():
    model, [ids] = make_model(), make_documents(1030)
    assert calm_rt.brier_lm(model, [ids[:64]]).block_size == 256  # the config's
    assert calm_rt.brier_lm(reread(model), [ids[:64]]).block_size == 1024
    model.config.max_position_embeddings = 1 << 17
    result = calm_rt.brier_lm(model, [ids], num_bootstrap=1)
    assert (result.block_size, result.num_patches) == (1024, 255)  # the next 6 tokens hold none
