"""What all sections of a config share: no unknown keys, no change after the check, and types as people write them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from dist_finetune.durations import parse_duration_s


def as_list(value: Any) -> Any:
    """One item, for a key that takes a list, is a list of one."""
    return [value] if isinstance(value, (str, int, float)) else value


def empty_section(value: Any) -> Any:
    """A section whose keys are all commented out is one with every default."""
    return {} if value is None else value


StringList = Annotated[tuple[str, ...], BeforeValidator(as_list, json_schema_input_type=str | list[str])]
DurationS = Annotated[float, BeforeValidator(parse_duration_s, json_schema_input_type=float | str)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
AutoOrPositive = Literal["auto"] | PositiveInt


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values don't change after the check."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1, so `epochs: true` would pass as one epoch."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            meaning = f" It takes: {field.description}" if field.description else ""
            raise ValueError(f"{str(value).lower()} has no meaning here.{meaning}")
        return value
