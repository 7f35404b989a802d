"""Initial values: the same whether a model was made in memory or on the meta device."""

import pytest
import torch
from torch import nn

from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig, fold_encoder

SIZES = {"patch_size": 2, "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
AUTOENCODER = AutoencoderConfig(latent_size=4, initializer_range=0.5, **SIZES)
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_mlp_layers": 1}


def make(kind: type) -> Autoencoder | Calm:
    if kind is Autoencoder:
        return Autoencoder(AUTOENCODER)
    return Calm(CalmConfig(latent_size=4, **HEADS, **SIZES), AUTOENCODER)


@pytest.mark.parametrize("kind", [Autoencoder, Calm])
def test_a_model_made_on_meta_is_initialised_whole(kind):
    with torch.device("meta"):
        empty = make(kind)
    empty.to_empty(device="cpu")
    for parameter in empty.parameters():
        nn.init.constant_(parameter, float("nan"))
    models = make(kind), empty
    for model in models:
        torch.manual_seed(3)
        model.init_weights()
    made, filled = (model.state_dict() for model in models)
    for name, tensor in made.items():
        assert torch.equal(tensor, filled[name]), name
    autoencoder = empty.ae_model if kind is Calm else empty
    assert autoencoder.decoder.lm_head_weight is autoencoder.encoder.embed_tokens.weight


@pytest.mark.parametrize("kind", [Autoencoder, Calm])
def test_values_that_are_not_drawn(kind):
    made, again = make(kind), make(kind)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1)
    again.init_weights()
    for name, parameter in made.named_parameters():
        twin = again.get_parameter(name)
        if parameter.unique().numel() == 1:  # norms, biases, the last layer of the head
            assert torch.equal(parameter, twin), name
        else:
            assert 0.5 < twin.std() / parameter.std() < 2 and twin.mean().abs() < twin.std(), name
            assert not torch.equal(parameter, twin), name


def test_constructors_draw_as_init_weights():
    """From the state in which they come to it, which torch's own initialisation is before."""
    states = []

    class Noted(Autoencoder):
        def init_weights(self):
            states.append(torch.get_rng_state())
            super().init_weights()

    made, other = Noted(AUTOENCODER), Autoencoder(AUTOENCODER)
    torch.set_rng_state(states[0])
    other.init_weights()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_tables_go_with_the_parameters_they_are_of():
    autoencoder = make(Autoencoder).requires_grad_(False)
    fold_encoder(autoencoder)
    autoencoder.init_weights()
    assert autoencoder.encoder.tables is None
