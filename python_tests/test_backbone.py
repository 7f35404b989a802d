"""The backbone: cache against full forward, independent rows, what stands in its layers."""

import copy

import pytest
import torch
from test_models import VOCAB, assert_as_exact, model, tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from calm_rt.nn import KVCache


@pytest.mark.parametrize("patch_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@torch.no_grad()
def test_cache_equals_full_forward(patch_size, key_heads):
    single = model(patch_size, key_heads)
    double = copy.deepcopy(single).double()
    ids = tokens(3, 7, patch_size)
    full, exact = single.hidden_states(ids), double.hidden_states(ids)
    cache, parts = KVCache(single.config, 3, 9), []
    for start, stop in [(0, 3), (3, 4), (4, 5), (5, 7)]:
        parts.append(single.hidden_states(ids[:, start * patch_size : stop * patch_size], cache))
        cache.advance(torch.full((3,), stop - start))
    assert_as_exact(torch.cat(parts, 1), exact, full)


@torch.no_grad()
def test_ragged_prefill_and_padding_beyond_the_cache():
    """Rows of 1, 3, 5 patches, padded to 7 in a cache of 5; then one more where there is room."""
    single = model(3, 2)
    double = copy.deepcopy(single).double()
    ids, following = tokens(3, 7, 3), tokens(3, 1, 3, seed=2)
    cache = KVCache(single.config, 3, 5)
    prompt = single.hidden_states(ids, cache)
    cache.advance(torch.tensor([1, 3, 5]))
    last = single.hidden_states(following, cache)
    for row, (count, more) in enumerate([(1, 1), (3, 1), (5, 0)]):
        own = torch.cat([ids[row, : 3 * count], following[row, : 3 * more]])[None]
        got = torch.cat([prompt[row, :count], last[row, :more]])[None]
        assert_as_exact(got, double.hidden_states(own), single.hidden_states(own))


@torch.no_grad()
def test_rows_of_a_batch_are_independent():
    net, ids = model(), tokens(4, 5, 4)
    hidden = net.hidden_states(ids)
    others = tokens(4, 5, 4, seed=3)
    others[2] = ids[2]
    assert torch.equal(net.hidden_states(others)[2], hidden[2])
    assert not torch.equal(net.hidden_states(others)[1], hidden[1])


@torch.no_grad()
def test_backbone_is_causal():
    net, ids = model(), tokens(2, 5, 4)
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % VOCAB
    first, second = net.hidden_states(ids), net.hidden_states(changed)
    assert torch.equal(first[:, :3], second[:, :3])
    assert not torch.equal(first[:, 3], second[:, 3])


class Adapted(torch.nn.Linear):
    """A linear map with more to it than its weight, as an adapter of few ranks has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


MAPS = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("place", ["post_attention_layernorm", "mlp", *MAPS])
def test_backbone_runs_the_hooks_of_its_layers(place):
    """An op takes weights, and would pass over what a call of a module runs."""
    net, ids = model(), tokens(2, 5, 4)
    plain, calls = net.hidden_states(ids), []
    part = net.transformer.layers[1].get_submodule(place)
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        handle = getattr(part, f"register_{kind}_hook")(lambda *_: calls.append(place))
        hidden = net.hidden_states(ids)
        torch.testing.assert_close(hidden, plain)
        hidden.sum().backward()
        handle.remove()
        assert calls.pop() == place and not calls
    part.forward = lambda x, forward=part.forward: calls.append(place) or forward(x)
    torch.testing.assert_close(net.hidden_states(ids), plain)
    assert calls == [place]


@pytest.mark.parametrize("place", MAPS)
@torch.no_grad()
def test_backbone_calls_what_stands_in_its_layers(place):
    net, ids = model(), tokens(2, 5, 4)
    plain, layer = net.hidden_states(ids), net.transformer.layers[1]
    part = layer.get_submodule(place)
    adapted = Adapted(part.in_features, part.out_features, bias=False)
    biased = torch.nn.Linear(part.in_features, part.out_features)
    for other in (adapted, biased):
        other.weight = part.weight
        setattr(layer.mlp, place.removeprefix("mlp."), other)
        assert (net.hidden_states(ids) - plain).abs().max() > 1e-3


@torch.no_grad()
def test_cache_refuses_more_patches_than_it_holds():
    net = model()
    cache = KVCache(net.config, 2, 3)
    cache.advance(torch.tensor([3, 1]))
    with pytest.raises(ValueError, match=r"counts: expected at most max_patches = 3 .* got 4"):
        cache.advance(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"cache\.lengths: expected shape \[B=3\]"):
        net.hidden_states(tokens(3, 1, 4), cache)


@torch.no_grad()
def test_cached_step_compiles_whole_and_once():
    net, ids = model(3, 2), tokens(2, 6, 3)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(ids: Tensor, cache: KVCache, counts: Tensor) -> Tensor:
        hidden = net.hidden_states(ids, cache)
        cache.advance(counts)
        return hidden

    compiled, counts = (
        torch.compile(step, fullgraph=True, backend=counter),
        torch.ones(2, dtype=torch.int64),
    )
    caches = KVCache(net.config, 2, 6), KVCache(net.config, 2, 6)
    for start in range(0, 18, 3):
        got = compiled(ids[:, start : start + 3], caches[0], counts)
        eager = step(ids[:, start : start + 3], caches[1], counts)
        exact = copy.deepcopy(net).double().hidden_states(ids[:, : start + 3])[:, -1:]
        assert_as_exact(got, exact, eager)
    assert counter.frame_count == 1
