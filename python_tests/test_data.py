"""Documents and token shards: what was written is read, in an order that the step decides."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_rt import data, host
from calm_rt.data import TokenShards, default_corpus, read_documents, write_shards
from calm_rt.shuffle import shuffled

PATCH = 4
BLOCK = 16
KNOWN_ORDER = [5, 0, 2, 6, 3, 1, 7, 4, 9, 8]
KNOWN_LARGE = [208657422707780216]


class Characters:
    """A tokenizer whose tokens are the characters of a text, from 3 on."""

    path = Path("characters")
    fingerprint = "characters"
    vocab_size = 200
    bos_id, eos_id, pad_id = 0, 1, 2

    def encode_batch(self, texts):
        return [[ord(character) + 3 for character in text] for text in texts]


def texts(number=60):
    return [f"{i} " * (i % 17 + 1) for i in range(number)]


@pytest.fixture
def shards(tmp_path):
    return write_shards(texts(), Characters(), tmp_path / "shards", PATCH, held_out=0.2)


def text_of(ids):
    return "".join(chr(token - 3) for token in ids if token > 2)


# ---- documents ----


def test_documents_of_files_folders_and_json_lines(tmp_path):
    (tmp_path / "folder" / "b").mkdir(parents=True)
    (tmp_path / "folder" / ".hidden").mkdir()
    files = {"folder/c.txt": "c", "folder/b/a.py": "a\r\n\tb", "folder/.hidden/x": "x", "z.md": "z"}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "folder" / "a.jsonl").write_text(
        '{"text": "1\\n"}\n\n{"text": ""}\n{"text": "ü"}\n'
    )
    (tmp_path / "named.json").write_text('{"text": "2", "meta": 3}\n')
    folder = tmp_path / "folder"
    assert list(read_documents(folder)) == ["1\n", "ü", "c", "a\r\n\tb"]
    assert list(read_documents(str(folder), suffixes=[".py"])) == ["a\r\n\tb"]
    assert list(read_documents([tmp_path / "z.md", tmp_path / "named.json"])) == ["z", "2"]


def test_long_files_are_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i}\n" + "\n" * (i % 7 == 0) for i in range(3000)) + "x" * 2500
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_documents(tmp_path / "a.txt", max_characters=1000))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 1000
    assert all(piece.endswith("\n\n") for piece in pieces[:-4])


def test_what_is_no_text_is_skipped_in_folders_only(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "image").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    with pytest.warns(UserWarning, match=r"skipped 2 files that are not utf-8 text, .*image"):
        assert list(read_documents(tmp_path)) == ["good"]
    (tmp_path / "good.txt").unlink()
    with pytest.raises(ValueError, match=r"no text in .* \(2 files are not utf-8 text\)"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"abc\0def", r"a.txt is a binary file \(NUL at byte 3\)"),
        ("a.txt", b"ab\xff", r"a.txt is not utf-8 text \(byte 2\); convert it"),
        ("a.txt", b"", "no text in .*a.txt; give"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', 'a.jsonl line 2 has no "text"'),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}', 'a.jsonl line 2 has no "text"'),
        ("a.jsonl", b"[1]", 'a.jsonl line 1 has no "text"'),
        ("a.jsonl", b'{"text": "a"', 'a.jsonl line 1 has no "text"'),
        ("a.jsonl", b'\n{"text": "\xff"}', 'a.jsonl line 2 has no "text"'),
        ("a.jsonl", b'{"text": "\\ud800"}', 'a.jsonl line 1 has no "text"'),
        (None, None, "a.txt does not exist"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"corpus: .*{message}") as error:
        list(read_documents(tmp_path / (name or "a.txt")))
    assert "\n" not in str(error.value)


def test_missing_path_is_noticed_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_documents([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no path is given"):
        read_documents([])


def test_default_corpus_is_there_on_every_machine():
    corpus = default_corpus()
    assert len(corpus) == len(set(corpus))
    assert all(path.suffix == ".py" for path in corpus)
    assert 5e6 < sum(path.stat().st_size for path in corpus) < 4e7
    assert not any("site-packages" in path.parts for path in corpus)
    names = {path.name for path in corpus}
    assert {"argparse.py", "dataclasses.py"} <= names


# ---- shards ----


def documents_of(shards):
    """All documents of the file, training ones first."""
    starts = np.fromfile(shards.folder / "documents.bin", np.int64)
    return np.split(stored(shards), starts[1:-1])


def stored(shards):
    return np.fromfile(shards.folder / "tokens.bin", shards.header.dtype).astype(int)


@pytest.mark.parametrize("patch_size", [1, 3, 4])
def test_shards_hold_every_document_once_at_its_alignment(tmp_path, monkeypatch, patch_size):
    """BOS (number % (K + 1) times), text, EOS and PAD to whole patches, however it is batched."""
    monkeypatch.setattr(data, "BATCH_CHARACTERS", 100)
    shards = write_shards(texts(), Characters(), tmp_path, patch_size, held_out=0.2)
    expected = []
    for number, ids in enumerate(Characters().encode_batch(texts())):
        ids = [0] * (number % (patch_size + 1)) + ids + [1]
        expected.append(ids + [2] * (-len(ids) % patch_size))
    documents = [ids.tolist() for ids in documents_of(shards)]
    assert sorted(documents) == sorted(expected)
    number = shards.header.num_train_documents
    assert [ids.tolist() for ids in shards.held_out_documents()] == documents[number:]
    order = [expected.index(ids) for ids in documents]
    assert order == sorted(order[:number]) + sorted(order[number:])  # each part as it came


@pytest.mark.parametrize("patch_size", [1, 4])
def test_train_tokens_are_those_of_the_text(tmp_path, patch_size):
    shards = write_shards(texts(), Characters(), tmp_path, patch_size, held_out=0.2)
    tokens = stored(shards)[: shards.header.num_train_tokens]
    assert shards.train_tokens.tolist() == tokens[tokens != 0].tolist()


def test_eos_stands_for_a_missing_bos(tmp_path, monkeypatch):
    monkeypatch.setattr(Characters, "bos_id", None)
    shards = write_shards(["a", "b", "c"], Characters(), tmp_path, 2, held_out=0)
    assert stored(shards).tolist() == [100, 1, 1, 101, 1, 2, 1, 1, 102, 1]
    assert shards.train_tokens.tolist() == [100, 1, 101, 1, 2, 102, 1]


def test_held_out_documents_are_a_share_and_stay_it(tmp_path, shards):
    held_out = [text_of(ids.tolist()) for ids in shards.held_out_documents()]
    assert 0 < len(held_out) < len(texts()) / 2
    assert shards.held_out_documents(2)[1].tolist() == shards.held_out_documents()[1].tolist()
    assert len(shards.held_out_documents(2)) == 2
    more = write_shards(texts(90)[::-1] * 2, Characters(), tmp_path / "more", PATCH, held_out=0.2)
    later = [text_of(ids.tolist()) for ids in more.held_out_documents()]
    assert set(held_out) <= set(later) and set(later) & set(texts()) == set(held_out)
    assert len(later) == 2 * len(set(later))  # equal texts stay on one side
    few = write_shards(["a", "b", "c"], Characters(), tmp_path / "few", PATCH, held_out=1e-9)
    assert len(few.held_out_documents()) == 1
    most = write_shards(["a", "b", "c"], Characters(), tmp_path / "few", PATCH, held_out=0.999999)
    assert len(most.held_out_documents()) == 2
    none = write_shards(["a"], Characters(), tmp_path / "none", PATCH, held_out=0)
    assert none.held_out_documents() == [] and stored(none).tolist() == [100, 1, 2, 2]


def test_wide_vocabularies_use_wide_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(Characters, "vocab_size", 70000)
    shards = write_shards(["a", chr(66000)], Characters(), tmp_path, 1, held_out=0)
    assert shards.header.dtype == "uint32"
    assert stored(shards).tolist() == [100, 1, 0, 66003, 1]


def test_training_goes_through_every_block_once_an_epoch(shards):
    number, size = shards.header.num_train_tokens // BLOCK, 5
    blocks = stored(shards)[: number * BLOCK].reshape(-1, BLOCK)
    steps = -(-2 * number // size)
    batches = [shards.train_batch(step, size, BLOCK, 7)[0] for step in range(steps)]
    assert all(ids.dtype == torch.int64 and ids.shape == (size, BLOCK) for ids in batches)
    seen = torch.cat(batches).tolist()
    first, second = seen[:number], seen[number : 2 * number]
    assert sorted(first) == sorted(second) == sorted(blocks.tolist())
    assert first != second  # another order in the next epoch
    other = torch.cat([shards.train_batch(step, size, BLOCK, 8)[0] for step in range(steps)])
    assert first != other.tolist()[:number]


def test_a_batch_is_a_function_of_the_step(shards, monkeypatch):
    expected = [shards.train_batch(step, 4, BLOCK, 3) for step in range(10**12, 10**12 + 3)]
    again = TokenShards(shards.folder)
    monkeypatch.setattr(host, "_host", None)  # nor does it depend on the compiler
    for step in (10**12 + 2, 10**12):
        for a, b in zip(again.train_batch(step, 4, BLOCK, 3), expected[step - 10**12], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(shards, world_size):
    ids, rows = shards.train_batch(9, 6, BLOCK, 1)
    ranks = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
    parts = [shards.train_batch(9, 6, BLOCK, 1, **rank) for rank in ranks]
    assert torch.equal(torch.cat([part[0] for part in parts]), ids)
    assert torch.equal(torch.cat([part[1] for part in parts]), rows)


def test_row_ids_count_the_patches_of_the_global_batches(shards):
    rows = [shards.train_batch(step, 3, BLOCK)[1] for step in range(2)]
    assert torch.equal(torch.cat(rows), torch.arange(2 * 3 * BLOCK // PATCH).view(6, -1))


def test_held_out_batches(shards):
    tokens = torch.cat(shards.held_out_documents())
    batches = list(shards.held_out_batches(3, BLOCK))
    assert torch.equal(torch.cat(batches).flatten(), tokens[: len(tokens) // BLOCK * BLOCK])
    assert {len(ids) for ids in batches[:-1]} == {3}


def test_limited_held_out_batches_are_spread(shards):
    whole = torch.cat(list(shards.held_out_batches(3, BLOCK)))
    [limited] = shards.held_out_batches(3, BLOCK, limit=1)
    assert torch.equal(limited, whole[[0, len(whole) // 3, 2 * len(whole) // 3]])
    assert torch.equal(torch.cat(list(shards.held_out_batches(3, BLOCK, limit=10**6))), whole)


@given(st.integers(1, 300), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_order_is_a_bijection(size, seed, epoch):
    order = shuffled(np.arange(size), size, np.full(size, epoch), seed)
    assert sorted(order) == list(range(size))


def test_order_is_a_known_one():
    """Resuming must find the same order after an update."""
    order = shuffled(np.arange(10), 10, np.zeros(10, int), 1)
    assert order.tolist() == KNOWN_ORDER
    big = 2**61 - 1
    assert shuffled(np.array([5]), big, np.array([3]), 1).tolist() == KNOWN_LARGE


def test_order_is_uniform():
    """Each of 5 blocks comes first in a fifth of 4,000 epochs: chi-square, 4 degrees of freedom."""
    number = 4000
    first = shuffled(np.zeros(number, int), 5, np.arange(number), 0)
    counts = np.bincount(first, minlength=5)
    assert ((counts - number / 5) ** 2 / (number / 5)).sum() < 18.5  # exceeded once in 1,000 seeds


# ---- bad input ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4, 10), "block_size: expected a multiple of patch_size 4, got 10"),
        ((0, 4, 0), "block_size: expected a multiple of patch_size 4, got 0"),
        (
            (0, 4, 40000),
            "block_size: expected at most the [0-9]+ training tokens .* give more text",
        ),
        ((-1, 4, 16), "step: expected at least 0, got -1"),
        ((0, 0, 16), "batch_size: "),
        ((0, 4, 16, 0, 0, 3), "batch_size: .*world_size 3"),
        ((0, 4, 16, 0, 2, 2), "batch_size: .*rank 2"),
    ],
)
def test_bad_batches(shards, arguments, message):
    ranks = dict(zip(("rank", "world_size"), arguments[4:], strict=False))
    with pytest.raises(ValueError, match=message):
        shards.train_batch(*arguments[:4], **ranks)


def test_held_out_text_shorter_than_a_block(shards):
    with pytest.raises(ValueError, match=r"block_size: .* at most the [0-9]+ held-out tokens"):
        shards.held_out_batches(2, 4000)


def test_bad_documents_and_settings(tmp_path, monkeypatch):
    tokenizer = Characters()
    with pytest.raises(ValueError, match="documents: expected at least one"):
        write_shards([], tokenizer, tmp_path / "s", PATCH)
    with pytest.raises(ValueError, match="documents: expected an iterable of texts, got one str"):
        write_shards("text", tokenizer, tmp_path / "s", PATCH)
    with pytest.raises(ValueError, match="held_out: the corpus is one document"):
        write_shards(["same", "same"], tokenizer, tmp_path / "s", PATCH)
    with pytest.raises(ValueError, match="held_out: expected a share"):
        write_shards(texts(), tokenizer, tmp_path / "s", PATCH, held_out=1)
    with pytest.raises(ValueError, match="patch_size: expected at least 1, got 0"):
        write_shards(texts(), tokenizer, tmp_path / "s", 0)
    with pytest.raises(ValueError, match=r"tokenizer: expected ids in \[0, 200\), got"):
        write_shards([chr(300)], tokenizer, tmp_path / "s", PATCH)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder: cannot write into .*file.* name one"):
        write_shards(texts(), tokenizer, tmp_path / "file", PATCH)
    assert list((tmp_path / "s").iterdir()) == []  # nothing unfinished is left


def test_a_full_disk_leaves_the_old_shards(shards):
    """A limit on file sizes stands for the disk; it holds for a whole process, so in another."""
    code = (
        "import resource, sys; sys.path[:0] = ['python_tests', '.']; from test_data import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        f"write_shards(texts(500), Characters(), {str(shards.folder)!r}, PATCH)"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 1 and "OSError" in run.stderr.splitlines()[-1]
    names = sorted(path.name for path in shards.folder.iterdir())
    assert names == ["documents.bin", "shards.json", "tokens.bin"]
    again = TokenShards(shards.folder)
    assert torch.equal(again.train_batch(0, 1, BLOCK)[0], shards.train_batch(0, 1, BLOCK)[0])


def test_an_interrupted_replacement_is_noticed(shards, monkeypatch):
    """New tokens of the same size beside the old header would be read without a complaint."""

    def stop(*names):
        if names[0].name == "documents.bin":
            raise KeyboardInterrupt
        replace(*names)

    replace = data.os.replace
    monkeypatch.setattr(data.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_shards(texts(), Characters(), shards.folder, PATCH, held_out=0.2)
    with pytest.raises(ValueError, match="holds no token shards"):
        TokenShards(shards.folder)


def test_another_tokenizer(shards):
    other = Characters()
    assert TokenShards(shards.folder, other).num_tokens == shards.num_tokens
    other.fingerprint = "other"
    with pytest.raises(ValueError, match="tokenizer: characters is not the one that"):
        TokenShards(shards.folder, other)


def header_with(**changes):
    return lambda data: json.dumps(json.loads(data) | changes).encode()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("tokens.bin", lambda data: data[:-2], "tokens.bin should hold [0-9]+ bytes and holds"),
        ("tokens.bin", lambda data: data + b"12", "tokens.bin should hold [0-9]+ bytes and holds"),
        ("tokens.bin", lambda data: None, "tokens.bin should hold [0-9]+ bytes and is missing"),
        ("documents.bin", lambda data: data[8:], "documents.bin should hold"),
        ("documents.bin", lambda data: bytes(len(data)), "documents.bin does not belong"),
        ("shards.json", lambda data: None, "holds no token shards .* calm-rt tokenize"),
        ("shards.json", lambda data: data[:50], "is damaged or not a calm_rt header"),
        ("shards.json", lambda data: b"[]", "is damaged or not a calm_rt header"),
        ("shards.json", lambda data: b'{"vocab_size": 3}', "is damaged or not a calm_rt header"),
        ("shards.json", lambda data: b"\xff", "is damaged or not a calm_rt header"),
        ("shards.json", header_with(format="other"), "is damaged or not a calm_rt header"),
        ("shards.json", header_with(num_tokens="many"), "is damaged or not a calm_rt header"),
        ("shards.json", header_with(dtype="float32"), "is damaged or not a calm_rt header"),
        ("shards.json", header_with(dtype="uint32"), "tokens.bin should hold"),
        ("shards.json", header_with(num_train_tokens=8), "documents.bin does not belong"),
        ("shards.json", header_with(version=1), "has version 1, expected 2"),
    ],
)
def test_damaged_shards(shards, name, change, message):
    path = shards.folder / name
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"folder: .*{message}") as error:
        TokenShards(shards.folder)
    assert "\n" not in str(error.value)


def test_ids_out_of_range_in_the_file(shards):
    path = shards.folder / "tokens.bin"
    np.full_like(np.fromfile(path, np.uint16), 200).tofile(path)
    with pytest.raises(ValueError, match="holds id 200, expected ids below vocab_size 200"):
        TokenShards(shards.folder).train_batch(0, 1, BLOCK)
