"""Patched models whose head is not ours: the official one draws, all else runs on the ops."""

import copy

import pytest
import scipy.stats
import torch
from official_standin import build, token_ids

import calm_rt
from calm_rt import engine

KINDS = ("DiffusionTransformer", "FlowTransformer")


def prompt(count: int) -> torch.Tensor:
    return (4 + token_ids(batch=1, patches=2) % 4).repeat(count, 1)[:, :6]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replaced_and_what_is_not(kind):
    model = build(kind)
    head = type(model.generative_head).__name__
    with calm_rt.patch(model) as report:
        assert list(report.replaced) == [
            "encoder_target",
            "temperature_sampling",
            "eval_brier",
            "generate",
        ]
        for name in ("temperature_sampling", "eval_brier", "generate"):
            assert report.replaced[name].endswith(f"; the official {head} draws")
        reason = f"{kind} has no energy head"
        assert report.kept["energy_score"] == report.kept["head_sampling"] == reason
    with calm_rt.patch(build("EnergyTransformer")) as report:
        assert "official" not in report.replaced["generate"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_generate_has_the_same_distribution(kind, temperature):
    """First new tokens of 300 rows; the official loop fills up at the other end."""
    model = build(kind, vocab_size=8)
    model.padding_idx = -1  # the unpatched loop deletes those that are drawn
    whole = torch.cat([torch.full((300, 2), 1), prompt(300)], 1)  # as BOS fills the first patch

    def counts(ids: torch.Tensor) -> torch.Tensor:
        new = model.generate(ids, max_length=ids.shape[1] + 4, temperature=temperature)
        return torch.bincount(new[:, ids.shape[1]], minlength=8)

    torch.manual_seed(1)
    before = counts(whole)
    calm_rt.patch(model)
    table = torch.stack([before, counts(prompt(300))])
    table = table[:, table.sum(0) >= 10]
    assert table.shape[1] >= 2
    assert scipy.stats.chi2_contingency(table.numpy()).pvalue > 1e-6


@pytest.mark.parametrize("kind", ("EnergyTransformer", *KINDS))
def test_no_target_gives_no_gradient(kind):
    """The same eager, where there are no rows, and compiled, where all of them weigh nothing."""
    model, ids = build(kind).train(), token_ids()
    calm_rt.patch(model)
    torch.compiler.reset()
    for module in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = module(input_ids=ids, labels=torch.full_like(ids, -100)).loss
        loss.backward()
        assert loss.isnan()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("method", ["pool", "exact"])
def test_a_seed_repeats_a_text_and_nothing_else_is_seeded(method):
    model = build("FlowTransformer", vocab_size=8)
    calm_rt.patch(model)
    options = {"max_new_tokens": 12, "temperature": 0.5, "method": method, "on_budget": "pool"}
    options |= {"num_samples": 20, "max_draws": 100}
    before = torch.get_rng_state()
    texts = [model.generate(prompt(2), seed=seed, **options) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(texts[0], texts[1]) and texts[0].shape[1] > 6
    assert texts[0].shape != texts[2].shape or not torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0][0], texts[0][1])  # equal prompts, draws of their own


def test_the_head_keeps_its_mode_and_is_followed():
    model = build("FlowTransformer").train()
    calm_rt.patch(model)
    hidden = torch.randn(3, 32)
    model.temperature_sampling(hidden, 0.5)
    assert model.training and model.generative_head.training
    del model.generative_head.net.bias
    with pytest.raises(AttributeError, match="bias"):
        model.temperature_sampling(hidden, 0.5)


def test_a_copy_draws_from_its_own_head():
    model = build("FlowTransformer")
    calm_rt.patch(model)
    other = copy.deepcopy(model)
    assert other._calm_rt_patch.model.head == (other.generative_head,)
    assert other.generative_head is not model.generative_head


def test_an_adapter_in_the_head_is_no_hindrance():
    model = build("FlowTransformer")
    model.generative_head.net.register_parameter("lora", torch.nn.Parameter(torch.ones(1)))
    assert "generate" in calm_rt.patch(model).replaced


class Doubled(torch.nn.Linear):
    """As an adapter: it computes something else with its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_in_an_energy_head_lets_the_official_head_draw(training):
    model, ids = build("EnergyTransformer").train(training), token_ids()
    model.generative_head.hidden_embd.__class__ = Doubled
    assert "head_sampling" in calm_rt.patch(model).kept
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and model.generative_head.hidden_embd.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["EnergyTransformer", "FlowTransformer"])
def test_what_needs_numbered_draws_is_left_out(kind, monkeypatch):
    """Draws that would be made again, and steps that nobody looks at."""
    model, seen = build(kind, vocab_size=8, eos_token_id=None), []
    torch.nn.init.zeros_(model.ae_model.decoder.latent_to_hidden.weight)  # every pool is sure
    calm_rt.patch(model)
    sample = engine.sample_patches

    def recording(*args, tuples_first=False, **options):
        seen.append(tuples_first)
        return sample(*args, tuples_first=tuples_first, **options)

    monkeypatch.setattr(engine, "sample_patches", recording)
    model.generate(prompt(1), max_new_tokens=80, temperature=0.5, seed=1)
    ours = kind == "EnergyTransformer"
    assert any(seen) == ours
    view = model._calm_rt_patch.model
    sizes = {"max_batch_size": 1, "max_patches": 2, "steps_per_read": 8}
    assert engine.Engine(view, **sizes).steps_per_read == (8 if ours else 1)
