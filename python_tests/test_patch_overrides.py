"""What derived classes and instances have of their own is not passed over by what stands in."""

import copy
import re
from types import MethodType, SimpleNamespace

import pytest
import torch
from official_standin import LM, MLPGenerator, build, token_ids
from torch import Tensor, nn

import calm_rt
from calm_rt.nn.backbone import rotary_angles

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
        got = "got one of its own" if on_instance else "got (that of )?Mine"
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


@pytest.mark.parametrize("path", ["ae_model", "generative_head"])
def test_hooks_and_forwards_that_the_official_code_does_not_call_either(path):
    model, ids = build(), token_ids()
    module = model.get_submodule(path)
    module.register_forward_hook(lambda *_: None)
    assert calm_rt.patch(model).kept.keys() == {"autoencoder_loss"}
    module.register_forward_hook(lambda *_: None)
    module.forward = lambda *_: None
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    assert model.generate(ids, max_new_tokens=4).shape[0] == 2


@pytest.mark.parametrize("on_instance", [True, False])
@pytest.mark.parametrize("path", ["ae_model.encoder", "generative_head.final_layer.linears"])
def test_forwards_that_come_behind_the_patch_are_named(path, on_instance):
    model, ids = build(), token_ids()
    module = model.get_submodule(path)
    calm_rt.patch(model)
    if on_instance:
        module.forward = module.forward
    else:
        derive(module, forward=doubled)
    message = f"got {re.escape(path)} with another class or forward since patch; unpatch and patch"
    for call in (lambda: model(input_ids=ids, labels=ids), lambda: model.generate(ids)):
        with pytest.raises(ValueError, match=message):
            call()


HEADLESS = {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"factor": 2.0}}
HEADLESS |= {"hidden_act": "gelu", "head_dim": 3}


@pytest.mark.parametrize("field", HEADLESS)
def test_the_head_needs_its_own_sizes_only(field):
    model = build()
    values = model.config.to_dict() | {field: HEADLESS[field]}
    model.config = SimpleNamespace(**values)
    report = calm_rt.patch(model)
    assert field in report.kept["generate"]
    assert {"head_sampling", "energy_score", "eval_brier"} <= report.replaced.keys()


def test_settings_of_training_hinder_no_generation():
    model = build()
    model.config = SimpleNamespace(**model.config.to_dict() | {"attention_dropout": 0.1, "beta": 3})
    model.config.num_samples = 1
    assert calm_rt.patch(model).kept.keys() == {"autoencoder_loss"}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("beta", 0, r"an exponent in \(0, 2\], got 0"),
        ("beta", 2.5, r"an exponent in \(0, 2\], got 2.5"),
        ("num_samples", 1, "at least 2, got 1"),
    ],
)
def test_scores_that_have_no_op_stay_official(name, value, expected):
    model, ids = build(), token_ids()
    setattr(model, name, value)
    report = calm_rt.patch(model)
    assert re.fullmatch(f"model.{name}: expected {expected}", report.kept["energy_score"])
    loss = model.train()(input_ids=ids, labels=ids).loss
    assert loss.isfinite() == (name == "beta")  # one draw has no distance to others


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.bfloat16,), ()])
def test_rotary_frequencies_follow_the_model(dtypes):
    """As transformers keeps them: a buffer, which a change of type rounds for good."""
    model, ids = build(), token_ids(batch=1, patches=40)
    size = LM["hidden_size"] // LM["num_attention_heads"]
    rotary = nn.Module()
    rotary.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, size, 2) / size), False)
    model.transformer.rotary_emb = rotary
    calm_rt.patch(model)
    for dtype in dtypes:
        model.to(dtype)
    place = model._calm_rt_patch.model.transformer._place(torch.zeros(1, 40, 32), None)
    angles = torch.arange(40.0)[None, :, None, None] * rotary.inv_freq.float()
    assert torch.equal(place.cos, angles.cos()) and torch.equal(place.sin, angles.sin())
    exact, _ = rotary_angles(torch.arange(40)[None], size, 10000.0, torch.float32)
    eps = 64 * torch.finfo(torch.float32).eps
    assert ((place.cos - exact).abs().max() <= eps * 40) == (not dtypes)
    other = copy.deepcopy(model)
    other.transformer.rotary_emb.inv_freq.zero_()
    assert (
        other._calm_rt_patch.model.transformer._place(torch.zeros(1, 2, 32), None).cos.eq(1).all()
    )
    assert model.generate(ids, max_new_tokens=4, temperature=1.0).shape[0] == 1
