"""Next-token logits of a causal language model: along texts, and along branches that leave them.

A branch leaves its text at a place of its own and goes on with other tokens. `Rereader` takes any
callable and reads a branch's whole prefix again for each of its tokens. `CachedReader` reads every
token once: all branches of a text at a time stand behind it in one key-value cache, where a mask
shows each the text before its place and its own tokens, and are cropped away afterwards. No copy of
the cache is made, and a text is read in pieces whose logits fit LOGIT_BYTES.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from calm_rt.ops.check import check

LOGIT_BYTES = 1 << 28  # of probabilities in float64 at a time
MOST_ROWS = 1024  # tokens read at once; bounds the mask of the branches too
FIRST_PIECE = 8  # tokens of a text that are read before the vocabulary's size is known
CACHED_ARGUMENTS = {"use_cache", "position_ids", "attention_mask"}
CACHE_NAMES = ("cache", "past_key_values")  # what newer and older transformers call it
KEEP_NAMES = ("logits_to_keep", "num_logits_to_keep")
REACHES = ("sliding_window", "attention_chunk_size")  # of a config: tokens that attention sees

PROBED = 128  # tokens on which reading through the cache is compared with reading anew
PROBED_BRANCHES = 16
# Mean total variation between the two: rounding stays below, and a mask or a position that the
# model ignores does not, unless its context hardly matters.
SLACK = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
SLACK_WIDE = 1e-4


def rows_for(vocab_size: int) -> int:
    """How many distributions may exist at once."""
    return max(1, min(MOST_ROWS, LOGIT_BYTES // (8 * vocab_size)))


class Branches(Protocol):
    """R branches of the texts that were read last."""

    def step(self, token: Tensor) -> Tensor:
        """Logits after one more token of every branch.  token: [R] int64.  returns: [R, V]."""


class Reader(Protocol):
    """A causal language model that reads."""

    device: torch.device

    def read(self, ids: Tensor) -> Iterator[Tensor]:
        """Logits after each token, in consecutive pieces.  ids: [B, T].  yields: [B, n, V]."""

    def branch(self, owner: Tensor, place: Tensor) -> Branches:
        """Branches off the texts read last, which ends those made before.

        owner: [R], text.  place: [R], tokens of it in front of the branch, at least 1.
        """


def text_config(model: object) -> Any:
    """A model's configuration, of its language part where it has others; None for none."""
    config = getattr(model, "config", None)
    inner = getattr(config, "get_text_config", None)  # of transformers
    return config if inner is None else inner()


def reader_of(model: Callable[[Tensor], Any], text: Tensor, batch_size: int) -> Reader:
    """The fastest reader that the model's own logits on a piece of this text prove right.

    text: [T] int64, the longest that will be read.
    batch_size: contexts in one forward pass where a branch's prefix is read again.
    """
    anew = Rereader(model, batch_size)
    config = text_config(model)
    reach = min(getattr(config, name, None) or len(text) for name in REACHES)
    names = parameters_of(model)
    name = _first(CACHE_NAMES, names)
    if name and names >= CACHED_ARGUMENTS and reach >= len(text):
        try:
            cached = CachedReader(model, name)
            if _agree(cached, anew, text[:PROBED].to(anew.device)):
                return cached
        except Exception:  # what is wrong with the model itself, reading anew will say
            pass
    return anew


def _agree(cached: "CachedReader", anew: "Rereader", text: Tensor) -> bool:
    """Whether branches that do not leave the text get the text's own logits.  text: [T], T >= 5."""
    count = min(PROBED_BRANCHES, len(text) - 3)
    place = torch.arange(len(text) - 2 - count, len(text) - 2, device=text.device)
    [expected] = anew.logits(text[None], count + 2)  # [n, V], after the last n tokens
    for _ in cached.read(text[None]):
        pass
    branches = cached.branch(torch.zeros_like(place), place)
    slack = SLACK.get(cached.dtype, SLACK_WIDE)
    for step in range(3):
        given = branches.step(text[place + step]).double().softmax(-1)
        wanted = expected[step : step + count].double().softmax(-1)
        if not (given - wanted).abs().sum(-1).mean() / 2 <= slack:  # NaN is no agreement
            return False
    return True


