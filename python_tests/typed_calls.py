"""Calls as users write them, for a type checker (`make types`); nobody runs them.

`assert_type` says what comes back: of an untyped name it would be Any.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import calm_rt
from calm_rt import ops
from calm_rt.brier import BrierLM
from calm_rt.checkpoint import convert
from calm_rt.data import Tokenizer, TokenShards, read_documents, train_tokenizer, write_shards
from calm_rt.evaluation import conditioning_gap, reconstruction_accuracy
from calm_rt.generation import Generation
from calm_rt.losses import autoencoder_loss, energy_loss
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig, KVCache, fold_encoder
from calm_rt.reference import EnergyScore, Stream
from calm_rt.sampling import sample_patches
from calm_rt.training import TrainingConfig, train, train_autoencoder


class OwnStream:
    def step(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


class OwnTokenizer:
    def __init__(self) -> None:
        self.path, self.fingerprint, self.vocab_size = Path("own"), "own", 256
        self.bos_id, self.eos_id, self.pad_id = 1, 2, 3

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode()

    def stream(self) -> OwnStream:
        return OwnStream()


class Logits(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 256)


class Drawer:
    def draw(self, contexts: list[Tensor], num_draws: int) -> Tensor:
        return torch.zeros(num_draws, len(contexts), 4, dtype=torch.int64)


def call_ops(x: Tensor, ids: Tensor, flag: bool, autoencoder: Autoencoder, model: Calm) -> None:
    mean, rows, seed = x[0], torch.arange(5), torch.tensor(3)
    (-ops.energy_score(x, mean, mean, num_targets=10, seed=seed, rows=rows).mean()).backward()
    terms = ops.energy_score(x, mean, mean, return_terms=True)
    assert_type(terms, EnergyScore)
    either = ops.energy_score(x, mean, mean, return_terms=flag)
    assert_type(either, Tensor | EnergyScore)
    assert_type(ops.linear_argmax(mean, mean), Tensor)
    assert_type(ops.linear_cross_entropy(mean, mean, rows, reduction="none"), Tensor)
    assert_type(ops.noise(rows, 3, 8, stream=Stream.LATENT, seed=1, dtype=torch.float64), Tensor)
    assert_type(ops.select_patch(ids, n=2, seed=0), Tensor)
    assert_type(ops.gated_mlp(mean, mean[0], mean, mean, mean, eps=1e-6), Tensor)
    assert_type(ops.encode(ids, autoencoder.encoder.weights(), eps=1e-6), tuple[Tensor, Tensor])
    assert_type(ops.decode(mean, autoencoder.decoder.weights(), eps=1e-6), Tensor)
    head = model.generative_head.weights()
    assert_type(ops.sample_latents(mean, head, num_samples=4, seed=0), Tensor)


def call_models(ids: Tensor) -> None:
    config, own = CalmConfig.from_dict({}), AutoencoderConfig(hidden_size=16)
    autoencoder, model = Autoencoder(own).to("cpu"), Calm(config, own).eval()
    mean, _ = autoencoder.encode(ids)
    assert_type(autoencoder.logits(mean), Tensor)
    fold_encoder(autoencoder.requires_grad_(False))
    assert_type(autoencoder.encoder.tables, Tensor | None)
    cache = KVCache(config, 2, 8)
    hidden = model.hidden_states(ids, cache)
    cache.advance(torch.tensor([4, 4]))
    assert_type(model.sample(hidden[:, -1], 4, 0), Tensor)
    loss, metrics = energy_loss(model, ids, seed=1, precision="bf16")
    loss.backward()
    assert_type(metrics, dict[str, Tensor])
    assert_type(autoencoder_loss(autoencoder, ids)[0], Tensor)
    assert_type(sample_patches(model, hidden[:, -1], temperature=0.5, seed=1).patches, Tensor)


def call_training(own: AutoencoderConfig, config: CalmConfig) -> None:
    tokenizer: Tokenizer = train_tokenizer("corpus.jsonl", 300, Path("tokenizer"))
    write_shards(read_documents("corpus.jsonl"), OwnTokenizer(), "data", 4)
    shards = TokenShards(Path("data"), tokenizer)
    training = TrainingConfig(steps=10, batch_size=2, block_size=16)
    autoencoder = train_autoencoder(own, shards, "autoencoder", training, overwrite=True)
    assert_type(autoencoder, Autoencoder)
    model = train(config, autoencoder, shards, "calm", training, device="cpu")
    assert_type(train(None, None, shards, Path("calm"), training, resume=True), Calm)
    assert_type(calm_rt.brier_lm(model, shards.held_out_documents(), num_draws=2), BrierLM)
    calm_rt.brier_lm(Logits(), shards)
    calm_rt.brier_lm(lambda ids: torch.zeros(*ids.shape, 256), [torch.arange(4)])
    calm_rt.brier_lm(Drawer(), torch.zeros(2, 8, dtype=torch.int64), block_size=8)
    assert_type(reconstruction_accuracy(autoencoder, shards.held_out_batches(2, 16)), float)
    gap, (low, high) = conditioning_gap(model, shards.held_out_batches(2, 16))
    print(low <= gap <= high)


def call_checkpoints() -> None:
    model = calm_rt.load("folder", device=torch.device("cpu"))
    assert_type(model, Autoencoder | Calm)
    calm_rt.save(model, Path("folder"), layout="official")
    convert("official", "folder", dtype=torch.bfloat16)
    assert_type(calm_rt.info(), dict[str, Any])
    with calm_rt.backend("reference"):
        assert_type(calm_rt.load_tokenizer("folder"), Tokenizer)


def call_generator(model: Calm, texts: list[str], ids: list[list[int]]) -> None:
    generator = calm_rt.Generator(model, OwnTokenizer(), max_batch_size=4)
    generations = generator.generate(texts, max_new_tokens=8, temperature=Fraction(1, 2), stop=ids)
    assert_type(generations, list[Generation])
    for index, generation in generator.results(["a", [1, 2]], max_new_tokens=8, temperature="1/2"):
        print(index, generation.ids)
    for piece in generator.stream("a", max_new_tokens=8, prompt="constrain", sequence_id=1):
        print(piece.strip())
    [sequence] = generator.prefill(ids, max_new_tokens=8)
    generator.step()
    print(sequence.unsent(), generator.release(sequence).text)
    generator.stream("a", max_new_tokens=8, temprature=0.5)  # pyright: ignore[reportCallIssue]
    generator.results(texts)  # pyright: ignore[reportCallIssue]
    try:
        generator.generate(texts, max_new_tokens=8)
    except calm_rt.GenerationError as error:
        assert_type(error.generations, list[Generation])


def call_patch(official: nn.Module) -> None:
    with calm_rt.patch(official, keep_bugs=["label_masks"]) as report:
        assert_type(report.replaced, dict[str, str])
    calm_rt.unpatch(official)
