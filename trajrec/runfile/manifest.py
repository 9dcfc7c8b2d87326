"""What is known of a recording from its first moment: spec and options, as JSON with a CRC-32."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from trajrec.checksum import crc32
from trajrec.errors import NewerFormatError, NotARunError
from trajrec.records import RunSpec
from trajrec.typed import typed

FORMAT = "trajrec recording"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a recording from its first moment.

    Attributes:
        spec: of the run.
        output: name of the packed file.
        keep: "steps" or "keyframes".
        compression: "zstd" or "none".
        resumed: steps the recording was taken up again at.
    """

    spec: RunSpec
    output: str
    keep: str
    compression: str
    resumed: tuple[int, ...] = ()

    @property
    def plain_rows(self) -> bool:
        """Whether rows lie in a file of their own, and not in the segments."""
        return self.keep == "steps" and self.compression == "none"

    def to_json(self) -> str:
        """The manifest as text, with a checksum."""
        body = json.dumps({**asdict(self), "spec": self.spec.to_json()}, indent=1)
        return json.dumps({"format": FORMAT, "version": VERSION, "crc32": crc32(body.encode())}) + "\n" + body


def parse_manifest(head: str, body: str, path: Path) -> Manifest:
    """The manifest of these two texts.

    Raises:
        NotARunError: it is none. NewerFormatError: as it says. ValueError, KeyError, TypeError: it is damaged.
    """
    about = json.loads(head)
    if about["format"] != FORMAT:
        raise NotARunError(f"{path} is not a recording of trajrec.")
    if type(about["version"]) is not int:
        raise ValueError(f"its version reads {about['version']!r:.40}")
    if about["version"] > VERSION:
        raise NewerFormatError(f"{path} was written by a newer trajrec (version {about['version']}). Update trajrec.")
    if about["crc32"] != crc32(body.encode()):
        raise ValueError("its text does not match its checksum")
    values = json.loads(body)
    manifest = typed(Manifest, {**values, "spec": RunSpec.from_json(values["spec"])})
    if manifest.keep not in ("steps", "keyframes") or manifest.compression not in ("zstd", "none"):
        raise ValueError(f"keep {manifest.keep!r:.40} and compression {manifest.compression!r:.40} are not known")
    if min(manifest.resumed, default=0) < 0:
        raise ValueError("resumptions should be steps")
    return manifest
