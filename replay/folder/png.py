"""A PNG from an array: the few lines of the format that a thumbnail needs, so that no imaging library is required.

Eight bits, grey or RGB, one IDAT chunk, every line unfiltered; larger pictures are thinned by whole steps.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from trajrec.records import Array

LARGEST = 64


def png(picture: npt.ArrayLike, largest: int = LARGEST) -> bytes:
    """The picture as a PNG file.

    Args:
        picture: [H, W], [1, H, W], [3, H, W] or [H, W, 3]; uint8 0..255, or floats: 0..1 as they are, any other
            range (normalised images) stretched from its least to its greatest value.
        largest: pixels of the longer side at most.

    Raises:
        ValueError: the shape is not that of a picture.
    """
    pixels = _pixels(_channels_last(np.asarray(picture)))
    step = max(1, -(-max(pixels.shape[:2]) // largest))
    pixels = np.ascontiguousarray(pixels[::step, ::step])
    height, width, channels = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _channels_last(picture: Array) -> Array:
    if picture.ndim == 2:
        return picture[:, :, None]
    if picture.ndim == 3 and picture.shape[0] in (1, 3):
        return np.moveaxis(picture, 0, 2)
    if picture.ndim == 3 and picture.shape[2] in (1, 3):
        return picture
    raise ValueError(f"A picture has shape [H, W], [1, H, W], [3, H, W] or [H, W, 3], not {list(picture.shape)}.")


def _pixels(picture: Array) -> npt.NDArray[np.uint8]:
    if picture.dtype == np.uint8:
        return picture
    values = np.nan_to_num(picture.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    if low < 0 or high > 1:
        values = (values - low) / ((high - low) or 1.0)
    return np.round(255 * values).astype(np.uint8)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
