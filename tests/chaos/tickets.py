"""How light workers pass the tickets of sequences to each other: one file a ticket."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path as FilePath

from tests.chaos.content import Path


class Tickets:
    """In the folder of a run; a ticket goes to one taker, who has renamed its file."""

    def __init__(self, folder: FilePath, name: str) -> None:
        self._folder, self._name = folder / "tickets", name
        self._folder.mkdir(exist_ok=True)

    def put(self, ticket: bytes, path: Path, tokens: int) -> None:
        file = self._folder / f"{ticket.hex()}.new"
        file.write_text(json.dumps([path.number, tokens]))
        file.rename(file.with_suffix(".ticket"))

    def take(self) -> tuple[bytes, Path, int] | None:
        """One that some worker has put there and nobody has taken."""
        for file in self._folder.glob("*.ticket"):
            mine = file.with_suffix(f".{self._name}")
            with suppress(FileNotFoundError):
                file.rename(mine)
                number, tokens = json.loads(mine.read_text())
                mine.unlink()
                return bytes.fromhex(file.stem), Path.of(number), tokens
        return None
