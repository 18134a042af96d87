from typing import Any

from kvd.admin.page_states import LEGENDS
from kvd.admin.pages import as_json, render
from kvd.admin.style import Style
from kvd_shared.page_state import PageState


def reply(states: bytes) -> dict[str, Any]:
    return {"pool": "default", "num_pages": len(states), "counts": {}, "map": states}


def test_one_character_a_page_while_they_fit() -> None:
    lines = render(reply(bytes([1, 2, 3, 4, 5, 6, 7, 8, 0])), Style(width=80)).splitlines()
    assert lines[:3] == ["pool default: 9 pages", "0 w▓█▒dqlx░", ""]
    legend = {line.split()[1]: line for line in lines[3:]}
    assert legend.keys() == {state.name.lower() for state in PageState}
    assert legend["free"] == "░ free           1  11.1 %  holds nothing"


def test_rows_are_as_wide_as_the_terminal_and_numbered() -> None:
    lines = render(reply(bytes(100)), Style(width=43)).splitlines()
    assert lines[1:4] == [" 0 " + "░" * 40, "40 " + "░" * 40, "80 " + "░" * 20]
    assert max(map(len, lines[1:4])) == 43


def test_a_large_pool_shows_the_most_frequent_state_of_several_pages() -> None:
    states = bytes([2, 2, 0] * 10 + [4, 0, 0] * 10)
    lines = render(reply(states), Style(width=23), rows=1).splitlines()
    assert lines[0].startswith("pool default: 60 pages, 3 a character")
    assert lines[1] == " 0 " + "▓" * 10 + "░" * 10


def test_a_single_quarantined_page_is_never_hidden() -> None:
    states = bytearray(10_000)
    states[1234] = 6
    rows = render(reply(bytes(states)), Style(width=50), rows=2).splitlines()[1:3]
    assert "".join(rows).count("q") == 1


def test_the_map_never_has_more_rows_than_asked_for() -> None:
    for num_pages in (1, 39, 40, 41, 1000, 4097):
        text = render(reply(bytes(num_pages)), Style(width=40), rows=3)
        assert len(text.split("\n\n")[0].splitlines()) <= 1 + 3


def test_a_run_of_pages_is_coloured_once() -> None:
    text = render(reply(bytes([3, 3, 3, 6])), Style(color=True, width=40))
    assert "0 \x1b[32m███\x1b[0m\x1b[31mq\x1b[0m" in text


def test_json_has_the_map_as_digits_with_their_names() -> None:
    shown = as_json(reply(bytes([0, 3, 6])))
    assert shown["map"] == "036"
    assert shown["states"][3] == "shared"


def test_every_state_is_drawn_in_its_own_way() -> None:
    assert LEGENDS.keys() == set(PageState)
    assert len({legend.mark for legend in LEGENDS.values()}) == len(PageState)
