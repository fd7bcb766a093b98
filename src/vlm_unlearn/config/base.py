"""What every config is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]  # of a whole, not percent


class Strict(BaseModel):
    """Base of every config: no unknown keys, values can't be changed afterwards.

    The text below a field says what it is for, in the code, in `model_fields` and in the documentation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
