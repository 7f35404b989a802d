"""One prompt and its continuation, as tokens and as text."""

import io
from pathlib import Path

import pytest

from calm_rt.data import Tokenizer, load_tokenizer
from calm_rt.nn import CalmConfig
from calm_rt.sequence import GenerationOptions, TokenSequence

TEXT = "The cat sat on the mat é日, and  the dog too"
CORPUS = ["The cat sat on the mat, and the dog too. "] * 50


def sequence_of(ids: list[int], prompt: list[int], tokenizer: Tokenizer | None, **options):
    """What is continued with these tokens, one a patch."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "patch_size": 1, "vocab_size": 1000}
    config = CalmConfig(**sizes, eos_token_id=tokenizer.eos_id if tokenizer else 2)
    options = GenerationOptions(max_new_tokens=len(ids), **options)
    sequence = TokenSequence(prompt, 0, options, config, tokenizer)
    for token in ids:
        if not sequence.finished:
            sequence.extend([token], 1, 1, True)
    return sequence


def sentencepiece_model(folder: Path) -> None:
    """With sentencepiece's defaults, as Llama-2's: a space in front of every text."""
    from sentencepiece import SentencePieceTrainer

    output = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=output,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(output.getvalue())


def metaspace_json(folder: Path, strips: bool) -> None:
    """A tokenizer.json of the same kind, whose decoder takes the space away in one of two ways."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False
    )
    model.train_from_iterator(CORPUS, trainer)
    model.add_tokens(names)
    decoders = tokenizers.decoders
    model.decoder = decoders.Metaspace()
    if strips:
        parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        model.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    model.save(str(folder / "tokenizer.json"))


@pytest.fixture(params=["sentencepiece", "metaspace", "metaspace, strip"])
def spaced(request, tmp_path) -> Tokenizer:
    """A tokenizer that puts a space in front of a text, and takes it away again."""
    if request.param == "sentencepiece":
        sentencepiece_model(tmp_path)
    else:
        metaspace_json(tmp_path, request.param.endswith("strip"))
    return load_tokenizer(tmp_path)


def test_the_space_at_a_continuations_start_stays(spaced):
    text = "The cat sat on the mat"
    ids = spaced.encode(text)
    assert spaced.decode(ids) == text
    for cut in range(len(ids) + 1):
        sequence = sequence_of(ids[cut:], ids[:cut], spaced)
        assert spaced.decode(ids[:cut]) + sequence.result().text == text
        assert sequence.unsent() == sequence.result().text
    assert " cat" in {sequence_of(ids[i:], ids[:i], spaced).result().text[:4] for i in range(9)}


def test_a_prompt_may_end_inside_a_character(tmp_path):
    """Its character comes whole with the continuation."""
    sentencepiece_model(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(TEXT)
    for cut in range(len(ids) + 1):
        before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert before + sequence_of(ids[cut:], ids[:cut], tokenizer).result().text == TEXT


def test_prompts_without_text_begin_one(spaced):
    ids = spaced.encode("cat")
    for prompt in ([], [spaced.bos_id], [spaced.vocab_size + 5]):
        assert sequence_of(ids, prompt, spaced).result().text == "cat"


@pytest.mark.parametrize(
    ("options", "prompt", "drawn", "share"),
    [
        ({"temperature": "1/2"}, [], [(8, 16), (8, 16)], 8 / 200),  # tuples decided
        ({"temperature": "1/2"}, [], [(208, 416)], 208 / 200),  # they did not
        ({"temperature": 0}, [], [(200, 300), (200, 100)], 1 / 2),
        ({}, [], [(1, 2), (1, 2)], 1),
        ({"temperature": "1/2", "prompt": "constrain"}, [7], [(600, 300), (8, 16)], 316 / 1600),
        ({"temperature": "1/3", "method": "exact"}, [], [(96, 96), (32, 64)], 160 / 256),
    ],
)
def test_decoded_share_is_one_of_the_whole_algorithm(options, prompt, drawn, share):
    config = CalmConfig(hidden_size=16, num_attention_heads=2, patch_size=2, vocab_size=100)
    options = GenerationOptions(max_new_tokens=4, **options)
    sequence = TokenSequence(prompt, 0, options, config, None)
    for draws, slots in drawn:
        sequence.extend([7, 8], draws, slots, False)
    assert sequence.result().decoded_share == pytest.approx(share)
