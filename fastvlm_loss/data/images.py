"""Encoded pictures to uint8 [size, size, 3]: transparency on white before resizing, a cap on pixels before decoding."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 50_000_000  # a photograph of 8660 x 5773; above it a file is more likely an attack or a poster


class BadImage(Exception):
    """A picture that cannot be used; the message says why in a few words."""


def decode(source: bytes | Path, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode, turn upright (EXIF), put on white, resize the shorter side and cut the centre: uint8 [size, size, 3].

    Raises BadImage for what is no readable picture, and for more than ``max_pixels`` pixels, before decoding them.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit here
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                if picture.width * picture.height > max_pixels:
                    raise BadImage("too many pixels")
                picture.draft("RGB", (2 * size, 2 * size))  # JPEG only: decode at a fraction of the size
                upright = on_white(ImageOps.exif_transpose(picture))
        return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC), np.uint8)
    except Image.DecompressionBombError:
        raise BadImage("too many pixels") from None
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        raise BadImage(f"not a readable picture ({type(error).__name__})") from error


def on_white(picture: Image.Image) -> Image.Image:
    """An RGB picture: transparent parts show white, not the colour hidden beneath them (often black)."""
    from PIL import Image

    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture.convert("RGB")
    layered = picture.convert("RGBA")
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB")
