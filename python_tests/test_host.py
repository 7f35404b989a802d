"""calm_rt.host: the C++ module and its Python fallback do the same, and what was published."""

import runpy
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_rt import host

TOKENS = st.integers(0, 3)
# Random123's kat_vectors for philox4x32-10: counter, key, words
KNOWN_ANSWERS = [
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0_A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
NATIVE = host._host


@pytest.fixture(params=["native", "fallback"])
def route(request, monkeypatch):
    """Each test once in C++ and once in Python."""
    if request.param == "native" and NATIVE is None:
        pytest.skip("calm_rt._host is not built")
    monkeypatch.setattr(host, "_host", NATIVE if request.param == "native" else None)


def pack(documents, heads, patch_size, dtype=np.uint16):
    tokens = np.array([token for ids in documents for token in ids], dtype=np.int32)
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    return pack_lengths(tokens, lengths, np.array(heads, dtype=np.int64), patch_size, dtype)


def pack_lengths(tokens, lengths, heads, patch_size=4, dtype=np.uint16):
    ids = {"start_id": 7, "eos_id": 9, "pad_id": 8}
    return host.pack_documents(
        tokens, lengths, heads, **ids, patch_size=patch_size, dtype=np.dtype(dtype)
    )


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_known_answers(route, counter, key, words):
    counters = np.array([counter, counter], dtype=np.uint32)
    assert host.philox4x32(counters, key).tolist() == [words, words]


def test_philox_takes_a_negative_seed_as_64_bits(route):
    counters = np.arange(8, dtype=np.uint32).reshape(2, 4)
    expected = host.philox4x32(counters, 2**64 - 5)
    assert (host.philox4x32(counters, -5) == expected).all()
    assert (host.philox4x32(counters, 5) != expected).any()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_packed_documents(route, dtype):
    packed, sizes = pack([[1, 2, 3], [], [4, 5], [6] * 4, []], [0, 2, 1, 0, 4], 4, dtype)
    assert packed.dtype == dtype
    assert packed[:12].tolist() == [1, 2, 3, 9, 7, 7, 9, 8, 7, 4, 5, 9]
    assert packed[12:].tolist() == [6, 6, 6, 6, 9, 8, 8, 8, 7, 7, 7, 7, 9, 8, 8, 8]
    assert sizes.tolist() == [4, 4, 4, 8, 8]


def test_packing_nothing(route):
    packed, sizes = pack([], [], 4)
    assert packed.size == sizes.size == 0


def test_wide_ids_survive(route):
    ids = [70000, 2**31 - 1]
    assert pack([ids], [1], 1, np.uint32)[0].tolist() == [7, *ids, 9]


def test_lengths_that_do_not_fit(route):
    for lengths in ([3], [5], [6, -2]):
        with pytest.raises(ValueError, match="lengths: expected sizes of 4 tokens"):
            pack_lengths(np.arange(4), np.array(lengths), np.zeros(len(lengths)))


def test_heads_that_do_not_fit(route):
    for heads, message in [([], "1 counts, got 0"), ([-1], "counts of at least 0, got -1")]:
        with pytest.raises(ValueError, match=f"heads: expected {message}"):
            pack([[1, 2]], heads, 4)


def test_native_packing_checks_its_memory():
    if NATIVE is None:
        pytest.skip("calm_rt._host is not built")
    tokens, packed = np.arange(4, dtype=np.int32), np.empty(4, np.uint16)
    beyond = [([5], [0]), ([-1], [0]), ([4], [0]), ([0], [-1]), ([0], [5]), ([2], [2])]
    for lengths, heads in beyond:
        with pytest.raises(ValueError, match="do not fit"):
            NATIVE.pack_documents(tokens, np.array(lengths), np.array(heads), 7, 9, 8, 4, packed)
    for lengths, heads, size in [([1], [], 4), ([1], [0, 0], 4), ([1], [0], 0)]:
        arrays = np.array(lengths), np.array(heads, dtype=np.int64)
        with pytest.raises(ValueError, match="expected"):
            NATIVE.pack_documents(tokens, *arrays, 7, 9, 8, size, packed)


@pytest.mark.skipif(NATIVE is None, reason="calm_rt._host is not built")
@given(st.lists(st.tuples(st.lists(TOKENS), st.integers(0, 9))), st.integers(1, 9))
def test_packing_is_the_same_on_both_routes(documents, patch_size):
    arguments = [ids for ids, _ in documents], [head for _, head in documents], patch_size
    with pytest.MonkeyPatch.context() as patch:
        native = pack(*arguments)
        patch.setattr(host, "_host", None)
        fallback = pack(*arguments)
    assert all((a == b).all() for a, b in zip(native, fallback, strict=True))
    assert len(native[0]) == native[1].sum()


def test_without_the_module(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "calm_rt._host", None)
    assert runpy.run_path(host.__file__)["_host"] is None
    assert not recwarn.list


def test_a_broken_module_warns(monkeypatch):
    class Broken:
        def find_spec(name, path, target=None):
            if name == "calm_rt._host":
                raise ImportError("undefined symbol")

    monkeypatch.delitem(sys.modules, "calm_rt._host", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    with pytest.warns(UserWarning, match=r"_host does not load \(undefined symbol\); reinstall"):
        assert runpy.run_path(host.__file__)["_host"] is None
