"""`kvdctl pages`: a map of a pool's pages.

Message   {"op": "pages", "args": {"pool": nil}}
Reply     {"pool": "default", "num_pages": 4096, "counts": {"free": 4000, "leased": 0, "writing": 0,
           "active": 90, "cached": 6, "duplicate": 0, "quarantined": 0},
           "map": one byte a page, a kvd_shared.page_state.PageState}
Command   kvdctl pages [--pool NAME] [--rows 24] [-o json]
          JSON has the map as a string of digits, and the states' names in their order as "states".
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from kvd.admin.page_states import LEGENDS, name_of
from kvd.admin.style import Style, count, percent
from kvd.admin.verb import Reply, Verb, as_observer, pool_argument, positive
from kvd_shared.page_state import PageState

DEFAULT_ROWS = 24


def arguments(parser: ArgumentParser) -> None:
    pool_argument(parser)
    parser.add_argument(
        "--rows",
        type=positive,
        default=DEFAULT_ROWS,
        metavar="N",
        help="at most so many rows: in a large pool a character stands for several pages "
        f"(default: {DEFAULT_ROWS})",
    )


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.pages(args.pool)


def as_json(reply: Reply) -> Reply:
    digits = "".join(map(str, reply["map"]))
    return reply | {"map": digits, "states": [name_of(state) for state in PageState]}


def render(reply: Reply, style: Style, rows: int = DEFAULT_ROWS) -> str:
    states, total = bytes(reply["map"]), reply["num_pages"]
    margin = len(str(total - 1)) + 1
    cells_a_row = max(1, style.width - margin)
    pages_a_cell = -(-total // (cells_a_row * rows))
    cells = bytes(
        _cell(states[first : first + pages_a_cell]) for first in range(0, total, pages_a_cell)
    )
    lines = [f"pool {reply['pool']}: {count(total, 'page')}{_scale(pages_a_cell)}"]
    for first in range(0, len(cells), cells_a_row):
        row = cells[first : first + cells_a_row]
        lines.append(f"{first * pages_a_cell:>{margin - 1}} {_painted(row, style)}")
    lines.append("")
    for state, legend in LEGENDS.items():
        pages = states.count(state)
        lines.append(
            f"{style.paint(legend.mark, legend.color)} {name_of(state):<11} {pages:>{margin + 2},} "
            f"{percent(pages, total):>7}  {legend.meaning}"
        )
    return "\n".join(lines)


def _scale(pages_a_cell: int) -> str:
    if pages_a_cell == 1:
        return ""
    return f", {pages_a_cell} a character: the most frequent state, but quarantined always shows"


def _cell(states: bytes) -> int:
    if PageState.QUARANTINED in states:
        return PageState.QUARANTINED
    return max(PageState, key=states.count)


def _painted(cells: bytes, style: Style) -> str:
    """Runs of one state share one colour sequence."""
    text, first = "", 0
    for end in range(1, len(cells) + 1):
        if end == len(cells) or cells[end] != cells[first]:
            legend = LEGENDS[PageState(cells[first])]
            text += style.paint(legend.mark * (end - first), legend.color)
            first = end
    return text


VERB = Verb(
    help="a map of a pool's pages",
    arguments=arguments,
    call=call,
    page=lambda reply, style, args: render(reply, style, args.rows),
    json=as_json,
    role=as_observer,
)
