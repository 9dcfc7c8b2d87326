"""A file of long vectors, one a sample, written in blocks and read back singly: hypergradients.

/sample            (S,)      int64   sample ids
/hypergradient     (S, P')           d w_T / d eps_i, trainable weights only
attribute params   JSON      name, shape and offset of every parameter in a vector
attributes exact, curvature, label: whether they are exact, or an approximation
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from trajrec.errors import OutputExistsError
from trajrec.records import Array, IntArray, ParamSpec
from trajrec.replay.label import label_of


class VectorFile:
    """Vectors [S, P'] on disk."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self._vectors = file["hypergradient"]

    @classmethod
    def create(
        cls, path: Path, samples: IntArray, params: Sequence[ParamSpec], dtype: str, curvature: str
    ) -> VectorFile:
        """A new file for the vectors of these samples.

        Raises:
            OutputExistsError: if the file exists.
        """
        if path.exists():
            raise OutputExistsError(f"{path} exists already; remove it or choose another name.")
        file = h5py.File(path, "x")
        offsets = np.cumsum([0, *(p.size for p in params)]).tolist()
        table = [{"name": p.name, "shape": p.shape, "offset": o} for p, o in zip(params, offsets[:-1], strict=True)]
        facts = {"exact": curvature == "hessian", "curvature": curvature, "label": label_of(curvature)}
        file.attrs.update({"params": json.dumps(table), **facts})
        file["sample"] = samples
        file.create_dataset("hypergradient", (len(samples), offsets[-1]), dtype=dtype)
        return cls(file)

    def write(self, piece: slice, vectors: Array) -> None:
        """Stores vectors [K, P'] of a piece of the samples."""
        self._vectors[piece] = vectors

    def read(self, place: int) -> Array:
        """The vector [P'] at a place."""
        values: Array = self._vectors[place]
        return values

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
