"""Instances of the official classes: recognised by structure, seen as our modules.

Nothing here imports the official code. A view is one of our modules whose parameter dictionaries
are those of the official module, so it follows whatever happens to them (training, .to, loading)
and holds no parameter of its own. It is only made where names and shapes agree with ours one by
one: an adapter or a quantised layer, whose arithmetic is another, does not. Submodules it does not
follow: `current` refuses where one was replaced since.
"""

import copy
import pickle
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calm_rt.checkpoint import ENERGY
from calm_rt.model_folder import HEAD_ALIAS
from calm_rt.nn import Autoencoder, AutoencoderConfig, Calm, CalmConfig, EnergyHead
from calm_rt.nn.backbone import Transformer
from calm_rt.nn.plain import has_hooks
from calm_rt.ops.check import check

AUTOENCODER = "Autoencoder"
KINDS = (AUTOENCODER, ENERGY, "DiffusionTransformer", "FlowTransformer")
OUTPUTS = {AUTOENCODER: "CausalLMOutputWithPast"}  # what forward returns, by kind
OUTPUT = "CustomCausalLMOutput"  # of all others
PARTS = {AUTOENCODER: ("encoder", "decoder", "ae_dropout", "kl_clamp", "kl_weight")}
MODEL_PARTS = ("ae_model", "transformer", "embed_proj", "generative_head")
MODEL_METHODS = ("eval_brier", "temperature_sampling", "generate")
MODULES = ("encoder", "decoder", *MODEL_PARTS)  # the parts that are submodules
LIBRARIES = ("torch.", "transformers.")  # whose classes have a forward that is nobody's
# their forward is what a view computes
STANDARD = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Sequential, nn.SiLU)
UNCALLED = ("ae_model", "generative_head")  # whose forward no view stands in for
HEAD_SIZES = ("hidden_size", "latent_size", "noise_size", "num_mlp_layers")
# fields of a configuration that views do not read: they run in evaluation mode and have no loss
UNREAD = {"attention_dropout": 0.0, "beta": 1.0, "num_samples": 2}
HEAD = "MLPGenerator"  # the official energy head


@dataclass
class Patch:
    """What is replaced in a model, and what stands in for it."""

    official: type  # the class whose methods are replaced
    kind: str  # its official name
    output: type | None = None  # of what forward returns
    autoencoder: Autoencoder | None = None  # views
    head: EnergyHead | None = None
    model: Calm | None = None
    keep_bugs: frozenset[str] = frozenset()
    switches: set[str] = field(default_factory=set)  # what is replaced
    installed: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    undo: list[Any] = field(default_factory=list)  # bound methods, as copies take theirs along

    def __reduce_ex__(self, protocol: int) -> Any:
        # methods of an instance are found by names that its class does not have
        advice = "unpatch the model first, or save its state_dict()"
        raise pickle.PicklingError(f"a patched model cannot be pickled: {advice}")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patch":
        memo[id(self)] = other = object.__new__(type(self))
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def drop_tables(self, *_: Any) -> None:
        """A hook of the official encoder: they belong to the parameters from before loading."""
        self.autoencoder.encoder.tables = None


def official_class(model: nn.Module) -> tuple[type, str]:
    """The class that has an official class's methods, and that one's name in KINDS.

    It is the instance's own or a base of it, known by name or else, in a fork, by its parts.
    raises: ValueError for anything else, naming what is missing.
    """
    names = f"an instance of the official {', '.join(KINDS)}"
    ours = type(model).__module__.startswith("calm_rt.")
    got = f"calm_rt's own {type(model).__name__}, which needs no patch"
    check(isinstance(model, nn.Module), "model", names, type(model).__name__)
    check(not ours, "model", names, got)
    found = next((cls for cls in type(model).__mro__ if cls.__name__ in KINDS), None)
    if found is None and (kind := _kind_by_parts(model)):
        own = [cls for cls in type(model).__mro__ if "forward" in vars(cls)]
        own = [cls for cls in own if not cls.__module__.startswith(LIBRARIES)]
        if own:
            return own[-1], kind  # what is derived from it may have methods of its own
    check(found is not None, "model", names, type(model).__name__)
    for part in ("config", "patch_size", *PARTS.get(found.__name__, MODEL_PARTS)):
        got = f"a {found.__name__} without {part}"
        check(_has(model, part), "model", names, got)
    return found, found.__name__


