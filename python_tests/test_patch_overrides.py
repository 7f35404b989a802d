"""What derived classes and instances have of their own is not passed over by what stands in."""

import re
from types import MethodType

import pytest
import torch
from official_standin import LM, MLPGenerator, build, token_ids
from torch import Tensor, nn

import calm_rt

SAMPLERS = ("head_sampling", "temperature_sampling", "generate")  # that draw from the energy head


def derive(module: nn.Module, **methods) -> nn.Module:
    """The module, of a derived class `Mine` with these methods."""
    module.__class__ = type("Mine", (type(module),), methods)
    return module


def constant(self, hidden: Tensor) -> Tensor:
    """A head's draws."""
    return hidden.new_zeros(*hidden.shape[:-1], LM["latent_size"])


def foreign_head(how: str, **changes) -> nn.Module:
    model = build(**changes)
    head = model.generative_head
    if how == "instance":
        head.sample = MethodType(constant, head)
    elif how == "derived":
        derive(head, sample=constant)
    else:  # another class with the same parameters
        base = MLPGenerator.__mro__[1]
        head.__class__ = type("Other", (base,), {"sample": constant, "__module__": "elsewhere"})
    return model


@pytest.mark.parametrize("off", [(), ("head_sampling",)])
@pytest.mark.parametrize("patch_size", [4, 2])
@pytest.mark.parametrize("how", ["instance", "derived", "other"])
def test_a_head_with_draws_of_its_own_makes_all_of_them(how, patch_size, off):
    model = foreign_head(how, patch_size=patch_size).eval()
    ids = token_ids(patches=4, patch_size=patch_size)
    report = calm_rt.patch(model, **dict.fromkeys(off, False))
    needing = {*SAMPLERS, *(["eval_brier"] if patch_size < 4 else [])}
    assert needing == report.kept.keys() - {"autoencoder_loss"}
    assert report.replaced.keys() == {"encoder_target", "energy_score"} | (
        {"eval_brier"} if patch_size == 4 else set()
    )
    for name in needing - {"head_sampling"}:
        assert report.kept[name].startswith(f"{name} would pass over a method: ")
    decoded = model.ae_model.decoder(torch.zeros(1, 1, LM["latent_size"])).argmax(-1)[0]
    patches = model.temperature_sampling(torch.randn(3, LM["hidden_size"]), 1.0)
    assert torch.equal(patches, decoded.expand(3, -1))
    model.padding_idx = -1  # none is deleted
    new = model.generate(ids, max_length=ids.shape[1] + patch_size, temperature=1.0)
    assert torch.equal(new[:, ids.shape[1] :], decoded.expand(2, -1))
    assert model(input_ids=ids, labels=ids).brier1.isfinite()


def test_official_draws_without_head_sampling_hinder_nothing():
    model = build()
    report = calm_rt.patch(model, head_sampling=False)
    assert report.kept.keys() == {"autoencoder_loss", "head_sampling"}
    calm_rt.unpatch(model)
    derive(model.generative_head)  # with nothing of its own
    assert calm_rt.patch(model).kept.keys() == {"autoencoder_loss"}


@pytest.mark.parametrize("on_instance", [True, False])
def test_generate_takes_a_temperature_sampling_of_the_model(on_instance):
    def sevens(self, hidden: Tensor, *_, **__) -> Tensor:
        return torch.full((len(hidden), self.patch_size), 7)

    model, ids = build(), token_ids()
    if on_instance:
        model.temperature_sampling = MethodType(sevens, model)
    else:
        derive(model, temperature_sampling=sevens)
    report = calm_rt.patch(model)
    own = "temperature_sampling is replaced" if on_instance else "Mine has its own temperature_sam"
    assert report.kept["temperature_sampling"].startswith(own)
    assert report.kept["generate"].startswith(f"generate would pass over a method: {own}")
    assert model.generate(ids, max_length=20)[:, 16:].eq(7).all()
    assert "head_sampling" in report.replaced


def test_a_distance_of_the_model_is_that_of_its_score():
    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.zeros(torch.broadcast_shapes(first.shape, second.shape)[:-1])

    model, ids = derive(build(), distance=distance), token_ids()
    report = calm_rt.patch(model)
    reason = "energy_score would pass over a method: Mine has its own distance"
    assert report.kept["energy_score"] == reason
    assert model.train()(input_ids=ids, labels=ids).loss == 0


def test_scores_of_small_patches_are_those_of_the_model():
    def eval_brier(self, latent_predictions, targets, outputs, loss):
        return "mine"

    model, ids = derive(build(patch_size=2), eval_brier=eval_brier), token_ids(patch_size=2)
    assert "Mine has its own eval_brier" in calm_rt.patch(model).kept["eval_brier"]
    assert model.eval()(input_ids=ids, labels=ids) == "mine"


