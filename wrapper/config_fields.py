"""What the fields of the pools document are made of: scalars with what they may be, and the section.

Knows none of the fields themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a field may hold, in words that complete "allowed: ..."; `choices`: what to guess from."""

    words: str
    choices: tuple[str, ...] = ()


# Scalars are strict: a number in quotes or a 1 for true is a slip of the pen, not a value.
Whole = Annotated[int, Strict()]
Seconds = Annotated[float, Strict(), Field(gt=0, le=31_536_000, allow_inf_nan=False)]
Text = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00]*$")]
Positive = Annotated[int, Strict(), Field(ge=1, le=1_000_000_000)]

Workers = Annotated[int, Strict(), Field(ge=1, le=10_000), Allowed("a whole number from 1 to 10000")]
Time = Annotated[Seconds, Allowed("a number of seconds above 0, at most a year")]
TimeOrNever = Annotated[
    Seconds | None, Allowed("a number of seconds above 0, at most a year, or null for no limit")
]
Milliseconds = Annotated[
    float,
    Strict(),
    Field(gt=0, le=3_600_000, allow_inf_nan=False),
    Allowed("a number of milliseconds above 0, at most 3600000"),
]
YesNo = Annotated[bool, Strict(), Allowed("true or false")]
CountOrNever = Annotated[Positive | None, Allowed("a whole number of at least 1, or null for never")]
Argv = Annotated[tuple[Text, ...], Allowed("a list of strings, the program first, none of them empty")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
