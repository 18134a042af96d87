"""Who may be what: the users and groups that each role admits. Values only, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

from kvd.process import Process
from kvd_shared.errors import NotAllowed

ROOT = 0


@dataclass(frozen=True, slots=True)
class Rule:
    """A role's own list. A process is on it by its user, its group or a supplementary group."""

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()

    def admits(self, process: Process) -> bool:
        return (
            process.uid in self.users
            or process.gid in self.groups
            or not self.groups.isdisjoint(process.groups)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The three lists. Who may be admin may be observer, too."""

    worker: Rule
    admin: Rule
    observer: Rule
    show_token_ids: bool = False  # in reports; digests stand for them otherwise

    @classmethod
    def standard(cls, uid: int, socket_gid: int) -> Access:
        """Where nothing is configured: who may open the sockets may work and look on; to change
        what is cached takes the daemon's own user, or root."""
        owners = frozenset({uid, ROOT})
        members = Rule(owners, frozenset({socket_gid}))
        return cls(worker=members, admin=Rule(owners), observer=members)

    def check(self, role: str, process: Process) -> None:
        """Raises NotAllowed unless the process may attach in that role."""
        rule: Rule = getattr(self, role)
        if rule.admits(process) or (role == "observer" and self.admin.admits(process)):
            return
        raise NotAllowed(
            f"user {process.uid}, group {process.gid}, may not attach as {role}: the operator of "
            f"kvd can name the user in access.{role}_users or a group of it in "
            f"access.{role}_groups",
            reason="role_not_allowed",
            role=role,
            uid=process.uid,
        )
