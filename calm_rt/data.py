"""Token shards: documents as memory-mapped tokens, read where a pure function of the step says.

A shard folder holds
    shards.json     the header: version, element type, sizes, tokenizer fingerprint
    tokens.bin      training documents, then held-out ones: BOS, text, EOS, PAD to whole patches
    documents.bin   int64 [D + 1], where in tokens.bin each document starts

Generation fills a prompt at the left with BOS until its last patch is whole, and an empty prompt is
one whole patch of BOS. So that a model has seen each of these alignments, document number d (from
0, over training and held-out documents as they came) begins with d % (K + 1) BOS tokens, 0 to K.
A tokenizer without BOS gives EOS for it, as in generation.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calm_rt import host
from calm_rt.atomic import scratch_folder
from calm_rt.documents import SHARDS, PathLike, default_corpus, read_documents
from calm_rt.ops.check import check
from calm_rt.shuffle import shuffled
from calm_rt.tokenizer import TextStream, Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "TextStream",
    "TokenShards",
    "Tokenizer",
    "default_corpus",
    "load_tokenizer",
    "read_documents",
    "train_tokenizer",
    "write_shards",
]

FORMAT, VERSION = "calm_rt token shards", 2
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OFFSET = np.dtype("<i8")
BATCH_CHARACTERS = 1 << 22  # of text that is encoded at once


@dataclass(frozen=True, kw_only=True)
class Header:
    """What shards.json says."""

    format: str
    version: int
    dtype: str
    vocab_size: int
    patch_size: int
    num_tokens: int
    num_train_tokens: int
    num_documents: int
    num_train_documents: int
    tokenizer: str  # fingerprint
    start_id: int  # BOS, or EOS where the tokenizer has none
    eos_id: int
    pad_id: int


def write_shards(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: PathLike,
    patch_size: int,
    held_out: float = 0.05,
) -> "TokenShards":
    """Encodes documents into a shard folder, in place of one that is there.

    documents: texts, read once.
    held_out: the share of the documents that is kept for evaluation, in [0, 1). A hash of its text
        decides about each document, so equal texts stay together and a grown corpus keeps its
        split; at least one document is held out.
    raises: ValueError for no documents, one text in their place, too few to hold one out, tokens
        outside the vocabulary, a folder that cannot be written. OSError, such as a full disk, as it
        comes; nothing unfinished stays behind.
    """
    one = isinstance(documents, str | bytes)  # whose letters would be documents
    check(not one, "documents", "an iterable of texts", f"one {type(documents).__name__}")
    check(patch_size >= 1, "patch_size", "at least 1", patch_size)
    check(0 <= held_out < 1, "held_out", "a share in [0, 1)", held_out)
    folder = Path(folder)
    name = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    special = {
        "start_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
    }
    layout = {**special, "patch_size": patch_size, "dtype": DTYPES[name]}
    with scratch_folder(folder) as scratch:
        keys, sizes = _write_in_order(documents, tokenizer, scratch / "all.bin", layout)
        held = _choose_held_out(keys, held_out)
        order = np.argsort(held, kind="stable")
        _write_reordered(scratch, sizes, order, DTYPES[name])
        starts = np.concatenate([[0], np.cumsum(sizes[order])]).astype(OFFSET)
        (scratch / "documents.bin").write_bytes(starts.tobytes())
        num_train = int((~held).sum())
        header = Header(
            format=FORMAT,
            version=VERSION,
            dtype=name,
            vocab_size=tokenizer.vocab_size,
            patch_size=patch_size,
            num_tokens=int(starts[-1]),
            num_train_tokens=int(starts[num_train]),
            num_documents=len(sizes),
            num_train_documents=num_train,
            tokenizer=tokenizer.fingerprint,
            **special,
        )
        (scratch / SHARDS).write_text(json.dumps(dataclasses.asdict(header), indent=1) + "\n")
        # an old header never stands beside new tokens, whatever happens in between
        (folder / SHARDS).unlink(missing_ok=True)
        for file in ("tokens.bin", "documents.bin", SHARDS):
            os.replace(scratch / file, folder / file)
    return TokenShards(folder)


def _write_in_order(
    documents: Iterable[str], tokenizer: Tokenizer, path: Path, layout: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the packed documents as they come.

    layout: keyword arguments of host.pack_documents.
    returns: a hash of each document's text in [0, 1), and its size in tokens: two [D].
    """
    keys, sizes = [], []
    with path.open("wb") as file:
        for texts in _batches(documents):
            tokens = tokenizer.encode_batch(texts)
            lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
            flat = np.fromiter(itertools.chain.from_iterable(tokens), np.int32, int(lengths.sum()))
            if len(flat) and not 0 <= flat.min() <= flat.max() < tokenizer.vocab_size:
                raise ValueError(
                    f"tokenizer: expected ids in [0, {tokenizer.vocab_size}), got "
                    f"{flat.min()} to {flat.max()}; its vocab_size is wrong"
                )
            heads = np.arange(len(keys), len(keys) + len(texts)) % (layout["patch_size"] + 1)
            packed, packed_sizes = host.pack_documents(flat, lengths, heads, **layout)
            packed.tofile(file)
            sizes.append(packed_sizes)
            keys += [_key(text) for text in texts]
    if not keys:
        raise ValueError("documents: expected at least one, got none; is the corpus empty?")
    return np.array(keys), np.concatenate(sizes)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _key(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") * 2.0**-48


def _choose_held_out(keys: np.ndarray, held_out: float) -> np.ndarray:
    """Which documents are held out: [D] bool. Between one text and all but one, unless held_out is
    0.
    """
    if held_out == 0:
        return np.zeros(len(keys), bool)
    distinct = np.unique(keys)
    if len(distinct) < 2:
        raise ValueError(
            "held_out: the corpus is one document, none can be held out; give more or held_out=0"
        )
    return keys <= np.clip(held_out, distinct[0], distinct[-2])


def _write_reordered(scratch: Path, sizes: np.ndarray, order: np.ndarray, dtype: np.dtype) -> None:
    """Writes tokens.bin from all.bin, documents in the given order."""
    tokens = np.memmap(scratch / "all.bin", dtype, "r")
    ends = np.cumsum(sizes)
    with (scratch / "tokens.bin").open("wb") as file:
        for run in np.split(order, np.flatnonzero(np.diff(order) != 1) + 1):
            tokens[ends[run[0]] - sizes[run[0]] : ends[run[-1]]].tofile(file)


class TokenShards:
    """The tokens of a shard folder; nothing is read before it is asked for."""

    def __init__(self, folder: PathLike, tokenizer: Tokenizer | None = None) -> None:
        """folder: written by write_shards.  tokenizer: if given, it must be the one that the tokens
        were made with.

        raises: ValueError for a folder without shards, foreign or truncated files, another
            tokenizer.
        """
        self.folder = Path(folder)
        self.header = header = _read_header(self.folder)
        if tokenizer is not None and tokenizer.fingerprint != header.tokenizer:
            raise ValueError(
                f"tokenizer: {tokenizer.path} is not the one that {folder} was made with; "
                f"use that one or run write_shards (calm-rt tokenize) again"
            )
        self.vocab_size, self.patch_size = header.vocab_size, header.patch_size
        self.num_tokens = header.num_tokens
        tokens = self._map("tokens.bin", DTYPES[header.dtype], header.num_tokens)
        self._starts = self._map("documents.bin", OFFSET, header.num_documents + 1)
        ends = self._starts[[header.num_train_documents, -1]].tolist()
        if ends != [header.num_train_tokens, header.num_tokens]:
            raise ValueError(f"folder: {folder}/documents.bin does not belong to shards.json")
        self._train, self._held_out = np.split(tokens, [header.num_train_tokens])

    def __reduce__(self) -> tuple:
        """Another process maps the files anew; numpy would pickle what is in them."""
        return type(self), (self.folder.absolute(),)

    @property
    def train_tokens(self) -> np.ndarray:
        """A copy of the training tokens without the BOS in front of documents: [N].

        For token frequencies: that BOS is never among the n-grams of calm_rt.brier.
        """
        starts = self._starts[: self.header.num_train_documents, None]
        places = starts + np.arange(self.patch_size)  # [D, K], BOS goes no further
        heads = np.logical_and.accumulate(self._train[places] == self.header.start_id, 1)
        return np.delete(self._train, places[heads])

    def train_batch(
        self,
        step: int,
        batch_size: int,
        block_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The blocks of a training step; a pure function of the arguments, so resuming needs the
        step only.

        Every epoch goes once through all blocks, in an order of its own. The global batch is the
        same for any world_size; each rank gets its share of the rows. Accumulated micro-batches are
        shares too: with A of them a rank takes rank = its rank x A + number, world_size = ranks x
        A.
        batch_size: rows of the global batch, a multiple of world_size.
        block_size: tokens of a row, a multiple of patch_size.
        returns: ids [batch_size / world_size, block_size] int64, and the row ids of their patches
            for random ops, step x patches of the global batch + patch: [batch_size / world_size,
            block_size / patch_size] int64.
        raises: ValueError for sizes that do not fit, and for a corpus shorter than one block.
        """
        num_blocks = self._num_blocks(self._train, "training", block_size)
        check(step >= 0, "step", "at least 0", step)
        check(
            batch_size >= 1 and 0 <= rank < world_size and batch_size % world_size == 0,
            "batch_size",
            "a positive multiple of world_size with rank below it",
            f"batch_size {batch_size}, world_size {world_size}, rank {rank}",
        )
        share = batch_size // world_size
        first = step * batch_size + rank * share
        epochs, blocks = np.divmod(np.arange(first, first + share), num_blocks)
        blocks = shuffled(blocks, num_blocks, epochs, seed)
        ids = self._read(self._train, blocks, block_size)
        num_patches = block_size // self.patch_size
        rows = np.arange(first * num_patches, (first + share) * num_patches)
        return ids, torch.from_numpy(rows).view(share, num_patches)

    def held_out_batches(
        self, batch_size: int, block_size: int, limit: int | None = None
    ) -> Iterator[Tensor]:
        """The held-out blocks in order.

        limit: the most batches, of blocks spread evenly over the held-out text; None for all.
        returns: iterator over ids [batch_size or, at the end, fewer, block_size] int64.
        raises: ValueError for sizes that do not fit, and for held-out text shorter than one block.
        """
        num_blocks = self._num_blocks(self._held_out, "held-out", block_size)
        check(batch_size >= 1, "batch_size", "at least 1", batch_size)
        check(limit is None or limit >= 1, "limit", "at least 1, or None", limit)
        most = num_blocks if limit is None else min(limit * batch_size, num_blocks)
        blocks = np.arange(most) * num_blocks // most
        parts = np.split(blocks, range(batch_size, most, batch_size))
        return (self._read(self._held_out, part, block_size) for part in parts)

    def held_out_documents(self, limit: int | None = None) -> list[Tensor]:
        """The held-out documents, each [tokens] int64 with its BOS, EOS and PAD, whole patches.

        limit: the most documents; None for all.
        """
        starts = self._starts[self.header.num_train_documents :] - self.header.num_train_tokens
        pairs = itertools.islice(itertools.pairwise(starts.tolist()), limit)
        return [self._tensor(self._held_out[start:end]) for start, end in pairs]

    def _num_blocks(self, tokens: np.ndarray, kind: str, block_size: int) -> int:
        whole = block_size > 0 and block_size % self.patch_size == 0
        check(whole, "block_size", f"a multiple of patch_size {self.patch_size}", block_size)
        if len(tokens) < block_size:
            advice = "lower it or give more text"
            if not len(tokens):
                advice = "tokenize with held_out above 0 and below 1, from two documents or more"
            raise ValueError(
                f"block_size: expected at most the {len(tokens)} {kind} tokens of {self.folder}, "
                f"got {block_size}; {advice}"
            )
        return len(tokens) // block_size

    def _read(self, tokens: np.ndarray, blocks: np.ndarray, block_size: int) -> Tensor:
        return self._tensor(
            np.stack([tokens[b * block_size : (b + 1) * block_size] for b in blocks])
        )

    def _tensor(self, tokens: np.ndarray) -> Tensor:
        if tokens.max() >= self.vocab_size:
            raise ValueError(
                f"folder: {self.folder}/tokens.bin holds id {tokens.max()}, expected ids below "
                f"vocab_size {self.vocab_size}; the file is damaged, write it again"
            )
        return torch.from_numpy(tokens.astype(np.int64))

    def _map(self, name: str, dtype: np.dtype, size: int) -> np.ndarray:
        path = self.folder / name
        expected = size * dtype.itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            raise ValueError(
                f"folder: {path} should hold {expected} bytes and "
                f"{'is missing' if found is None else f'holds {found}'}; write the shards again"
            )
        return np.memmap(path, dtype, "r")


def _read_header(folder: Path) -> Header:
    path = folder / SHARDS
    if not path.is_file():
        raise ValueError(
            f"folder: {folder} holds no token shards (no shards.json); make them with write_shards "
            f"or calm-rt tokenize"
        )
    try:
        values = json.loads(path.read_bytes())
        if values["format"] == FORMAT and values["version"] != VERSION:
            raise ValueError(
                f"folder: {path} has version {values['version']}, expected {VERSION}; write the "
                f"shards again"
            )
        header = Header(**values)
        sizes = dataclasses.asdict(header)
        numbers = [value for name, value in sizes.items() if Header.__annotations__[name] is int]
        valid = header.format == FORMAT and header.dtype in DTYPES
        valid &= all(isinstance(number, int) and number >= 0 for number in numbers)
        valid &= header.patch_size > 0 and 0 < header.num_tokens >= header.num_train_tokens
        valid &= header.num_train_documents <= header.num_documents
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        valid = False
    if not valid:
        raise ValueError(
            f"folder: {path} is damaged or not a calm_rt header; write the shards again"
        )
    return header
