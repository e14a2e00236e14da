"""What a user declares of one column of a source: its type and what is valid in it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

VALUE = ConfigDict(extra="forbid", arbitrary_types_allowed=True, use_attribute_docstrings=True)
"""Pydantic's settings of every declared value."""

DType = Literal["string", "int64", "float64", "bool", "timestamp", "media"]

MEDIA_TYPES = (
    *(f"image/{kind}" for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff")),
    *(f"audio/{kind}" for kind in ("wav", "flac", "ogg", "mpeg", "mp4")),
    "video/mp4",
    "application/pdf",
    "application/json",
)
"""Media types that are told by their bytes; `text/…` beside them."""

_PLACE = re.compile(r"^((https?|s3|gs|gcs|abfss?|az)://[^/?#@\\\s]+)?/([^?#\\\s]*/)?$")
_REFERENCE = re.compile(r"^[a-z][a-z0-9_-]*\.\w+$")


@dataclass(frozen=True, config=VALUE)
class Col:
    """What one column of a source must be."""

    dtype: DType
    """Type of its values; `timestamp` is microseconds, UTC; `media` is an image, a sound or a text: bytes or a URL."""
    nullable: bool = False
    """Whether a row may lack it."""
    ge: float | None = None
    """Smallest valid value."""
    le: float | None = None
    """Largest valid value."""
    one_of: tuple[str, ...] | None = None
    """The only valid strings, if they are known."""
    max_null_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Largest share of nulls in a batch of 100 rows or more; a batch with more of them is refused as a whole."""
    references: str | None = None
    """`<source>.<column>` of another source of the pipeline: the value must stand there when the row is ingested."""
    media_types: tuple[str, ...] | None = None
    """What a column of media may hold, e.g. `("image/png", "image/jpeg")`; held against the bytes themselves."""
    max_bytes: Annotated[int, Field(ge=1)] = 16 << 20
    """Largest value of a column of media."""
    urls: tuple[str, ...] = ()
    """Where values of a column of media may lie that come as URLs: folders, such as `https://host/photos/`,
    `s3://bucket/` or `/data/photos/`; absent: none is taken, and nothing is fetched."""

    @model_validator(mode="after")
    def _rules_fit_the_type(self) -> Col:
        numbers = self.dtype in ("int64", "float64")
        if not numbers and (self.ge is not None or self.le is not None):
            raise ValueError(f"ge and le are for numbers, not for {self.dtype}")
        if self.dtype != "string" and self.one_of is not None:
            raise ValueError(f"one_of is for strings, not for {self.dtype}")
        if (self.dtype == "media") != (self.media_types is not None):
            raise ValueError("a column of media needs media_types, and no other column has them")
        if self.urls and self.dtype != "media":
            raise ValueError(f"urls are for media, not for {self.dtype}")
        for place in self.urls:
            if not _PLACE.match(place):
                raise ValueError(
                    f"urls={place!r}: write a folder, e.g. 'https://host/photos/', 's3://bucket/', '/data/'"
                )
        strange = [m for m in self.media_types or () if m not in MEDIA_TYPES and not m.startswith("text/")]
        if strange:
            raise ValueError(f"media types {strange} can not be told by their bytes: known are {MEDIA_TYPES}, text/…")
        if self.references is not None and self.dtype in ("media", "bool"):
            raise ValueError(f"a column of {self.dtype} can not refer to another")
        if self.references is not None and not _REFERENCE.match(self.references):
            raise ValueError(f"references={self.references!r}: write '<source>.<column>', e.g. 'planes.tailnum'")
        return self


def is_textual(media_type: str) -> bool:
    """Whether values of the type are UTF-8 text."""
    return media_type.startswith("text/") or media_type == "application/json"
