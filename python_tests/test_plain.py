"""What an op would pass over in a head or an autoencoder is an error that names it."""

import pytest
import torch
from test_models import model, tokens

from calm_rt.losses import energy_loss
from calm_rt.nn import Calm, KVCache, fold_encoder, screen_decoder


class Adapter(torch.nn.Module):
    """What PEFT puts in a Linear's place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x):
        return 2 * self.base_layer(x)


@pytest.mark.parametrize("where", ["generative_head.hidden_embd", "ae_model.encoder.squeeze_layer"])
def test_an_adapter_that_an_op_would_pass_over_is_named(where):
    changed, ids = model(), tokens(1, 3, 4)
    layer = changed.get_submodule(where)
    changed.set_submodule(where, Adapter(layer))
    with pytest.raises(ValueError, match=r"model: expected Linear modules.*got Adapter"):
        energy_loss(changed, ids)
    changed.set_submodule(where, layer)
    hook = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="got Linear with hooks"):
        energy_loss(changed, ids)
    hook.remove()
    hook = layer.register_full_backward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="got Linear with hooks"):
        energy_loss(changed, ids)
    hook.remove()
    before, _ = energy_loss(changed, ids)
    torch.nn.utils.parametrizations.weight_norm(layer)
    torch.testing.assert_close(energy_loss(changed, ids)[0], before)
    layer.parametrizations.weight.original0.data *= 3
    assert energy_loss(changed, ids)[0] != before


@pytest.mark.parametrize(
    ("where", "change", "got"),
    [
        ("mlp_blocks.0.linears", lambda m: m.__setitem__(1, torch.nn.GELU()), "got GELU"),
        ("mlp_blocks.0.linears", lambda m: m.append(torch.nn.Dropout()), "got 6 modules"),
        (
            "mlp_blocks.0",
            lambda m: m.register_forward_hook(print),
            "got EnergyHeadBlock with",
        ),
        (
            "final_layer.linears",
            lambda m: m.register_forward_pre_hook(print),
            "got Sequential",
        ),
        ("", lambda m: m.register_full_backward_hook(print), "got EnergyHead with hooks"),
        ("", lambda m: setattr(m, "forward", print), "got EnergyHead"),
    ],
)
def test_a_change_between_the_layers_of_a_head_is_named(where, change, got):
    changed = model()
    change(changed.generative_head.get_submodule(where))
    with pytest.raises(ValueError, match=f"model: expected .*{got}"):
        changed.sample(torch.zeros(1, changed.config.hidden_size), 2, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.hidden_states([1, 2]), "ids: expected a tensor, got list"),
        (lambda m: m.ae_model.encode(None), "ids: expected a tensor, got None"),
        (lambda m: m.ae_model.decode([1.0]), "latents: expected a tensor, got list"),
        (lambda m: KVCache(m.config, "a", 3), "batch_size: expected an int, got 'a'"),
        (lambda m: fold_encoder(m), "autoencoder: expected an Autoencoder .*got Calm"),
        (lambda m: screen_decoder(m), "autoencoder: expected an Autoencoder .*got Calm"),
        (lambda m: Calm(m.ae_model.config, m.config), "config: expected a CalmConfig, got Auto"),
        (lambda m: Calm(m.config, m.config), "autoencoder_config: expected an .*got CalmConfig"),
    ],
)
def test_arguments_of_another_kind_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(model())


@pytest.mark.parametrize("where", ["encoder", "encoder.encoder_layers.0", "encoder.norm"])
def test_a_hook_in_an_autoencoder_is_named(where):
    autoencoder = model().ae_model
    autoencoder.get_submodule(where).register_forward_hook(print)
    with pytest.raises(ValueError, match=r"model: expected .* with hooks"):
        autoencoder.encode(tokens(1, 3, 4))
