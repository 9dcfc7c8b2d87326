"""How far to trust first-order numbers: what training again said, or that nobody asked, and what else is known.

Only training again tells (`trajrec.replay.validation`): it separated all trainings that were tried. Where that was not
done, the report says "not checked". Two facts are at hand then.

The growth of the adjoint: lam_t says how much the target loss moves when the weights after step t are moved. Where its
norm grows on the way back through the run, small changes early in the training are amplified by later steps; beyond
some size the change that a single sample makes is no longer small. The bounds are taken from smooth trainings in which
contributions were held against the removal of samples (`benchmarks/sensitivity.py`): up to a growth of about 5 they
came true within some per cent, from 10 on they did not.

Kinks (`trajrec.replay.losses.kinks`): growth is one of derivatives, and these do not see a ReLU that changes its side.
Of 6 ReLU trainings whose adjoint hardly grew, the numbers held in one. So a training with kinks is never called calm,
and where both are the matter, nothing predicts what happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trajrec.replay.folder.format import Settings
from trajrec.replay.folder.validated import Validated

CALM, WILD = 5.0, 50.0
UNCHECKED = "Not checked: trajrec validate trains again without some samples, and says whether the numbers hold."


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The sensitivity of a training to small changes, and what is known of how far its numbers go.

    Attributes:
        growth: the largest norm of the adjoint on the way back over its norm at the end of the run (no unit), or None.
        smooth: whether the model and its loss have no kinks, or None if nobody knows; kinks: what has them.
        curvature: of the numbers: "hessian", "ggn", "none" or None.
        validated: what training again said, or None.
    """

    growth: float | None
    smooth: bool | None = None
    kinks: tuple[str, ...] = ()
    curvature: str | None = None
    validated: Validated | None = None

    @classmethod
    def of(cls, settings: Settings, validated: Validated | None) -> Sensitivity:
        """Of a replay."""
        s = settings
        return cls(s.growth, s.smooth, s.kinks, s.curvature, validated if validated and validated.verdict else None)

    @property
    def verdict(self) -> Literal["calm", "rough", "wild", "kinks", "unknown"]:
        """In a word, from growth and kinks alone; wild is said of every training, calm and rough of smooth ones."""
        if self.growth is not None and self.growth > WILD:
            return "wild"
        if self.smooth is False:
            return "kinks"
        if self.smooth is None or self.growth is None:
            return "unknown"
        return "calm" if self.growth <= CALM else "rough"

    @property
    def sentence(self) -> str:
        """In words: what training again said, else that it was not asked, and what else is known."""
        said = f"{UNCHECKED} {self._grown()}" if self.validated is None else self.validated.sentence
        doubtful = self.verdict == "wild" if self.validated is None else self.validated.verdict != "holds"
        return " ".join(filter(None, [said.strip(), self._advice() if doubtful else ""]))

    @property
    def tone(self) -> Literal["good", "bad", "open", ""]:
        """How it is to be shown."""
        if self.validated is not None:
            return (
                "good" if self.validated.verdict == "holds" else "bad" if self.validated.verdict != "weak" else "open"
            )
        return "" if self.verdict in ("calm", "unknown") else "open"

    @property
    def heading(self) -> str:
        """In a word or two, where nobody must miss it; nothing where there is nothing to be warned of."""
        if self.validated is not None:
            verdicts = {"holds": "Comes true", "weak": "Comes true in part"}
            return verdicts.get(self.validated.verdict or "", "Does not come true")
        return "Sensitive" if self.verdict in ("rough", "wild") else ""

    def _grown(self) -> str:
        """What growth and kinks say."""
        way = "going back through the run the adjoint grew to at most"
        grew = "" if self.growth is None else f"{way} {self.growth:.3g} times its size"
        if self.verdict == "wild":
            return f"Wild: {grew}. This training is so sensitive that first-order numbers should not be trusted."
        if self.smooth is False:
            also = f" ({grew})" if grew else ""
            return (
                f"The model or its loss has kinks ({', '.join(self.kinks)}): leaving a sample out can do something "
                f"else than its derivative says, and growth does not show it{also}."
            )
        if self.verdict == "calm":
            return f"Calm: {grew}, and there are no kinks. Single samples are small changes for this training."
        if self.verdict == "rough":
            return f"Rough: {grew}. Single numbers may be far off."
        return f"{grew[:1].upper()}{grew[1:]}." if grew else ""

    def _advice(self) -> str:
        """What helps where the numbers do not hold."""
        if self.curvature == "none":
            return "These are numbers without the Hessian, an approximation: ask for the exact ones."
        if self.smooth is False and self.verdict == "wild":
            return (
                f"Wild and with kinks ({', '.join(self.kinks)}): nothing predicts what removals do in one such run, "
                "other forms included. Smaller learning rates and smooth activations would tame it."
            )
        if self.smooth is False:
            kinks = ", ".join(self.kinks)
            return f"Kinks ({kinks}) are a likely cause: smooth activations and smaller learning rates tame them."
        tamed = "smaller learning rates" if self.smooth else "smooth activations and smaller learning rates"
        if self.curvature == "ggn":
            return f"Such a training is tamed by {tamed}."
        return f"--curvature ggn, the Gauss-Newton form, may predict such a training better; {tamed} tame it."
