"""`calm_rt.patch(model)`: an instance of the official code runs on the ops, until `unpatch`.

Methods become attributes of the one instance (see patched.py), so its class, other instances,
parameters, state dict and checkpoints stay what they are.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Self

import torch
from torch import nn

from calm_rt import official_bugs, official_models, patched, patched_generate
from calm_rt.nn import fold_encoder as fold
from calm_rt.nn import folded_bytes
from calm_rt.official_bugs import ALL_MODELS, BUGS
from calm_rt.official_models import AUTOENCODER, ENERGY, Patch
from calm_rt.ops.check import check
from calm_rt.patched import ATTRIBUTE

# switch: what stands in for the official code
SWITCHES = {
    "autoencoder_loss": "linear_cross_entropy, no [R, V] logits (outputs.logits is None)",
    "encoder_target": "encode, without gradient and outside autocast",
    "energy_score": "energy_score, no [S, M, R, L] differences",
    "head_sampling": "sample_latents, contexts not repeated",
    "temperature_sampling": "tuples and a lazy pool as in Generator, no logits",
    "eval_brier": "all pairs of draws, decoded without logits",
    "generate": "calm_rt.Generator, which refuses lengths beyond max_position_embeddings",
}
# a replica shares the attributes of its model, so methods there would run the model itself
NO_REPLICAS = ("one outside of nn.DataParallel (use DistributedDataParallel)", "nn.DataParallel")


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did; as a context manager it unpatches at the end."""

    name: str  # the class of the model
    replaced: dict[str, str] = field(default_factory=dict)  # switch: what runs now
    kept: dict[str, str] = field(default_factory=dict)  # switch: why the official code stays
    cured: dict[str, str] = field(default_factory=dict)  # official bug: what it was
    not_cured: dict[str, str] = field(default_factory=dict)  # official bug: why it stays
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"calm_rt.patch: {self.name}"]
        for title in ("replaced", "kept", "cured", "not_cured"):
            entries = getattr(self, title)
            lines += [f"  {title.replace('_', ' ')}"] if entries else []
            lines += [f"    {name:20}  {text}" for name, text in entries.items()]
        return "\n".join(lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if _patch_of(_unwrap(self.model)) is not None:
            unpatch(self.model)


def patch(
    model: nn.Module,
    *,
    autoencoder_loss: bool = True,
    encoder_target: bool = True,
    energy_score: bool = True,
    head_sampling: bool = True,
    temperature_sampling: bool = True,
    eval_brier: bool = True,
    generate: bool = True,
    fold_encoder: bool = False,
    keep_bugs: Collection[str] = (),
) -> PatchReport:
    """Lets an instance of the official code run on the ops.

    model: of the official Autoencoder, EnergyTransformer, DiffusionTransformer or FlowTransformer
        or of a fork with other names and the same parts, also inside DistributedDataParallel,
        torch.compile or PEFT's adapters. Patch before the optimizer is made and before Trainer,
        DistributedDataParallel or torch.compile get the model, and after submodules are replaced,
        say by adapters: what is replaced later is a ValueError where it would have been used.
    autoencoder_loss, encoder_target, energy_score, head_sampling, temperature_sampling,
        eval_brier, generate: which parts to replace.
    fold_encoder: encode targets by table (see `nn.fold_encoder`: K V H numbers); after moving or
        changing the autoencoder, patch again.
    keep_bugs: names in `official_bugs.BUGS` of official bugs not to cure. Where only the official
        code has a bug, keeping it leaves the switches off that would cure it.
    returns: PatchReport of what was replaced and cured, and what was not and why. In a `with`
        statement it unpatches at the end.
    raises: ValueError for another model, one that is patched already or offloaded, or an unknown
        bug.
    """
    model = _unwrap(model, refused=nn.DataParallel)
    official, kind = official_models.official_class(model)
    check(_patch_of(model) is None, "model", "one that is not patched", "a patched one")
    meta = any(parameter.is_meta for parameter in model.parameters())
    check(not meta, "model", "one with values (not offloaded)", "parameters on the meta device")
    one = isinstance(keep_bugs, str)
    check(not one, "keep_bugs", "a list of names", f"one name (write [{keep_bugs!r}])")
    unknown = sorted(set(keep_bugs) - BUGS.keys())
    check(not unknown, "keep_bugs", f"names among {', '.join(BUGS)}", unknown)
    wanted = {
        "autoencoder_loss": autoencoder_loss,
        "encoder_target": encoder_target,
        "energy_score": energy_score,
        "head_sampling": head_sampling,
        "temperature_sampling": temperature_sampling,
        "eval_brier": eval_brier,
        "generate": generate,
    }
    state = Patch(official, kind, keep_bugs=frozenset(keep_bugs))
    renamed = "" if official.__name__ == kind else f", by its parts {kind}"
    report = PatchReport(f"{type(model).__name__}{renamed}", model=model)
    kept = {name: "switched off" for name, on in wanted.items() if not on}
    kept |= _impossible(model, state, [name for name, on in wanted.items() if on])
    state.switches = {name for name in SWITCHES if name not in kept}
    try:
        _replace(model, state, report, kept, fold_encoder)
    except BaseException:  # out of memory or interrupted while it folds: nobody has a report
        _undo(state)
        raise
    return report


def _replace(
    model: nn.Module, state: Patch, report: PatchReport, kept: dict[str, str], fold_encoder: bool
) -> None:
    """Changes the model, and fills the report."""
    kind = state.kind
    _cure(model, state, report)
    _install(model, state, kept)
    report.kept.update((name, kept[name]) for name in SWITCHES if name in kept)
    report.replaced.update((n, text) for n, text in SWITCHES.items() if n in state.switches)
    if kind not in (AUTOENCODER, ENERGY):
        drawing = f"; the official {type(model.generative_head).__name__} draws"
        for name in ("temperature_sampling", "eval_brier", "generate"):
            if name in report.replaced:
                report.replaced[name] += drawing
    if fold_encoder:
        _fold(model, state, report)
    cured, not_cured = official_bugs.name_cures(model, kind, state.keep_bugs, state.switches)
    report.cured.update(cured)
    report.not_cured.update(not_cured)


def unpatch(model: nn.Module) -> None:
    """Gives a patched model the methods of its class back.

    A method that somebody wrapped in the meantime stays wrapped, and leads to the official one.
    An embedding that patching tied stays tied: the parameter that it had before has not followed
    training, loading or a change of type since.
    raises: ValueError for a model that is not patched.
    """
    model = _unwrap(model)
    state = _patch_of(model)
    check(state is not None, "model", "a patched one", type(model).__name__)
    _undo(state)


def _undo(state: Patch) -> None:
    for module, name, value in reversed(state.installed):
        if module.__dict__.get(name) is value:
            delattr(module, name)
    for undo in reversed(state.undo):
        undo()


def _unwrap(model: nn.Module, refused: type | tuple = ()) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and an adapter of PEFT."""
    while True:
        check(not isinstance(model, refused), "model", *NO_REPLICAS)
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(type(model), "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def _patch_of(model: nn.Module) -> Patch | None:
    return getattr(model, "__dict__", {}).get(ATTRIBUTE)


def _impossible(model: nn.Module, state: Patch, wanted: list[str]) -> dict[str, str]:
    """Makes the views of the model, and says which switches cannot be on: switch: why."""
    kind = state.kind
    of_models = f"only in {', '.join(ALL_MODELS)}"
    reasons: dict[str, str] = {}
    for name in wanted:
        if (name == "autoencoder_loss") != (kind == AUTOENCODER):
            reasons[name] = of_models if kind == AUTOENCODER else f"only in {AUTOENCODER}"
    if kind not in (AUTOENCODER, ENERGY):
        no_energy = f"{kind} has no energy head"
        reasons |= {name: no_energy for name in ("energy_score", "head_sampling")}
    elif reason := None if kind == AUTOENCODER else _no_score(model):
        reasons.setdefault("energy_score", reason)
    path = "" if kind == AUTOENCODER else "ae_model"
    views: dict[str, Callable[[], object]] = {
        "autoencoder": lambda: official_models.view_of_autoencoder(model, path)
    }
    if kind == ENERGY:
        views["head"] = lambda: official_models.view_of_head(model)
    if kind in ALL_MODELS:
        views["model"] = lambda: official_models.view_of_model(model, own_head=kind == ENERGY)
    failures = {}
    for name, make in views.items():
        try:
            setattr(state, name, make())
        except (ValueError, AttributeError) as error:
            failures[name] = str(error)
    try:
        state.output = official_models.output_class(state.official, state.kind)
    except ValueError as error:
        failures["output"] = str(error)
    needs = {
        "autoencoder_loss": ("autoencoder", "output"),
        "encoder_target": ("autoencoder", "output"),
        "head_sampling": ("head", "output"),
        "temperature_sampling": ("autoencoder", "model"),
        "eval_brier": ("autoencoder", "output"),
        "generate": ("model",),
    }
    if kind in ALL_MODELS and model.patch_size < patched.ORDERS:
        needs["eval_brier"] = ("model", "output")  # draws are continued
    for name in wanted:
        failed = [failures[view] for view in needs.get(name, ()) if view in failures]
        if failed:
            reasons.setdefault(name, failed[0])
    for name, reason in official_bugs.switches_off(model, kind, state.keep_bugs).items():
        if name in wanted:
            reasons.setdefault(name, reason)
    return reasons


def _no_score(model: nn.Module) -> str | None:
    """Why the energy score of these settings has no op."""
    beta, count = getattr(model, "beta", None), getattr(model, "num_samples", 2)
    if not (isinstance(beta, int | float) and 0 < beta <= 2):
        return f"model.beta: expected an exponent in (0, 2], got {beta}"
    return None if count >= 2 else f"model.num_samples: expected at least 2, got {count}"


def _autoencoder(model: nn.Module, kind: str) -> nn.Module:
    return model if kind == AUTOENCODER else model.ae_model


def _install(model: nn.Module, state: Patch, kept: dict[str, str]) -> None:
    """Binds the methods that the switches ask for; a method that is not official stays, see kept.

    A switch that cannot be on leaves state.switches for kept.
    """
    small = getattr(model, "patch_size", 0) < patched.ORDERS
    head = getattr(model, "generative_head", None)
    methods = [
        ("autoencoder_loss", model, "forward", patched.autoencoder_forward),
        ("encoder_target", model, "forward", patched.model_forward),
        ("head_sampling", model, "forward", patched.model_forward),
        ("head_sampling", head, "sample", patched.head_sample),
        ("energy_score", model, "energy_score", patched.energy_score),
        ("temperature_sampling", model, "temperature_sampling", patched.temperature_sampling),
        ("generate", model, "generate", patched_generate.generate),
    ]
    eval_brier = ("forward", patched.model_forward) if small else ("eval_brier", patched.eval_brier)
    methods.append(("eval_brier", model, *eval_brier))
    officials = {model: state.official}
    if state.kind == ENERGY:
        officials[head] = official_models.head_class(model, state.official)
    for switch, module, name, _ in methods:
        if switch in state.switches and (reason := _foreign(module, name, officials[module])):
            kept[switch] = reason
            state.switches.discard(switch)
    called = {
        "energy_score": [(model, "distance")],
        "temperature_sampling": [(head, "sample")],
        "generate": [(model, "temperature_sampling"), (head, "sample")],
        "eval_brier": [(model, "eval_brier"), (head, "sample")] if small else [],
    }
    for switch, calls in called.items():
        for module, name in calls:
            if switch not in state.switches or module not in officials:
                continue  # other heads than the energy head draw by themselves
            if reason := _foreign(module, name, officials[module]):
                kept[switch] = f"{switch} would pass over a method: {reason}"
                state.switches.discard(switch)
    for switch, module, name, function in methods:
        if switch in state.switches and name not in module.__dict__:
            _set(state, module, name, MethodType(function, module))
            if ATTRIBUTE not in module.__dict__:
                _set(state, module, ATTRIBUTE, state)
    if ATTRIBUTE not in model.__dict__:
        _set(state, model, ATTRIBUTE, state)
    _set(state, model, "_replicate_for_data_parallel", MethodType(_refuse_replicas, model))


def _refuse_replicas(self: nn.Module) -> None:
    """In place of a method that `nn.DataParallel` calls on its devices' behalf."""
    check(False, "model", *NO_REPLICAS)


def _foreign(module: nn.Module, name: str, official: type | None) -> str | None:
    """Why a method is not the official one; None where it is.

    official: the class that has that one, None for none.
    """
    if name in module.__dict__:
        return f"{name} is replaced on this instance already; patch before others wrap it"
    if official is None:
        return f"{type(module).__name__} has its own {name}"
    for cls in type(module).__mro__:
        if name in cls.__dict__ and cls is not official and issubclass(cls, official):
            return f"{cls.__name__} has its own {name}"
        if cls is official:
            return None
    return None


def _set(state: Patch, module: nn.Module, name: str, value: Any) -> None:
    setattr(module, name, value)
    state.installed.append((module, name, value))


def _cure(model: nn.Module, state: Patch, report: PatchReport) -> None:
    """Cures the bugs that need no switch."""
    kind = state.kind
    cures = {
        "tied_embedding": _tie,
        "missing_num_samples": _give_num_samples,
        "loss_kwargs": _refuse_loss_kwargs,
    }
    for name, cure in cures.items():
        if not BUGS[name].is_in(model, kind):
            continue
        if name in state.keep_bugs:
            report.not_cured[name] = "in keep_bugs"
            continue
        done, reason = cure(model, state)
        if done:
            report.cured[name] = BUGS[name].cure
        elif reason:
            report.not_cured[name] = reason


def _tie(model: nn.Module, state: Patch) -> tuple[bool, str | None]:
    """Whether something was cured, or why not."""
    autoencoder = _autoencoder(model, state.kind)
    embedding, decoder = autoencoder.encoder.embed_tokens.weight, autoencoder.decoder
    head = decoder.lm_head_weight
    if head is embedding:
        return False, None
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        reason = "embedding and output projection differ: one was not loaded"
        return False, f"{reason} (calm_rt.load reads every layout)"
    decoder.lm_head_weight = embedding  # for good, see unpatch
    return True, None


def _give_num_samples(model: nn.Module, state: Patch) -> tuple[bool, str | None]:
    missing = not hasattr(model, "num_samples")
    if missing:
        _set(state, model, "num_samples", model.config.num_samples)
    return missing, None


def _refuse_loss_kwargs(model: nn.Module, state: Patch) -> tuple[bool, str | None]:
    """Trainer takes **kwargs of a forward for a division by num_items_in_batch."""
    if hasattr(model, "accepts_loss_kwargs"):
        return False, None  # somebody knows better
    if reason := _foreign(model, "forward", state.official):
        return False, reason
    _set(state, model, "accepts_loss_kwargs", False)
    return True, None


def _fold(model: nn.Module, state: Patch, report: PatchReport) -> None:
    if "encoder_target" not in state.switches:
        report.kept["fold_encoder"] = "encoder_target is not replaced"
        return
    view = state.autoencoder
    try:
        fold(view)
    except ValueError as error:
        report.kept["fold_encoder"] = str(error)
        return
    encoder = model.ae_model.encoder
    hook = encoder.register_load_state_dict_post_hook(state.drop_tables)
    state.undo.append(hook.remove)
    report.replaced["fold_encoder"] = f"tables of {folded_bytes(view):,} bytes"
