"""The canonical layout: golden words that can never drift, an independent definition, round trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.core.bitpack import pack, unpack, words_per_row

# The first bits+1 words of a row of 33 codes, code j = (5 j + 3) mod 2**bits; the words after them are 0.
GOLDEN = {
    1: [0x55555555, 0x00000001],
    2: [0x93939393, 0x93939393, 0x00000003],
    3: [0x43C67543, 0x7543C675, 0xC67543C6, 0x00000003],
    4: [0x61C72D83, 0xE94FA50B, 0x61C72D83, 0xE94FA50B, 0x00000003],
    5: [0x79793503, 0xFD560B30, 0x77137249, 0x1BB45871, 0xF668F514, 0x00000003],
    6: [0x1748D203, 0x5C2B9A17, 0x38913FEB, 0x2789D613, 0x503BDB1B, 0x79950F28, 0x00000023],
    7: [0x72434403, 0x2B4C84E1, 0x23F74D58, 0x6C539D26, 0xC7667C57, 0x41407BED, 0x3C64A0F1, 0x00000023],
    8: [0x120D0803, 0x26211C17, 0x3A35302B, 0x4E49443F, 0x625D5853, 0x76716C67, 0x8A85807B, 0x9E99948F, 0x000000A3],
}  # fmt: skip


def words_by_definition(codes: list[int], bits: int) -> list[int]:
    """One big integer: code j at bit j*bits, cut into 32-bit words."""
    stream = sum(code << (j * bits) for j, code in enumerate(codes))
    count = -(-len(codes) // 32) * bits
    return [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]


def unsigned(words: torch.Tensor) -> list[int]:
    return [int(w) & 0xFFFFFFFF for w in words]


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_follow_the_definition(bits):
    codes = [(5 * j + 3) % (1 << bits) for j in range(33)]
    words = pack(torch.tensor([codes]), bits)
    assert words.dtype == torch.int32 and words.shape == (1, words_per_row(33, bits))
    assert unsigned(words[0]) == GOLDEN[bits] + [0] * (bits - 1)
    assert unsigned(words[0]) == words_by_definition(codes, bits)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 31), (3, 32), (4, 33), (2, 172), (1, 1000)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip(bits, n, k):
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (n, -(-k // 32) * bits)
    assert torch.equal(unpack(words, bits, k), codes)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 140), st.integers(0, 1 << 30))
def test_round_trip_any_shape(bits, n, k, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    words = pack(codes, bits)
    assert torch.equal(unpack(words, bits, k), codes)
    for row, expected in zip(words, codes.tolist(), strict=True):
        assert unsigned(row) == words_by_definition(expected, bits)


def test_padding_codes_are_zero():
    words = pack(torch.full((1, 3), 7), 3)
    assert unsigned(words[0]) == [0b111111111, 0, 0]


def test_large_input_is_packed_in_blocks_of_rows(monkeypatch):
    import lowbit.core.bitpack as bitpack

    codes = torch.randint(0, 8, (10, 50), dtype=torch.uint8)
    whole = pack(codes, 3)
    monkeypatch.setattr(bitpack, "_ROWS_AT_ONCE", 120)  # two rows at a time
    assert torch.equal(pack(codes, 3), whole)
    assert torch.equal(unpack(whole, 3, 50), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(2, 2), 0, "bits must be between 1 and 8: got bits=0"),
        (torch.zeros(2, 2), 9, "bits must be between 1 and 8: got bits=9"),
        (torch.zeros(2), 4, r"codes must be 2-d"),
        (torch.full((1, 2), 4), 2, r"codes must be in \[0, 3\] at bits=2: got values in \[4, 4\]"),
        (torch.full((1, 2), -1), 2, r"codes must be in \[0, 3\]"),
    ],
)
def test_pack_refuses(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack(codes, bits)


@pytest.mark.parametrize("words", [torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int64)])
def test_unpack_refuses_words_of_another_shape(words):
    with pytest.raises(ValueError, match=r"words must be int32 \[N, 4\] for K=32, bits=4"):
        unpack(words, 4, 32)


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_columns(bits):
    words = pack(torch.empty(3, 0, dtype=torch.uint8), bits)
    assert words.shape == (3, 0) and unpack(words, bits, 0).shape == (3, 0)
