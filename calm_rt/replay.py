"""Steps of a batch without a look by the host: on a GPU, replays of one CUDA graph.

The choice is that of the steps that look, bit for bit; a lazy pool spares less where nobody looks
(`calm_rt.pool.decode_blindly`).
"""

import torch
from torch import Tensor

from calm_rt.nn import Calm, KVCache
from calm_rt.sampling import parse_temperature, sample_blindly
from calm_rt.sequence import Sampling


class Steps:
    """Steps of a fixed batch under fixed settings, each: read the last patch, draw the next.

    A sequence ends, for all that is known here, with a patch that holds EOS or with a state that is
    not finite; from then on it stands still, and what it would draw is not read.
    """

    def __init__(self, model: Calm, cache: KVCache, sampling: Sampling, most: int) -> None:
        """cache: of the batch's sequences.  sampling: by pools, any seed.  most: steps in a run."""
        self._model, self._cache = model, cache
        self._temperature = parse_temperature(sampling.temperature)
        self._num_candidates = sampling.num_candidates
        size, device = len(cache.lengths), cache.lengths.device
        patch_size = model.config.patch_size
        whole = {"dtype": torch.int64, "device": device}
        with torch.inference_mode(False):  # a later run may be in that mode, or outside
            self._seed = torch.zeros((), **whole)
            self._patch = torch.zeros(size, patch_size, **whole)
            self._rows = torch.zeros(size, **whole)
            self._ended = torch.zeros(size, dtype=torch.bool, device=device)
            self._step = torch.zeros(1, **whole)
            self._drawn = torch.zeros(most, size, patch_size + 2, **whole)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):  # a graph is of the current one's stream
                self._capture()

    def run(self, patches: Tensor, rows: Tensor, seed: int, count: int) -> Tensor:
        """Takes `count` steps; the caches then hold what was read.

        patches: [N, K] int64, the last of every sequence, unread; the other B - N rows stand still.
        rows: [N] int64, row ids of the first step; those of the next are greater by one.
        returns: [count, N, K + 2] int64, for one look: patch, whether the state was finite, and
            whether the sequence took the step, for it had not ended before.
        """
        number = len(patches)
        self._patch[:number].copy_(patches)
        self._rows[:number].copy_(rows)
        self._ended[:number].fill_(False)
        self._ended[number:].fill_(True)
        self._seed.fill_(seed)
        self._step.zero_()
        with torch.cuda.device_of(self._drawn):
            for _ in range(count):
                self._take() if self._graph is None else self._graph.replay()
        return self._drawn[:count, :number]

    def _take(self) -> None:
        cache, going = self._cache, ~self._ended  # [B]
        hidden = self._model.hidden_states(self._patch, cache)[:, 0]  # [B, H]
        # full where a sequence has ended for another reason
        cache.lengths.add_(going).clamp_(max=cache.max_patches)
        settings = (self._temperature, self._num_candidates, self._seed, self._rows)
        patch = sample_blindly(self._model, hidden, *settings)  # [B, K]
        finite = hidden.isfinite().all(-1)  # [B]
        drawn = torch.cat([patch, finite[:, None], going[:, None]], 1)
        self._drawn.index_copy_(0, self._step, drawn[None])
        self._ended.logical_or_(~finite)
        # what follows from NaN need not be a token: it is never read
        self._patch.copy_(torch.where(self._ended[:, None], self._patch, patch))
        if self._model.config.eos_token_id is not None:
            self._ended.logical_or_((patch == self._model.config.eos_token_id).any(-1))
        self._rows.add_(going)
        self._step.add_(1)

    def _capture(self) -> None:
        """What the trial step writes into the cache lies behind its end."""
        lengths, stream = self._cache.lengths.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries make what they need, which a capture may not
            self._take()
        torch.cuda.current_stream().wait_stream(stream)
        self._step.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._take()
        self._graph = graph
        self._cache.lengths.copy_(lengths)
