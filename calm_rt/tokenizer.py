"""Tokenizers behind one protocol: sentencepiece models, also trained here, and tokenizer.json."""

import bisect
import codecs
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from calm_rt.atomic import scratch_folder
from calm_rt.documents import PathLike, read_documents
from calm_rt.hub import BESIDE_TOKENIZERS, TOKENIZER_JSON, TOKENIZER_MODEL, local_folder
from calm_rt.ops.check import check

SAMPLE_CHARACTERS = 10_000_000  # of text that a vocabulary is learnt from: 1 s at 1024 tokens
CHUNK_CHARACTERS = 1500  # of text in a training sentence of sentencepiece, up to the line end
SPACE = "\u2581"  # how sentencepiece spells a space
MIN_VOCAB_SIZE = 264  # 256 bytes, 4 special tokens and room for some characters
NAMES = {  # of special tokens where no file says them
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>"),
    "eos": ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>"),
    "pad": ("[PAD]", "<pad>"),
}


class TextStream(Protocol):
    """Turns tokens into text one at a time; the pieces together are the text of all tokens."""

    def step(self, token: int) -> str:
        """The whole characters that this token completes; often empty."""
        ...

    def finish(self) -> str:
        """What is left of a character that never became whole, as U+FFFD."""
        ...


class Tokenizer(Protocol):
    """What the package needs of a tokenizer; special tokens are never made from text nor turned
    into text.
    """

    path: Path  # the file it was read from
    fingerprint: str  # of that file
    vocab_size: int
    eos_id: int
    pad_id: int

    @property  # so that an int, too, is one
    def bos_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def stream(self) -> TextStream: ...


def train_tokenizer(
    corpus: PathLike | Sequence[PathLike], vocab_size: int, path: PathLike
) -> "SentencePieceTokenizer":
    """Learns a byte-pair vocabulary and writes it.

    Text is never normalised and unknown characters become bytes, so decoding gives back exactly
    what was encoded. At most SAMPLE_CHARACTERS characters are used, evenly spread over the corpus;
    the same corpus gives the same file.
    corpus: as in read_documents.  vocab_size: at least 264; ids 0-3 are unknown, BOS, EOS, PAD,
        then 256 bytes.
    path: the file to write if it ends in ".model", else the folder to write tokenizer.model into.
    raises: ValueError for a corpus without text and a vocabulary that it cannot give.
    """
    expected = f"at least {MIN_VOCAB_SIZE} (256 bytes, 4 special tokens and some characters)"
    check(vocab_size >= MIN_VOCAB_SIZE, "vocab_size", expected, vocab_size)
    path = Path(path)
    path = path if path.suffix == ".model" else path / TOKENIZER_MODEL
    chunks = _sample_chunks(read_documents(corpus))
    model = _train_sentencepiece(chunks, vocab_size)
    with scratch_folder(path.parent, "path") as scratch:
        Path(scratch, path.name).write_bytes(model)
        os.replace(Path(scratch, path.name), path)
    return SentencePieceTokenizer(path)


def load_tokenizer(path: PathLike, *, hub: bool = False) -> Tokenizer:
    """Reads a tokenizer.

    path: a sentencepiece file, a tokenizer.json (needs the `tokenizers` package), or a folder that
        holds tokenizer.model or tokenizer.json.
    hub: take "owner/name" for a repository of the Hugging Face hub, see hub.local_folder.
    raises: ValueError for a missing or foreign file; Llama-3's tokenizer.model (tiktoken's format)
        is recognised, and the error points to its tokenizer.json.
    """
    path = local_folder(path, hub, tokenizer=True)
    if path.is_dir():
        model, other = path / TOKENIZER_MODEL, path / TOKENIZER_JSON
        if not model.is_file() and not other.is_file():
            raise ValueError(f"tokenizer: no tokenizer.model or tokenizer.json in {path}")
        usable = model.is_file() and not (other.is_file() and _is_tiktoken(model))
        path = model if usable else other
    if not path.is_file():
        raise ValueError(f"tokenizer: {path} does not exist; name a tokenizer file or its folder")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