def head_class(model: nn.Module, official: type) -> type | None:
    """The class of an energy head, or a base of it, whose `sample` is the official one.

    official: the model's. Where it has its official name, one of another name and file is None.
    """
    own = [cls for cls in type(model.generative_head).__mro__ if "sample" in vars(cls)]
    named = [cls for cls in own if cls.__name__ == HEAD]
    if named or not own:
        return named[-1] if named else None
    known = official.__name__ not in KINDS or own[-1].__module__ == official.__module__
    return own[-1] if known else None


def output_class(official: type, kind: str) -> type:
    """The class of what an official forward returns, from the module that defines it.

    raises: ValueError where that module has no such class, by name or by its brier1.
    """
    name, module = OUTPUTS.get(kind, OUTPUT), sys.modules.get(official.__module__)
    found = getattr(module, name, None)
    if found is None and kind not in OUTPUTS:
        classes = (value for value in vars(module).values() if isinstance(value, type))
        with_brier = (c for c in classes if "brier1" in getattr(c, "__dataclass_fields__", ()))
        found = next(with_brier, None)
    check(found is not None, official.__module__, f"a class {name}", "none")
    return found


def view_of_autoencoder(model: nn.Module, path: str) -> Autoencoder:
    """path: of the autoencoder in the model.

    raises: ValueError for sizes or parameters that are not those of our Autoencoder.
    """
    config = AutoencoderConfig.from_dict(_config(model.get_submodule(path)))
    with torch.device("meta"):
        view = Autoencoder(config)
    return _share(view, model, path).eval()


def view_of_head(model: nn.Module) -> EnergyHead:
    """raises: ValueError for sizes or parameters that are not those of our EnergyHead."""
    sizes = {name: value for name, value in _config(model).items() if name in HEAD_SIZES}
    with torch.device("meta"):
        view = EnergyHead(CalmConfig(**sizes, num_attention_heads=1))
    return _share(view, model, "generative_head")


def view_of_model(official: nn.Module, own_head: bool) -> Calm:
    """own_head: whether the head is an EnergyHead; otherwise the official one draws.

    raises: ValueError for sizes or parameters that are not those of our Calm.
    """
    inner = AutoencoderConfig.from_dict(_config(official.ae_model))
    config = CalmConfig.from_dict(_config(official) | UNREAD)
    rotary = getattr(official.transformer, "rotary_emb", None)
    with torch.device("meta"):
        view = Calm(config, inner) if own_head else _HeadedCalm(config, inner)
        if hasattr(rotary, "inv_freq"):
            view.transformer = _Backbone(config)
            view.transformer.rotary = (rotary,)
    if not own_head:
        view.head = (official.generative_head,)
    return _share(view, official, "", () if own_head else ("generative_head.",)).eval()


def current(view: nn.Module) -> nn.Module:
    """The view, to be used now; compiled code does not look at what it shows.

    raises: ValueError where an official submodule is another than when the view was made, or has
        a class, forward or hooks now, which nobody would call.
    """
    if not torch.compiler.is_compiling():
        for modules, name, module, cls, path in view.seen:
            now = modules.get(name)
            same = now is module or getattr(now, "_orig_mod", None) is module  # compiled: the same
            got = f"another {path}, which was replaced since patch; unpatch and patch again"
            check(same, "model", "the submodules that patch saw", got)
            same = type(module) is cls and (path in UNCALLED or "forward" not in vars(module))
            got = f"{path} with another class or forward since patch; unpatch and patch again"
            check(same, "model", "the submodules that patch saw", got)
            got = f"{path} with some, registered since patch; unpatch and patch again"
            some = has_hooks(module) and path not in UNCALLED
            check(not some, "model", "submodules without hooks", got)
    return view


class _Backbone(Transformer):
    """Turns by the official frequencies, which follow the model's type.

    `model.bfloat16()` rounds what transformers keeps for all layers, and training may have used it.
    """

    rotary: tuple[Any, ...] = ()  # inside a tuple, for it is no part of the view

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[..., None, None] * self.rotary[0].inv_freq.to(dtype)
        return angles.cos(), angles.sin()


