"""What a report finds, as plain frozen values: one class a section, numbers and words only.

k rows of a table, S tracked samples, M targets
"""

from __future__ import annotations

from dataclasses import dataclass

from trajrec.replay.agreement import Agreement
from trajrec.replay.suspects import ClassClusters, Detection, Jaccard


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a table of samples.

    Attributes:
        rank: from 1, within its side.
        side: "helpful" or "harmful".
        sample: id of the training sample.
        label: its label, if known.
        name: its name, if the data set gives one.
        noisy: whether its label is known to be wrong, if that is known at all.
        target: id of the target, -1 for a mean.
        contribution: C(i, j), in the unit of the target.
        share: |C| as a fraction of the sum of |C| over all tracked samples.
    """

    rank: int
    side: str
    sample: int
    label: str | None
    name: str | None
    noisy: bool | None
    target: int
    contribution: float
    share: float


@dataclass(frozen=True, slots=True)
class Top:
    """The most helpful and the most harmful samples of one target, or of a mean of targets.

    Attributes:
        title: what they help or harm, in words.
        target: its id, -1 for a mean.
        helpful: rows by descending contribution, all positive.
        harmful: rows by ascending contribution, all negative.
    """

    title: str
    target: int
    helpful: tuple[Entry, ...]
    harmful: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Why:
    """What taught the model one target: its top samples, and the sum of contributions of every training class.

    Attributes:
        target: the test sample.
        label: its true label, prediction: what the final model reads; None where unknown.
        by_label: (training label, samples, sum of contributions), largest sum first.
    """

    target: int
    label: str | None
    prediction: str | None
    name: str | None
    top: Top
    by_label: tuple[tuple[str, int, float], ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """How contributions are distributed.

    Attributes:
        count: how many.
        std: standard deviation (n - 1); NaN for a single one.
        positive: how many help; negative: how many harm; zero: how many do neither.
    """

    count: int
    mean: float
    std: float
    min: float
    max: float
    positive: int
    negative: int
    zero: int


@dataclass(frozen=True, slots=True)
class Outlier:
    """A sample far from the mean; z in standard deviations."""

    sample: int
    label: str | None
    name: str | None
    contribution: float
    z: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts [bins] in equal bins from low to high; the first and last also count what lies outside."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean, deviation, concentration and outliers.

    Attributes:
        samples: spread of the samples' contributions to the mean target.
        pairs: spread of all S x M contributions, if M > 1.
        concentration: (fraction of the samples, how many that are, share of the sum of |C| they carry).
        histogram: of the samples.
        far: how many samples are outliers (3 standard deviations or more).
        outliers: the farthest of them.
    """

    samples: Spread
    pairs: Spread | None
    concentration: tuple[tuple[float, int, float], ...]
    histogram: Histogram
    far: int
    outliers: tuple[Outlier, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Inter-class contributions (paper, equation 23).

    Attributes:
        train: training classes, the rows.
        test: test classes, the columns.
        mean: [train, test] mean contribution over all pairs; None where there is no pair.
        normalised: the same over sqrt(row sum x column sum); None where that is not a positive number.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    mean: tuple[tuple[float | None, ...], ...]
    normalised: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Suspect:
    """A sample whose label may be wrong; a larger score is more suspected."""

    rank: int
    sample: int
    label: str | None
    name: str | None
    noisy: bool | None
    score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """Samples by one suspicion.

    Attributes:
        title: what the score is.
        suspects: the k most suspected.
        detection: how well it finds known wrong labels, if any are known.
    """

    title: str
    suspects: tuple[Suspect, ...]
    detection: Detection | None


@dataclass(frozen=True, slots=True)
class Clusters:
    """The paper's clustering by signs.

    Attributes:
        classes: the two clusters of every class.
        suspected: how many samples are in clusters that harm.
        jaccard: overlap with the known wrong labels, if any are known.
    """

    classes: tuple[ClassClusters, ...]
    suspected: int
    jaccard: Jaccard | None


@dataclass(frozen=True, slots=True)
class Suspicions:
    """Everything that suggests wrong labels; clusters are None where there are few targets or no labels."""

    rankings: tuple[Ranking, ...]
    clusters: Clusters | None


@dataclass(frozen=True, slots=True)
class Track:
    """One sample through training: its contribution [epochs] in every epoch."""

    sample: int
    label: str | None
    name: str | None
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Which phase of training mattered.

    Attributes:
        epochs: [E] their numbers.
        helpful: [E] sum of the positive contributions of samples in that epoch, to the mean target.
        harmful: [E] sum of the negative ones.
        tracks: single samples.
    """

    epochs: tuple[int, ...]
    helpful: tuple[float, ...]
    harmful: tuple[float, ...]
    tracks: tuple[Track, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Agreement of this replay with another on the samples that both have.

    Attributes:
        this: what this replay is, in a few words.
        other: what the other is.
        agreement: of the contributions to the mean target.
        by_target: (targets, mean Spearman, mean sign error) over targets that both have, if more than one.
        points: (sample, this, other) of at most some thousand samples, for a scatter plot.
    """

    this: str
    other: str
    agreement: Agreement
    by_target: tuple[int, float, float] | None
    points: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """What a sample looks like: PNG bytes or text; `set` is "train" or "test"."""

    set: str
    sample: int
    png: bytes | None
    text: str | None
