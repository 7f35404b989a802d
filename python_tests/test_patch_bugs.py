"""Official bugs that calm_rt.patch cures, on a stand-in with the official structure."""

import pytest
import torch
from official_standin import assert_same_mean, build, losses, token_ids
from torch import Tensor, nn

import calm_rt


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
    assert (inner.decoder.lm_head_weight is separate) == kept  # what was tied stays so
    assert not hasattr(model, "num_samples")


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


@pytest.mark.parametrize("keep_bugs", [(), ("one_pair_of_draws",)])
@pytest.mark.parametrize("kind", ["EnergyTransformer", "FlowTransformer"])
def test_no_target_has_no_score(kind, keep_bugs):
    model, ids = build(kind).eval(), token_ids()
    calm_rt.patch(model, keep_bugs=keep_bugs)
    output = model(input_ids=ids, labels=torch.full_like(ids, -100))
    assert output.loss.isnan() and output.brier1.isnan() and output.brier4.ndim == 0


def test_models_without_values_are_refused_before_anything_is_changed():
    model = build()
    model.transformer.to("meta")
    message = (
        r"model: expected one with values \(not offloaded\), got parameters on the meta device"
    )
    with pytest.raises(ValueError, match=message):
        calm_rt.patch(model)
    assert "forward" not in vars(model)