class _HeadedCalm(Calm):
    """A view whose draws an official head makes, from torch's generators.

    What a call draws depends on its seed, its row ids and their number of draws.
    """

    numbered_draws = False

    def __init__(self, config: CalmConfig, autoencoder_config: AutoencoderConfig):
        super().__init__(config, autoencoder_config)
        del self.generative_head
        self.head: tuple[Any, ...] = ()  # inside a tuple, so that its mode is not set with ours

    def sample(
        self, hidden: Tensor, num_samples: int, seed: int | Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """See `Calm.sample`."""
        if not len(hidden):
            return hidden.new_empty(num_samples, 0, self.config.latent_size)
        rows = torch.arange(len(hidden)) if rows is None else rows
        words = [number % 2**64 for number in (int(seed), *rows.tolist())]
        [word] = np.random.SeedSequence(words).generate_state(1, np.uint64)
        on_gpu = [hidden.device] if hidden.device.type == "cuda" else []
        with torch.random.fork_rng(on_gpu):
            torch.default_generator.manual_seed(int(word))
            for device in on_gpu:
                torch.cuda.default_generators[device.index].manual_seed(int(word))
            return self.head[0].sample(hidden.expand(num_samples, *hidden.shape))


def _kind_by_parts(model: nn.Module) -> str | None:
    def has(*parts: str) -> bool:
        return all(_has(model, part) for part in ("config", "patch_size", *parts))

    if has(*PARTS[AUTOENCODER]):
        return AUTOENCODER
    if not has(*MODEL_PARTS, *MODEL_METHODS):
        return None
    if has("energy_score"):
        return ENERGY
    return KINDS[2 if "Diff" in type(model.generative_head).__name__ else 3]


def _has(model: nn.Module, part: str) -> bool:
    """Submodules are the model's own: a wrapper may pass on whatever it is asked for."""
    return part in model._modules if part in MODULES else hasattr(model, part)


def _share(
    view: nn.Module, model: nn.Module, path: str, without: tuple[str, ...] = ()
) -> nn.Module:
    """path: of what is viewed in the model.  without: beginnings of names that the view lacks."""
    official = model.get_submodule(path)
    wanted, given = _shapes(view), _shapes(official, without)
    for name in sorted(wanted.keys() | given.keys()):
        shape, other = wanted.get(name), given.get(name)
        expected = "no such parameter" if shape is None else f"shape {shape}"
        check(shape == other, name, expected, "none" if other is None else f"shape {other}")
    view.seen = _submodules(model, path, without)
    for _, _, module, _, name in view.seen:
        if name not in UNCALLED:
            check(not has_hooks(module), name, "a module without hooks", "some")
            own = "forward" in vars(module)
            check(not own, name, f"the forward of {type(module).__name__}", "one of its own")
    for inner, module in view.named_modules():
        source = official.get_submodule(inner)
        if inner and inner not in UNCALLED:  # the view's own forward is called by nobody
            _check_forward(inner, module, source)
        if module._parameters:
            module._parameters = source._parameters
    return view


def _check_forward(name: str, module: nn.Module, source: nn.Module) -> None:
    """raises: ValueError where the forward of source is not the one that module stands in for.

    That is torch's, or the first one that a class of the official code, a library's or a fork's
    had: what is derived from such a class may compute anything.
    """
    known = [kind.forward for kind in STANDARD if isinstance(module, kind)]
    given = [cls for cls in type(source).__mro__ if "forward" in vars(cls) and cls is not nn.Module]
    given = [cls for cls in given if not cls.__module__.startswith("calm_rt.")]
    plain, got = True, type(source).__name__
    expected = f"a plain {type(module).__name__}"
    if known:
        plain = type(source).forward in (type(module).forward, *known)
    elif len(given) > 1 and not given[0].__module__.startswith(LIBRARIES):
        plain, expected = False, f"the forward of {given[-1].__name__}"
        got = f"that of {given[0].__name__}"
    check(plain, name, expected, got)


def _submodules(
    model: nn.Module, path: str, without: tuple[str, ...]
) -> list[tuple[dict[str, nn.Module], str, nn.Module, type, str]]:
    """Where each module at and below a path stands, its name there, itself, its class and path."""
    seen = []
    for name, module in model.named_modules(remove_duplicate=False):
        inside = name and f"{name}.".startswith(f"{path}." if path else "")
        if inside and not name.startswith(without) and not f"{name}.".startswith(HEAD_ALIAS):
            parent, _, last = name.rpartition(".")
            seen.append((model.get_submodule(parent)._modules, last, module, type(module), name))
    return seen


def _shapes(module: nn.Module, without: tuple[str, ...] = ()) -> dict[str, list[int]]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {n: list(p.shape) for n, p in parameters if not n.startswith((HEAD_ALIAS, *without))}


def _config(official: nn.Module) -> dict[str, Any]:
    config = official.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(vars(config))
