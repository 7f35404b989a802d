"""Generation: prompts of any length, ragged batches through one KV cache, EOS, streaming."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from calm_rt.data import Tokenizer
from calm_rt.nn import Calm, KVCache
from calm_rt.ops.check import check
from calm_rt.sampling import parse_temperature, sample_patches


@dataclass(frozen=True)
class Generation:
    """What one prompt was continued with."""

    text: str | None  # the continuation, without EOS and stop text; None without a tokenizer
    ids: list[int]  # the new tokens, a drawn EOS included; at most max_new_tokens
    steps: int  # patches drawn for this sequence
    seconds: float  # from the start of the call to this sequence's last patch
    finished: bool  # True after EOS or a stop text, False where max_new_tokens ended it


class Generator:
    """Continues prompts with a CALM.

    A prompt is aligned at the left: BOS tokens (EOS where the model has none) fill its first patch,
    as at the start of a document, and an empty prompt is one patch of them. Draws depend on (seed,
    sequence id, step) only, so a sequence gets the same random numbers in any batch; a matrix
    product may still round differently at another batch size.
    """

    def __init__(self, model: Calm, tokenizer: Tokenizer | None = None) -> None:
        check(
            isinstance(model, Calm),
            "model",
            "a Calm (a language model, not an autoencoder)",
            type(model).__name__,
        )
        config = model.config
        if tokenizer is not None:
            sizes = (
                f"the model's {config.vocab_size} tokens (use the tokenizer it was trained with)"
            )
            check(
                tokenizer.vocab_size <= config.vocab_size, "tokenizer", sizes, tokenizer.vocab_size
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.start_id = config.eos_token_id if config.bos_token_id is None else config.bos_token_id

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float | Fraction | str = 1,
        num_candidates: int = 200,
        seed: int = 0,
        stop: Sequence[str] = (),
        sequence_ids: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Continues all prompts in one batch.

        prompts: texts, or lists of token ids (the only kind without a tokenizer), of any lengths.
        temperature: 0, or 1/n as a number, a Fraction or text; below 1 each step votes among
            num_candidates draws.
        stop: texts that end a sequence; they are left out of its text.
        sequence_ids: one number below 2^31 a prompt, its name for the random numbers; None for
            0, 1, ....
        returns: one Generation a prompt, in order.
        raises: ValueError for prompts, lengths or settings that do not fit the model.
        """
        check(
            not isinstance(prompts, str),
            "prompts",
            "a list of prompts",
            "one text (write [prompt])",
        )
        if sequence_ids is None:
            sequence_ids = range(len(prompts))
        check(
            len(sequence_ids) == len(prompts),
            "sequence_ids",
            f"one for each of {len(prompts)} prompts",
            len(sequence_ids),
        )
        sequences = [
            _Sequence(self, prompt, name, stop)
            for prompt, name in zip(prompts, sequence_ids, strict=True)
        ]
        for _ in self._run(sequences, max_new_tokens, temperature, num_candidates, seed):
            pass
        return [sequence.result() for sequence in sequences]

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float | Fraction | str = 1,
        num_candidates: int = 200,
        seed: int = 0,
        stop: Sequence[str] = (),
        sequence_id: int = 0,
    ) -> Iterator[str]:
        """Continues one prompt and yields its text as it grows, in whole characters.

        The pieces together are the text that `generate` returns for the same arguments.
        raises: ValueError as `generate`, and without a tokenizer.
        """
        check(self.tokenizer is not None, "tokenizer", "one to turn tokens into text", None)
        sequence = _Sequence(self, prompt, sequence_id, stop)
        steps = self._run([sequence], max_new_tokens, temperature, num_candidates, seed)
        return (piece for _ in steps if (piece := sequence.unsent()))

    def _run(
        self,
        sequences: list["_Sequence"],
        max_new_tokens: int,
        temperature: float | Fraction | str,
        num_candidates: int,
        seed: int,
    ) -> Iterator[None]:
        """Checks the request, then returns an iterator whose every step draws one patch for each
        unfinished sequence."""
        patch_size, limit = self.model.config.patch_size, self.model.config.max_position_embeddings
        check(
            isinstance(max_new_tokens, int) and max_new_tokens >= 0,
            "max_new_tokens",
            "0 or more",
            max_new_tokens,
        )
        check(num_candidates >= 1, "num_candidates", "at least 1", num_candidates)
        temperature = parse_temperature(temperature)
        num_steps = -(-max_new_tokens // patch_size)
        longest = max((len(s.prompt) for s in sequences), default=0) // patch_size
        check(
            longest + num_steps <= limit,
            "prompts",
            f"at most max_position_embeddings = {limit} patches of {patch_size} tokens in all",
            f"{longest} and {num_steps} new: shorten the prompt or lower max_new_tokens",
        )
        for sequence in sequences:
            sequence.room = max_new_tokens
        return self._steps(
            sequences, num_steps, longest + num_steps, temperature, num_candidates, seed
        )

    @torch.no_grad()
    def _steps(
        self,
        sequences: list["_Sequence"],
        num_steps: int,
        max_patches: int,
        temperature: Fraction,
        num_candidates: int,
        seed: int,
    ) -> Iterator[None]:
        start = time.perf_counter()
        active = list(sequences)
        hidden, cache = None, None
        for step in range(num_steps if sequences else 0):
            if hidden is None:
                hidden, cache = self._prefill(active, max_patches)
            names = torch.tensor([s.name for s in active], device=hidden.device)
            patches = sample_patches(
                self.model,
                hidden,
                temperature=temperature,
                num_candidates=num_candidates,
                seed=seed,
                rows=names << 32 | step,
            ).patches
            for sequence, patch in zip(active, patches.tolist(), strict=True):
                sequence.extend(patch)
                sequence.seconds = time.perf_counter() - start
            yield
            kept = [i for i, sequence in enumerate(active) if not sequence.finished]
            if not kept:
                return
            if len(kept) < len(active):
                rows = torch.tensor(kept, device=hidden.device)
                active, patches = [active[i] for i in kept], patches[rows]
                cache.select(rows)
            if step + 1 < num_steps:
                hidden = self.model.hidden_states(patches, cache)[:, -1]
                cache.advance(torch.ones_like(cache.lengths))

    def _prefill(self, sequences: list["_Sequence"], max_patches: int) -> tuple[Tensor, KVCache]:
        """Reads the prompts, padded on the right to one length where nobody looks.

        returns: the state after each prompt's last patch [B, H], and the cache.
        """
        weight = self.model.transformer.embed_tokens.weight
        cache = KVCache(self.model.config, len(sequences), max_patches, weight.dtype, weight.device)
        longest = max(len(s.prompt) for s in sequences)
        ids = torch.tensor(
            [s.prompt + [self.start_id] * (longest - len(s.prompt)) for s in sequences]
        )
        counts = torch.tensor([len(s.prompt) // self.model.config.patch_size for s in sequences])
        counts = counts.to(weight.device)
        hidden = self.model.hidden_states(ids.to(weight.device), cache)
        hidden = hidden[torch.arange(len(sequences), device=weight.device), counts - 1]
        check(
            bool(hidden.isfinite().all()),
            "model",
            "finite hidden states",
            "NaN or inf (are the weights damaged?)",
        )
        cache.advance(counts)
        return hidden, cache


class _Sequence:
    """One prompt and what has been drawn for it."""

    def __init__(
        self, generator: Generator, prompt: str | Sequence[int], name: int, stop: Sequence[str]
    ) -> None:
        config, tokenizer = generator.model.config, generator.tokenizer
        if isinstance(prompt, str):
            check(
                tokenizer is not None, "prompts", "token ids, for there is no tokenizer", "a text"
            )
            prompt = tokenizer.encode(prompt)
        prompt = [int(token) for token in prompt]
        wrong = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        check(wrong is None, "prompts", f"token ids in [0, {config.vocab_size})", wrong)
        check(not isinstance(stop, str), "stop", "a list of texts", f"one text (write [{stop!r}])")
        check(all(stop), "stop", "texts that are not empty", list(stop))
        check(not stop or tokenizer is not None, "stop", "a tokenizer to look for texts", None)
        check(0 <= name < 2**31, "sequence_ids", "numbers in [0, 2^31)", name)
        missing = -len(prompt) % config.patch_size if prompt else config.patch_size
        check(
            not missing or generator.start_id is not None,
            "prompts",
            f"whole patches of {config.patch_size} tokens, as there is no BOS or EOS to fill one",
            f"{len(prompt)} tokens",
        )
        self.prompt = [generator.start_id] * missing + prompt
        self.name = name
        self.room = 0  # tokens that may still be drawn
        self.seconds = 0.0
        self.finished = False
        self._eos_id = config.eos_token_id
        self._stop = tuple(stop)
        self._decoder = tokenizer.stream() if tokenizer else None
        self._ids: list[int] = []
        self._steps = 0
        self._text = ""  # decoded so far, in whole characters
        self._sent = 0  # characters of it already streamed
        self._ended = False  # by EOS or a stop text

    def extend(self, patch: list[int]) -> None:
        """Appends the tokens of a drawn patch up to EOS, a stop text or max_new_tokens."""
        self._steps += 1
        for token in patch[: self.room]:
            self._ids.append(token)
            self.room -= 1
            self._ended = token == self._eos_id
            if self._decoder and not self._ended:
                self._append_text(self._decoder.step(token))
            if self._ended:
                break
        self.finished = self._ended or self.room == 0

    def _append_text(self, piece: str) -> None:
        longest = max(map(len, self._stop), default=1)
        searched = max(0, len(self._text) - longest + 1)
        self._text += piece
        ends = [at for text in self._stop if (at := self._text.find(text, searched)) >= 0]
        if ends:
            self._text, self._ended = self._text[: min(ends)], True

    def unsent(self) -> str:
        """The text that is new and certain; what may begin a stop text waits."""
        end = len(self._text)
        if not self.finished:
            end = min([end, *(_start_of_partial(self._text, text) for text in self._stop)])
        piece, self._sent = self._text[self._sent : end], max(end, self._sent)
        return piece

    def result(self) -> Generation:
        text = self._text if self._decoder else None
        return Generation(text, self._ids, self._steps, self.seconds, self._ended)


def _start_of_partial(text: str, stop: str) -> int:
    """Where the longest end of `text` that is a beginning of `stop` starts."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return len(text) - size
    return len(text)
