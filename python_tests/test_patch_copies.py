"""What outlives a patch, and what its copies share: parameters that were tied, tables, methods."""

import copy

import pytest
import torch
from official_standin import build, token_ids
from torch import nn

import calm_rt
from calm_rt import patching


def untie(model: nn.Module) -> nn.Module:
    """Two parameters where the official loading paths leave two."""
    inner = getattr(model, "ae_model", model)
    inner.decoder.lm_head_weight = nn.Parameter(inner.encoder.embed_tokens.weight.detach().clone())
    return model


def is_tied(model: nn.Module) -> bool:
    inner = getattr(model, "ae_model", model)
    return inner.decoder.lm_head_weight is inner.encoder.embed_tokens.weight


@pytest.mark.parametrize("change", ["train", "load", "bfloat16"])
def test_an_embedding_that_was_tied_stays_tied(change):
    model, ids = untie(build("Autoencoder")).train(), token_ids()
    forward = model.forward
    with calm_rt.patch(model) as report:
        assert "tied_embedding" in report.cured
        if change == "train":
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            for _ in range(20):
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
        elif change == "load":
            model.load_state_dict(build("Autoencoder", seed=1).state_dict())
        else:
            model.to(torch.bfloat16)
    assert is_tied(model) and model.forward == forward
    state = model.state_dict()
    embedding = state["encoder.embed_tokens.weight"]
    assert torch.equal(state["decoder.lm_head_weight"], embedding)


def test_unpatching_a_copy_leaves_the_original_alone():
    model = untie(build("Autoencoder"))
    calm_rt.patch(model)
    other = copy.deepcopy(model)
    assert is_tied(other)
    calm_rt.unpatch(other)
    assert is_tied(model) and is_tied(other)
    assert "forward" in vars(model) and "forward" not in vars(other)


def test_loading_into_a_copy_drops_its_own_tables():
    model, ids = build(), token_ids()
    calm_rt.patch(model, fold_encoder=True)
    other = copy.deepcopy(model)
    fresh = build(seed=1)
    other.load_state_dict(fresh.state_dict())
    calm_rt.patch(fresh)
    views = [m._calm_rt_patch.autoencoder for m in (model, other, fresh)]
    assert [view.encoder.tables is None for view in views] == [False, True, True]
    assert torch.equal(views[1].encode(ids)[0], views[2].encode(ids)[0])
    calm_rt.unpatch(other)
    assert len(model.ae_model.encoder._load_state_dict_post_hooks) == 1
    assert not other.ae_model.encoder._load_state_dict_post_hooks
    model.load_state_dict(other.state_dict())
    assert views[0].encoder.tables is None


@pytest.mark.parametrize(
    "path",
    [
        "embed_proj.0",
        "transformer.layers.0.self_attn.q_proj",
        "transformer.embed_tokens",
        "ae_model",
        "ae_model.encoder.squeeze_layer",
        "generative_head.hidden_embd",
    ],
)
def test_submodules_that_are_replaced_later_are_refused(path):
    model, ids = build(), token_ids()
    hidden, draws = torch.zeros(2, 32), torch.zeros(2, 2, 8)
    uses = [
        ("", lambda: model.generate(ids, max_new_tokens=4)),
        ("", lambda: model.temperature_sampling(hidden)),
        ("ae_model", lambda: model(input_ids=ids, labels=ids)),
        ("ae_model", lambda: model.eval_brier(draws, ids[:, :4], None, draws.mean())),
        ("generative_head", lambda: model(input_ids=ids, labels=ids)),
        ("generative_head", lambda: model.generative_head.sample(hidden)),
    ]
    calm_rt.patch(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, copy.deepcopy(model.get_submodule(path)))
    message = f"model: expected .* got another {path}, which was replaced since patch; unpatch and"
    for start, call in uses:
        if path.startswith(start):
            with pytest.raises(ValueError, match=message):
                call()
    calm_rt.unpatch(model)
    calm_rt.patch(model)  # what differs now is in the report


def test_replacing_what_the_ops_do_not_stand_in_for_is_no_matter():
    model, ids = build("FlowTransformer"), token_ids()
    calm_rt.patch(model)
    model.generative_head.net = nn.Sequential(model.generative_head.net)
    model.ae_model.encoder = torch.compile(model.ae_model.encoder)  # the same arithmetic
    assert model.generate(ids, max_new_tokens=4).shape[0] == 2
    model.transformer.layers[0] = nn.Identity()
    with pytest.raises(ValueError, match=r"got another transformer\.layers\.0, which"):
        model.generate(ids, max_new_tokens=4)
    model.generative_head = nn.Identity()
    with pytest.raises(ValueError, match="replaced since patch"):
        model.temperature_sampling(torch.zeros(2, 32))


@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_nobody_would_call(before: bool):
    model, ids = build("EnergyTransformer").train(), token_ids()
    layer = model.generative_head.hidden_embd
    if before:
        hook = layer.register_forward_hook(lambda *_: None)
        report = calm_rt.patch(model)
        assert "hidden_embd: expected a module without hooks" in report.kept["head_sampling"]
        calm_rt.unpatch(model)
        hook.remove()
    calm_rt.patch(model)
    hook = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"got generative_head\.hidden_embd with some, registered"):
        model(ids, labels=ids)
    hook.remove()
    model(ids, labels=ids)


class Wrapper(nn.Module):
    """Passes on what it is asked for, as adapters do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.base_model = inner

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


class Adapter(Wrapper):
    def get_base_model(self) -> nn.Module:
        return self.base_model


@pytest.mark.parametrize("kind", ["Autoencoder", "EnergyTransformer"])
def test_a_wrapper_is_not_taken_for_the_model(kind):
    model = build(kind)
    with pytest.raises(ValueError, match=r"model: expected an instance of .*, got Wrapper"):
        calm_rt.patch(Wrapper(model))
    with calm_rt.patch(Adapter(model)) as report:
        assert report.name == kind and "forward" in vars(model)
    assert "forward" not in vars(model)


def test_data_parallel_is_refused_before_and_after():
    model = build()
    message = "model: expected one outside .*use DistributedDataParallel.*, got nn.DataParallel"
    with pytest.raises(ValueError, match=message):
        calm_rt.patch(nn.DataParallel(model))
    calm_rt.patch(model)
    parallel = nn.DataParallel(model)
    with pytest.raises(ValueError, match=message):
        parallel.module._replicate_for_data_parallel()
    calm_rt.unpatch(parallel)
    assert model._replicate_for_data_parallel() is not model


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_on_the_way_leaves_nothing_behind(error, monkeypatch):
    def failing(view):
        raise error

    monkeypatch.setattr(patching, "fold", failing)
    model = build("FlowTransformer")  # which gets num_samples first
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(error):
        calm_rt.patch(model, fold_encoder=True)
    assert [vars(module) for module in model.modules()] == before
