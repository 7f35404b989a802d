"""Tokenizers: text comes back exactly, also piece by piece; errors say what to do."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_rt import tokenizer as module
from calm_rt.data import load_tokenizer, train_tokenizer

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "official_k4"
CODE = Path(module.__file__).read_text("utf-8")
AWKWARD = [
    "",
    " ",
    "\n\n",
    "\tif x:\n\t\treturn  1  \r\n",
    " leading and trailing ",
    "\u2581 a real \u2581\u2581 and a space",
    "a\x00b\x01\x7f\ufeff\u2028",
    "<s></s><unk><pad><0x0A>",
    "日本語 \N{GRINNING FACE} e\u0301 \U0010ffff",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "code.py").write_text(CODE, "utf-8")
    return train_tokenizer(folder / "code.py", 512, folder)


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [*map(stream.step, ids), stream.finish()]


@pytest.mark.parametrize("text", [*AWKWARD, CODE])
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text
    assert not {0, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batches_are_encoded_as_single_texts(tokenizer):
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]
    assert tokenizer.encode_batch([]) == []


def test_stream_yields_whole_characters_only(tokenizer):
    ids = tokenizer.encode("日a")
    assert len(ids) == 4  # three bytes, one letter
    assert streamed(tokenizer, ids) == ["", "", "日", "a", ""]
    assert streamed(tokenizer, ids[:2]) == ["", "", "\ufffd"]
    assert tokenizer.decode(ids[:2]) == "\ufffd"
    broken_off = [*ids[:2], ids[3]]
    assert streamed(tokenizer, broken_off)[2] == "\ufffda"


def test_special_tokens_have_no_text(tokenizer):
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id] == [1, 2, 3]
    assert tokenizer.decode([1, 2, 3, *tokenizer.encode("x"), 2]) == "x"


@pytest.mark.parametrize("token", [-1, 512])
def test_ids_out_of_range(tokenizer, token):
    with pytest.raises(ValueError, match=rf"token: expected an id in \[0, 512\), got {token}"):
        tokenizer.decode([token])


def test_code_is_encoded_in_pieces(tokenizer):
    assert tokenizer.vocab_size == 512
    assert len(tokenizer.encode(CODE)) < len(CODE) / 2
    assert len(tokenizer.encode(" " * 8)) <= 2  # indentation is not spelt space by space


def test_training_is_deterministic_and_samples(tokenizer, tmp_path, monkeypatch):
    source = tokenizer.path.parent / "code.py"
    again = train_tokenizer(source, 512, tmp_path / "other.model")
    assert again.path == tmp_path / "other.model"
    assert again.fingerprint == tokenizer.fingerprint == load_tokenizer(again.path).fingerprint
    names = [path.name for path in tmp_path.iterdir()]
    assert names == ["other.model"]  # nothing temporary is left
    monkeypatch.setattr(module, "SAMPLE_CHARACTERS", 8000)
    documents = [CODE[start : start + 3000] for start in range(0, len(CODE), 3000)] * 4
    chunks = module._sample_chunks(documents)
    assert 3000 <= sum(map(len, chunks)) <= 8000
    positions = [i for i, text in enumerate(documents) if text[:1000] in {c[:1000] for c in chunks}]
    assert min(positions) < len(documents) / 4 and max(positions) > 3 * len(documents) / 4
    monkeypatch.setattr(module, "SAMPLE_CHARACTERS", 10**7)
    assert "".join(module._sample_chunks([CODE, "x" * 10**5])) == CODE + "x" * 10**5


def test_many_different_characters_leave_room_for_pairs(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x5200))) + "the same again " * 200
    (tmp_path / "corpus.txt").write_text(text, "utf-8")
    tokenizer = train_tokenizer(tmp_path / "corpus.txt", 300, tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the same again")) <= 4


def test_vocabularies_that_the_corpus_cannot_give(tmp_path):
    (tmp_path / "a.txt").write_text("hello world\n" * 50)
    with pytest.raises(ValueError, match=r"vocab_size: .* gives at most 2[0-9]+ tokens; lower"):
        train_tokenizer(tmp_path / "a.txt", 5000, tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size: expected at least 264 .*, got 100"):
        train_tokenizer(tmp_path / "a.txt", 100, tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()


def test_path_that_cannot_be_written(tmp_path):
    (tmp_path / "a.txt").write_text(CODE)
    with pytest.raises(ValueError, match=r"path: cannot write into .*a.txt"):
        train_tokenizer(tmp_path / "a.txt", 300, tmp_path / "a.txt" / "folder")


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "is a tiktoken file.* use the tokenizer.json"),
        ("tokenizer.model", b"junk", "is not a sentencepiece model"),
        ("tokenizer.model", b"", "is not a sentencepiece model"),
        ("tokenizer.json", b"{}", "is not a tokenizer.json"),
        ("other.txt", b"x", "no tokenizer.model or tokenizer.json in"),
    ],
)
def test_foreign_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    if name == "tokenizer.json":
        pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=f"tokenizer: .*{message}") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: .*nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.fixture
def json_folder(tmp_path):
    """A byte-level tokenizer.json as Llama-3's: no PAD, a tiktoken file beside it."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([CODE], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    return tmp_path


