"""Numbered draws of the next patch: of each context, in rounds, decoded slot by slot.

Draw i of round r is draw i of its row under the key seed + r * ROUND_STEP (calm_rt.reference has
the rest), so round 0 is what `ops.sample_latents` draws, and a draw depends on (seed, row id, r, i)
only.
"""

import copy
from collections.abc import Sequence

from torch import Tensor

from calm_rt import ops
from calm_rt.nn import Calm
from calm_rt.ops.decode import decode_patch, decode_slots
from calm_rt.reference import Stream

# 2^64 / golden ratio: multiples of it keep away from each other and from small numbers, so that
# the rounds of seeds 0, 1, 2, ... have keys of their own.
ROUND_STEP = 0x9E3779B97F4A7C15


class Draws:
    """The draws of B contexts from a model.

    A test puts its own `draw` and `decode` in their place.
    seed: [] int64.  rows: [B] int64, row ids.
    """

    def __init__(self, model: Calm, hidden: Tensor, seed: Tensor, rows: Tensor) -> None:
        self.seed, self.rows = seed, rows
        self.patch_size = model.config.patch_size
        self._model, self._hidden = model, hidden
        self._weights = model.ae_model.decoder.weights()
        self._eps = model.ae_model.config.rms_norm_eps

    def of(self, contexts: Tensor) -> "Draws":
        """Those of some contexts.  contexts: [C] int64."""
        some = copy.copy(self)
        some._hidden, some.rows = self._hidden[contexts], self.rows[contexts]
        return some

    def draw(self, number: int, count: int) -> Tensor:
        """The first `count` draws of a round, as far as all slots of a patch go together.

        returns: [B, count, H], which `decode` reads.
        """
        latents = self._model.sample(self._hidden, count, self.key(number), self.rows)  # [S, B, L]
        patches = latents.transpose(0, 1).flatten(0, 1).to(self._weights.latent.weight.dtype)
        return decode_patch(patches, self._weights, eps=self._eps).unflatten(0, (-1, count))

    def whole_patches(self, number: int, count: int) -> Tensor:
        """The first `count` draws of a round, decoded in all slots.  returns: [B, count, K]."""
        latents = self._model.sample(self._hidden, count, self.key(number), self.rows)  # [S, B, L]
        return self._model.ae_model.decode(latents).transpose(0, 1)

    def search_size(self, count: int) -> int:
        """Multiplications that searching the vocabulary for `count` whole patches each takes."""
        return len(self.rows) * count * self.patch_size * self._weights.vocabulary.numel()

    def decode(self, states: Tensor, rows: Sequence[Tensor], count: Tensor | None = None) -> Tensor:
        """The tokens in chosen slots.

        states: [N, H], of `draw`.
        rows: for each of the K slots the rows of states that are wanted, [N_k] int64.
        count: [] int64, only the first so many are wanted; None for all.
        returns: [N_0 + N_1 + ...] int64, slot after slot, -1 of what is not wanted.
        """
        return decode_slots(states, rows, self._weights, eps=self._eps, count=count)

    def key(self, number: int) -> Tensor:
        """The key of a round, [] int64."""
        step = number * ROUND_STEP % 2**64
        return self.seed + (step - 2**64 if step >= 2**63 else step)

    def acceptance(self, number: int, count: int) -> Tensor:
        """A uniform number in steps of 2^-48 for each draw of a round.  returns: [B, count]."""
        high, low = self.uniforms(Stream.ACCEPTANCE, number, count, 2).unbind(-1)
        return high + low * 2.0**-24

    def places(self, number: int, tuples: int, n: int) -> Tensor:
        """A uniform number for each member of the tuples of a round.  returns: [B, tuples, n]."""
        return self.uniforms(Stream.TUPLE, number, tuples, n)

    def choice(self) -> Tensor:
        """The uniform number with which `ops.select_patch` chooses.  returns: [B] float64."""
        return self.uniforms(Stream.CHOICE, 0, 1, 1).flatten()

    def uniforms(self, stream: Stream, number: int, count: int, length: int) -> Tensor:
        """Uniform numbers for each draw of a round.  returns: [B, count, length] float64."""
        options = {"seed": self.key(number), "stream": stream, "distribution": "uniform"}
        values = ops.noise(self.rows, count, length, **options)  # in steps of 2^-24: exact in float
        return values.transpose(0, 1).double()