class Rereader:
    """Of any callable ids [B, T] -> logits [B, T, V], or an object with them as `.logits`."""

    def __init__(self, model: Callable[[Tensor], Any], batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.device = device_of(model)
        names = parameters_of(model)
        self.options = {"use_cache": False} if "use_cache" in names else {}
        self.keep = _first(KEEP_NAMES, names)

    def read(self, ids: Tensor) -> Iterator[Tensor]:
        self.ids = ids
        logits = self.logits(ids, ids.shape[1])
        yield from logits.split(max(1, rows_for(logits.shape[2]) // len(ids)), 1)

    def branch(self, owner: Tensor, place: Tensor) -> "_Prefixes":
        pairs = zip(owner.tolist(), place.tolist(), strict=True)
        return _Prefixes(self, [self.ids[text, :at] for text, at in pairs])

    def logits(self, ids: Tensor, count: int) -> Tensor:
        """Those after each of the last `count` tokens.  ids: [B, T].  returns: [B, count, V]."""
        options = self.options | ({self.keep: count} if self.keep else {})
        return checked(self.model(ids, **options), ids, count if self.keep else None)[:, -count:]


class _Prefixes:
    """Branches as whole texts of their own."""

    def __init__(self, reader: Rereader, texts: list[Tensor]) -> None:
        self.reader, self.texts = reader, texts

    def step(self, token: Tensor) -> Tensor:
        self.texts = [torch.cat(pair) for pair in zip(self.texts, token[:, None], strict=True)]
        size = self.reader.batch_size
        return torch.cat(
            [self._last(self.texts[i : i + size]) for i in range(0, len(self.texts), size)]
        )

    def _last(self, texts: list[Tensor]) -> Tensor:
        """Logits after every text: [R, V]."""
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # on the right: nobody looks
        length = torch.tensor([len(text) for text in texts], device=ids.device)
        count = ids.shape[1] - int(length.min()) + 1
        logits = self.reader.logits(ids, count)
        place = length - 1 - (ids.shape[1] - count)
        return logits[torch.arange(len(texts), device=logits.device), place.to(logits.device)]


class CachedReader:
    """Of a model as those of `transformers` are: cache, positions and a mask [B, 1, T, keys].

    The cache is of the kind that the model makes, without the settings that make it forget.
    """

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        """name: of the argument and of the output that hold the cache."""
        self.model, self.name, self.device = model, name, device_of(model)
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        first = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.new_cache = type(getattr(model(first, use_cache=True), name))
        if self.new_cache is tuple:  # older transformers take the newer kind, but do not make it
            self.new_cache = sys.modules["transformers"].DynamicCache

    def call(self, ids: Tensor, **options: Tensor) -> Tensor:
        """Logits [B, T, V] after ids [B, T] behind what the cache holds, which then holds them."""
        options[self.name] = self.cache
        return checked(self.model(ids, use_cache=True, **options), ids)

    def read(self, ids: Tensor) -> Iterator[Tensor]:
        self.cache, self.size, self.behind = self.new_cache(), ids.shape, 0
        at, count = 0, FIRST_PIECE
        while at < ids.shape[1]:
            yield (logits := self.call(ids[:, at : at + count]))
            at, count = at + count, max(1, rows_for(logits.shape[2]) // len(ids))

    def branch(self, owner: Tensor, place: Tensor) -> "_Masked":
        if self.behind:
            self.cache.crop(-self.behind)  # a negative number is what every transformers takes
        self.behind = 0
        return _Masked(self, owner, place)


class _Masked:
    """Branches side by side in the cache: W of each text, the later ones of which may be idle."""

    def __init__(self, reader: CachedReader, owner: Tensor, place: Tensor) -> None:
        texts, length = reader.size
        counts = owner.bincount(minlength=texts)
        order = owner.argsort(stable=True)
        slot = torch.empty_like(owner)  # [R], which of its text's branches
        slot[order] = torch.arange(len(owner), device=owner.device)
        slot -= (counts.cumsum(0) - counts)[owner]
        self.reader, self.at = reader, (owner, slot)
        width = int(counts.max())
        self.place = owner.new_ones(texts, width)
        self.place[self.at] = place
        keys = torch.arange(length, device=owner.device)
        hidden = torch.finfo(reader.dtype).min
        self.mask = torch.zeros(texts, width, length, dtype=reader.dtype, device=owner.device)
        self.mask.masked_fill_(keys >= self.place[..., None], hidden)
        own = torch.full((width, width), hidden, dtype=reader.dtype, device=owner.device)
        self.own = own.fill_diagonal_(0).expand(texts, -1, -1)

    def step(self, token: Tensor) -> Tensor:
        ids = torch.zeros_like(self.place)
        ids[self.at] = token
        self.mask = torch.cat([self.mask, self.own], 2)
        options = {"attention_mask": self.mask[:, None], "position_ids": self.place}
        logits = self.reader.call(ids, **options)
        self.reader.behind += ids.shape[1]
        self.place = self.place + 1
        return logits[self.at]


def checked(output: Any, ids: Tensor, count: int | None = None) -> Tensor:
    """The logits in what a model gave for ids [B, T]: [B, count, V], count None for T."""
    logits = getattr(output, "logits", output)
    shape = (len(ids), ids.shape[1] if count is None else count)
    fits = isinstance(logits, Tensor) and logits.ndim == 3 and tuple(logits.shape[:2]) == shape
    expected = f"logits [B, T, V] after ids {list(ids.shape)}, or an object with them as .logits"
    got = list(logits.shape) if isinstance(logits, Tensor) else type(logits)
    check(fits and logits.is_floating_point(), "model(ids)", expected, got)
    return logits


def parameters_of(model: Callable) -> set[str]:
    """The names that a call takes."""
    try:
        return set(inspect.signature(getattr(model, "forward", model)).parameters)
    except (TypeError, ValueError):  # a callable that does not say
        return set()


def _first(wanted: tuple[str, ...], names: set[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def device_of(model: Callable) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
