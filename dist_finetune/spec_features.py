"""What to extract and which heads to fit on it: section `features` of a config."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, field_validator

from dist_finetune.spec_base import Section, StringList, as_list

Pool = Literal["auto", "mean", "cls", "gap", "max", "pyramid"]
HeadKind = Literal["softmax", "svm", "rbf-svm"]
HeadList = Annotated[tuple[HeadKind, ...], BeforeValidator(as_list, json_schema_input_type=HeadKind | list[HeadKind])]


class FeaturesSpec(Section):
    at: StringList = ()
    """Depths, such as [stem, 4, "6-8", -1, head]: `stem` (or `embeddings`) is what the blocks read, a number the output
    of that block, `head` what the model's own classifier reads. Left out: all of them."""
    pool: Pool = "auto"
    """How the positions of a depth become one vector. mean: over a text's tokens or an image's positions; cls: the
    first token; gap: global average of a feature map; max; pyramid: averages of 1x1 and 2x2 cells of a feature map.
    auto: mean for tokens, gap for feature maps."""
    heads: HeadList = ("softmax", "svm", "rbf-svm")
    """softmax: multinomial logistic regression; svm: linear; rbf-svm: for up to 5,000 training rows."""
    class_weight: Literal["balanced"] | None = None
    """balanced: every class counts the same, whatever its number of rows."""

    @field_validator("heads")
    @classmethod
    def _some_once(cls, value: tuple[HeadKind, ...]) -> tuple[HeadKind, ...]:
        if not value:
            raise ValueError("name at least one of softmax, svm and rbf-svm")
        if len(set(value)) < len(value):
            raise ValueError(f"{', '.join(value)} names a head twice")
        return value
