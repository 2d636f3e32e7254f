"""Images as tensors: evaluation and augmentation transforms, and the map-style data set that applies them.

Evaluation repeats the transform a timm model was measured with: resize the short side, centre crop, normalise.
Augmentation draws its numbers from (seed, epoch, index) alone, so that a sample looks the same at any world size and
worker count.
"""

import io
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dist_finetune.data.image_input import ImageInput
from dist_finetune.data.targets import label_array, stacked_labels
from dist_finetune.tasks.names import TaskName

# Areas and aspect ratios of a random crop. More than half of the image on average: fine-tuning sets are small, and
# crops of a few percent, right for hundreds of ImageNet epochs, often miss the object.
CROP_AREA = (0.25, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CACHE_BYTES = 2**30  # of a machine, for the pixels of one split


def open_rgb(image: Mapping[str, Any]) -> Image.Image:
    """The decoded RGB image of `{"bytes": ..., "path": ...}`, upright. Raises what Pillow raises on damaged files."""
    source = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
    with Image.open(source) as opened:
        if opened.mode == "P" and "transparency" in opened.info:
            return ImageOps.exif_transpose(opened.convert("RGBA")).convert("RGB")
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):
            # Pillow makes all above 255 of 16 bits white in a grey image; in a coloured one it takes the high byte.
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright.convert("RGB")


def evaluation_pixels(image: Image.Image, image_input: ImageInput) -> Tensor:
    """uint8 (C, H, W): short side resized to size / crop_fraction, then the centre crop."""
    height, width = (math.floor(side / image_input.crop_fraction) for side in image_input.size)
    if height == width:
        size = [height]
    else:
        shrink = min(image.height / height, image.width / width)
        size = [round(image.height / shrink), round(image.width / shrink)]
    resized = functional.resize(image, size, InterpolationMode(image_input.interpolation))
    return functional.pil_to_tensor(functional.center_crop(resized, list(image_input.size)))


def augmented_pixels(image: Image.Image, image_input: ImageInput, seed: int, epoch: int, index: int) -> Tensor:
    """uint8 (C, H, W): a random resized crop, flipped half of the time; pure in image, seed, epoch and index."""
    draw = random.Random(f"{seed}/{epoch}/{index}")
    top, left, height, width = _random_crop(image.height, image.width, draw)
    mode = InterpolationMode(image_input.interpolation)
    pixels = functional.resized_crop(image, top, left, height, width, list(image_input.size), mode)
    return functional.pil_to_tensor(functional.horizontal_flip(pixels) if draw.random() < 0.5 else pixels)


def normalised(pixels: Tensor, image_input: ImageInput) -> Tensor:
    """float32 (C, H, W) of uint8 pixels: scaled to 0..1, less the mean, over the standard deviation."""
    scaled = pixels.to(torch.float32).div_(255)
    mean = torch.tensor(image_input.mean).view(-1, 1, 1)
    std = torch.tensor(image_input.std).view(-1, 1, 1)
    return scaled.sub_(mean).div_(std)


class ImageRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows `{"image": float32 (C, H, W), "label"}` of a table with columns "image" and "label", the latter as
    `label_array` gives it.

    Indexed by a row number, or by (epoch, row number) where augmentation should differ from epoch to epoch. Without
    augmentation the resized pixels stay in memory after their first use when all rows fit into `cache_bytes`.
    """

    def __init__(
        self,
        table: Dataset,
        image_input: ImageInput,
        augment: bool,
        seed: int,
        cache_bytes: int = CACHE_BYTES,
        task: TaskName = "classification",
        num_outputs: int = 1,
    ) -> None:
        self.table = table.cast_column("image", ImageFeature(decode=False)).with_format(None)
        self.labels = label_array(table, task, num_outputs)
        self.image_input = image_input
        self.augment = augment
        self.seed = seed
        row_bytes = len(image_input.mean) * image_input.size[0] * image_input.size[1]
        self._cached: dict[int, Tensor] | None = None
        if not augment and row_bytes * len(table) <= cache_bytes:
            self._cached = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = (int(item[0]), int(item[1])) if isinstance(item, tuple) else (0, int(item))
        return {"image": normalised(self._pixels(epoch, index), self.image_input), "label": self.labels[index]}

    def _pixels(self, epoch: int, index: int) -> Tensor:
        if self._cached is not None and index in self._cached:
            return self._cached[index]
        image = open_rgb(self.table[index]["image"])
        if self.augment:
            return augmented_pixels(image, self.image_input, self.seed, epoch, index)
        pixels = evaluation_pixels(image, self.image_input)
        if self._cached is not None:
            self._cached[index] = pixels
        return pixels


def collate_images(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """`{"inputs": float32 (B, C, H, W), "labels": see `stacked_labels`}` of rows that `ImageRows` gave.

    Channels lie last in memory, and convolutions keep it so: twice as fast for a depthwise CNN on a CPU, and the layout
    that tensor cores work in. Weights stay as they are, since ZeRO lays them end to end.
    """
    images = torch.stack([row["image"] for row in rows]).contiguous(memory_format=torch.channels_last)
    return {"inputs": images, "labels": stacked_labels(rows)}


def _random_crop(height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop; the largest one of a fitting aspect where ten draws don't fit."""
    for _ in range(10):
        area = height * width * draw.uniform(*CROP_AREA)
        aspect = math.exp(draw.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = draw.randint(0, height - crop_height), draw.randint(0, width - crop_width)
            return top, left, crop_height, crop_width
    crop_width = max(1, min(width, round(height * CROP_ASPECT[1])))
    crop_height = max(1, min(height, round(width / CROP_ASPECT[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
