"""Generative heads: a hidden state to draws of the next latent vector (paper section 3.3)."""

from torch import Tensor, nn

from calm_rt import reference
from calm_rt.nn.autoencoder import init_weights
from calm_rt.nn.config import CalmConfig
from calm_rt.nn.plain import check_plain, weights_between_silu, weights_of
from calm_rt.ops.check import check_shape
from calm_rt.reference import HEAD_EPS, HeadBlock, HeadWeights


class EnergyHeadBlock(nn.Module):
    """The parameters of one residual block that refines the noise under the context."""

    def __init__(self, size: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(size, eps=HEAD_EPS)
        self.linears = nn.Sequential(
            nn.Linear(2 * size, size),
            nn.SiLU(),
            nn.Linear(size, size),
            nn.SiLU(),
            nn.Linear(size, 2 * size),
        )
        self.down_proj = nn.Linear(size, size)

    def weights(self) -> HeadBlock:
        """The parameters as `ops` take them."""
        check_plain(self, EnergyHeadBlock)
        linears = weights_between_silu(self.linears, 3)
        return HeadBlock(weights_of(self.in_ln), *linears, weights_of(self.down_proj))


class EnergyHeadOutput(nn.Module):
    """The parameters of the head's last two linear maps."""

    def __init__(self, size: int, latent_size: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(size, eps=HEAD_EPS)
        self.linears = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, latent_size))


class EnergyHead(nn.Module):
    """Noise and a hidden state to one latent vector; parameters as in the official MLPGenerator."""

    def __init__(self, config: CalmConfig):
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.noise_embd = nn.Linear(config.noise_size, size)
        self.hidden_embd = nn.Linear(size, size)
        self.norm_hidden = nn.LayerNorm(size, eps=HEAD_EPS)
        self.norm_noise = nn.LayerNorm(size, eps=HEAD_EPS)
        self.mlp_blocks = nn.ModuleList(EnergyHeadBlock(size) for _ in range(config.num_mlp_layers))
        self.final_layer = EnergyHeadOutput(size, config.latent_size)
        self.init_weights()

    def init_weights(self) -> None:
        """The whole initialisation: the head of an untrained model draws zeros."""
        init_weights(self, self.config.initializer_range)
        nn.init.zeros_(self.final_layer.linears[2].weight)

    def forward(self, hidden: Tensor, noise: Tensor) -> Tensor:
        """One latent vector for every context and noise vector.

        hidden: [R, H].  noise: [S, R, N], uniform in [-0.5, 0.5).
        returns: [S, R, L].
        """
        check_shape("hidden", hidden, R=None, H=self.config.hidden_size)
        check_shape("noise", noise, S=None, R=hidden.shape[0], N=self.config.noise_size)
        return reference.head_latents(hidden, noise, self.weights())

    def weights(self) -> HeadWeights:
        """The parameters as `ops.sample_latents` takes them."""
        final = self.final_layer
        check_plain(final, EnergyHeadOutput)
        final_first, final_second = weights_between_silu(final.linears, 2)
        return HeadWeights(
            noise=weights_of(self.noise_embd),
            noise_norm=weights_of(self.norm_noise),
            hidden=weights_of(self.hidden_embd),
            hidden_norm=weights_of(self.norm_hidden),
            blocks=[block.weights() for block in self.mlp_blocks],
            final_norm=weights_of(final.in_ln),
            final_first=final_first,
            final_second=final_second,
        )
