import io

import pytest

from kvd.admin.style import Style, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_want_them() -> None:
    assert Style.of(Terminal(), {}).color
    assert not Style.of(Terminal(), {"NO_COLOR": "1"}).color
    assert not Style.of(io.StringIO(), {}).color


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.94, "9.9s"),
        (59.9, "59s"),
        (60, "1m 0s"),
        (3661, "1h 1m"),
        (1e6, "11d 13h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
