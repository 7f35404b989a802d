"""Draws that begin with known tokens, gathered from round to round.

They are draws of the conditional distribution p(x | tokens), whose power 1 / T is, but for a
constant, the conditional of the power 1 / T: so a pool of them is all that Algorithm 2 needs to
sample the conditional at the same temperature. How many rounds it takes to find so many depends on
who begins with the tokens alone, not on what follows them, so the first N that are found are N
independent draws; and where max_draws ends the search before, those found are a smaller pool.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calm_rt.draws import Draws
from calm_rt.pool import Pools


class Matches(NamedTuple):
    """Pools of up to N draws for B contexts that begin with the context's known tokens."""

    states: Tensor  # [B, N, H], what `draws` decodes tokens from
    tokens: Tensor  # [K, B, N] int64, -1 where not decoded yet
    found: Tensor  # [B] int64, how many begin with them; of none, all N are any draws
    draws: Tensor  # [B] int64, vectors that the head drew
    slots: Tensor  # [B] int64, tokens decoded

    def alive(self) -> Tensor:
        """[B, N] bool, the candidates."""
        size = self.states.shape[1]
        count = torch.where(self.found > 0, self.found, size)
        return torch.arange(size, device=count.device) < count[:, None]


def gather_matches(
    draws: Draws, prefix: Tensor, wanted: int, size: int, max_draws: int, first_round: int = 0
) -> Matches:
    """Draws rounds until each context has as many matches as are wanted, or made max_draws.

    prefix: [B, K] int64, known first tokens, -1 where free; only those slots are decoded.
    wanted: at most `size`, the draws of a round.
    """
    num_contexts, device = len(draws.rows), draws.rows.device
    wanted = min(wanted, max_draws)
    found, drawn, slots = torch.zeros(3, num_contexts, dtype=torch.int64, device=device)
    active = torch.arange(num_contexts, device=device)
    states = tokens = None
    number, left = first_round, max_draws
    while left and len(active):
        some, count = draws.of(active), min(size, left)
        new = some.draw(number, count)  # [A, count, H]
        pools = Pools(some, new)
        pools.keep(prefix[active])
        known = pools.tokens.unflatten(1, pools.shape)  # [K, A, count]
        if states is None:
            states, tokens = new[:, :wanted].clone(), known[..., :wanted].clone()
        place = found[active, None] + pools.alive.cumsum(1) - 1  # [A, count]
        context, candidate = (pools.alive & (place < wanted)).nonzero(as_tuple=True)
        place, target = place[context, candidate], active[context]
        states[target, place] = new[context, candidate]
        tokens[:, target, place] = known[:, context, candidate]
        found[active] = (found[active] + pools.alive.sum(1)).clamp(max=wanted)
        drawn[active] += count
        slots[active] += pools.slots
        active = active[found[active] < wanted]
        number, left = number + 1, left - count
    return Matches(states, tokens, found, drawn, slots)
