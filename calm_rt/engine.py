"""The engine: sequences that enter and leave one static key-value cache between steps.

The cache is one allocation of max_batch_size slots. The sequences in it hold its first slots, so
that every forward pass works on a slice without a copy: where one leaves, the last moves into its
slot. Draws depend on (seed, sequence id, step of the sequence) only, so nobody's draws change when
others come and go.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from calm_rt.nn import Calm, KVCache
from calm_rt.ops.check import check
from calm_rt.rejection import BudgetError
from calm_rt.replay import Steps
from calm_rt.sampling import sample_patches
from calm_rt.sequence import Sampling, TokenSequence

PREFILL_CHUNK = 1024  # patches: their activations take less than the weights of any usual backbone

# Share of the last contexts that tuples decided from which on they are tried before pools: what
# they cost in vain, for a lone sequence the more as few draws read all weights (on a CPU).
TUPLES_FIRST, TUPLES_ALONE = 0.1, 0.15
REMEMBERED = 16  # steps, about
MOST_REPLAYS = 8  # graphs that are kept, of batch sizes and settings
NOT_FINITE = "hidden states are NaN or inf (are the weights damaged?)"


class Engine:
    """A batch of sequences in progress."""

    def __init__(
        self,
        model: Calm,
        *,
        max_batch_size: int,
        max_patches: int,
        prefill_chunk: int = PREFILL_CHUNK,
        batch_invariant: bool = False,
        steps_per_read: int = 1,
    ) -> None:
        """max_batch_size: sequences at once.  max_patches: of one sequence, prompt included.
        prefill_chunk: patches of prompts that one forward pass reads, over all sequences; at least
            one of each is read.
        batch_invariant, steps_per_read: see Generator.
        """
        self.model = model
        # draws without numbers follow from what only the host can see
        self.steps_per_read = steps_per_read if model.numbered_draws else 1
        self.prefill_chunk, self.batch_invariant = prefill_chunk, batch_invariant
        weight = model.transformer.norm.weight
        sizes = (max_batch_size, max_patches)
        self.cache = KVCache(model.config, *sizes, weight.dtype, weight.device)
        with torch.inference_mode(False):  # as the cache, for calls in that mode and outside
            # of the state after every sequence's last patch that was read
            self.hidden = weight.new_zeros(max_batch_size, len(weight))
        self.sequences: list[TokenSequence] = []  # sequences[i] holds slot i
        self.sure_share = 0.0  # of the last contexts, what tuples decided
        self._replays: dict[tuple[int, Sampling], Steps] = {}  # by batch size and settings
        self._addresses = _addresses(model)  # which captured steps read from

    @property
    def free(self) -> int:
        """How many sequences may still enter."""
        return len(self.hidden) - len(self.sequences)

    def fits(self, max_batch_size: int, max_patches: int) -> bool:
        """Whether it could have been made for these sizes, but for more slots, and for the model's
        parameters as they are now."""
        sizes = len(self.hidden) >= max_batch_size and self.cache.max_patches == max_patches
        return sizes and self._addresses == _addresses(self.model)

    def reset(self) -> None:
        """An engine without sequences is then as a new one, but for the steps it has captured."""
        self.sure_share = 0.0

    @torch.no_grad()
    def prefill(self, sequences: Sequence[TokenSequence]) -> None:
        """Gives each sequence a slot and reads its prompt; one that may draw nothing needs neither.

        raises: ValueError where there are too few free slots, or a sequence may outgrow its slot.
        """
        sequences = [sequence for sequence in sequences if not sequence.finished]
        slots = f"at most the {self.free} free slots"
        check(len(sequences) <= self.free, "prompts", slots, len(sequences))
        limit = self.cache.max_patches
        fits = f"at most max_patches = {limit} patches each, new tokens included"
        for sequence in sequences:
            check(sequence.num_patches <= limit, "prompts", fits, sequence.num_patches)
            sequence.start()
        if self.batch_invariant:
            for sequence in sequences:
                self._read_prompts([sequence])
        elif sequences:
            self._read_prompts(sorted(sequences, key=lambda s: len(s.context), reverse=True))

    @torch.no_grad()
    def step(self) -> list[TokenSequence]:
        """Draws one patch for every unfinished sequence; finished ones are released before.

        With steps_per_read up to so many for each, once none is left to begin.
        returns: the sequences that got one.
        """
        self._release_finished()
        if self._may_run_blindly():
            return self._run_blindly()
        self._read_patches()
        self._release_finished()  # those whose states are not finite
        groups: dict[object, list[int]] = {}
        for slot, sequence in enumerate(self.sequences):
            # known tokens apart: at temperature 1 they take a pool, which would change free draws
            shared = (sequence.sampling, bool(sequence.known))
            key = slot if self.batch_invariant else shared
            groups.setdefault(key, []).append(slot)
        for slots in groups.values():
            self._draw(slots)
        return [sequence for sequence in self.sequences if not sequence.error]

    def _may_run_blindly(self) -> bool:
        kinds = {sequence.sampling for sequence in self.sequences}
        begun = all(sequence.unread for sequence in self.sequences)
        alike = len(kinds) == 1 and begun and not self.batch_invariant
        return self.steps_per_read > 1 and alike and kinds.pop().method == "pool"

    def _run_blindly(self) -> list[TokenSequence]:
        """Several steps of all sequences, of which each keeps those up to its end.

        Batch sizes are rounded up to a power of two, or each sequence that ends would make the
        others wait for a new capture.
        """
        sequences, patch_size = self.sequences, self.model.config.patch_size
        size = min(len(self.hidden), 1 << (len(sequences) - 1).bit_length())
        seed, sampling = sequences[0].sampling.seed, sequences[0].sampling._replace(seed=0)
        steps = self._replays.get((size, sampling))
        if steps is None:
            if len(self._replays) == MOST_REPLAYS:
                del self._replays[next(iter(self._replays))]  # the oldest
            slots = self.cache.slots(0, size)
            steps = Steps(self.model, slots, sampling, self.steps_per_read)
            self._replays[size, sampling] = steps
        self._count_read()
        longest = max(-(-sequence.room // patch_size) for sequence in sequences)
        last = self._tensor([sequence.last_patch for sequence in sequences])
        rows = self._tensor([sequence.name << 32 | sequence.steps for sequence in sequences])
        drawn = steps.run(last, rows, seed, min(self.steps_per_read, longest))
        one = sampling.temperature == 1
        draws, extended = 1 if one else sampling.num_candidates, set()
        for step in drawn.tolist():
            for sequence, (*patch, finite, taken) in zip(sequences, step, strict=True):
                if not taken or sequence.finished:  # by its stop text or its room
                    continue
                if not finite:
                    sequence.fail(NOT_FINITE)
                else:
                    sequence.extend(patch, draws, draws * patch_size, one)
                    extended.add(sequence)
        return [sequence for sequence in sequences if sequence in extended]

    def release(self, sequence: TokenSequence) -> None:
        """Frees the sequence's slot, finished or not; nothing happens where it has none."""
        if sequence not in self.sequences:
            return
        slot, last = self.sequences.index(sequence), self.sequences.pop()
        vacated = len(self.sequences)
        if sequence.error:
            self.cache.clear(slot)  # NaN would reach the next owner through masked attention
        if last is not sequence:
            self.sequences[slot] = last
            self.cache.move(vacated, slot)
            self.hidden[slot] = self.hidden[vacated]
            if last.error:
                self.cache.clear(vacated)
        self.cache.lengths[vacated] = 0

    def _release_finished(self) -> None:
        for sequence in [sequence for sequence in self.sequences if sequence.finished]:
            self.release(sequence)

    def _read_prompts(self, sequences: list[TokenSequence]) -> None:
        """Reads prompts, the longest first, chunk by chunk into the next free slots.

        A chunk is padded on the right to one length where nobody looks; sequences that end before
        it take no part.
        """
        patch_size, first = self.model.config.patch_size, len(self.sequences)
        self.cache.lengths[first : first + len(sequences)] = 0
        width = max(1, self.prefill_chunk // len(sequences)) * patch_size  # tokens
        for start in range(0, len(sequences[0].context), width):
            chunks = [s.context[start : start + width] for s in sequences]
            chunks = [chunk for chunk in chunks if chunk]
            longest = max(map(len, chunks))
            ids = self._tensor([chunk + [0] * (longest - len(chunk)) for chunk in chunks])
            counts = self._tensor([len(chunk) // patch_size for chunk in chunks])
            read = (start + longest) // patch_size
            slots = self.cache.slots(first, first + len(chunks), read)
            hidden = self.model.hidden_states(ids, slots)  # [B, P, H]
            slots.advance(counts)
            rows = torch.arange(len(chunks), device=hidden.device)
            self.hidden[first : first + len(chunks)] = hidden[rows, counts - 1]
        self.sequences += sequences
        self._fail_if_not_finite(first, len(self.sequences))

    def _read_patches(self) -> None:
        """Reads every sequence's last patch, except where only its prompt has been read."""
        unread = [slot for slot, sequence in enumerate(self.sequences) if sequence.unread]
        if not unread:
            return
        self._count_read()
        tiles = [(slot, slot + 1) for slot in unread]
        if not self.batch_invariant:
            tiles = [(0, unread[-1] + 1)]
        for first, last in tiles:
            sequences = self.sequences[first:last]
            # known without a look: so attention has the same width in any cache, on any device
            read = max(sequence.num_drawn_patches for sequence in sequences)
            slots = self.cache.slots(first, last, read)
            ids = self._tensor([sequence.last_patch for sequence in sequences])
            hidden = self.model.hidden_states(ids, slots)[:, 0]  # [B, H]
            counted = self._tensor([sequence.unread for sequence in sequences])
            slots.advance(counted.long())
            new = torch.where(counted[:, None], hidden, self.hidden[first:last])
            self.hidden[first:last] = new
            for sequence in sequences:
                sequence.unread = False
            self._fail_if_not_finite(first, last)

    def _count_read(self) -> None:
        """Counts the patches that sequences have read; steps that an exception ended may have
        counted more."""
        read = [sequence.num_drawn_patches - sequence.unread for sequence in self.sequences]
        self.cache.lengths[: len(read)] = self._tensor(read)

    def _fail_if_not_finite(self, first: int, last: int) -> None:
        finite = self.hidden[first:last].isfinite().all(-1).tolist()
        for sequence, good in zip(self.sequences[first:last], finite, strict=True):
            if not good:
                sequence.fail(NOT_FINITE)

    def _draw(self, slots: list[int]) -> None:
        """Draws the next patch of these slots, whose sequences share their settings."""
        sequences = [self.sequences[slot] for slot in slots]
        rows = self._tensor([sequence.name << 32 | sequence.steps for sequence in sequences])
        prefix = None
        if sequences[0].known:
            free = [-1] * self.model.config.patch_size
            known = [sequence.known for sequence in sequences]
            prefix = self._tensor([tokens + free[len(tokens) :] for tokens in known])
        settings = sequences[0].sampling._asdict()
        # products of few rows round as those of many do not, so where texts must not depend on a
        # batch, each sequence goes by its own history
        history = sequences[0] if self.batch_invariant else self
        often_sure = history.sure_share > TUPLES_FIRST + TUPLES_ALONE / len(slots)
        settings["tuples_first"] = often_sure and self.model.numbered_draws
        hidden = self.hidden[self._tensor(slots)]
        try:
            sample = sample_patches(self.model, hidden, rows=rows, prefix=prefix, **settings)
        except BudgetError as error:
            if len(slots) == 1:
                taken = error.result
                counts = taken.draws, taken.slots, taken.trials, taken.calls, taken.spared
                sequences[0].fail(str(error), *map(int, counts))
            else:  # each alone: the same draws again, so the others get what they would have got
                for slot in slots:
                    self._draw([slot])
            return
        *columns, sure = (column.tolist() for column in sample)
        history.sure_share += (sum(sure) / len(sure) - history.sure_share) / REMEMBERED
        for sequence, *drawn in zip(sequences, *columns, strict=True):
            sequence.extend(*drawn)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.hidden.device)


def _addresses(model: Calm) -> tuple[int, ...]:
    """Where the parameters lie, which changes where others take their place."""
    return tuple(parameter.data_ptr() for parameter in model.parameters())
