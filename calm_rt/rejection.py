"""Algorithm 1 of the paper: samples of p^(1/T) / Z for any T in (0, 1], from draws of p alone.

With n = floor(1/T) and alpha = 1/T - n, each context by itself:
    1. x, and n - 1 draws more: all equal to x, or start again;
    2. alpha = 0: take x. Otherwise draw: equal to x, take x; else start again with probability
       alpha / i, i = 1, 2, ... counting these tests. That takes x with probability p(x)^alpha.
A round of draws goes through these stages together, decoded as far as it takes to tell which are
equal; contexts that are done leave.

Given known first tokens only the draws that begin with them count. Those are draws of p(x | tokens)
and the result has p(x | tokens)^(1/T) / Z', which is the conditional of p^(1/T) / Z: the tokens'
own probability is a constant.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from calm_rt.draws import Draws
from calm_rt.pool import Pools, settle

FIRST_ROUND, LARGEST_ROUND = 32, 256  # draws; each round has twice as many as the one before


class Rejection(NamedTuple):
    """What algorithm 1 found for B contexts, and what it took."""

    patches: Tensor  # [B, K] int64
    found: Tensor  # [B] bool, False where max_draws were not enough
    draws: Tensor  # [B] int64, that the head made, in whole rounds
    calls: Tensor  # [B] int64, that theorem 2 counts: always n of stage one, however early it fails
    spared: Tensor  # [B] int64, calls of stage one without a draw: behind a first difference, or
    # behind the last draw
    trials: Tensor  # [B] int64, starts of stage one
    slots: Tensor  # [B] int64, tokens decoded
    rounds: int  # that were begun


class BudgetError(RuntimeError):
    """Algorithm 1 found no patch within max_draws.

    result: of all contexts that were drawn together.
    """

    def __init__(self, message: str, result: Rejection) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple:
        """As a worker process sends it."""
        return type(self), (str(self), self.result)


def reject(
    draws: Draws, temperature: Fraction, max_draws: int, prefix: Tensor | None = None
) -> Rejection:
    """Algorithm 1 on all contexts together.

    temperature: T in (0, 1].
    max_draws: of each context.
    prefix: [B, K] int64, known first tokens, -1 where free.
    """
    num_contexts, device = len(draws.rows), draws.rows.device
    progress = [_Progress(temperature) for _ in range(num_contexts)]
    patches = torch.full((num_contexts, draws.patch_size), -1, device=device)
    slots = torch.zeros(num_contexts, dtype=torch.int64, device=device)
    drawn = torch.zeros_like(slots)
    active = torch.arange(num_contexts, device=device)
    kept_state, kept_tokens = None, None  # of every active context's x: [A, 1, H], [K, A, 1]
    rounds, left = 0, max_draws
    while left and len(active):
        size = min(FIRST_ROUND << min(rounds, 30), LARGEST_ROUND, left)
        some = draws.of(active)
        states = some.draw(rounds, size)  # [A, size, H]
        uniforms = some.acceptance(rounds, size).tolist()
        tokens = torch.full((draws.patch_size, *states.shape[:2]), -1, device=device)
        if kept_state is None:
            kept_state, kept_tokens = torch.zeros_like(states[:, :1]), tokens[..., :1]
        states, tokens = torch.cat([kept_state, states], 1), torch.cat([kept_tokens, tokens], 2)
        runs = [progress[context] for context in active.tolist()]
        alive = torch.ones(states.shape[:2], dtype=torch.bool, device=device)
        alive[:, 0] = torch.tensor([run.equal > 0 for run in runs], device=device)
        pools = Pools(some, states, tokens, alive)
        if prefix is not None:
            pools.keep(prefix[active])
        settle(pools, 2)
        done = [
            run.follow(*row)
            for run, *row in zip(
                runs, pools.group.tolist(), pools.alive.tolist(), uniforms, strict=True
            )
        ]
        done = torch.tensor(done, dtype=torch.bool, device=device)
        index = torch.arange(len(runs), device=device)
        place = torch.tensor([run.place for run in runs], dtype=torch.int64, device=device)
        pools.promised[index, place] = done
        pools.decode(torch.zeros_like(pools.tokens, dtype=torch.bool))
        kept_state = states[index, place][~done, None]
        kept_tokens = pools.tokens.unflatten(1, pools.shape)[:, index, place]  # [K, A]
        patches[active[done]] = kept_tokens.T[done]
        kept_tokens = kept_tokens[:, ~done, None]
        drawn[active] += size
        slots[active] += pools.slots
        active = active[~done]
        rounds, left = rounds + 1, left - size
    for context in active.tolist():
        progress[context].stop()
    counts = [[run.calls, run.spared, run.trials] for run in progress]
    calls, spared, trials = torch.tensor(counts, device=device).view(-1, 3).long().T
    found = torch.ones_like(slots, dtype=torch.bool)
    found[active] = False
    return Rejection(patches, found, drawn, calls, spared, trials, slots, rounds)


class _Progress:
    """Where a context stands in algorithm 1."""

    def __init__(self, temperature: Fraction) -> None:
        self.n = math.floor(1 / temperature)
        self.alpha = float(1 / temperature - self.n)
        self.place = 0  # of x in the round; from one round to the next x is candidate 0
        self.equal = 0  # draws that were equal in a row, x the first of them
        self.tests = 0  # of stage two
        self.calls, self.spared, self.trials = 0, 0, 0

    def follow(
        self, group: Sequence[int], alive: Sequence[bool], uniforms: Sequence[float]
    ) -> bool:
        """Goes through a round: x, and then its draws.

        group: equal for equal candidates.  alive: False for those that do not count.
        uniforms: one for each draw.
        returns: whether x is taken.
        """
        self.place = 0
        for place, uniform in enumerate(uniforms, 1):
            if not alive[place]:
                continue
            if self.equal == 0:
                self.place, self.tests = place, 0
                self.trials += 1
                self.calls += self.n
                equal = True
            else:
                equal = group[place] == group[self.place]
                self.calls += self.equal >= self.n
            if equal:
                self.equal += 1
            elif self.equal < self.n:
                self.spared += self.n - self.equal - 1
                self.equal = 0
            else:
                self.tests += 1
                if uniform < self.alpha / self.tests:
                    self.equal = 0
            if self.equal > self.n or (self.equal == self.n and self.alpha == 0):
                return True
        return False

    def stop(self) -> None:
        """No draw follows: what is left of stage one is not called."""
        if 0 < self.equal < self.n:
            self.spared += self.n - self.equal
