"""How a model wants its images; apart from the transforms, which take seconds to import."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageInput:
    """What a model takes: pixels (H, W), the statistics to normalise by, and how its evaluation images were resized."""

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_fraction: float = 0.875
