"""Models with the official parameter names: state dicts of the official checkpoints fit."""

from calm_rt.nn.autoencoder import (
    Autoencoder,
    fold_encoder,
    folded_bytes,
    screen_decoder,
)
from calm_rt.nn.backbone import KVCache, Transformer
from calm_rt.nn.calm import Calm
from calm_rt.nn.config import AutoencoderConfig, CalmConfig
from calm_rt.nn.heads import EnergyHead

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "Calm",
    "CalmConfig",
    "EnergyHead",
    "KVCache",
    "Transformer",
    "fold_encoder",
    "folded_bytes",
    "screen_decoder",
]
