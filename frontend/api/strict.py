"""What all objects in a request's body have in common: strict types, and null means the default. Pure."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, model_validator

MAX_FIELDS: Final = 256  # of one object


class Strict(BaseModel):
    """Fields nobody defines are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"an object should have at most {MAX_FIELDS} fields, not {len(data)}")
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data
