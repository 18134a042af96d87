"""The `kvdctl` command: looks at a running daemon."""

from kvd.admin.command import main

__all__ = ["main"]
