"""A CALM in one file, on your own backbone and head: only the ops and losses are ours.

python examples/plain_loop.py --steps 200 --text FILE     (tokens are bytes)
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from calm_rt import ops
from calm_rt.losses import autoencoder_loss
from calm_rt.nn import Autoencoder, AutoencoderConfig

K, WIDTH, LATENT, NOISE, DRAWS, BATCH, PATCHES = 4, 128, 32, 16, 4, 8, 16


class Backbone(nn.Module):
    """Any network that turns patches into states, and states and noise into draws."""

    def __init__(self):
        super().__init__()
        self.embed, self.join = nn.Embedding(256, WIDTH), nn.Linear(K * WIDTH, WIDTH)
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)
        first, last = nn.Linear(WIDTH + NOISE, WIDTH), nn.Linear(WIDTH, LATENT)
        self.head = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, ids):  # [B, P K]
        patches = self.join(self.embed(ids).unflatten(1, (-1, K)).flatten(2))
        states = self.recurrent(patches)[0].flatten(0, 1)  # [B P, H]
        noise = torch.rand(DRAWS, len(states), NOISE) - 0.5
        return self.head(torch.cat([states.expand(DRAWS, -1, -1), noise], -1))  # [S, B P, L]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--text", default=__file__)
options = parser.parse_args()
data = torch.frombuffer(bytearray(Path(options.text).read_bytes()), dtype=torch.uint8).long()
config = AutoencoderConfig(
    patch_size=K, vocab_size=256, hidden_size=WIDTH, intermediate_size=WIDTH, latent_size=LATENT
)
autoencoder, backbone = Autoencoder(config), Backbone()
for kind, model in (("autoencoder", autoencoder), ("language model", backbone)):
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(options.steps):
        starts = torch.randint(len(data) - PATCHES * K, (BATCH,))
        ids = torch.stack([data[start : start + PATCHES * K] for start in starts])
        if model is autoencoder:
            loss, _ = autoencoder_loss(autoencoder, ids, seed=step)
        else:
            with torch.no_grad():
                mean, log_std = (part.flatten(0, 1) for part in autoencoder.encode(ids[:, K:]))
            loss = -ops.energy_score(backbone(ids[:, :-K]), mean, log_std, seed=step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{kind}: loss {loss.item():.3f} after {options.steps} steps")
