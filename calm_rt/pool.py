"""Algorithm 2 of the paper on pools that are decoded only as far as the choice depends on them.

A patch competes at level m if m candidates of the pool are equal to it, so each of its tokens must
be shared by m candidates. Slots are decoded one after another; candidates that agree so far are a
group, and its size bounds how often any patch in it can occur. Only groups that can still compete
are split further. What is left undecided occurs too seldom to compete, whatever it is, so the
choice is, bit for bit, that of the fully decoded pool: of its tuples (calm_rt.tuples) where one
decides, otherwise of `ops.select_patch`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calm_rt import ops
from calm_rt.draws import Draws
from calm_rt.tuples import Tuples

# How many tokens cost as much as one more pass over the vocabulary. Measured with V 128,257 and
# H 512 on an AVX-512 CPU with its screen (6 ms and 0.19 ms a row on one thread); for CUDA from
# bandwidth and rate.
PASS_ROWS = {"cpu": 32, "cuda": 256}
FIRST_SHARE = 0.25  # of a pool, supposed to be worth a second slot


class Vote(NamedTuple):
    patches: Tensor  # [B, K] int64
    slots: Tensor  # [B] int64, tokens decoded
    sure: Tensor  # [B] bool, a tuple of equal candidates decided


class Pools:
    """What is known of B pools of S candidates: tokens, and who is equal to whom so far.

    states: [B, S, H], what `draws` decodes tokens from.
    tokens: [K, B, S] int64, those that are known already, -1 where they are not; None for none.
    alive: [B, S] bool, candidates that take part; None for all.
    """

    def __init__(
        self,
        draws: Draws,
        states: Tensor,
        tokens: Tensor | None = None,
        alive: Tensor | None = None,
    ) -> None:
        self.shape, device = states.shape[:2], states.device
        full_shape = draws.patch_size, *self.shape
        if tokens is None:
            tokens = torch.full(full_shape, -1, device=device)
        if alive is None:
            alive = torch.ones(self.shape, dtype=torch.bool, device=device)
        self.tokens = tokens.flatten(1)  # [K, B S]
        self.alive = alive
        self.promised = torch.zeros_like(alive)  # [B, S], decoded whole in the next pass
        self.depth = torch.zeros_like(alive, dtype=torch.int64)  # [B, S], slots known of the group
        self.group = torch.arange(self.shape[0], device=device)[:, None].repeat(1, self.shape[1])
        self.slots = torch.zeros(self.shape[0], dtype=torch.int64, device=device)  # [B], decoded
        self._draws, self._states = draws, states.flatten(0, 1)
        self._next_group = self.shape[0]
        self._last_split = 0  # candidates
        self._count_alive()

    def keep(self, prefix: Tensor) -> None:
        """Drops the candidates that do not begin with known tokens.  prefix: [B, K], -1 if free."""
        for slot, known in enumerate(prefix.T):
            asked = self.alive & (known >= 0)[:, None]
            wanted = torch.zeros_like(self.tokens, dtype=torch.bool)
            wanted[slot] = asked.flatten()
            self.decode(wanted)
            same = self.tokens[slot].view(self.shape) == known[:, None]
            self.alive = self.alive & (same | ~asked)
        self._count_alive()

    def decode(self, wanted: Tensor) -> None:
        """Finds out tokens.  wanted: [K, B S] bool; what is known already costs nothing."""
        wanted = (wanted | self.promised.flatten()) & (self.tokens < 0)
        rows = [of_slot.nonzero().squeeze(1) for of_slot in wanted]
        if any(len(of_slot) for of_slot in rows):
            self.tokens[wanted] = self._draws.decode(self._states, rows)
            self.slots += wanted.unflatten(1, self.shape).sum((0, 2))

    def split(self, chosen: Tensor) -> None:
        """Splits whole groups by their next slot, or by all their slots where that is cheaper.

        chosen: [B, S] bool.
        """
        at_once = self._is_cheaper_at_once(chosen)
        wanted = torch.zeros_like(self.tokens, dtype=torch.bool)
        for slot in range(len(wanted)):
            next_or_later = self.depth <= slot if at_once else self.depth == slot
            wanted[slot] = (chosen & next_or_later).flatten()
        self.decode(wanted)
        before = self.depth.clone()
        for slot in range(len(wanted)):
            due = (self.depth if at_once else before) == slot
            members = (chosen & due).flatten().nonzero().squeeze(1)
            if len(members):
                self._split_by(slot, members)

    def decide(self, tuples: Tuples) -> tuple[Tensor, Tensor]:
        """Which pools a tuple decides, and the candidate that it chooses; those need no vote.

        returns: [B] bool; [B] int64.
        """
        self.split(self.alive)
        tokens = self.tokens.unflatten(1, self.shape).permute(1, 2, 0)  # [B, S, K], a view
        hopeful = tuples.equal(tokens[..., :1])  # [B, T]
        members = hopeful.nonzero()[:, :1] * self.shape[1] + tuples.candidates[hopeful]  # [N, n]
        wanted = torch.zeros_like(self.tokens, dtype=torch.bool)
        wanted[:, members.flatten()] = True
        self.decode(wanted)
        found, chosen = tuples.find(tokens)
        self.count[found] = 0
        return found, chosen

    def whole(self) -> Tensor:
        """[B, S] bool, the candidates of groups in which every slot is known."""
        return self.depth == len(self.tokens)

    def _is_cheaper_at_once(self, chosen: Tensor) -> bool:
        """Whether passes over the vocabulary cost more than the tokens that they would spare, if
        each leaves the same share of the candidates as the last."""
        count = int(chosen.sum())
        share = min(1, count / self._last_split) if self._last_split else FIRST_SHARE
        self._last_split = count
        slots = len(self.tokens) - int(self.depth[chosen].min())
        return cheaper_at_once(count, slots, chosen.device.type, share)

    def _split_by(self, slot: int, members: Tensor) -> None:
        """members: [N] int64, places in [B S]."""
        group, depth, count = (t.view(-1) for t in (self.group, self.depth, self.count))
        key = group[members] << 32 | self.tokens[slot, members]
        kinds, place, sizes = key.unique(return_inverse=True, return_counts=True)
        group[members] = place + self._next_group
        count[members] = sizes[place]
        depth[members] += 1
        self._next_group += len(kinds)

    def _count_alive(self) -> None:
        """Lets the candidates that take part be one group, of which nothing is known."""
        self.count = torch.where(self.alive, self.alive.sum(1, keepdim=True), 0)  # [B, S]


def cheaper_at_once(count: int, slots: int, device: str, share: float = FIRST_SHARE) -> bool:
    """Whether `slots` passes over the vocabulary cost more than the tokens that they would spare.

    count: candidates, of which each pass leaves a share.
    """
    spared = slots - sum(share**passes for passes in range(slots))
    return count * spared <= PASS_ROWS[device] * (slots - 1)


def draw_blindly(draws: Draws, number: int, count: int) -> Tensor:
    """The first `count` draws of a round, decoded whole or as far as `decode_blindly` does,
    whichever should cost less.  returns: [B, count, K] int64."""
    if cheaper_at_once(len(draws.rows) * count, draws.patch_size, draws.rows.device.type):
        return draws.whole_patches(number, count)
    return decode_blindly(draws, draws.draw(number, count))


def decode_blindly(draws: Draws, states: Tensor) -> Tensor:
    """Pools decoded slot by slot as far as their choice depends on it, without a look by the host.

    A patch that no other candidate has competes at level 1 only, where all candidates weigh alike:
    so beside those that share all tokens so far with another, one a pool is decoded, which is then
    the choice. The others differ from all in what is known. (`vote`, at n > 2, spares more.)

    states: [B, S, H], what `draws` decodes tokens from.
    returns: [B, S, K] int64, of which `ops.select_patch` at n >= 2 and tuples choose as of the
        whole pools; -1 where nothing was decoded.
    """
    (num_pools, size), patch, device = states.shape[:2], draws.patch_size, states.device
    states = states.flatten(0, 1)
    order, count = torch.arange(num_pools * size, device=device), None  # [B S]
    tokens = torch.full((len(order), patch), -1, device=device)  # [B S, K]
    kept = (draws.choice() * size).long()  # [B]
    for slot in range(patch):
        if slot:
            known = tokens.unflatten(0, (num_pools, size))
            order, count = ops.survivors(known, kept, depth=slot)
        rows = [order[:0]] * patch
        rows[slot] = order
        tokens[:, slot].index_copy_(0, order, draws.decode(states, rows, count))
    return tokens.unflatten(0, (num_pools, size))


def settle(pools: Pools, n: int) -> None:
    """Splits groups until all patches that compete at temperature 1 / n are whole, n >= 2.

    The level is min(n, count of the most frequent patch), if any occurs twice. The largest group
    is split first, so it is found from above; with it go others while they are few.
    """
    num_pools, size = pools.shape
    few = max(1, PASS_ROWS[pools.alive.device.type] // max(1, num_pools))
    while True:
        whole = pools.whole()
        least = torch.where(whole, pools.count, 0).amax(1).clamp(2, n)  # [B], known of the level
        bound = torch.where(whole, 0, pools.count)  # [B, S]
        largest = bound.topk(min(few, size)).values  # [B, few]
        aim = torch.minimum(largest[:, 0].clamp(max=n), largest[:, -1])
        chosen = bound >= torch.maximum(aim, least)[:, None]
        if not chosen.any():
            return
        pools.split(chosen)


def vote(
    draws: Draws,
    states: Tensor,
    n: int,
    tokens: Tensor | None = None,
    alive: Tensor | None = None,
    tuples: Tuples | None = None,
) -> Vote:
    """Algorithm 2 at temperature 1 / n; n = 1 takes any candidate, which is exact.

    states, tokens, alive: see `Pools`.
    tuples: which decide where they can, of pools in which all candidates take part.
    """
    (num_pools, size), device = states.shape[:2], states.device
    pools = Pools(draws, states, tokens, alive)
    # Where no patch repeats, the level is 1 and this candidate is the choice.
    place = (draws.choice() * pools.alive.sum(1)).long()  # [B]
    chosen = (pools.alive.cumsum(1) > place[:, None]).int().argmax(1)
    pools.promised[torch.arange(num_pools, device=device), chosen] = True
    sure = torch.zeros(num_pools, dtype=torch.bool, device=device)
    if tuples is not None:
        sure, equal = pools.decide(tuples)
    if min(n, size) > 1:
        settle(pools, n)
        blanks = -1 - torch.arange(size, device=device)  # [S], equal to no token and to each other
        whole = pools.whole().flatten()
        known = torch.where(whole, pools.tokens, blanks.repeat(num_pools))
        known = known.unflatten(1, pools.shape).permute(1, 2, 0)  # [B, S, K]
        elected = ops.select_patch(known, n=n, seed=draws.seed, rows=draws.rows)
        repeats = pools.count.gather(1, elected[:, None]).squeeze(1) > 1
        chosen = torch.where(repeats, elected, chosen)
    if tuples is not None:
        chosen = torch.where(sure, equal, chosen)
    ids = torch.arange(num_pools, device=device) * size + chosen
    wanted = torch.zeros_like(pools.tokens, dtype=torch.bool)
    wanted[:, ids] = True
    pools.decode(wanted)
    return Vote(pools.tokens[:, ids].T, pools.slots, sure)
