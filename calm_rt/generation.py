"""Generation: prompts of any length through the engine, to texts, results as they finish, a stream
or a loop of one's own."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from operator import itemgetter
from typing import Unpack

import torch

from calm_rt.data import Tokenizer
from calm_rt.engine import PREFILL_CHUNK, Engine
from calm_rt.nn import Calm, screen_decoder
from calm_rt.nn.plain import uncompiled
from calm_rt.ops.check import check, check_int
from calm_rt.sampling import MAX_DRAWS, sample_patches
from calm_rt.sequence import (
    Generation,
    GenerationError,
    GenerationOptions,
    GivenOptions,
    Sampling,
    TokenSequence,
    start_id,
)

__all__ = ["Generation", "GenerationError", "Generator"]

MAX_BATCH_SIZE = 32
STEPS_PER_READ = {"cpu": 1, "cuda": 8}
NEEDED_OF_TOKENIZERS = ("encode", "stream", "vocab_size", "eos_id")
WHOLE_PATCHES = 64  # to which a cache is rounded up that is kept for the next call

Prompt = str | Sequence[int]


class Generator:
    """Continues prompts with a CALM.

    Draws depend on (seed, sequence id, step of the sequence) only, so a sequence gets the same
    random numbers in any batch and whoever else comes or goes. A matrix product may still round
    differently at another batch size, and a text then part from that of another batch.

    Beside `generate`, `results` and `stream` there is a loop for others to drive, a server's for
    example: `prefill` reads prompts into free slots of one key-value cache, each `step` draws a
    patch for all sequences, `release` frees a slot.
    """

    def __init__(
        self,
        model: Calm,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch_size: int = MAX_BATCH_SIZE,
        max_patches: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        batch_invariant: bool = False,
        screen: bool = True,
        steps_per_read: int | None = None,
    ) -> None:
        """model: is put into evaluation mode, and stays in it.
        max_batch_size: sequences at once; others wait until one has finished.
        max_patches: of one sequence in the loop of one's own, which fixes its cache; None for the
            model's longest. The other methods take what their prompts need.
        prefill_chunk: patches of prompts that one forward pass reads, which bounds its memory.
        batch_invariant: every sequence goes through the network alone, and its attention reads as
            many patches as it has itself, so that its text is the same bit for bit alone and in any
            batch on one device. A step of B sequences then costs B steps of one: at temperature 1
            nothing is gained by a batch; below it little is lost, for a pool fills the matrix
            products by itself. On a GPU nothing is captured.
        screen: on a CPU, decode through `nn.screen_decoder`: same tokens sooner, for V H bytes.
        steps_per_read: steps of the whole batch before the host looks at what was drawn, where all
            its sequences have the same settings and method "pool" and stand behind their first
            patch; None for 8 where the model is on a GPU, otherwise 1. On a GPU each of them is one
            replay of a CUDA graph; the draws are the same, large pools are decoded slot by slot
            without a look by the host, and a sequence that ends in between wastes what is left of
            them. Above 1 the cache and the graphs of a call stay for the next. batch_invariant
            takes single steps, whatever is given.
        raises: ValueError for a model or tokenizer that does not fit, and for weights of the head
            or the decoder that are NaN or inf, which would give a token all the same.
        """
        model = uncompiled(model)
        kind = "a Calm (a language model, not an autoencoder)"
        check(isinstance(model, Calm), "model", kind, type(model).__name__)
        config = model.config
        if steps_per_read is None:
            steps_per_read = STEPS_PER_READ.get(model.transformer.norm.weight.device.type, 1)
        steps_per_read = check_int("steps_per_read", steps_per_read, 1)
        if tokenizer is not None:
            missing = [name for name in NEEDED_OF_TOKENIZERS if not hasattr(tokenizer, name)]
            kind = f"one of load_tokenizer, or with its {', '.join(NEEDED_OF_TOKENIZERS)}"
            got = f"{type(tokenizer).__name__} without {', '.join(missing)}"
            check(not missing, "tokenizer", kind, got)
            fits = f"the model's {config.vocab_size} tokens (use the tokenizer it was trained with)"
            check(
                tokenizer.vocab_size <= config.vocab_size, "tokenizer", fits, tokenizer.vocab_size
            )
            ends = config.eos_token_id, tokenizer.eos_id
            fits = f"one whose eos_id is the model's config.eos_token_id = {ends[0]}"
            check(None in ends or ends[0] == ends[1], "tokenizer", fits, f"eos_id = {ends[1]}")
        max_batch_size = check_int("max_batch_size", max_batch_size, 1)
        prefill_chunk = check_int("prefill_chunk", prefill_chunk, 1)
        limit = config.max_position_embeddings
        max_patches = check_int(
            "max_patches", limit if max_patches is None else max_patches, 1, limit
        )
        meta = any(parameter.is_meta for parameter in model.parameters())
        check(not meta, "model", "one with values", "parameters on the meta device")
        _check_finite(model)
        self.model = model.eval()
        if screen:
            screen_decoder(model.ae_model)
        self.tokenizer = tokenizer
        self.start_id = start_id(config)
        self.max_batch_size, self.max_patches = max_batch_size, max_patches
        self.prefill_chunk, self.batch_invariant = prefill_chunk, batch_invariant
        self.steps_per_read = steps_per_read
        self._engine: Engine | None = None  # of the loop of one's own
        self._num_prefilled = 0  # sequences that it has read
        self._idle: Engine | None = None  # of a call that is over, for the next

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float | Fraction | str = 1,
        num_candidates: int = 200,
        method: str = "pool",
        max_draws: int = MAX_DRAWS,
        on_budget: str = "raise",
        seed: int = 0,
        stop: Sequence[str | Sequence[int]] = (),
        prompt: str = "align",
        sequence_ids: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Continues all prompts.

        prompts: texts, or lists of token ids (the only kind without a tokenizer), of any lengths.
        temperature, num_candidates, method, max_draws, on_budget: see `sample_patches`.
        stop: texts, or lists of token ids, that end a sequence; they are left out of its text, and
            stand in its ids.
        prompt: what happens where a prompt is no whole number of patches. "align": BOS tokens (EOS
            where the model has none) fill its first patch, as at the start of a document.
            "constrain": its left-over tokens are known of the first new patch, which is drawn to
            begin with them; where no draw does, a warning and `Generation.constrained` say so. An
            empty prompt is one patch of BOS.
        sequence_ids: one number below 2^31 a prompt, its name for the random numbers; None for
            0, 1, ....
        returns: one Generation a prompt, in order.
        raises: ValueError for prompts, lengths or settings that do not fit the model.
            GenerationError, which has all results, where hidden states of a sequence were NaN or
            inf, or max_draws were used up under on_budget="raise": it ended there, and all others
            were finished before the error is raised.
        """
        results = self.results(
            prompts,
            sequence_ids=sequence_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            num_candidates=num_candidates,
            method=method,
            max_draws=max_draws,
            on_budget=on_budget,
            seed=seed,
            stop=stop,
            prompt=prompt,
        )
        generations = [generation for _, generation in sorted(results, key=itemgetter(0))]
        errors = [generation.error for generation in generations if generation.error]
        if errors:
            raise GenerationError(_all_errors(errors), generations)
        return generations

    def results(
        self,
        prompts: Sequence[Prompt],
        *,
        sequence_ids: Sequence[int] | None = None,
        **options: Unpack[GivenOptions],
    ) -> Iterator[tuple[int, Generation]]:
        """Continues all prompts and yields (index of the prompt, Generation) as each finishes.

        options: those of `generate`.
        raises: ValueError as `generate`, at once; never GenerationError: look at `error`.
        """
        return self._run(self._sequences("results", prompts, sequence_ids, options))

    def stream(
        self, prompt: Prompt, /, *, sequence_id: int = 0, **options: Unpack[GivenOptions]
    ) -> Iterator[str]:
        """Continues one prompt and yields its text as it grows, in whole characters.

        The pieces together are the text that `generate` returns for the same arguments.
        options: those of `generate`.
        raises: ValueError as `generate`, at once, and without a tokenizer; GenerationError behind
            the text that was drawn before.
        """
        check(self.tokenizer is not None, "tokenizer", "one to turn tokens into text", None)
        [sequence] = self._sequences("stream", [prompt], [sequence_id], options)
        return self._stream(sequence)

    def prefill(
        self,
        prompts: Sequence[Prompt],
        *,
        sequence_ids: Sequence[int] | None = None,
        **options: Unpack[GivenOptions],
    ) -> list[TokenSequence]:
        """Reads prompts into free slots of this generator's own cache, made at the first call.

        sequence_ids: as for `generate`, but None counts on from call to call (an id is how many
            sequences were read before), so that a prompt that comes again gets new draws.
        options: those of `generate`; sequences of different options go together.
        returns: the sequences in progress, one a prompt: `finished`, `unsent()` for the new text,
            `result()` for the Generation so far.
        raises: ValueError as `generate`, and where there are fewer than `free_slots`.
        """
        first_id = self._num_prefilled
        sequences = self._sequences("prefill", prompts, sequence_ids, options, first_id)
        sizes = self.max_batch_size, self.max_patches
        if self._engine is None or not self._engine.fits(*sizes):
            busy = (
                [s.name for s in self._engine.sequences if not s.finished] if self._engine else []
            )
            check(not busy, "model", f"as it was while sequences {busy} are in progress", "another")
            self._engine = self._new_engine(*sizes)
        self._engine.prefill(sequences)
        self._num_prefilled += len(sequences)
        return sequences

    def step(self) -> list[TokenSequence]:
        """Draws a patch, or up to steps_per_read, for every unfinished sequence of `prefill`.

        returns: the sequences that got one. Finished ones have left the cache at the next step.
        """
        return self._engine.step() if self._engine else []

    def release(self, sequence: TokenSequence) -> Generation:
        """Frees the slot of a sequence, finished or not.

        returns: what was drawn for it.
        """
        if self._engine:
            self._engine.release(sequence)
        sequence.released = True
        return sequence.result()

    @property
    def free_slots(self) -> int:
        """How many sequences `prefill` can take now."""
        return self._engine.free if self._engine else self.max_batch_size

    def _sequences(
        self,
        method: str,
        prompts: Sequence[Prompt],
        sequence_ids: Sequence[int] | None,
        options: GivenOptions,
        first_id: int = 0,
    ) -> list[TokenSequence]:
        """The prompts of a request, all of it checked."""
        listed = "one text (write [prompt])"
        check(not isinstance(prompts, str), "prompts", "a list of prompts", listed)
        check(isinstance(prompts, Iterable), "prompts", "a list of prompts", repr(prompts))
        prompts = list(prompts)
        listed = sequence_ids is None or isinstance(sequence_ids, Iterable)
        check(listed, "sequence_ids", "a list of numbers", repr(sequence_ids))
        count_on = ((first_id + index) % 2**31 for index in range(len(prompts)))
        names = list(count_on if sequence_ids is None else sequence_ids)
        fits = f"one for each of {len(prompts)} prompts"
        check(len(names) == len(prompts), "sequence_ids", fits, len(names))
        settings, config = GenerationOptions.of_call(method, options), self.model.config
        self._check_sampling(settings.sampling())
        sequences = [
            TokenSequence(prompt, name, settings, config, self.tokenizer)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        limit, size = config.max_position_embeddings, config.patch_size
        for index, sequence in enumerate(sequences):
            check(
                sequence.num_patches <= limit,
                f"prompts[{index}]",
                f"at most max_position_embeddings = {limit} patches of {size} tokens in all",
                f"{sequence.num_patches} with the new ones: shorten the prompt or lower "
                f"max_new_tokens",
            )
        return sequences

    @torch.no_grad()
    def _check_sampling(self, sampling: Sampling) -> None:
        """Draws for no context at all: whoever uses the settings says what is wrong with them."""
        weight = self.model.transformer.norm.weight
        rows = torch.empty(0, dtype=torch.int64, device=weight.device)
        sample_patches(
            self.model, weight.new_empty(0, len(weight)), rows=rows, **sampling._asdict()
        )

    def _new_engine(self, max_batch_size: int, max_patches: int) -> Engine:
        return Engine(
            self.model,
            max_batch_size=max_batch_size,
            max_patches=max_patches,
            prefill_chunk=self.prefill_chunk,
            batch_invariant=self.batch_invariant,
            steps_per_read=self.steps_per_read,
        )

    def _borrow_engine(self, sequences: Sequence[TokenSequence]) -> Engine:
        """An engine with room for these sequences, of which some may wait.

        Sizes are rounded up where an engine may serve again: its steps are captured for them.
        """
        slots, patches = len(sequences), max(sequence.num_patches for sequence in sequences)
        if self.steps_per_read > 1:
            slots = 1 << (slots - 1).bit_length()
            patches += -patches % WHOLE_PATCHES
        slots = min(self.max_batch_size, slots)
        patches = min(self.model.config.max_position_embeddings, patches)
        engine, self._idle = self._idle, None
        if engine is None or not engine.fits(slots, patches):
            return self._new_engine(slots, patches)
        engine.reset()
        return engine

    def _give_back(self, engine: Engine) -> None:
        """An engine that was left in the middle of its work is given up."""
        if self.steps_per_read > 1 and not engine.sequences:
            self._idle = engine

    def _run(self, sequences: list[TokenSequence]) -> Iterator[tuple[int, Generation]]:
        if not sequences:
            return
        waiting, running = deque(enumerate(sequences)), []
        engine = self._borrow_engine(sequences)
        while waiting or running:
            entering = [waiting.popleft() for _ in range(min(engine.free, len(waiting)))]
            engine.prefill([sequence for _, sequence in entering])
            running += entering
            engine.step()
            for index, sequence in running:
                if sequence.finished:
                    engine.release(sequence)
                    yield index, sequence.result()
            running = [(index, sequence) for index, sequence in running if not sequence.finished]
        self._give_back(engine)

    def _stream(self, sequence: TokenSequence) -> Iterator[str]:
        engine = self._borrow_engine([sequence])
        engine.prefill([sequence])
        while not sequence.finished:
            engine.step()
            if piece := sequence.unsent():
                yield piece
        engine.release(sequence)
        self._give_back(engine)
        if sequence.error:
            raise GenerationError(sequence.error, [sequence.result()])


def _check_finite(model: Calm) -> None:
    """Of what hidden states do not show, where each step looks for NaN and inf."""
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name.startswith(("generative_head.", "ae_model.decoder.")):
            bounds = torch.stack(weight.detach().aminmax())
            check(bool(bounds.isfinite().all()), "model", "finite weights", f"NaN or inf in {name}")


def _all_errors(errors: Sequence[str]) -> str:
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{errors[0]}{more}"
