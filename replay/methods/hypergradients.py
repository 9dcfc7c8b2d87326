r"""Hypergradients d w_T / d eps_i of chosen samples: the second public question.

A hypergradient is as large as the model, so they are computed in blocks of samples and streamed to an HDF5 file, from
which single ones are read back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trajrec.records import Array, IntArray
from trajrec.replay.label import label_of
from trajrec.replay.machine.memory import kept
from trajrec.replay.methods.blocks import Execution, TangentPasses
from trajrec.replay.positional import by_position
from trajrec.replay.progress import Progress, Silent
from trajrec.replay.proof.certificate import Certificate
from trajrec.replay.question import Curvature, FloatName, Question, Scope, curvature_of
from trajrec.replay.session import Session
from trajrec.replay.step import RecordedRun
from trajrec.task.task import Task


class Vectors(Protocol):
    """Where hypergradients [S, P'] are kept."""

    def write(self, piece: slice, vectors: Array) -> None:
        """Stores vectors [K, P'] of a piece of the samples."""

    def read(self, place: int) -> Array:
        """The vector [P'] at a place."""

    def close(self) -> None:
        """Nothing more is written or read."""


class Hypergradients:
    """Hypergradients on disk; `h[i]` reads that of sample i as a dict of tensors by parameter name.

    Attributes:
        samples: [S] training sample ids.
        certificate: what the replay has proved.
        path: the HDF5 file; a temporary one (removed by `close`) unless `out` was given.
        curvature: as in the question.
        label: "exact", or "approximation, not checked against exact".
    """

    def __init__(self, session: Session, scope: Scope, path: Path, folder: Any, vectors: Vectors) -> None:
        self.samples = samples = scope.samples
        self.curvature, self.label = scope.curvature, label_of(scope.curvature)
        self.path = path
        self.certificate: Certificate | None = None
        self._layout = session.layout
        self._folder = folder
        self._places = {int(sample): place for place, sample in enumerate(samples)}
        self._vectors = vectors

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        """D w_T / d eps of a sample by its id.

        Raises:
            KeyError: if it was not asked for.
        """
        if int(sample) not in self._places:
            raise KeyError(f"sample {sample} is not among the {len(self)} tracked ones")
        return self._layout.split(torch.from_numpy(self._vectors.read(self._places[int(sample)])))

    def write(self, piece: slice, vectors: Tensor, _: Tensor | None = None) -> None:
        """Stores the hypergradients [K, P'] of a piece of the samples; not those of running statistics."""
        self._vectors.write(piece, vectors.cpu().numpy())

    def close(self) -> None:
        """Closes the file, and removes it if it is a temporary one."""
        self._vectors.close()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Hypergradients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@by_position("samples", "exact")
def hypergradients(
    run: RecordedRun,
    task: Task,
    *,
    samples: IntArray | Sequence[int] | None = None,
    exact: bool = True,
    curvature: Curvature | None = None,
    steps: tuple[int, int] | None = None,
    dtype: FloatName | torch.dtype | None = None,
    device: str | torch.device | None = None,
    allow_drift: bool = False,
    memory: int | None = None,
    progress: Progress | None = None,
    out: str | Path | None = None,
) -> Hypergradients:
    """Hypergradients d w_T / d eps_i of chosen training samples (paper, Algorithm 1 and equations (33), (34)).

    They belong to no target and are made going forwards, which makes every step again: what `contributions` takes
    beyond these (targets, mode, by_epoch, certify) has no meaning for them.

    Args:
        run: an open recording (`trajrec.open`).
        task: describes the training.
        samples: [S] training sample ids; default all N.
        exact: as `contributions`.
        curvature: as `contributions`.
        steps: (a, b): samples count at steps a to b only; default all.
        dtype: as `contributions`.
        device: as `contributions`.
        allow_drift: as `contributions`.
        memory: as `contributions`.
        progress: as `contributions`.
        out: HDF5 file to be written; default a temporary one.

    Raises:
        OutputExistsError: if `out` exists.
        TaskError, DriftError, DerivativeError, ReplayError: as `contributions`.
    """
    from trajrec.replay.folder.vectors import VectorFile

    question = Question(
        samples=None if samples is None else np.asarray(samples),
        curvature=curvature_of(exact, curvature),
        mode="tangent",
        steps=steps,
        certify="all",
        dtype=dtype,
        device=device,
        allow_drift=allow_drift,
    )
    session = Session.of(run, task, question, memory)
    scope = question.scope(session.samples, session.run.steps, None)
    folder = None if out is not None else tempfile.TemporaryDirectory(prefix="trajrec-")
    path = Path(out) if folder is None and out is not None else Path(str(folder and folder.name)) / "hypergradients.h5"
    dtype_name = str(session.dtype).removeprefix("torch.")
    vectors = VectorFile.create(path, scope.samples, session.layout.params, dtype_name, scope.curvature)
    result = Hypergradients(session, scope, path, folder, vectors)
    try:
        session.guarded(lambda: _fill(session, scope, result, progress or Silent()))
    except BaseException:
        result.close()
        path.unlink(missing_ok=True)
        raise
    return result


def _fill(session: Session, scope: Scope, result: Hypergradients, progress: Progress) -> None:
    if scope.curvature == "hessian":
        session.prove_derivative(forwards=True)
    with kept():
        TangentPasses(session, scope, Execution(progress)).run(result.write, np.zeros(0))
    result.certificate = session.certificate()
