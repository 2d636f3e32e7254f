"""Whether a cache pays: arithmetic of passes, bytes and speeds, and a disk that is really written and read."""

from pathlib import Path

import pytest

from dist_finetune.cache.worth import SLOW_DISK, disk_speed, weigh

MIB, GIB = 2**20, 2**30


def test_a_cache_spares_all_passes_but_one_and_is_written_once_and_read_in_each() -> None:
    worth = weigh(num_passes=10, prefix_s=5.0, num_bytes=GIB, write_speed=GIB / 4, read_speed=GIB)
    assert worth.saved_s == pytest.approx(45.0)
    assert worth.stored_s == pytest.approx(4.0 + 10.0)
    assert worth.pays
    assert worth.reason == (
        "10 passes of 5 s through the frozen part become one, and 1,024 MiB take 14 s to write and read at 256 and "
        "1,024 MiB/s"
    )


@pytest.mark.parametrize(
    ("num_passes", "prefix_s", "num_bytes", "pays"),
    [
        (10, 100.0, GIB, True),
        (10, 100.0, 50 * GIB, False),  # a shallow prefix of large images: reading them back takes longer
        (1.5, 100.0, GIB, False),
        (3, 0.001, 1000, True),
    ],
)
def test_cheap_prefixes_of_many_bytes_do_not_pay_on_a_slow_disk(
    num_passes: float, prefix_s: float, num_bytes: int, pays: bool
) -> None:
    assert weigh(num_passes, prefix_s, num_bytes, SLOW_DISK, SLOW_DISK).pays is pays


def test_the_disk_is_measured_by_writing_and_reading(tmp_path: Path) -> None:
    write_speed, read_speed = disk_speed(tmp_path, 8 * 2**20)
    assert 2**20 < write_speed < 2**40
    assert 2**20 < read_speed < 2**40
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="gone"):
        disk_speed(tmp_path / "gone", 2**20)


@pytest.mark.parametrize(
    ("num_passes", "prefix_s", "num_bytes", "kept", "settled"),
    [
        (3, 0.0176, 120 * MIB, False, True),  # embeddings alone: hundredths of a second against ten
        (3, 0.6, 120 * MIB, False, False),  # a disk of 1 GiB/s would make it pay
        (3, 0.6, 10 * MIB, True, True),  # small, and pays
        (3, 0.001, 4 * MIB, True, True),  # half a second is no loss
        (10, 100.0, GIB, True, True),
        (10, 100.0, 50 * GIB, False, False),
    ],
)
def test_what_loses_is_not_kept_and_no_disk_is_measured_for_what_is_clear(
    num_passes: float, prefix_s: float, num_bytes: int, kept: bool, settled: bool
) -> None:
    worth = weigh(num_passes, prefix_s, num_bytes, SLOW_DISK, SLOW_DISK)
    assert (worth.is_kept, worth.is_settled) == (kept, settled)