class SentencePieceTokenizer:
    """A sentencepiece model."""

    def __init__(self, path: PathLike) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        data = self.path.read_bytes()
        self.fingerprint = _fingerprint(data)
        if _is_tiktoken(self.path):
            right = self.path.with_name(TOKENIZER_JSON)
            remedy = f"{right}" if right.is_file() else "the tokenizer.json of the same model"
            raise ValueError(
                f"tokenizer: {path} is a tiktoken file, which is not supported; use {remedy}"
            )
        try:
            self._processor = SentencePieceProcessor()
            self._processor.load_from_serialized_proto(data)
        except RuntimeError:
            raise ValueError(
                f"tokenizer: {path} is not a sentencepiece model (damaged, or another format?)"
            ) from None
        if self._processor.eos_id() < 0:
            raise ValueError(f"tokenizer: {path} has no EOS token; train it with eos_id >= 0")
        self.vocab_size = self._processor.get_piece_size()
        bos_id, pad_id = self._processor.bos_id(), self._processor.pad_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_id = self._processor.eos_id()
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self._bytes = [self._piece_bytes(token) for token in range(self.vocab_size)]
        # the character SPACE itself goes in as bytes, or it would come out as a space
        escape = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._escape = escape if all(map(self._processor.is_byte, escape)) else []
        # some models add a space in front of every text; decoding takes it away
        self._adds_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without BOS and EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of many texts, on two threads."""
        ids = self._processor.encode(list(texts), num_threads=2)
        if self._escape:
            for index, text in enumerate(texts):
                if SPACE in text:
                    ids[index] = self._encode_escaped(text)
        return ids

    def _encode_escaped(self, text: str) -> list[int]:
        first, *rest = self._processor.encode(text.split(SPACE))
        return first + [token for part in rest for token in [*self._escape, *part]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are no utf-8 become U+FFFD."""
        stream = self.stream()
        return "".join([*map(stream.step, ids), stream.finish()])

    def stream(self) -> "ByteStream":
        """A decoder that takes one token at a time."""
        return ByteStream(self._bytes, self._adds_space)

    def _piece_bytes(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_control(token):
            return b""
        if self._processor.is_unknown(token):
            return "\ufffd".encode()
        return piece.replace(SPACE, " ").encode()


class ByteStream:
    """TextStream over tokens that each stand for some bytes."""

    def __init__(self, token_bytes: list[bytes], skip_space: bool) -> None:
        self._token_bytes = token_bytes
        self._skip_space = skip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        """The whole characters that this token completes."""
        _check_ids([token], len(self._token_bytes))
        text = self._decoder.decode(self._token_bytes[token])
        if self._skip_space and text:
            self._skip_space = False
            text = text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """U+FFFD if the last character never became whole."""
        return self._decoder.decode(b"", True)


class HuggingFaceTokenizer:
    """A tokenizer.json, read with the `tokenizers` package.

    BOS, EOS and PAD are those of tokenizer_config.json or special_tokens_map.json beside it, else
    those with a usual name. A missing PAD is added as "[PAD]" behind the vocabulary, as the
    official code does.
    """

    def __init__(self, path: PathLike) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"tokenizer: reading {path} needs: pip install tokenizers") from None
        self.path = Path(path)
        data = self.path.read_bytes()
        self.fingerprint = _fingerprint(data)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(
                f"tokenizer: {path} is not a tokenizer.json ({str(error).splitlines()[0]})"
            ) from None
        self._tokenizer.encode_special_tokens = True  # text that spells one stays text
        self.bos_id, eos_id, pad_id = map(self._special_id, NAMES)
        if eos_id is None:
            raise ValueError(f"tokenizer: {path} has no EOS; name it in special_tokens_map.json")
        self.eos_id = eos_id
        if pad_id is None:
            taken = self._tokenizer.get_vocab(with_added_tokens=True).values()
            self._tokenizer.add_special_tokens(["[PAD]"])
            pad_id = self._tokenizer.token_to_id("[PAD]")
            if pad_id is None or pad_id in taken:  # which the package numbers by the count
                raise ValueError(
                    f"tokenizer: {path} has no PAD; name it in special_tokens_map.json"
                )
        self.pad_id = pad_id
        # not their number: ids may have holes
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without BOS and EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of many texts."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens."""
        ids = list(ids)
        _check_ids(ids, self.vocab_size)
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def stream(self) -> "HuggingFaceStream":
        """A decoder that takes one token at a time."""
        return HuggingFaceStream(self)

    def _special_id(self, kind: str) -> int | None:
        for name in BESIDE_TOKENIZERS:
            token = _read_json(self.path.with_name(name)).get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and self._tokenizer.token_to_id(token) is not None:
                return self._tokenizer.token_to_id(token)
        ids = (self._tokenizer.token_to_id(name) for name in NAMES[kind])
        return next((token for token in ids if token is not None), None)


