"""What it costs to compute a node's pages anew, compared with the first of a prompt."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvd_shared.refs import TOKEN_BYTES

if TYPE_CHECKING:
    from kvd.node import Node

# A token costs 2 FLOPs a weight, and 4 a layer, hidden dimension and token that comes before it.
# With 8e9 weights, 32 layers of 4096: 16e9 + 524e3 * position, which is twice the first term here.
TWICE_AT = 1 << 15  # tokens


def recompute_cost(node: Node) -> int:
    """In half powers of two, of the node's middle page."""
    page_tokens = len(node.tokens) // TOKEN_BYTES / node.num_pages
    middle = (node.depth + node.num_pages / 2) * page_tokens
    return round(2 * math.log2(1 + middle / TWICE_AT))