@pytest.fixture
def llama_folder(json_folder):
    """As Llama-3's file says it: words by a pattern, special tokens behind, BOS put before."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces, path = tokenizers.pre_tokenizers, json_folder / "tokenizer.json"
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    pattern = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+|.")
    model.pre_tokenizer = pieces.Sequence(
        [pieces.Split(pattern, "isolated"), pieces.ByteLevel(False, use_regex=False)]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pieces.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator([CODE], trainer)
    model.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    model.post_processor = tokenizers.processors.TemplateProcessing(
        "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 300)]
    )
    model.save(str(path))
    return json_folder


def test_tokenizer_json(json_folder):
    tokenizer = load_tokenizer(json_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 300)
    assert tokenizer.vocab_size == 301  # [PAD] is added behind, as the official code does
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode([0, *ids, 1, 300]) == text
        assert "".join(streamed(tokenizer, ids)) == text
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]
    pieces = streamed(tokenizer, tokenizer.encode("日"))
    assert [piece for piece in pieces if piece] == ["日"]
    assert streamed(tokenizer, tokenizer.encode("日")[:-1])[-1] == "\ufffd"
    with pytest.raises(ValueError, match="token: "):
        tokenizer.decode([301])


def test_tokenizer_of_llama_3(llama_folder):
    tokenizer = load_tokenizer(llama_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (300, 301, 302)
    for text in [*AWKWARD, "a<|end_of_text|>b[PAD]", "12345", CODE]:
        ids = tokenizer.encode(text)
        assert max(ids, default=0) < 300  # none special, though the text may spell one
        assert tokenizer.decode(ids) == text
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]


@pytest.mark.parametrize("folder", ["json_folder", "llama_folder"])
def test_streams_are_those_of_the_package(folder, request, monkeypatch):
    """Token by token, also in releases before 0.20, which have none."""
    from tokenizers import Tokenizer, decoders

    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    texts = [tokenizer.encode(text) for text in [*AWKWARD, CODE]]
    texts += [[*ids[:-1], tokenizer.eos_id, *ids] for ids in texts]  # characters break off
    own = Tokenizer.from_file(str(tokenizer.path))
    expected = []
    for ids in texts:
        stream = decoders.DecodeStream(skip_special_tokens=True)
        expected.append([stream.step(own, token) or "" for token in ids])
    monkeypatch.delattr(decoders, "DecodeStream")
    tokenizer = load_tokenizer(tokenizer.path)
    assert [streamed(tokenizer, ids)[:-1] for ids in texts] == expected
    assert ["".join(streamed(tokenizer, ids)) for ids in texts] == list(
        map(tokenizer.decode, texts)
    )


def test_ids_with_holes(json_folder):
    """The size of a vocabulary is the largest id and one, not the number of its tokens."""
    path = json_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["far"] = 500
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == max(500, tokenizer.pad_id) + 1
    ids = [*tokenizer.encode("x"), 500, 400, *tokenizer.encode("y")]
    assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == "xfary"
    content["model"]["vocab"] |= {"new": 302}  # the next that the package would count
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has no PAD; name it in special_tokens_map\.json"):
        load_tokenizer(path)
    (json_folder / "special_tokens_map.json").write_text('{"pad_token": "new"}')
    assert load_tokenizer(path).pad_id == 302


def test_the_right_file_is_named(json_folder, monkeypatch):
    right = json_folder / "tokenizer.json"
    with pytest.raises(ValueError, match=f"is a tiktoken file, .*; use {right}"):
        load_tokenizer(json_folder / "tokenizer.model")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=f"reading {right} needs: pip install tokenizers"):
        load_tokenizer(json_folder)


def test_special_tokens_named_in_a_file(json_folder):
    names = {"eos_token": {"content": "<|begin_of_text|>"}, "pad_token": "<|end_of_text|>"}
    (json_folder / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(json_folder / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 300)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden tokenizer at {GOLDEN}")
def test_foreign_sentencepiece_model():
    """Made with sentencepiece's defaults: a space in front of a text, which decoding takes away."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = load_tokenizer(GOLDEN)
    original = SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer.model"))
    for text in ("hello world", "  two  spaces", "a\nb", "ü"):
        ids = original.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == original.decode(ids)
