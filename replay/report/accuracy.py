"""What a replay's numbers are good to, in a sentence (`trajrec.replay.proof.accuracy` measures it)."""

from __future__ import annotations

GOOD = 1e-3


def sentence(accuracy: float | None, dtype: str | None) -> str:
    """What numbers of a floating type are good to, relative to the largest; nothing where it was not measured."""
    if accuracy is None:
        return ""
    said = f"Numbers in {dtype or 'this precision'} are good to about {accuracy:.0e} of the largest"
    return said + ("; --dtype float64 gives more." if accuracy > GOOD and dtype == "float32" else ".")
