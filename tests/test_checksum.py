"""Checksums by zlib-ng and by zlib: of a copy, beside which nothing is touched, and of pieces put together."""

import random
import subprocess
import sys
import zlib

import numpy as np
import pytest

from trajrec import checksum
from trajrec.checksum import copy_crc32, crc32_combine

PLAIN = "import sys; sys.modules['zlib_ng.zlib_ng'] = None; from tests.test_checksum import "


def copies(count):
    chance = random.Random(random.randrange(2**32))
    source = np.frombuffer(chance.randbytes(80_000), np.uint8)
    for _ in range(count):
        size, start, place = chance.choice((700, 70_000)), chance.randrange(200), chance.randrange(200)
        size, begun = chance.randrange(size), chance.choice((0, chance.randrange(2**32)))
        target = np.full(place + size + 100, 7, np.uint8)
        part = source[start : start + size]
        crc = copy_crc32(target[place : place + size], part, begun)
        assert crc == zlib.crc32(part, begun), (size, start, place, begun)
        assert target.tobytes() == bytes([7] * place) + part.tobytes() + bytes([7] * 100), (size, start, place)


def test_all_sizes_places_and_beginnings():
    copies(3000)


def combinations(count):
    chance = random.Random(random.randrange(2**32))
    for size in [0, 1, 2**16 - 1, 2**16, 2**16 + 1, *(chance.randrange(2**18) for _ in range(count))]:
        first, second = chance.randbytes(chance.randrange(40)), chance.randbytes(size)
        assert crc32_combine(zlib.crc32(first), zlib.crc32(second), size) == zlib.crc32(first + second), size


def test_the_sum_of_pieces_put_together_follows_from_theirs():
    combinations(100)


def test_without_compiled_code():
    command = PLAIN + "checksum, combinations, copies; assert checksum.crc32.__module__ == 'zlib'"
    subprocess.run([sys.executable, "-c", f"{command}; copies(300); combinations(100)"], check=True, timeout=120)


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "?"])
def test_numbers_of_any_kind(dtype):
    source = np.arange(101).astype(dtype)
    target = np.zeros_like(source)
    assert copy_crc32(target, source) == zlib.crc32(source.tobytes())
    np.testing.assert_array_equal(target, source)


@pytest.mark.skipif(not hasattr(checksum.copy_crc32, "__self__"), reason="not compiled here")
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="5 bytes do not fit a place of 4"):
        copy_crc32(bytearray(4), bytes(5))
    with pytest.raises(TypeError):
        copy_crc32(bytes(4), bytes(4))
