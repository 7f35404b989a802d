"""batch_invariant=True: the text is the same bit for bit alone and in any batch."""

import random

import pytest
import torch
import torch.nn.functional as F
from test_engine import recorded  # noqa: F401  (a fixture)
from test_generation import PATCH, build_model
from torch import Tensor

from calm_rt.draws import Draws
from calm_rt.generation import Generator
from calm_rt.nn import backbone


@pytest.fixture(scope="module")
def single():
    """In float32 and wide enough that products round differently at other batch sizes."""
    sizes = {"hidden_size": 96, "intermediate_size": 160}
    return build_model(**sizes).float()


def prompts_of_mixed_lengths():
    draw = random.Random(0)
    return [[draw.randrange(256) for _ in range(draw.randrange(50))] for _ in range(8)]


@pytest.mark.parametrize("temperature", [1, "1/2"])
def test_texts_are_the_same_bit_for_bit(single, recorded, temperature):  # noqa: F811
    prompts, order = prompts_of_mixed_lengths(), [5, 2, 7, 0, 3, 6, 1, 4]
    options = {"max_new_tokens": 14, "temperature": temperature, "num_candidates": 6}
    generator = Generator(single, batch_invariant=True)
    alone, first = [], {}
    for name, prompt in enumerate(prompts):
        alone += generator.generate([prompt], sequence_ids=[name], **options)
    first |= recorded
    few = Generator(single, batch_invariant=True, max_batch_size=3)
    for other, names in ((generator, range(8)), (generator, order), (few, order)):
        recorded.clear()
        chosen = [prompts[name] for name in names]
        results = other.generate(chosen, sequence_ids=names, **options)
        assert [result.ids for result in results] == [alone[name].ids for name in names]
        assert recorded.keys() == first.keys()
        for row, (hidden, patch) in recorded.items():
            assert torch.equal(hidden, first[row][0]) and torch.equal(patch, first[row][1])


@pytest.mark.parametrize("looks", [True, False])
def test_attention_sees_what_it_sees_of_a_sequence_alone(monkeypatch, looks):
    """Sizes and alignment of its operands, on a CPU and where nobody looks, as on a GPU."""
    seen, attend = [], F.scaled_dot_product_attention

    def record(*operands, attn_mask, **options):
        tensors = [*operands, *([] if attn_mask is None else [attn_mask])]
        aligned = [stored.data_ptr() % 64 for stored in operands[1:]]
        seen.append((*(tensor.shape for tensor in tensors), *aligned))
        return attend(*operands, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(backbone, "may_look", lambda tensor: looks)
    model = build_model(hidden_size=40).float()
    generator = Generator(model, batch_invariant=True, prefill_chunk=5)
    prompts, options = prompts_of_mixed_lengths(), {"max_new_tokens": 14}
    together = generator.generate(prompts, **options)
    in_batch, alone = sorted(seen), []
    seen.clear()
    for name, prompt in enumerate(prompts):
        alone += generator.generate([prompt], sequence_ids=[name], **options)
    assert in_batch == sorted(seen) and len(seen) > 2 * 8 * 3
    assert [result.ids for result in together] == [result.ids for result in alone]
    generator.prefill([prompts[0]], **options)  # a cache of the longest texts
    seen.clear()
    generator.step(), generator.step()
    assert set(seen) <= set(in_batch)


def last_bits(self: Draws, number: int, count: int) -> Tensor:
    """Tokens of the draws as sensitive to rounding as can be: three bits in each patch."""
    states = self.draw(number, count)  # [B, count, H]
    return (states[..., :PATCH].contiguous().view(torch.int32) & 1) * torch.tensor([1, 1, 1, 0])


def test_sequences_try_tuples_by_their_own_history(monkeypatch):
    """What tuples decided for others must not say how many rows the products of this one have,
    which round differently."""
    monkeypatch.setattr(Draws, "whole_patches", last_bits)
    model = build_model(hidden_size=256, intermediate_size=256).float()
    prompts, names = prompts_of_mixed_lengths(), range(8)
    options = {"max_new_tokens": 60, "temperature": "1/2", "num_candidates": 200}
    generator = Generator(model, batch_invariant=True)
    together = generator.generate(prompts, **options)
    alone = [generator.generate([prompts[i]], sequence_ids=[i], **options)[0] for i in names]
    assert [g.draws for g in together] == [g.draws for g in alone]
    assert [g.ids for g in together] == [g.ids for g in alone]
    assert len({g.draws for g in alone}) > 3  # some came to try tuples first, not all at once