def doubled(self, *args, **kwargs) -> Tensor:
    return 2 * super(type(self), self).forward(*args, **kwargs)


OF_VIEWS = ("temperature_sampling", "generate")  # that read the whole model
OF_AUTOENCODER = ("encoder_target", "eval_brier", *OF_VIEWS)
CONTAINERS = {
    "ae_model.encoder": OF_AUTOENCODER,
    "ae_model.decoder": OF_AUTOENCODER,
    "ae_model.encoder.encoder_layers.0": OF_AUTOENCODER,
    "embed_proj": OF_VIEWS,
    "embed_proj.1": OF_VIEWS,  # SiLU
    "transformer": OF_VIEWS,
    "generative_head.final_layer.linears": SAMPLERS,
}


@pytest.mark.parametrize("on_instance", [True, False])
@pytest.mark.parametrize("path", CONTAINERS)
def test_containers_with_a_forward_of_their_own_are_called(path, on_instance):
    model = build()
    module = model.get_submodule(path)
    if on_instance:
        forward = module.forward
        module.forward = MethodType(lambda self, *a, **k: forward(*a, **k), module)
    else:
        derive(module, forward=doubled)
    report = calm_rt.patch(model)
    assert report.kept.keys() == {"autoencoder_loss", *CONTAINERS[path]}
    for switch in CONTAINERS[path]:
        got = " with a forward of its own" if on_instance else "got (that of )?Mine"
        assert re.search(got, report.kept[switch])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_autoencoder_whose_parts_have_their_own_forward_keeps_its_loss(part):
    model = build("Autoencoder")
    derive(model.get_submodule(part), forward=doubled)
    assert "got that of Mine" in calm_rt.patch(model).kept["autoencoder_loss"]


def test_wrapped_and_patched_autoencoders_inside_are_no_hindrance():
    """As Accelerate wraps what it prepares; the language model never calls that forward."""
    model, ids = build(), token_ids()
    calm_rt.patch(model.ae_model)
    ours = model.ae_model.forward
    model.ae_model.forward = MethodType(lambda self, *a, **k: ours(*a, **k), model.ae_model)
    assert calm_rt.patch(model).kept.keys() == {"autoencoder_loss"}
    assert model.train()(input_ids=ids, labels=ids).loss.isfinite()
    assert model.ae_model(input_ids=ids, labels=ids).logits is None


METHODS = ("forward", "energy_score", "temperature_sampling", "eval_brier", "generate")


@pytest.mark.parametrize("patch_size", [4, 2])
@pytest.mark.parametrize("again", ["", "energy_score", "encoder_target"])
def test_what_others_wrapped_in_an_earlier_patch_is_what_the_report_says(patch_size, again):
    """As after Trainer or Accelerate with mixed precision, and another patch with less."""
    model, ids = build(patch_size=patch_size).train(), token_ids(patch_size=patch_size)
    calm_rt.patch(model)
    for name in METHODS:
        ours = getattr(model, name)
        setattr(model, name, MethodType(lambda self, *a, ours=ours, **k: ours(*a, **k), model))
    calm_rt.unpatch(model)
    if again:
        switches = dict.fromkeys(calm_rt.patching.SWITCHES, False) | {again: True}
        report = calm_rt.patch(model, **switches)
        assert f"{again.replace('encoder_target', 'forward')} is replaced" in report.kept[again]
    hidden, draws = torch.randn(2, LM["hidden_size"]), torch.randn(3, 2, LM["latent_size"])
    calls = [
        lambda of: of("forward")(input_ids=ids, labels=ids).loss,
        lambda of: of("energy_score")(draws, draws[0], draws[1]),
        lambda of: of("temperature_sampling")(hidden, 1.0),
        lambda of: of("generate")(ids, max_length=24, temperature=1.0),
    ]
    for call in calls:
        results = []
        for of in (
            lambda name: getattr(model, name),
            lambda name: MethodType(getattr(type(model), name), model),
        ):
            torch.manual_seed(5)
            results.append(call(of))
        assert torch.equal(*results)


def test_an_autoencoder_without_its_switch_gives_logits_through_an_old_wrapper():
    model, ids = build("Autoencoder"), token_ids()
    calm_rt.patch(model)
    ours = model.forward
    model.forward = MethodType(lambda self, *args, **kwargs: ours(*args, **kwargs), model)
    assert model(input_ids=ids, labels=ids).logits is None
    calm_rt.unpatch(model)
    for switches in ({}, {"autoencoder_loss": False}):
        with calm_rt.patch(model, **switches) as report:
            assert "autoencoder_loss" in report.kept
            assert model(input_ids=ids, labels=ids).logits is not None