class HuggingFaceStream:
    """TextStream of a HuggingFaceTokenizer.

    A token's text is what it adds to that of the tokens before it, as in the package's own
    DecodeStream, which releases before 0.20 (transformers 4.43 wants one) do not have.
    """

    def __init__(self, owner: HuggingFaceTokenizer) -> None:
        self._owner = owner
        self._ids: list[int] = []
        self._window: list[int] = []  # tokens of the last text given out, which shape the next
        self._held: list[int] = []  # tokens whose text is not whole yet
        self._sent = 0

    def step(self, token: int) -> str:
        """The whole characters that this token completes."""
        _check_ids([token], self._owner.vocab_size)
        self._ids.append(token)
        self._held.append(token)
        before = self._owner.decode(self._window)
        text = self._owner.decode(self._window + self._held)
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self._window, self._held = self._held, []
        self._sent += len(text) - len(before)
        return text[len(before) :]

    def finish(self) -> str:
        """U+FFFD if the last character never became whole."""
        return self._owner.decode(self._ids)[self._sent :]


def _sample_chunks(documents: Iterable[str]) -> list[str]:
    """Chunks of whole lines, evenly spread over the documents, SAMPLE_CHARACTERS at most."""
    kept: list[str] = []
    size, stride, index = 0, 1, 0
    for document in documents:
        start = 0
        while start < len(document):
            end = document.find("\n", start + CHUNK_CHARACTERS, start + 2 * CHUNK_CHARACTERS) + 1
            end = end or start + 2 * CHUNK_CHARACTERS
            if index % stride == 0:
                kept.append(document[start:end])
                size += len(kept[-1])
            index, start = index + 1, end
            if size > SAMPLE_CHARACTERS:
                kept, stride = kept[::2], 2 * stride
                size = sum(map(len, kept))
    return kept


def _train_sentencepiece(chunks: list[str], vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    counts = Counter()
    for chunk in chunks:
        counts.update(chunk)
    rare = _rare_characters(counts, (vocab_size - MIN_VOCAB_SIZE) // 2 + 1)
    if rare:
        # they will be spelt in bytes; sentencepiece merges nothing with the tab in their place
        table = dict.fromkeys(map(ord, rare), "\t")
        chunks = [chunk.translate(table) for chunk in chunks]
    output = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=output,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            required_chars=SPACE,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * CHUNK_CHARACTERS,  # bytes, 4 a character at most
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            pad_piece="<pad>",
            num_threads=2,  # stands in the file, which must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"too high .*<= (\d+)", str(error))
        if most:
            remedy = f"this corpus gives at most {most[1]} tokens; lower vocab_size or add text"
        else:
            remedy = f"sentencepiece refused it ({str(error).splitlines()[0]})"
        raise ValueError(
            f"vocab_size: expected one that fits the corpus, got {vocab_size}: {remedy}"
        ) from None
    return output.getvalue()


def _rare_characters(counts: Counter, room: int) -> list[str]:
    """All but the most common characters that fill the room or cover 99.95 % of the text."""
    ordered = counts.most_common()
    covered = list(itertools.accumulate(count for _, count in ordered))
    enough = bisect.bisect_left(covered, 0.9995 * covered[-1]) + 1
    return [character for character, _ in ordered[min(enough, room) :]]


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    check(wrong is None, "token", f"an id in [0, {vocab_size})", wrong)


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n?", file.readline(256)) is not None


def _fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
