"""What a user declares of one column of a source: its type and what is valid in it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

VALUE = ConfigDict(extra="forbid", arbitrary_types_allowed=True, use_attribute_docstrings=True)
"""Pydantic's settings of every declared value."""

DType = Literal["string", "int64", "float64", "bool", "timestamp"]

_REFERENCE = re.compile(r"^[a-z][a-z0-9_-]*\.\w+$")


@dataclass(frozen=True, config=VALUE)
class Col:
    """What one column of a source must be."""

    dtype: DType
    """Type of its values; `timestamp` is microseconds, UTC."""
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

    @model_validator(mode="after")
    def _rules_fit_the_type(self) -> Col:
        numbers = self.dtype in ("int64", "float64")
        if not numbers and (self.ge is not None or self.le is not None):
            raise ValueError(f"ge and le are for numbers, not for {self.dtype}")
        if self.dtype != "string" and self.one_of is not None:
            raise ValueError(f"one_of is for strings, not for {self.dtype}")
        if self.references is not None and not _REFERENCE.match(self.references):
            raise ValueError(f"references={self.references!r}: write '<source>.<column>', e.g. 'planes.tailnum'")
        return self
