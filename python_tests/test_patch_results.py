"""calm_rt.patch: sampling, BrierLM, generation, and the official bugs that patching cures."""

import pytest
import scipy.stats
import torch
from draws import DRAWS, assert_same_mean, losses, token_ids
from official_standin import AE, build
from torch import Tensor, nn

import calm_rt
from calm_rt import patching
from calm_rt.patching import BUGS, SWITCHES


@pytest.mark.parametrize("kind", ["EnergyTransformer", "FlowTransformer"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_temperature_sampling_has_the_same_distribution(kind, temperature):
    """First tokens of 600 patches, with few candidates so that the cascade reaches every level."""
    model = build(kind, vocab_size=8)
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(2)).repeat(600, 1)

    def counts() -> Tensor:
        patches = model.temperature_sampling(hidden[:, None], temperature, num_samples=4)
        assert patches.shape == (600, 1, 4)
        return torch.bincount(patches[:, 0, 0], minlength=8)

    before = counts()
    calm_rt.patch(model)
    table = torch.stack([before, counts()])
    table = table[:, table.sum(0) >= 10]
    assert table.shape[1] >= 2
    assert scipy.stats.chi2_contingency(table.numpy()).pvalue > 1e-6


def test_brier_uses_all_pairs():
    """Same expectation as one pair, and the spread of six pairs of four draws."""
    model, ids = build(vocab_size=8).eval(), token_ids(patches=8) % 8

    def scores() -> Tensor:
        outputs = [model(input_ids=ids, labels=ids) for _ in range(DRAWS)]
        return torch.stack([torch.stack([o.brier1, o.brier2]) for o in outputs]).double()

    before = scores()
    calm_rt.patch(model)
    after = scores()
    assert_same_mean(before, after)
    assert (after.var(0) < before.var(0)).all()
    calm_rt.unpatch(model)
    report = calm_rt.patch(model, keep_bugs=["one_pair_of_draws"])
    assert report.not_cured["one_pair_of_draws"] == "in keep_bugs"
    kept = scores()
    assert_same_mean(before, kept)
    assert (kept.var(0) > after.var(0)).all()


def test_brier_of_small_patches():
    model = build(patch_size=2, vocab_size=6, pad_token_id=None).eval()
    ids = token_ids(patches=8, patch_size=2) % 6
    report = calm_rt.patch(model)
    assert "eval_brier" in report.replaced
    output = model(input_ids=ids, labels=ids)
    expected = calm_rt.brier_lm(model._calm_rt_patch.model, ids, num_draws=400).brier
    scores = [model(input_ids=ids, labels=ids) for _ in range(30)]
    mean = torch.stack([torch.stack([o.brier1, o.brier4]) for o in scores]).double()
    reference = torch.tensor([[expected[0], expected[3]]]).expand(2, 2)
    assert_same_mean(mean, reference)
    assert output.brier1.ndim == 0


def test_labels_inside_a_patch():
    """A label of -100 makes its patch no target, and leaves all others what they are."""
    ids = token_ids(batch=2, patches=6)
    labels = ids.clone()
    labels[0, 9], labels[1, 14:18] = -100, -100  # 1 and 2 patches
    model = build().train()
    with calm_rt.patch(model, encoder_target=True) as report:
        assert "label_masks" in report.cured
        hidden = torch.zeros(2, 5, 1)
        hidden, patches, weight = patched_targets(model, hidden, labels)
        assert len(hidden) == len(patches) == 10 - 3 and weight is None
        wanted = [p for p in ids.view(-1, 4)[[1, 3, 4, 5, 7, 8, 11]]]
        assert torch.equal(patches, torch.stack(wanted))
        assert model.eval()(input_ids=ids, labels=labels).brier1.isfinite()
    labels[0, 9], labels[1, 14:18] = ids[0, 9], ids[1, 14:18]
    labels[:, :12] = -100  # whole patches: as the official code does it
    before = losses(model.train(), ids, labels)
    calm_rt.patch(model)
    assert_same_mean(before, losses(model, ids, labels))


def patched_targets(model: nn.Module, hidden: Tensor, labels: Tensor):
    from calm_rt.patched import _targets_of

    return _targets_of(model._calm_rt_patch, hidden, labels, model.patch_size)


@pytest.mark.parametrize("kept", [False, True])
def test_bugs_that_need_no_switch(kept):
    keep_bugs = ["tied_embedding", "missing_num_samples"] if kept else []
    model, ids = build("DiffusionTransformer").train(), token_ids()
    inner = model.ae_model
    inner.decoder.lm_head_weight = nn.Parameter(inner.encoder.embed_tokens.weight.detach().clone())
    separate = inner.decoder.lm_head_weight
    report = calm_rt.patch(model, keep_bugs=keep_bugs)
    names = {"tied_embedding", "missing_num_samples"}
    assert "diffusion_device" in report.not_cured
    assert names <= (report.not_cured if kept else report.cured).keys()
    assert (inner.decoder.lm_head_weight is separate) == kept
    if kept:
        with pytest.raises(AttributeError, match="num_samples"):
            model(input_ids=ids, labels=ids)
    else:
        model(input_ids=ids, labels=ids).loss.backward()
    calm_rt.unpatch(model)
    assert inner.decoder.lm_head_weight is separate and not hasattr(model, "num_samples")


def test_an_untied_head_that_was_not_loaded_is_named():
    model = build("Autoencoder")
    model.decoder.lm_head_weight = nn.Parameter(torch.zeros(50, 16))
    report = calm_rt.patch(model)
    assert "was not loaded" in report.not_cured["tied_embedding"]


def test_targets_do_not_depend_on_training():
    """The official encoder rounds its embeddings to bfloat16 in training mode."""
    model, patches = build(), token_ids()
    exact = model.ae_model.eval().encoder(input_ids=patches)
    assert not torch.equal(model.ae_model.train().encoder(input_ids=patches), exact)
    report = calm_rt.patch(model.train())
    assert "bf16_embeddings" in report.cured
    got = torch.cat(model._calm_rt_patch.autoencoder.encode(patches), -1)
    assert (got - exact).abs().max() <= 64 * torch.finfo(torch.float32).eps * exact.abs().max()
    calm_rt.unpatch(model)
    report = calm_rt.patch(model, keep_bugs=["bf16_embeddings"])
    assert report.kept["encoder_target"] == "keep_bugs has bf16_embeddings"


def test_folded_targets_go_when_weights_are_loaded():
    model, ids = build().train(), token_ids()
    before = losses(model.eval(), ids)
    model.train()
    report = calm_rt.patch(model, fold_encoder=True)
    encoder = model._calm_rt_patch.autoencoder.encoder
    assert "bytes" in report.replaced["fold_encoder"] and encoder.tables is not None
    assert_same_mean(before, losses(model, ids))
    model.load_state_dict(model.state_dict())
    assert encoder.tables is None
    calm_rt.unpatch(model)
    model.ae_model.requires_grad_(True)
    report = calm_rt.patch(model, fold_encoder=True)
    assert "a frozen autoencoder" in report.kept["fold_encoder"]


def test_generate():
    model = build()
    prompt = token_ids(batch=2, patches=2)[:, :7]  # the last patch is not whole
    prompt[1, 5:] = AE["pad_token_id"]
    calm_rt.patch(model)
    ids = model.generate(prompt, max_new_tokens=10, temperature=1.0, seed=3)
    assert torch.equal(ids[0, :7], prompt[0]) and torch.equal(ids[1, :5], prompt[1, :5])
    assert ids.shape[1] <= 17
    again = model.generate(prompt, max_new_tokens=10, temperature=1.0, seed=3)
    assert torch.equal(ids, again)
    alone = model.generate(prompt[:1], max_length=17, temperature=1.0, seed=3)
    assert torch.equal(alone[0], ids[0, : alone.shape[1]])
    eos = model.eos_token_id
    for row, start in zip(ids.tolist(), (7, 5), strict=True):
        new = row[start : start + 10]
        if eos in new:
            assert set(row[start + new.index(eos) + 1 :]) <= {AE["pad_token_id"]}
    calm_rt.unpatch(model)
    report = calm_rt.patch(model, keep_bugs=["prompt_padding"])
    assert report.not_cured["prompt_padding"] == "in keep_bugs"
    assert model.generate(prompt, max_new_tokens=4, temperature=1.0).shape[1] <= 11


def test_the_report_reads():
    report = calm_rt.patch(build("FlowTransformer"))
    text = str(report)
    assert text.startswith("calm_rt.patch: FlowTransformer\n  replaced\n")
    assert "FlowTransformer has no energy head" in text and "num_samples was never set" in text
    names = SWITCHES.keys() | BUGS.keys()
    assert report.replaced.keys() | report.kept.keys() == SWITCHES.keys()
    assert (report.cured.keys() | report.not_cured.keys()) <= names | {
        f"(by {switch})" for switch in SWITCHES
    }
    assert patching.PatchReport("x").__str__() == "calm_rt.patch: x"
