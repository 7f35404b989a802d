"""What a model costs at given sizes, without a run: memory, arithmetic, and a time from a rate.

Memory that torch holds is counted on fake tensors, which have shapes and no data: the code itself
runs, so no second description of it can grow wrong. What kernels hold for themselves is added by
formula, and so is what a library compiles for itself: of 16-bit types on a CPU, code for every new
shape of a product, whatever its size, which stays. How many shapes pools take depends on how many
candidates each pass leaves, which is taken to vary as heads of so many tosses of a coin do, and on
the few numbers of rows that those are rounded up to (`decode.spare_rows`).
Arithmetic is that of the matrix products (costs.py for the ops, torch's own counter for the
backbone); at small batches reading the weights takes longer than the arithmetic does.
"""

import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from calm_rt import benchmark, costs
from calm_rt.draws import Draws
from calm_rt.engine import PREFILL_CHUNK
from calm_rt.losses import energy_loss
from calm_rt.nn import AutoencoderConfig, Calm, CalmConfig, KVCache, fold_encoder
from calm_rt.ops.check import check, check_int
from calm_rt.ops.decode import spare_rows
from calm_rt.sampling import contexts_at_once, decodes_whole
from calm_rt.training_state import build_optimizer

RATE_SIZE = 1024  # of the square product that measures a machine's rate
RATE_ROUNDS = 7

