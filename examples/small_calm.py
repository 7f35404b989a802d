"""A small CALM and random bytes, for the examples that are about something else."""

import torch
from torch import Tensor, nn

from calm_rt.losses import energy_loss
from calm_rt.nn import AutoencoderConfig, Calm, CalmConfig

SIZES = {"patch_size": 4, "vocab_size": 256, "latent_size": 16}
BLOCK = 64  # tokens


class CalmForTraining(nn.Module):
    """A module whose forward is the loss, which is what trainers, DDP and FSDP wrap.

    The draws of a step follow from `seed`: pass another one in each step and each process.
    """

    def __init__(self):
        super().__init__()
        config = CalmConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_mlp_layers=1,
            num_samples=4,
            **SIZES,
        )
        self.calm = Calm(config, AutoencoderConfig(hidden_size=64, intermediate_size=128, **SIZES))
        # safetensors, and so Trainer and Accelerate, takes no tensor twice: a parameter that a
        # Calm has under two names is shown under one, and loading completes the other
        self.register_state_dict_post_hook(drop_alias)

    def forward(self, input_ids: Tensor, seed: int = 0) -> Tensor:
        """input_ids: [B, T] int64.  returns: [], the energy loss."""
        return energy_loss(self.calm, input_ids, seed=seed)[0]


def drop_alias(_: nn.Module, tensors: dict[str, Tensor], prefix: str, *__: object) -> None:
    """Takes the second name of the autoencoder's embedding out of a state dict."""
    tensors.pop(f"{prefix}calm.ae_model.decoder.lm_head_weight", None)


def random_blocks(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Blocks of tokens as datasets give them."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(256, (BLOCK,), generator=generator)} for _ in range(count)]
