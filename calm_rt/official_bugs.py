"""Known bugs of the official code: which of them patching cures, and what keeps each as it is."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from calm_rt.brier import ORDERS
from calm_rt.official_models import ENERGY, KINDS

ALL_MODELS = KINDS[1:]
CONTINUED = "eval_brier for K < 4"  # which also stands in for forward, and draws by itself


class Bug(NamedTuple):
    """An official bug that patching cures."""

    cure: str
    switches: tuple[str, ...] = ()  # any of which brings the cure; none: it needs no switch
    kinds: tuple[str, ...] = ALL_MODELS  # of models that have it
    official: tuple[str, ...] = ()  # switches that are off where it is kept: only that code has it
    when: Callable[[Any], bool] = lambda model: True  # which of these models have it

    def is_in(self, model: Any, kind: str) -> bool:
        return kind in self.kinds and self.when(model)


def _is_small(model: Any) -> bool:
    return model.patch_size < ORDERS


# name: as in keep_bugs
BUGS = {
    "tied_embedding": Bug("embedding and output projection were two parameters; tied", kinds=KINDS),
    "missing_num_samples": Bug(
        "num_samples was never set; taken from the configuration",
        kinds=tuple(kind for kind in ALL_MODELS if kind != ENERGY),
    ),
    "loss_kwargs": Bug(
        "Trainer left the loss undivided by its accumulation steps; accepts_loss_kwargs is False",
        kinds=KINDS,
    ),
    "bf16_embeddings": Bug(
        "train() made the encoder round its embeddings to bfloat16",
        ("autoencoder_loss", "encoder_target"),
        kinds=KINDS,
        official=("encoder_target",),  # in an Autoencoder the official encoder runs in our loss
    ),
    "label_masks": Bug(
        "labels of -100 inside a patch shifted all later targets; such a patch is no target",
        ("encoder_target", "head_sampling", CONTINUED),
    ),
    "nan_gradients": Bug(
        "beta < 1 gave NaN gradients", ("energy_score",), (ENERGY,), official=("energy_score",)
    ),
    "noise_levels": Bug(
        "in bfloat16 the head's noise had 384 levels; drawn in float32 and rounded, 3,000",
        ("head_sampling", "temperature_sampling", CONTINUED, "generate"),
        (ENERGY,),
        official=("head_sampling", "temperature_sampling", CONTINUED, "generate"),
    ),
    "one_pair_of_draws": Bug(
        "only 1 pair of all draws was scored",
        ("eval_brier",),
        when=lambda model: _is_small(model) or hasattr(model, "energy_score"),
    ),
    "last_start": Bug("the last start of every row was not scored", (CONTINUED,), when=_is_small),
    "tuple_cache": Bug(
        "evaluation took the key-value cache for tuples, which in newer transformers it is not",
        (CONTINUED,),
        official=(CONTINUED,),
        when=_is_small,
    ),
    "python_random": Bug(
        "Python's random chose, unseeded by torch; torch's generator seeds all",
        ("temperature_sampling", "generate"),
    ),
    "strict_temperature": Bug(
        "1/T had to be whole to nine digits, and T = 0 was refused; rounded, and 0 is the mode",
        ("temperature_sampling", "generate"),
    ),
    "prompt_padding": Bug(
        "prompts were filled with pad ids at their end, and all pad ids deleted from the result; "
        "BOS fills their beginning, and pad ids are stripped at their ends",
        ("generate",),
    ),
    "overshot_length": Bug(
        "max_length was passed by up to K - 1 tokens, and by a patch at least", ("generate",)
    ),
    "tokens_after_eos": Bug(
        "tokens that a patch has behind EOS stayed; EOS is the last",
        ("generate",),
        official=("generate",),
    ),
    "missing_pad_id": Bug(
        "without a pad id generate raised a TypeError; EOS fills up",
        ("generate",),
        official=("generate",),
        when=lambda model: model.padding_idx is None,
    ),
}
# what no patch of an instance can reach
NOT_CURED = {"DiffusionTransformer": {"diffusion_device": "the sampling loop itself calls .cuda()"}}


def switches_off(model: Any, kind: str, keep_bugs: Collection[str]) -> dict[str, str]:
    """The switches that keep_bugs leave off, where the official code has to run: switch: why."""
    reasons = {}
    for name in BUGS:
        if name in keep_bugs and BUGS[name].is_in(model, kind):
            for switch in _known(BUGS[name].official, model, kind):
                reasons.setdefault(switch, f"keep_bugs has {name}")
    return reasons


def name_cures(
    model: Any, kind: str, keep_bugs: Collection[str], on: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """What is cured, and what is not and why, of the bugs whose cure comes with switches.

    on: the switches that are on.
    """
    cured, not_cured = {}, dict(NOT_CURED.get(kind, {}))
    for name, bug in BUGS.items():
        if not bug.switches or not bug.is_in(model, kind):
            continue
        if name in keep_bugs:
            kept = " and ".join(_known(bug.official, model, kind))
            not_cured[name] = f"in keep_bugs; {kept} off" if kept else "in keep_bugs"
        elif set(_known(bug.switches, model, kind)) & set(on):
            cured[name] = bug.cure
        else:
            not_cured[name] = f"needs {' or '.join(_known(bug.switches, model, kind))}"
    return cured, not_cured


def _known(switches: tuple[str, ...], model: Any, kind: str) -> list[str]:
    """The switches that count for a model."""
    small = kind in ALL_MODELS and _is_small(model)
    known = ["eval_brier" if s == CONTINUED else s for s in switches if small or s != CONTINUED]
    return [name for name in known if (name == "autoencoder_loss") == (kind not in ALL_MODELS)]
