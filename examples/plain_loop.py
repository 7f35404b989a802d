"""A CALM in one file: a causal transformer of plain PyTorch, the ops as functions, and its text.

python examples/plain_loop.py --steps 1000 --text FILE     (tokens are bytes)
"""

import argparse

import torch
from torch import nn

from calm_rt import ops
from calm_rt.ops.decode import decode_hidden
from calm_rt.reference import DecoderWeights, HeadBlock, HeadWeights, LinearWeights

K, H, L, STD, PATCHES = 4, 128, 32, torch.tensor(0.1), 16
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--text", default=__file__)
options = parser.parse_args()
data = torch.tensor(list(open(options.text, "rb").read()))
blocks = data.unfold(0, PATCHES * K, 1).unflatten(1, (-1, K))  # [N, P, K], one at every byte
encoder = nn.Sequential(nn.Embedding(256, H), nn.Flatten(-2), nn.Linear(K * H, L), nn.Tanh())
decoder = nn.ModuleList([nn.Linear(L, H), nn.Linear(H, K * H), nn.RMSNorm(H), nn.Embedding(256, H)])
embed = nn.Sequential(nn.Embedding(256, H), nn.Flatten(-2), nn.Linear(K * H, H))
layer = nn.TransformerEncoderLayer(H, 4, 4 * H, dropout=0.0, batch_first=True, norm_first=True)
transformer = nn.TransformerEncoder(layer, 2, nn.LayerNorm(H), enable_nested_tensor=False)
sizes = [(16, H), H, (H, H), H, H, (2 * H, H), (H, H), (H, 2 * H), (H, H), H, (H, H), (H, L)]
head = nn.ModuleList(nn.LayerNorm(s) if s == H else nn.Linear(*s) for s in sizes)
first, expand, *pairs = (LinearWeights(m.weight, m.bias) for m in (*decoder[:2], *head))
decode_with = DecoderWeights(first, [], expand, [], decoder[2].weight, decoder[3].weight)
draw_with = HeadWeights(*pairs[:4], [HeadBlock(*pairs[4:9])], *pairs[9:])


def states(ids):  # [1 or B, P, K] -> [P or B P, H]
    mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
    return transformer(embed(ids), mask, is_causal=True).flatten(0, 1)


for trained in ((encoder, decoder), (embed, transformer, head)):
    optimizer = torch.optim.AdamW(nn.ModuleList(trained).parameters(), lr=1e-3)
    for step in range(options.steps):
        ids = blocks[torch.randint(len(blocks), (16,))]  # [B, P, K]
        if encoder in trained:
            latents = encoder(ids).flatten(0, 1)  # [R, L]
            hidden = decode_hidden(latents + STD * torch.randn_like(latents), decode_with)
            loss = ops.linear_cross_entropy(hidden.flatten(0, 1), decode_with[5], ids.flatten())
        else:
            mean = encoder(ids[:, 1:]).flatten(0, 1).detach()
            draws = ops.sample_latents(states(ids[:, :-1]), draw_with, num_samples=4, seed=step)
            loss = -ops.energy_score(draws, mean, STD.log().expand_as(mean), seed=step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss {loss.item():.3f} after {options.steps} steps")
ids = blocks[:1, : PATCHES // 2]  # a prompt
for row in torch.arange(PATCHES // 2)[:, None]:  # row ids number the draws
    draws = ops.sample_latents(states(ids)[-1:], draw_with, num_samples=200, seed=1, rows=row)
    pool = ops.decode(draws[:, 0], decode_with)[None]  # [1, S, K], of [S, 1, L]
    ids = torch.cat([ids, pool[:, ops.select_patch(pool, n=2, seed=1, rows=row)]], 1)
print(bytes(ids.flatten().tolist()).decode(errors="replace"))
