"""What `save` writes of models that were compiled, parametrized or changed: `load` takes it."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from calm_rt import checkpoint
from calm_rt.losses import energy_loss
from calm_rt.nn import AutoencoderConfig, Calm, CalmConfig

SIZES = {"patch_size": 2, "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
IDS = torch.arange(16).view(2, 8)


@pytest.fixture
def model() -> Calm:
    torch.manual_seed(0)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_mlp_layers": 1}
    config = CalmConfig(latent_size=4, num_samples=2, **heads, **SIZES)
    model = Calm(config, AutoencoderConfig(latent_size=4, **SIZES))
    nn.init.normal_(model.generative_head.final_layer.linears[2].weight)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def compile_parts(model: Calm) -> None:
    model.transformer.layers[0] = torch.compile(model.transformer.layers[0], backend="eager")
    model.embed_proj = torch.compile(model.embed_proj, backend="eager")


def parametrize(model: Calm) -> None:
    parametrizations.weight_norm(model.generative_head.noise_embd)
    parametrizations.weight_norm(model.ae_model.decoder.expand_layer)
    parametrizations.spectral_norm(model.generative_head.mlp_blocks[0].down_proj)
    parametrizations.orthogonal(model.ae_model.encoder.squeeze_layer)


@pytest.mark.parametrize("layout", ["calm_rt", "official"])
@pytest.mark.parametrize("change", [compile_parts, parametrize])
def test_changed_parts_are_saved_as_what_they_compute(model, change, layout, tmp_path):
    change(model)
    state = {name: tensor.clone() for name, tensor in model.train().state_dict().items()}
    checkpoint.save(model, tmp_path, layout=layout)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(module.training for module in model.generative_head.modules())
    loaded = checkpoint.load(tmp_path)
    assert not any("_orig_mod" in n or "parametrizations" in n for n in loaded.state_dict())
    with torch.no_grad():
        ours, theirs = (energy_loss(m.eval(), IDS, seed=1)[0] for m in (model, loaded))
    torch.testing.assert_close(ours, theirs)


def add_a_module(model: Calm) -> None:
    model.probe = nn.Linear(2, 3)


def add_a_head(model: Calm) -> None:
    model.generative_head = nn.Linear(16, 4)


def resize(model: Calm) -> None:
    model.transformer.embed_tokens.weight = nn.Parameter(torch.zeros(50, 16))


def make_ints(model: Calm) -> None:
    model.transformer.norm.weight = nn.Parameter(torch.ones(16).char(), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_a_module, r"got also probe\.bias, probe\.weight \(2 in all\)"),
        (add_a_head, r"got also generative_head\.bias, generative_head\.weight \(2 in all\)"),
        (resize, r"embed_tokens\.weight of shape \[40, 16\].*got \[50, 16\] torch.float32"),
        (make_ints, r"norm\.weight of shape \[16\].*got \[16\] torch.int8"),
    ],
)
def test_what_load_would_refuse_is_named_and_the_old_folder_stays(model, change, message, tmp_path):
    model.save(tmp_path)
    before = contents(tmp_path)
    change(model)
    with pytest.raises(ValueError, match=f"model: expected .*{message}"):
        model.save(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.save(model, tmp_path / "official", layout="official")
    assert contents(tmp_path) == before and not (tmp_path / "official").exists()
