import pytest

from kvd_shared.sizes import PoolSize, format_bytes


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("256MiB", 256 << 20, "bytes"),
        (" 1.5 GiB ", 3 << 29, "bytes"),
        ("0.1KiB", 102, "bytes"),
        ("7 b", 7, "bytes"),
        ("4096 pages", 4096, "pages"),
        ("1page", 1, "pages"),
        ("123456789012 TiB", 123456789012 << 40, "bytes"),
    ],
)
def test_reads_what_people_write(text: str, amount: int, unit: str) -> None:
    size = PoolSize.parse(text)
    assert (size.amount, size.unit) == (amount, unit)


@pytest.mark.parametrize(
    "text",
    ["", "64", "64MB", "-1MiB", "1.5 pages", "MiB", "1e9 B", "½GiB", "٤٢ MiB", "4096 pagers"],
)
def test_anything_else_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(ValueError, match=r"256MiB or 4096 pages.*KiB.*pages"):
        PoolSize.parse(text)


def test_bytes_are_rounded_down_to_whole_pages() -> None:
    assert PoolSize(1000, "bytes").num_pages(300) == 3
    assert PoolSize(1000, "pages").num_pages(300) == 1000


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (9 << 18, "2.25 MiB"),
        (38 << 30, "38 GiB"),
        (41 << 28, "10.2 GiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_three_digits_are_shown(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
