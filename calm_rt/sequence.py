"""One prompt and what is drawn for it: ends (EOS, stop texts, max_new_tokens), text, statistics.

The engine (engine.py) draws patches; here they become tokens and text. Nothing here knows a batch.
"""

import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import NamedTuple, Required, Self, TypedDict

from calm_rt.data import TextStream, Tokenizer
from calm_rt.nn import CalmConfig
from calm_rt.ops.check import check, check_int, check_seed
from calm_rt.sampling import MAX_DRAWS, parse_temperature

PROMPTS = ("align", "constrain")
# Tokens of a prompt that its continuation is decoded behind: a character has four bytes at most,
# and some text in these means that the space before a text's first word has been.
DECODED_BEFORE = 32


class Sampling(NamedTuple):
    """The settings that `sample_patches` takes; sequences that share them are drawn together."""

    temperature: float | Fraction | str
    num_candidates: int
    method: str
    max_draws: int
    on_budget: str
    seed: int


class GivenOptions(TypedDict, total=False):
    """GenerationOptions as keyword arguments of a call."""

    max_new_tokens: Required[int]
    temperature: float | Fraction | str
    num_candidates: int
    method: str
    max_draws: int
    on_budget: str
    seed: int
    stop: Sequence[str | Sequence[int]]
    prompt: str


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How prompts are continued; `Generator.generate` explains each."""

    max_new_tokens: int
    temperature: float | Fraction | str = 1
    num_candidates: int = 200
    method: str = "pool"
    max_draws: int = MAX_DRAWS
    on_budget: str = "raise"
    seed: int = 0
    stop: Sequence[str | Sequence[int]] = ()
    prompt: str = "align"

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 0), ("num_candidates", 1), ("max_draws", 1)):
            object.__setattr__(self, name, check_int(name, getattr(self, name), least))
        object.__setattr__(self, "seed", check_seed(self.seed))
        temperature = parse_temperature(self.temperature, self.method)
        object.__setattr__(self, "temperature", temperature)
        stop, expected = self.stop, "a list of texts or lists of token ids"
        check(not isinstance(stop, str), "stop", expected, f"one text (write [{stop!r}])")
        check(isinstance(stop, Iterable), "stop", expected, repr(stop))
        stop = list(stop)
        listed = all(isinstance(one, Iterable) and not isinstance(one, bytes) for one in stop)
        check(listed, "stop", expected, repr(stop))
        stop = [s if isinstance(s, str) else [check_int("stop", i, 0) for i in s] for s in stop]
        check(all(stop), "stop", "texts and lists that are not empty", stop)
        for text in (one for one in stop if isinstance(one, str)):
            _check_text("stop", text)
        object.__setattr__(self, "stop", stop)
        check(self.prompt in PROMPTS, "prompt", f"one of {', '.join(PROMPTS)}", self.prompt)

    @classmethod
    def of_call(cls, method: str, given: GivenOptions) -> Self:
        """raises: TypeError for names that the method does not have, or without max_new_tokens."""
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                known = f"the options are {', '.join(names)}"
                raise TypeError(f"{method}() got an unexpected option {name!r}; {known}")
        if "max_new_tokens" not in given:
            raise TypeError(f"{method}() needs the option 'max_new_tokens'")
        return cls(**given)

    def sampling(self) -> Sampling:
        return Sampling(*(getattr(self, name) for name in Sampling._fields))


@dataclass(frozen=True)
class Generation:
    """What one prompt was continued with."""

    text: str | None  # what follows the prompt, without EOS and stop, in whole characters; None
    # without a tokenizer
    ids: list[int]  # the new tokens, a drawn EOS included; at most max_new_tokens
    finished: bool  # True after EOS or a stop, False where max_new_tokens or an error ended it
    steps: int  # patches drawn for this sequence
    seconds: float  # from the first look at its prompt to its last patch
    draws: int  # vectors that the head drew for it
    decoded_share: float  # tokens decoded for it, of those that the algorithm decodes as written:
    # num_candidates x K a pool; every draw's K where there is none, or known tokens were looked for
    exact: bool  # whether every patch has exactly the distribution asked for
    constrained: bool  # False where no draw began with the prompt's left-over tokens, so that they
    # were put over another patch
    acceptance: float | None  # of algorithm 1, patches found / trials; None without a trial
    calls: int  # of the sampler by algorithm 1, as the paper's theorem 2 counts them
    spared: int  # those of them that took no draw, e.g. as stage one ends at a first difference
    error: str | None = None  # why it ended early; what was drawn before is here


class GenerationError(ValueError):
    """Some sequences could not go on; all others were finished.

    generations: of all prompts, in order; those with an `error` ended early.
    """

    def __init__(self, message: str, generations: Sequence[Generation]) -> None:
        super().__init__(message)
        self.generations = list(generations)

    def __reduce__(self) -> tuple:
        """As a worker process sends it."""
        return type(self), (str(self), self.generations)


class TokenSequence:
    """One prompt, and what has been drawn for it."""

    def __init__(
        self,
        prompt: str | Sequence[int],
        name: int,
        options: GenerationOptions,
        config: CalmConfig,
        tokenizer: Tokenizer | None,
    ) -> None:
        """name: the sequence id, on which the random numbers depend.

        raises: ValueError for a prompt, id or option that does not fit the model.
        """
        name = check_int("sequence_ids", name, 0, 2**31 - 1)
        texts = [stop for stop in options.stop if isinstance(stop, str)]
        check(not texts or tokenizer is not None, "stop", "a tokenizer to look for texts", None)
        ids = _token_ids(prompt, config, tokenizer)
        self.name = name
        self.options = options
        self.sampling = options.sampling()
        self.context, self.left_over = _split_prompt(ids, options.prompt, config)
        self.room = options.max_new_tokens  # tokens that may still be drawn
        self.steps = 0
        self.unread = False  # whether the last patch is still to go through the backbone
        self.sure_share = 0.0  # of its last steps, what tuples decided; the engine's to keep
        self.error: str | None = None
        self.released = False  # from the loop of somebody else, who wants no more of it
        self.last_patch = self.context[-config.patch_size :]
        self._patch_size, self._eos_id = config.patch_size, config.eos_token_id
        self._stop_texts = texts
        self._stop_ids = [stop for stop in options.stop if not isinstance(stop, str)]
        most = max((max(stop) for stop in self._stop_ids), default=0)
        check(most < config.vocab_size, "stop", f"token ids in [0, {config.vocab_size})", most)
        self._decoder = _decoder_behind(ids, tokenizer) if tokenizer else None
        self._num_texts = tokenizer.vocab_size if tokenizer else 0  # ids beyond them have no text
        self._ids: list[int] = []
        self._text = ""  # decoded so far, in whole characters
        self._lengths: list[int] = []  # of the text before each token
        self._sent = 0  # characters of it already streamed
        self._ended = False  # by EOS or a stop
        self._start, self._seconds = 0.0, 0.0
        self._draws, self._slots, self._full, self._exact = 0, 0, 0, True
        pools = self.sampling.method == "pool" and self.sampling.temperature != 1
        self._pool = self.sampling.num_candidates if pools else None  # draws of a free patch
        self._matched = True
        self._accepted, self._trials, self._calls, self._spared = 0, 0, 0, 0

    @property
    def finished(self) -> bool:
        """Whether nothing more is drawn for it."""
        return self._ended or self.room == 0 or self.error is not None

    @property
    def num_patches(self) -> int:
        """Patches of prompt and continuation together, at most."""
        tokens = len(self.context) + len(self.left_over) + self.options.max_new_tokens
        return -(-tokens // self._patch_size)

    @property
    def num_drawn_patches(self) -> int:
        """Patches of what the backbone reads of the prompt, and of all that was drawn behind it."""
        return len(self.context) // self._patch_size + self.steps

    @property
    def known(self) -> list[int]:
        """The first tokens of the next patch, as far as the prompt has them."""
        return [] if self.steps else self.left_over

    def start(self) -> None:
        """The clock of this sequence starts."""
        self._start = time.perf_counter()

    def extend(
        self,
        patch: list[int],
        draws: int,
        slots: int,
        exact: bool,
        matched: bool = True,
        trials: int = 0,
        calls: int = 0,
        spared: int = 0,
    ) -> None:
        """Appends the tokens of a drawn patch up to EOS, a stop or max_new_tokens.

        patch: [K], beginning with the known tokens.  Others: see `PatchSample`.
        """
        self.error = "an exception came while its last patch was taken"  # until it is whole
        known = len(self.known)
        self.steps, self.last_patch, self.unread = self.steps + 1, patch, True
        self._count(draws, slots, trials, calls, spared, None if known else self._pool)
        self._exact = self._exact and exact
        self._matched = self._matched and matched
        self._accepted += exact and trials > 0
        for token in patch[known : known + self.room]:
            self._ids.append(token)
            self._lengths.append(len(self._text))
            self.room -= 1
            self._ended = token == self._eos_id
            if self._decoder and token < self._num_texts and not self._ended:
                self._append_text(self._decoder.step(token))
            for stop in self._stop_ids:
                if self._ids[-len(stop) :] == stop:
                    self._text, self._ended = self._text[: self._lengths[-len(stop)]], True
            if self._ended:
                break
        self._seconds, self.error = time.perf_counter() - self._start, None

    def fail(
        self,
        reason: str,
        draws: int = 0,
        slots: int = 0,
        trials: int = 0,
        calls: int = 0,
        spared: int = 0,
    ) -> None:
        """Ends the sequence before its next step, on which so much was spent."""
        self.error = f"sequence {self.name}, step {self.steps}: {reason}"
        self._count(draws, slots, trials, calls, spared)

    def unsent(self) -> str:
        """The text that is new and certain; what may begin a stop waits for the next patch."""
        end = len(self._text)
        if not self.finished and not self.released:
            ends = [_start_of_partial(self._text, text) for text in self._stop_texts]
            lengths = [*self._lengths, end]
            ends += [lengths[_start_of_partial(self._ids, ids)] for ids in self._stop_ids]
            end = min([end, *ends])
        piece, self._sent = self._text[self._sent : end], max(end, self._sent)
        return piece

    def result(self) -> Generation:
        """What has been drawn so far."""
        return Generation(
            text=self._text if self._decoder else None,
            ids=list(self._ids),
            finished=self._ended,
            steps=self.steps,
            seconds=self._seconds,
            draws=self._draws,
            decoded_share=self._slots / max(1, self._full),
            exact=self._exact,
            constrained=self._matched,
            acceptance=self._accepted / self._trials if self._trials else None,
            calls=self._calls,
            spared=self._spared,
            error=self.error,
        )

    def _count(
        self,
        draws: int,
        slots: int,
        trials: int,
        calls: int,
        spared: int,
        pool: int | None = None,
    ) -> None:
        self._draws, self._slots = self._draws + draws, self._slots + slots
        self._full += (draws if pool is None else pool) * self._patch_size
        self._trials, self._calls = self._trials + trials, self._calls + calls
        self._spared += spared

    def _append_text(self, piece: str) -> None:
        longest = max(map(len, self._stop_texts), default=1)
        searched = max(0, len(self._text) - longest + 1)
        self._text += piece
        ends = [at for text in self._stop_texts if (at := self._text.find(text, searched)) >= 0]
        if ends:
            self._text, self._ended = self._text[: min(ends)], True


def start_id(config: CalmConfig) -> int | None:
    """The token before a text: BOS, or EOS where the model has none."""
    return config.eos_token_id if config.bos_token_id is None else config.bos_token_id


def _check_text(name: str, text: str) -> None:
    """Raises ValueError for halves of characters: bytes of the command line that are no UTF-8, half
    a pair in JSON."""
    halves = any("\ud800" <= character <= "\udfff" for character in text)
    check(not halves, name, "text of whole characters", ascii(text[:80]))


def _token_ids(
    prompt: str | Sequence[int], config: CalmConfig, tokenizer: Tokenizer | None
) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            check(False, "prompts", "token ids, for there is no tokenizer", "a text")
        _check_text("prompts", prompt)
        prompt = tokenizer.encode(prompt)
    expected = "texts or lists of token ids"
    listed = isinstance(prompt, Iterable) and not isinstance(prompt, bytes)
    listed = listed and getattr(prompt, "ndim", 1) == 1
    check(listed, "prompts", expected, f"{prompt!r} for one of them")
    ids = []
    for token in prompt:
        try:
            ids.append(operator.index(token))
        except TypeError:
            ids.append(-1)
        good = 0 <= ids[-1] < config.vocab_size
        check(good, "prompts", f"token ids in [0, {config.vocab_size})", repr(token))
    return ids


def _decoder_behind(ids: list[int], tokenizer: Tokenizer) -> TextStream:
    """A decoder of what follows a prompt, whose own text it has given already."""
    decoder = tokenizer.stream()
    for token in ids[-DECODED_BEFORE:]:
        if token < tokenizer.vocab_size:
            decoder.step(token)
    return decoder


def _split_prompt(ids: list[int], mode: str, config: CalmConfig) -> tuple[list[int], list[int]]:
    """What the backbone reads, in whole patches, and the tokens that begin the first new patch.

    align: start tokens fill the first patch at the left. constrain: the text begins with a patch,
    and what its end leaves over is known of the first new one. Without any whole patch, one of
    start tokens is read.
    """
    size, start = config.patch_size, start_id(config)
    left = len(ids) % size if mode == "constrain" else 0
    context, left_over = ids[: len(ids) - left], ids[len(ids) - left :]
    missing = -len(context) % size if context else size
    check(
        not missing or start is not None,
        "prompts",
        f"whole patches of {size} tokens, as there is no BOS or EOS to fill one",
        f"{len(ids)} tokens",
    )
    return [start] * missing + context, left_over


def _start_of_partial(text: str | Sequence[int], stop: str | Sequence[int]) -> int:
    """Where the longest end of `text` that is a beginning of `stop` starts."""
    for start in range(max(0, len(text) - len(stop) + 1), len(text)):
        if text[start:] == stop[: len(text) - start]:
            return start
    return len(text)
