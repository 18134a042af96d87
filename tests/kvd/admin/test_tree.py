from typing import Any

from kvd.admin.style import Style
from kvd.admin.tree import render


def node(
    id: int, parent: int | None, pages: int, last_use_s: float | None, holders: int = 0
) -> Any:
    return {
        "id": id,
        "parent": parent,
        "pages": pages,
        "tokens": pages * 16,
        "digest": f"d{id}",
        "holders": holders,
        "hits": id,
        "priority": 35,
        "last_use_s": last_use_s,
        "expires_s": None,
    }


def reply(*nodes: Any, truncated: bool = False, **space: Any) -> dict[str, Any]:
    identity = {"model": "9c1e77aa01bc23de", "weights_version": 2, "adapter": "", "salt": ""}
    spaces = [identity | space | {"nodes": list(nodes)}] if nodes else []
    return {"pool": "p", "page_size": 16, "namespaces": spaces, "truncated": truncated}


NODES = [
    node(1, None, 1, 700.0),
    node(2, None, 26, None),
    node(3, 2, 2, 3.5),
    node(4, 2, 1, None, holders=2),
    node(5, 1, 40, 700.0),
]


def test_siblings_in_use_come_first() -> None:
    assert render(reply(*NODES), Style()) == (
        "pool p\n"
        "\n"
        "model 9c1e77aa01bc…, version 2: 5 nodes, 70 pages\n"
        "├─ d2  416 tokens, 26 pages, 2 hits, held below\n"
        "│  ├─ d4  16 tokens, 1 page, 4 hits, held by 2 sessions\n"
        "│  └─ d3  32 tokens, 2 pages, 3 hits, used 3.5s ago\n"
        "└─ d1  16 tokens, 1 page, 1 hit, used 11m 40s ago\n"
        "   └─ d5  640 tokens, 40 pages, 5 hits, used 11m 40s ago"
    )


def test_or_those_with_most_pages_below() -> None:
    lines = render(reply(*NODES), Style(), sort="pages").splitlines()[3:]
    assert [line.replace("│", " ").split()[1] for line in lines] == ["d1", "d5", "d2", "d3", "d4"]


def test_depth_says_what_it_hides() -> None:
    lines = render(reply(*NODES), Style(), depth=1).splitlines()[3:]
    assert lines == [
        "├─ d2  416 tokens, 26 pages, 2 hits, held below",
        "│  └─ … 2 nodes, 3 pages",
        "└─ d1  16 tokens, 1 page, 1 hit, used 11m 40s ago",
        "   └─ … 1 node, 40 pages",
    ]
    assert "…" not in "".join(render(reply(*NODES), Style(), depth=2).splitlines()[3:])


def test_a_conversation_of_ten_thousand_turns_is_drawn() -> None:
    chain = [node(n, n - 1 if n else None, 1, 1.0) for n in range(10_000)]
    assert len(render(reply(*chain), Style(), depth=3).splitlines()) == 3 + 3 + 1
    assert len(render(reply(*chain[:2000]), Style()).splitlines()) == 2000 + 3


def test_namespaces_differ_in_what_is_set() -> None:
    text = render(reply(NODES[0], salt="74656e616e74", adapter="ff" * 32), Style())
    assert "adapter ffffffffffff…, salt 74656e616e74: 1 node, 1 page" in text


def test_nothing_and_too_much_are_said() -> None:
    assert render(reply(), Style()) == "pool p\nnothing is cached"
    cut = render(reply(*NODES, truncated=True), Style())
    assert cut.endswith("\n\ncut after 5 nodes")


def test_a_model_name_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in render(reply(NODES[0], model="\x1b[2Jx"), Style())


def test_what_is_unusual_about_a_node_is_said() -> None:
    unusual = node(1, None, 2, 3.5) | {"priority": 80, "expires_s": 61.0}
    assert render(reply(unusual), Style()).endswith("used 3.5s ago, priority 80, expires in 1m 1s")