# What oneDNN keeps of each shape of a 16-bit product: 490 to 640 kB, whatever its size (64 x 64 to
# 688 x 256, 1 to 464 rows), bfloat16 as float16, on AVX-512 with both, and 330 kB where rows are
# whole sixteens, as those of a lazy pool's later passes are; nothing of float32 and on AVX2; not
# known of other processors. The last 1,024 stay.
KERNEL_BYTES, WHOLE_KERNEL_BYTES, MOST_KERNELS = 570_000, 330_000, 1024
# Shapes inside of ops: a gated MLP's gate and up in two ranges of columns, and its down.
SHAPES = {"mm": 1, "addmm": 1, "gated_mlp": 3, "sample_latents": 8, "decode": 8}
PASS_SHAPES = SHAPES["addmm"] + SHAPES["gated_mlp"]  # of a pass over a slot or several


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the storages that ops make inside, as long as each lives."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.products: dict[object, int] = {}  # shapes of products, by function and operands
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        if name in SHAPES:
            operands = tree_leaves((arguments, keywords))
            shapes = tuple(tuple(leaf.shape) for leaf in operands if isinstance(leaf, Tensor))
            self.products[name, shapes] = SHAPES[name]
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and storage not in self._known:
                self._known[storage] = True
                weakref.finalize(storage, self._free, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return result

    def num_products(self) -> int:
        """How many shapes the library's products had."""
        return sum(self.products.values())

    def _free(self, size: int) -> None:
        self.live -= size


def plan_generation(
    config: CalmConfig,
    autoencoder_config: AutoencoderConfig,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    prompt_tokens: int = 0,
    max_new_tokens: int = 128,
    num_candidates: int = 200,
    prefill_chunk: int = PREFILL_CHUNK,
) -> dict[str, Any]:
    """Memory and arithmetic of generation on the CPU.

    batch_size: sequences at once.  num_candidates: draws of a step, 1 at temperature 1.
    returns: parameters, and bytes: parameter_bytes, screen_bytes (of the rounded vocabulary),
        cache_bytes, activation_bytes (of the largest forward pass), draw_bytes (of a step's
        draws), kernel_bytes (code of the library for 16-bit products), peak_bytes, and most_bytes,
        the peak where all draws are equal and none can be ruled out early, and where sequences end
        one by one, each number of which the library compiles for; flop of reading all
        prompts, and of a step of the batch: backbone, head and decode, the last for all slots of
        all draws (the lazy pool decodes a share of them).
    raises: ValueError for sizes below 1 or a text longer than the model's longest.
    """
    _check_counts(batch_size=batch_size, num_candidates=num_candidates, prefill_chunk=prefill_chunk)
    prompt_tokens = check_int("prompt_tokens", prompt_tokens, 0)
    max_new_tokens = check_int("max_new_tokens", max_new_tokens, 0)
    size = config.patch_size
    prompt = max(1, -(-prompt_tokens // size))
    patches = prompt - (-max_new_tokens // size)
    limit = config.max_position_embeddings
    check(patches <= limit, "max_new_tokens", f"at most {limit} patches with the prompt", patches)
    with FakeTensorMode(), torch.no_grad(), _default_dtype(dtype), LiveMemory() as memory:
        model = Calm(config, autoencoder_config)
        parameters = memory.live
        cache = KVCache(config, batch_size, patches, dtype)
        screen = autoencoder_config.vocab_size * autoencoder_config.hidden_size  # of one byte each
        held = memory.live
        width = min(prompt, max(1, prefill_chunk // batch_size))
        memory.peak = held
        with FlopCounterMode(display=False) as step:
            model.hidden_states(_ids(batch_size, size), cache)
        of_step = memory.num_products()
        model.hidden_states(_ids(batch_size, width * size), cache)
        activations = memory.peak - held
        of_prompts = memory.num_products() - of_step
        read = _kernel_bytes(memory, dtype)
        draws, most_draws = _draw_memory(model, memory, batch_size, num_candidates)
        of_step = memory.num_products() - of_prompts
        steps = -(-max_new_tokens // size) if most_draws > draws else 0  # that leave some of a pool
        sizes = padded_sizes(batch_size * num_candidates, dtype)
        usual = different_sizes(steps, batch_size * num_candidates, sizes)
        most = min(steps, len(sizes))
        kernels = _kernel_bytes(memory, dtype, usual)
        most_kernels = _kernel_bytes(memory, dtype, most, (batch_size - 1) * of_step)
        with FlopCounterMode(display=False) as prefill:
            model.hidden_states(_ids(1, prompt * size))
        flop = {
            "prompts": batch_size * prefill.get_total_flops(),
            "backbone": step.get_total_flops(),
            **_sampling_flop(model, batch_size, num_candidates),
        }
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "parameter_bytes": parameters,
        "screen_bytes": screen,
        "cache_bytes": held - parameters,
        "activation_bytes": activations,
        "draw_bytes": draws,
        "kernel_bytes": kernels,
        "peak_bytes": held + screen + max(activations + read, draws + kernels),
        "most_bytes": held + screen + max(activations + read, most_draws + most_kernels),
        "flop": flop,
        "flop_per_step": sum(flop.values()) - flop["prompts"],
        "tokens_per_step": batch_size * size,
    }


def plan_training(
    config: CalmConfig,
    autoencoder_config: AutoencoderConfig,
    *,
    batch_size: int = 16,
    block_size: int = 512,
    num_targets: int = 100,
) -> dict[str, Any]:
    """Memory and arithmetic of a float32 training step on one device, the encoder folded.

    batch_size: blocks of block_size tokens, rounded up to whole patches.
    returns: bytes: state_bytes (parameters, tables, gradients, optimizer), activation_bytes (what
        a step needs beyond), peak_bytes; flop_per_step; tokens_per_step.
    raises: ValueError for sizes below 1, or a block_size of less than two patches.
    """
    _check_counts(batch_size=batch_size, num_targets=num_targets, block_size=block_size)
    size = config.patch_size
    check(block_size > size, "block_size", f"more than one patch of {size} tokens", block_size)
    block_size += -block_size % size
    with FakeTensorMode(), LiveMemory() as memory:
        model = Calm(config, autoencoder_config).train()
        fold_encoder(model.ae_model)
        optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 0.1)
        ids = _ids(batch_size, block_size)

        def step() -> None:
            energy_loss(model, ids, num_targets=num_targets)[0].backward()
            optimizer.step()

        step()  # makes gradients and optimizer state, which then stay
        state = memory.live
        memory.peak = memory.live
        step()
        with FlopCounterMode(display=False) as backbone:
            model.hidden_states(ids[:, :-size])
        flop = 3 * backbone.get_total_flops() + _loss_flop(model, ids, num_targets)
    return {
        "state_bytes": state,
        "activation_bytes": memory.peak - state,
        "peak_bytes": memory.peak,
        "flop_per_step": flop,
        "tokens_per_step": batch_size * block_size,
    }


def gemm_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP a second of the library's square product here, the median of a few."""
    matrix = torch.ones(RATE_SIZE, RATE_SIZE, dtype=dtype, device=device)
    calls: dict[str, Callable[[], object]] = {"product": lambda: matrix @ matrix}
    seconds = benchmark.compete(calls, device, RATE_ROUNDS)["product"]
    return 2 * RATE_SIZE**3 / statistics.median(seconds)


def padded_sizes(count: int, dtype: torch.dtype) -> list[int]:
    """The numbers of rows that passes over up to `count` candidates have, rising."""
    like = torch.empty(0, dtype=dtype)
    return sorted({rows + spare_rows(rows, like) for rows in range(1, count + 1)})


def different_sizes(steps: int, tosses: int, sizes: Sequence[int]) -> float:
    """How many to expect of `sizes`, rising, to which the heads of `tosses` coins are rounded up,
    `steps` times."""
    heads = NormalDist(tosses / 2, tosses**0.5 / 2)
    below = [0.0, *(heads.cdf(size + 0.5) for size in sizes)]
    return sum(1 - (1 - to + since) ** steps for since, to in pairwise(below))


def library_compiles(dtype: torch.dtype) -> bool:
    """Whether products of this type are oneDNN's here, on a processor like the one measured."""
    mkldnn = torch.ops.mkldnn
    supported = {
        torch.bfloat16: mkldnn._is_mkldnn_bf16_supported,
        torch.float16: mkldnn._is_mkldnn_fp16_supported,
    }
    measured = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return measured and dtype in supported and supported[dtype]()


def plan_table(report: dict[str, Any]) -> str:
    """A plan as text.

    report: {"gemm_rate": FLOP/s, "generation": of plan_generation, "training": of plan_training}.
    """
    rate, generation, training = (report[name] for name in ("gemm_rate", "generation", "training"))
    lines = [f"parameters {generation['parameters']:,}"]
    for title, part in (("generation", generation), ("training", training)):
        lines += ["", title]
        for name, value in part.items():
            if name.endswith("_bytes"):
                lines.append(f"  {name.removesuffix('_bytes'):12} {value / 1e6:12,.1f} MB")
        for name, value in part.get("flop", {}).items():
            lines.append(f"  {name:12} {value / 1e9:12,.3f} GFLOP")
        seconds = part["flop_per_step"] / rate
        speed = part["tokens_per_step"] / seconds
        lines.append(f"  {'step':12} {part['flop_per_step'] / 1e9:12,.3f} GFLOP")
        lines.append(f"  at {rate / 1e9:,.1f} GFLOP/s: {seconds:.3g} s, {speed:,.0f} tokens/s")
    return "\n".join(lines)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.zeros(rows, tokens, dtype=torch.int64)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        check_int(name, count, 1)


def _kernel_bytes(
    memory: LiveMemory, dtype: torch.dtype, later_passes: float = 0, more: int = 0
) -> int:
    """What the library keeps of the shapes seen so far, of passes with new numbers of rows, and of
    more shapes, but no more than the last MOST_KERNELS."""
    if not library_compiles(dtype):
        return 0
    later = later_passes * PASS_SHAPES
    others = min(memory.num_products() + more, MOST_KERNELS - later)
    return round(others * KERNEL_BYTES + later * WHOLE_KERNEL_BYTES)


def _sampling_flop(model: Calm, batch_size: int, num_candidates: int) -> dict[str, int]:
    hidden = torch.empty(batch_size, model.config.hidden_size)
    latents = torch.empty(batch_size * num_candidates, model.config.latent_size)
    head, decoder = model.generative_head.weights(), model.ae_model.decoder.weights()
    draws = costs.sample_latents(False, hidden=hidden, weights=head, num_samples=num_candidates)
    return {
        "head": draws.flop,
        "decode": costs.decode(False, latents=latents, weights=decoder).flop,
    }


def _draw_memory(
    model: Calm, memory: LiveMemory, batch_size: int, num_candidates: int
) -> tuple[int, int]:
    """What a step's draws hold: as a rule, and at most.

    A pool decodes one slot of all candidates, and then few. At most, where all its candidates are
    equal, it decodes all other slots at once. Small ones are decoded whole.
    """
    held, config = memory.live, model.ae_model.config
    hidden = torch.empty(batch_size, model.config.hidden_size)
    if num_candidates == 1:
        memory.peak = held
        model.ae_model.decode(model.sample(hidden, 1, 0)[0])
        return memory.peak - held, memory.peak - held
    contexts, peaks = min(batch_size, contexts_at_once(model, num_candidates)), []
    draws = Draws(model, hidden[:contexts], torch.tensor(0), torch.arange(contexts))
    if decodes_whole(draws, num_candidates):
        memory.peak = memory.live
        draws.whole_patches(0, num_candidates)
        return memory.peak - held, memory.peak - held
    for slots in (1, config.patch_size - 1):
        memory.peak = memory.live
        states = draws.draw(0, num_candidates).flatten(0, 1)
        every = torch.arange(len(states))
        draws.decode(states, [every] * slots + [every[:0]] * (config.patch_size - slots))
        peaks.append(memory.peak - held)
        del states
    return peaks[0], max(peaks)


def _loss_flop(model: Calm, ids: Tensor, num_targets: int) -> int:
    """Of the energy loss beyond the backbone, with its gradient."""
    config, (rows, tokens) = model.config, ids.shape
    count = rows * (tokens // config.patch_size - 1)
    latents = torch.empty(count, config.latent_size)
    draws = torch.empty(config.num_samples, *latents.shape)
    contexts = torch.empty(count, config.hidden_size)
    head, encoder = model.generative_head.weights(), model.ae_model.encoder.weights()
    options = {"weights": head, "num_samples": config.num_samples}
    scored = {"x": draws, "mean": latents, "log_std": latents, "num_targets": num_targets}
    parts = [
        costs.sample_latents(True, hidden=contexts, **options),
        costs.energy_score(True, **scored),
        costs.encode(False, ids=ids[:, config.patch_size :].reshape(count, -1), weights=encoder),
    ]
    return int(sum(part.flop for part in parts))
