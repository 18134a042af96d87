"""`kvdctl tree`: the prefixes that are cached, as the tree they form.

Message   {"op": "tree", "args": {"pool": nil, "max_nodes": 1000}}
Reply     {"pool": "default", "page_size": 16, "truncated": false, "namespaces": [{
           "model": "9c1e…", "weights_version": 0, "adapter": hex, "salt": hex, "nodes": [
           {"id": 7, "parent": nil, "pages": 26, "tokens": 416, "digest": "a1b2…",
            "holders": 2, "hits": 5, "priority": 35, "last_use_s": nil (held) or seconds ago,
            "expires_s": nil (never) or in seconds}]}]}
          Prompts are private: a digest names a node's tokens. Where the daemon's configuration
          permits it, admins get each node's "first_tokens", too (--tokens)
Command   kvdctl tree [--pool NAME] [--depth 3] [--sort use|pages] [--max-nodes 1000] [-o json]
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from kvd.admin.style import Style, count, duration, printable, shortened
from kvd.admin.verb import Reply, Verb, as_admin, as_observer, pool_argument, positive

DEFAULT_PRIORITY = 35  # everyone's; another one is said
Children = dict[int | None, list[Reply]]


def arguments(parser: ArgumentParser) -> None:
    pool_argument(parser)
    parser.add_argument("--depth", type=positive, metavar="N", help="show N levels below the root")
    parser.add_argument(
        "--sort",
        choices=("use", "pages"),
        default="use",
        help="siblings: held and lately used first (default), or those with most pages below",
    )
    parser.add_argument(
        "--max-nodes",
        type=positive,
        default=1000,
        metavar="N",
        help="ask for at most N (default: 1000)",
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="ask as admin, who sees token ids where access.show_token_ids is configured",
    )


def call(args: Namespace) -> Any:
    from kvd_shared import verbs

    return verbs.tree(args.pool, args.max_nodes)


def render(reply: Reply, style: Style, depth: int | None = None, sort: str = "use") -> str:
    lines = [f"pool {reply['pool']}"]
    for space in reply["namespaces"]:
        lines += ["", _space(space, style), *_nodes(space["nodes"], style, depth, sort)]
    if not reply["namespaces"]:
        lines.append("nothing is cached")
    if reply["truncated"]:
        shown = sum(len(space["nodes"]) for space in reply["namespaces"])
        lines += ["", f"cut after {count(shown, 'node')}"]
    return "\n".join(lines)


def _space(space: Reply, style: Style) -> str:
    nodes = space["nodes"]
    parts = [f"model {shortened(printable(space['model']))}", f"version {space['weights_version']}"]
    parts += [f"{key} {shortened(space[key])}" for key in ("adapter", "salt") if space[key]]
    total = count(sum(node["pages"] for node in nodes), "page")
    return f"{style.paint(', '.join(parts), 'bold')}: {count(len(nodes), 'node')}, {total}"


def _nodes(nodes: list[Reply], style: Style, depth: int | None, sort: str) -> Iterator[str]:
    children = _children(nodes)
    below = _totals(children)

    def order(node: Reply) -> float:
        if sort == "pages":
            return -below[node["id"]][1]
        return -1.0 if node["last_use_s"] is None else float(node["last_use_s"])

    def entries(parent: int | None, prefix: str, level: int) -> list[tuple[Reply, str, int, bool]]:
        """In reverse, for the stack."""
        siblings = sorted(children.get(parent, []), key=order)
        return [(node, prefix, level, node is siblings[-1]) for node in reversed(siblings)]

    # a stack, not recursion: a conversation of many turns is a deep tree
    stack = entries(None, "", 1)
    while stack:
        node, prefix, level, is_last = stack.pop()
        yield f"{prefix}{'└─ ' if is_last else '├─ '}{_node(node, style)}"
        inner = prefix + ("   " if is_last else "│  ")
        num_nodes, num_pages = below[node["id"]]
        if level != depth:
            stack += entries(node["id"], inner, level + 1)
        elif num_nodes > 1:
            hidden = f"{count(num_nodes - 1, 'node')}, {count(num_pages - node['pages'], 'page')}"
            yield f"{inner}└─ … {hidden}"


def _children(nodes: list[Reply]) -> Children:
    children: Children = {}
    for node in nodes:
        children.setdefault(node["parent"], []).append(node)
    return children


def _totals(children: Children) -> dict[int, tuple[int, int]]:
    """Nodes and pages at and below each node."""
    top_down = list(children.get(None, []))
    for node in top_down:  # grows while it is walked
        top_down += children.get(node["id"], [])
    totals: dict[int, tuple[int, int]] = {}
    for node in reversed(top_down):
        own = [totals[child["id"]] for child in children.get(node["id"], [])]
        totals[node["id"]] = (1 + sum(n for n, _ in own), node["pages"] + sum(p for _, p in own))
    return totals


def _node(node: Reply, style: Style) -> str:
    if node["holders"]:
        use = style.paint(f"held by {count(node['holders'], 'session')}", "green")
    elif node["last_use_s"] is None:
        use = style.paint("held below", "green")
    else:
        use = style.paint(f"used {duration(node['last_use_s'])} ago", "dim")
    size = f"{count(node['tokens'], 'token')}, {count(node['pages'], 'page')}"
    more = ""
    if node["priority"] != DEFAULT_PRIORITY:
        more += f", priority {node['priority']}"
    if node["expires_s"] is not None:
        more += f", expires in {duration(max(node['expires_s'], 0))}"
    if node.get("first_tokens"):
        more += f", begins {' '.join(str(token) for token in node['first_tokens'])}"
    return f"{node['digest']}  {size}, {count(node['hits'], 'hit')}, {use}{more}"


VERB = Verb(
    help="the cached prefixes and who holds them",
    arguments=arguments,
    call=call,
    page=lambda reply, style, args: render(reply, style, args.depth, args.sort),
    role=lambda args: as_admin(args) if args.tokens else as_observer(args),
)
