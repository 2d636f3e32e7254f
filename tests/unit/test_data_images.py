"""Evaluation pixels equal timm's; augmentation depends on seed, epoch and index alone; the cache changes nothing."""

import io
import random
from itertools import product

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from timm.data import create_transform, resolve_data_config

from dist_finetune.data import images
from dist_finetune.data.encode import encode_table
from dist_finetune.data.images import ImageInput, ImageRows, collate_images, evaluation_pixels, normalised, open_rgb
from dist_finetune.plan import DataPlan

SIZES = [(40, 60), (97, 33), (64, 64), (20, 21), (300, 200)]


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise, so that resizing modes and crops differ visibly."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    slope = np.linspace(0, 190, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    return Image.fromarray((noise + slope).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> dict[str, object]:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return {"bytes": out.getvalue(), "path": None}


@pytest.fixture(scope="module")
def table() -> Dataset:
    rows = {"image": [encoded(photo(*size, seed)) for seed, size in enumerate(SIZES)], "label": [0, 1, 0, 1, 1]}
    return Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": Value("int64")}))


@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 32, 32), "crop_pct": 0.875, "interpolation": "bicubic"},
        {
            "input_size": (3, 48, 48),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5,) * 3,
            "std": (0.4,) * 3,
        },
        {"input_size": (3, 33, 50), "crop_pct": 0.9, "interpolation": "bicubic"},
        {"input_size": (3, 224, 224), "crop_pct": 0.95, "interpolation": "bilinear"},
    ],
)
def test_evaluation_equals_timm(table: Dataset, config: dict[str, object]) -> None:
    resolved = resolve_data_config(config)
    transform = create_transform(**resolved)
    image_input = ImageInput(
        resolved["input_size"][1:], resolved["mean"], resolved["std"], resolved["interpolation"], resolved["crop_pct"]
    )
    rows = ImageRows(table, image_input, augment=False, seed=0)
    for i, source in enumerate(table):
        torch.testing.assert_close(rows[i]["image"], transform(source["image"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["L", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_upright_rgb(kind: str) -> None:
    form = "JPEG" if kind == "CMYK" else "PNG"
    assert open_rgb(encoded(photo(10, 20).convert(kind), form)).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    assert open_rgb(encoded(photo(10, 20), "JPEG", exif=exif)).size == (10, 20)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_shades(kind: str) -> None:
    shades = np.arange(0, 2**16, 256, dtype=np.uint16).reshape(16, 16)
    rgb = np.asarray(open_rgb(encoded(Image.fromarray(shades), kind)))
    assert (rgb == (shades >> 8)[:, :, None]).all()


def test_augmentation_is_of_seed_epoch_and_index_alone(table: Dataset) -> None:
    image_input = ImageInput((24, 24))
    first = ImageRows(table, image_input, augment=True, seed=5)
    forwards = {key: first[key]["image"] for key in product(range(2), range(5))}
    random.seed(1)
    torch.manual_seed(1)
    again = ImageRows(table, image_input, augment=True, seed=5)
    for key in reversed(forwards):
        assert torch.equal(again[key]["image"], forwards[key])
    assert torch.equal(first[3]["image"], forwards[0, 3])
    assert not torch.equal(forwards[0, 3], forwards[1, 3])
    assert not torch.equal(ImageRows(table, image_input, augment=True, seed=6)[0, 3]["image"], forwards[0, 3])


def test_crops_vary_and_flips_come_about_half_of_the_time() -> None:
    # Red grows to the right and green downwards: a flip turns the slope of red around.
    ramp = np.zeros((60, 60, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(60)[None, :] * 4, np.arange(60)[:, None] * 4
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    table = Dataset.from_dict({"image": [encoded(Image.fromarray(ramp))] * 100, "label": [0] * 100}, features=features)
    rows = ImageRows(table, ImageInput((16, 16)), augment=True, seed=0)
    images = torch.stack([rows[i]["image"] for i in range(100)])
    flipped = (images[:, 0, :, 0] > images[:, 0, :, -1]).all(1).sum().item()
    assert 30 <= flipped <= 70
    assert (images[:, 1, -1] > images[:, 1, 0]).all()  # never upside down
    assert images[:, 1].mean(dim=(1, 2)).std() > 0.1


def test_the_cache_changes_no_value_and_keeps_to_its_limit(table: Dataset) -> None:
    image_input = ImageInput((32, 32))
    kept = ImageRows(table, image_input, augment=False, seed=0)
    plain = ImageRows(table, image_input, augment=False, seed=0, cache_bytes=5 * 3 * 32 * 32 - 1)
    for _ in range(2):
        for i in range(5):
            image = kept[i]["image"]
            assert torch.equal(image, plain[i]["image"])
            image.zero_()  # a caller's change must not reach the cache
    assert kept._cached is not None
    assert len(kept._cached) == 5
    assert plain._cached is None


@pytest.mark.parametrize(("num_workers", "num_ranks", "is_kept"), [(0, 1, True), (2, 1, False), (0, 2, False)])
def test_processes_of_a_machine_share_the_limit_of_the_cache(
    table: Dataset, monkeypatch: pytest.MonkeyPatch, num_workers: int, num_ranks: int, is_kept: bool
) -> None:
    monkeypatch.setattr(images, "CACHE_BYTES", 5 * 3 * 32 * 32)
    data = DataPlan({"train": 5}, ("a", "b"), "image", ("image",), ("label",), "", None, (32, 32), num_workers)
    rows = encode_table(table, data, ImageInput((32, 32)), "cpu", None, num_ranks=num_ranks)
    assert (rows.dataset._cached is not None) == is_kept


def test_batches(table: Dataset) -> None:
    rows = ImageRows(table, ImageInput((16, 24)), augment=False, seed=0)
    batch = collate_images([rows[np.int64(i)] for i in range(5)])
    assert batch["inputs"].shape == (5, 3, 16, 24)
    assert batch["inputs"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 1, 0, 1, 1]
    assert batch["labels"].dtype == torch.int64
    pixels = evaluation_pixels(photo(*SIZES[2], seed=2), rows.image_input)
    assert torch.equal(batch["inputs"][2], normalised(pixels, rows.image_input))
