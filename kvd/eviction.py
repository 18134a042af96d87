"""Which unprotected node's pages go next: tenants first, then priorities, then the policy.

1. A tenant over its maximum share gives up its own.
2. Then whoever is not within a minimum share: the lowest priority of all, the longest unused first
   where tenants tie.
3. A tenant within its minimum share comes last: its cached pages stay as long as anything else
   can go, and no running request is ever refused for their sake.

Among the nodes of one tenant and one priority the configured policy decides (kvd.policies).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvd.node import Node
from kvd.options import CacheOptions, TenantShare, pages_of
from kvd.policies import POLICIES, Policy
from kvd_shared.namespace import Namespace


class Tenant:
    """The namespaces of one salt, or all that have no share of their own (`share` is None).

    Invariant: `num_pages` is the number of tree pages of its namespaces; `levels` has one policy
    for each priority in use, and together they order exactly its unprotected nodes, but for those
    that wait for their children to go first.
    """

    def __init__(self, share: TenantShare | None, num_pages: int, ttl_s: float | None) -> None:
        self.name = (share.name or "unnamed") if share else "others"
        self.min_pages = pages_of(share.min_share, num_pages) if share else 0
        self.max_pages = pages_of(share.max_share, num_pages) if share else num_pages
        self.ttl_s = share.ttl_s if share and share.ttl_s is not None else ttl_s
        self.num_pages = 0
        self.levels: dict[int, Policy] = {}  # by priority, in rising order

    @property
    def first(self) -> tuple[int, Policy] | None:
        """The lowest priority of which something is unprotected."""
        for priority, policy in self.levels.items():
            if policy:
                return priority, policy
        return None


class EvictionOrder:
    """Invariant: a node stands in at most one policy, the one that `node.order` names, and only
    while it is unprotected."""

    def __init__(self, num_pages: int, options: CacheOptions) -> None:
        self._new_policy: Callable[[], Policy] = lambda: POLICIES[options.policy](num_pages)
        self._others = Tenant(None, num_pages, options.ttl_s)
        self._by_salt = {t.salt: Tenant(t, num_pages, options.ttl_s) for t in options.tenants}
        self.tenants = [self._others, *self._by_salt.values()]
        self._only: Policy | None = None  # while one tenant has used one priority
        self.alone = len(self.tenants) == 1
        self._any_policy = self._new_policy()  # for `alike`, which asks about two nodes only

    def tenant_of(self, namespace: Namespace) -> Tenant:
        return self._by_salt.get(namespace.salt, self._others)

    def add(self, node: Node) -> None:
        """The node has become unprotected, or is the end of a path again."""
        levels = node.root.tenant.levels
        policy = levels.get(node.priority)
        if policy is None:
            policy = levels[node.priority] = self._new_policy()
            node.root.tenant.levels = dict(sorted(levels.items()))
            self._only = policy if self.alone and len(levels) == 1 else None
        node.order = policy
        policy.add(node)

    def discard(self, node: Node) -> None:
        """The node is protected, or gone. One that waits for its children stands nowhere."""
        if node.order is not None:
            node.order.discard(node)
            node.order = None

    def victim(self, of: Tenant | None = None) -> Node:
        """The node whose last pages go next, of one tenant if given; it has no children.

        The caller has checked that something is unprotected. A node whose children have not gone
        yet is put aside; the tree adds it again when the last of them does.
        """
        if of is None and self._only is not None:
            node = self._only.victim()
            if not node.children:
                return node
        while True:
            tenant = self._others if of is None and self.alone else of
            if tenant is None:
                policy = self._next_policy()
            else:
                for policy in tenant.levels.values():
                    if policy:
                        break
            node = policy.victim()
            if not node.children:
                return node
            self.discard(node)

    def alike(self, parent: Node, child: Node) -> bool:
        return self._any_policy.alike(parent, child)

    def in_order(self) -> Iterator[Node]:
        """All nodes that stand in an order; for checks."""
        for tenant in self.tenants:
            for policy in tenant.levels.values():
                yield from policy

    def allowance(self, node: Node) -> int:
        """How many pages of this victim may go before another node's turn could come."""
        assert node.order is not None
        pages, tenant = node.order.portion(node), node.root.tenant
        if self.alone or tenant.num_pages <= tenant.min_pages:
            return pages
        over = tenant.num_pages - tenant.max_pages
        return min(pages, over if over > 0 else tenant.num_pages - tenant.min_pages)

    def _next_policy(self) -> Policy:
        ranked: list[tuple[tuple[int, int, float], int, Policy]] = []
        for tenant in self.tenants:
            if first := tenant.first:
                priority, policy = first
                within = tenant.num_pages <= tenant.min_pages
                standing = 0 if tenant.num_pages > tenant.max_pages else 2 if within else 1
                key = (standing, priority, policy.victim().last_use_s)
                ranked.append((key, len(ranked), policy))
        assert ranked, "nothing is unprotected"
        return min(ranked)[2]
