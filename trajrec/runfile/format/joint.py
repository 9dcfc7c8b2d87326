r"""The CRC-32 of pieces put one behind the other, from those of the pieces: nothing is read again.

A CRC-32 is a remainder modulo a polynomial over GF(2), so putting |B| bits behind A multiplies that of A by x^|B|:

$$\mathrm{crc}(AB) = \mathrm{crc}(A) \cdot x^{8|B|} + \mathrm{crc}(B) \pmod p$$

(the inversions before and after, which zlib's CRC-32 has, cancel). Polynomials are 32-bit numbers with the highest
power in the lowest bit, as in zlib's `crc32_combine`, after which this is made.
"""

from __future__ import annotations

from collections.abc import Iterable

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_BYTE = 1 << 23  # x^8


class Joint:
    """Puts pieces of `size` bytes behind what has been summed."""

    def __init__(self, size: int) -> None:
        self._shift = _power(_BYTE, size)

    def extend(self, crc: int, crc32s: Iterable[int]) -> int:
        """The CRC-32 of what has the CRC-32 `crc`, followed by pieces that have `crc32s`."""
        for other in crc32s:
            crc = _product(crc, self._shift) ^ int(other)
        return crc


def _power(base: int, exponent: int) -> int:
    result = _ONE
    while exponent:
        if exponent & 1:
            result = _product(result, base)
        base, exponent = _product(base, base), exponent >> 1
    return result


def _product(a: int, b: int) -> int:
    """The product of two polynomials, mod p."""
    result, bit = 0, _ONE
    while a:
        if a & bit:
            result ^= b
            a ^= bit
        bit >>= 1
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return result
