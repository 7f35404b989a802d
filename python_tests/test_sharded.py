"""What is said of a model under FSDP2 whose parts cannot be sharded, and of one that is saved."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import calm_rt
from calm_rt.losses import energy_loss
from calm_rt.nn import AutoencoderConfig, Calm, CalmConfig, fold_encoder, screen_decoder

SIZES = {"patch_size": 2, "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
IDS = torch.arange(16).view(2, 8)
WHOLE = r"model: expected whole weights .*examples/fsdp2\.py.* got a DTensor"


class Training(torch.nn.Module):
    def __init__(self, fold: bool = False):
        super().__init__()
        torch.manual_seed(0)
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_mlp_layers": 1}
        config = CalmConfig(latent_size=4, num_samples=2, **heads, **SIZES)
        self.calm = Calm(config, AutoencoderConfig(latent_size=4, **SIZES))
        if fold:
            fold_encoder(self.calm.ae_model)

    def forward(self, ids):
        return energy_loss(self.calm, ids, seed=1)[0]


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model: Training, mesh) -> None:
    for layer in model.calm.transformer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    "part",
    [
        "calm",
        "calm.transformer",
        "calm.generative_head",
        "calm.generative_head.mlp_blocks.0",
        "calm.generative_head.norm_noise",
        "calm.ae_model",
        "calm.ae_model.encoder",
    ],
)
def test_a_part_that_cannot_be_sharded_says_which_can(mesh, part):
    model = Training()
    fully_shard(model.get_submodule(part), mesh=mesh)
    with pytest.raises(ValueError, match=WHOLE):
        model(IDS)


@pytest.mark.parametrize("change", [fold_encoder, screen_decoder])
def test_tables_are_made_before_sharding(mesh, change):
    model = Training()
    shard(model, mesh)
    with pytest.raises(ValueError, match=WHOLE):
        change(model.calm.ae_model)


@pytest.mark.parametrize("fold", [False, True])
def test_a_sharded_model_is_gathered_to_be_saved(mesh, fold, tmp_path):
    model, expected = Training(fold), Training()
    shard(model, mesh)
    torch.testing.assert_close(model(IDS), expected(IDS))
    with pytest.raises(ValueError, match=r"gather .*get_model_state_dict\(.*got a DTensor"):
        model.calm.save(tmp_path)
    assert not list(tmp_path.iterdir())
    gathered = Training()
    torch.nn.init.zeros_(gathered.calm.transformer.norm.weight)
    options = StateDictOptions(full_state_dict=True)
    gathered.load_state_dict(get_model_state_dict(model, options=options))
    gathered.calm.save(tmp_path)
    for name, tensor in calm_rt.load(tmp_path).state_dict().items():
        assert torch.equal(tensor, expected.calm.state_dict()[name]), name
