"""energy_score alone, as the loss of somebody else's probabilistic forecasts.

    python examples/forecast_score.py --steps 100

A network turns inputs and noise into an ensemble; the truth was measured with a known error. The
score is proper: only the right distribution reaches its best value. The truth here has correlated
parts, which losses of single components do not see.
"""

import argparse

import torch
from torch import nn

from calm_rt import ops

PARTS, NOISE, ENSEMBLE, ERROR = 8, 8, 16, 0.1

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()
torch.manual_seed(0)
forecast = nn.Sequential(nn.Linear(1 + NOISE, 64), nn.SiLU(), nn.Linear(64, PARTS))
optimizer = torch.optim.AdamW(forecast.parameters(), lr=3e-3)
log_error = torch.full((256, PARTS), ERROR).log()
for step in range(options.steps):
    x = torch.rand(256, 1)
    shock = torch.randn(256, 1)  # common to all parts
    truth = torch.sin(6 * x) + 0.5 * shock + 0.2 * torch.randn(256, PARTS)
    inputs = torch.cat([x.expand(ENSEMBLE, -1, -1), torch.randn(ENSEMBLE, 256, NOISE)], -1)
    ensemble = forecast(inputs)  # [S, R, L]
    observed = truth + ERROR * torch.randn_like(truth)
    loss = -ops.energy_score(ensemble, observed, log_error, num_targets=8, seed=step).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
parts = ensemble[:, x.squeeze(1).argsort()[128]].T  # [L, S], in the middle
print(f"loss {loss.item():.3f}; correlation of parts {parts.corrcoef()[0, 1].item():.2f}")
