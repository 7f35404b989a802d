"""Encoders and decoders whose parameters are not all of one type."""

import pytest
import torch
from test_autoencoder import CONFIG, IDS, folded, frozen

import calm_rt
from calm_rt import inputs, ops

MIXED = {  # a module that becomes bfloat16, and what is said
    "encoder.hidden_to_latent": r"weights.latent: expected the type of weights.embedding",
    "encoder.embed_tokens": r"weights.token_layers: expected the type of weights.embedding",
    "encoder.encoder_layers.1.mlp.up_proj": r"weights.patch_layers: expected the type of weights",
    "decoder.expand_layer": r"weights.expand: expected the type of latents, torch.float32",
    "decoder.decoder_layers.0.mlp": r"weights.patch_layers: expected the type of latents",
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("part", MIXED)
def test_matrices_of_several_types_are_named(part: str, backend: str) -> None:
    autoencoder, latents = frozen(), torch.zeros(2, CONFIG.latent_size)
    autoencoder.get_submodule(part).bfloat16()

    def run() -> object:
        encodes = part.startswith("encoder")
        return autoencoder.encode(IDS) if encodes else autoencoder.decode(latents)

    with calm_rt.backend(backend):
        with pytest.raises(ValueError, match=f"{MIXED[part]}.*got torch.(bfloat16|float32)$"):
            run()
        autoencoder.requires_grad_(True)  # a frozen encoder ignores autocast
        with torch.autocast("cpu", torch.bfloat16):
            run()


def test_latents_of_another_type_and_ints_are_named() -> None:
    arguments = inputs.decode(2, 9, 8, 12, 3, 2)
    with pytest.raises(
        ValueError, match=r"weights.latent: expected the type of latents, .*32, got"
    ):
        ops.decode(arguments["latents"].float(), arguments["weights"])
    arguments = inputs.encode(2, 9, 8, 12, 3, 2)
    whole = arguments["weights"]._replace(embedding=arguments["weights"].embedding.int())
    with pytest.raises(ValueError, match=r"weights.embedding: expected a floating-point tensor"):
        ops.encode(arguments["ids"], whole)


def test_tables_of_another_type_than_the_parameters_are_not_used() -> None:
    autoencoder = folded()
    for parameter in autoencoder.parameters():
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(autoencoder.encode(IDS)[0], frozen(torch.bfloat16).encode(IDS)[0])
    assert autoencoder.encoder.tables is not None
