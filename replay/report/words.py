"""Numbers in words, the same in every section and for every renderer."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """A contribution, with its sign and four digits."""
    if value is None or math.isnan(value):
        return "undefined"
    return "0" if value == 0 else f"{value:+.3e}"


def percent(value: float | None) -> str:
    """A share as a percentage."""
    if value is None or math.isnan(value):
        return "undefined"
    return f"{100 * value:.2f} %"


def whole(share: float) -> str:
    """A share as a percentage of two digits."""
    return "undefined" if math.isnan(share) else f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def ratio(value: float) -> str:
    """A coefficient with three decimals, or "undefined"."""
    return "undefined" if math.isnan(value) else f"{value:.3f}"


def axis(value: float) -> str:
    """A number as short as it can be, for an axis or a cell."""
    if value == 0 or 0.01 <= abs(value) < 1e5:
        return f"{value:,.6g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def counted(number: int | None, noun: str) -> str:
    """A number of things, as in "3 steps"; nothing for None."""
    return "" if number is None else f"{number:,} {noun}{'' if number == 1 else 's'}"
