"""Steps of a batch without a look by the host: on a GPU, replays of one CUDA graph.

Such a step draws whole pools, for what a lazy pool spares it decides by looking. The choice is the
same, bit for bit.
"""

import torch
from torch import Tensor

from calm_rt.nn import Calm, KVCache
from calm_rt.sampling import parse_temperature, sample_whole
from calm_rt.sequence import Sampling


class Steps:
    """Steps of a fixed batch under fixed settings, each: read the last patch, draw the next."""

    def __init__(self, model: Calm, cache: KVCache, sampling: Sampling, most: int) -> None:
        """cache: of the batch's sequences.  sampling: by pools.  most: steps in one run."""
        self._model, self._cache = model, cache
        self._temperature = parse_temperature(sampling.temperature)
        self._num_candidates = sampling.num_candidates
        size, device = len(cache.lengths), cache.lengths.device
        patch_size = model.config.patch_size
        self._seed = torch.tensor(sampling.seed, device=device)
        self._patch = torch.zeros(size, patch_size, dtype=torch.int64, device=device)
        self._rows = torch.zeros(size, dtype=torch.int64, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._patches = torch.zeros(most, size, patch_size, dtype=torch.int64, device=device)
        self._finite = torch.ones(most, size, dtype=torch.bool, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()

    def run(self, patches: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Takes `count` steps; the caches then hold what was read.

        patches: [B, K] int64, the last of every sequence, unread.
        rows: [B] int64, row ids of the first step; those of the next are greater by one.
        returns: [count, B, K] int64, patches; [count, B] bool, whether the state was finite.
        """
        self._patch.copy_(patches)
        self._rows.copy_(rows)
        self._step.zero_()
        for _ in range(count):
            self._take() if self._graph is None else self._graph.replay()
        return self._patches[:count], self._finite[:count]

    def _take(self) -> None:
        cache = self._cache
        hidden = self._model.hidden_states(self._patch, cache)[:, 0]  # [B, H]
        cache.lengths.add_(1).clamp_(max=cache.max_patches)  # full: of a sequence that has ended
        settings = (self._temperature, self._num_candidates, self._seed, self._rows)
        patch = sample_whole(self._model, hidden, *settings)  # [B, K]
        self._finite.index_copy_(0, self._step, hidden.isfinite().all(-1)[None])
        self._patches.index_copy_(0, self._step, patch[None])
        self._patch.copy_(patch)
        self._rows.add_(1)
        self._step.add_(1)

    def _capture(self) -> None:
        """What the two trial steps write into the cache lies behind its end."""
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
