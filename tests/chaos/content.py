"""What the light workers' pages say: a page's bytes follow from the tokens before and in it.

The slot of token i holds 64-bit words that depend on all tokens from 0 to i, their order, and the
namespace. So whoever reads a page can tell whether it is what it claims to be, slot by slot, and a
page of another prompt, of another use, or that is half written, never passes for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import numpy as np
import numpy.typing as npt

from kvd_shared.layout import PoolLayout
from kvd_shared.namespace import Namespace
from kvd_shared.refs import TokenIds

LAYOUT = PoolLayout(num_layers=1, num_kv_heads=1, head_dim=8, page_size=16, dtype="float32")
PAGE_SIZE = LAYOUT.page_size  # tokens
LANES = LAYOUT.bytes_per_token // 8  # 64-bit words a slot
NAMESPACES = tuple(Namespace(model="chaos", salt=salt) for salt in (b"", b"one", b"two"))
VOCABULARY = 1 << 20

Words = npt.NDArray[np.uint64]
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Path:
    """One sequence of the universe: a document, what follows it, and where it branches off.

    Branch 0 is the document and its suffix; a higher one leaves it at `Universe.fork_at`.
    """

    doc: int
    suffix: int
    branch: int = 0

    @property
    def number(self) -> int:
        """For histories; `Path.of` reads it."""
        return self.doc << 16 | self.suffix << 8 | self.branch

    @classmethod
    def of(cls, number: int) -> Path:
        return cls(number >> 16, number >> 8 & 0xFF, number & 0xFF)


@dataclass(frozen=True, slots=True)
class Universe:
    """All sequences that workers of one seed can compute: finite, so that what one has published
    can be looked for later by anybody who knows the seed."""

    seed: int
    documents: int = 24
    suffixes: int = 4
    branches: int = 1  # besides the stem
    doc_pages: int = 6  # mean
    own_pages: int = 5  # mean, behind the document

    def namespace(self, path: Path) -> Namespace:
        return NAMESPACES[path.doc % len(NAMESPACES)]

    def tokens(self, path: Path) -> TokenIds:
        """The whole sequence, int32; read-only."""
        return _tokens(self, path)

    def prompt_length(self, path: Path) -> int:
        """How many of the tokens a request brings; the rest grows token by token."""
        return len(self.document(path.doc)) + 1 + (path.suffix * 7 + path.doc * 3) % 21

    def fork_at(self, path: Path) -> int:
        """Where the branches leave the stem, in tokens; behind the prompt."""
        return min(self.prompt_length(path) + 3 + path.doc % 18, len(self.tokens(stem(path))) - 1)

    def document(self, doc: int) -> TokenIds:
        return _document(self, doc)

    def paths(self) -> list[Path]:
        """Every stem."""
        return [Path(d, s) for d in range(self.documents) for s in range(self.suffixes)]

    def words(self, path: Path) -> Words:
        """What the slots of the sequence's tokens hold: uint64[tokens, LANES]; read-only."""
        return _words(self, path)


def stem(path: Path) -> Path:
    return Path(path.doc, path.suffix)


def slot_words(namespace: Namespace, tokens: TokenIds) -> Words:
    """uint64[tokens, LANES]: for each token, of all tokens up to it."""
    places = np.arange(1, len(tokens) + 1, dtype=np.uint64)
    salt = np.uint64(crc32(namespace.to_wire()) << 20)
    each = _mix(_mix(tokens.astype(np.uint64) + salt) ^ places * np.uint64(_GOLDEN))
    prefixes = _mix(np.cumsum(each, dtype=np.uint64))
    lanes = np.arange(1, LANES + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return _mix(prefixes[:, None] + lanes[None, :])


def _mix(words: Words) -> Words:
    """A bijection of 64-bit words whose every input bit moves half of the output bits: two
    multiplications with odd numbers between shifts (the finaliser of splitmix64)."""
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)


@lru_cache(4096)
def _document(universe: Universe, doc: int) -> TokenIds:
    """A quarter of each document is common to all of its namespace."""
    mean = universe.doc_pages * PAGE_SIZE
    rng = np.random.default_rng([universe.seed, 1, doc])
    common = np.random.default_rng([universe.seed, 2, doc % len(NAMESPACES)])
    head = common.integers(VOCABULARY, size=mean // 4)
    rest = rng.integers(VOCABULARY, size=int(rng.integers(mean // 4, 5 * mean // 4)))
    return np.concatenate([head, rest]).astype(np.int32)


@lru_cache(4096)
def _tokens(universe: Universe, path: Path) -> TokenIds:
    mean = universe.own_pages * PAGE_SIZE
    rng = np.random.default_rng([universe.seed, 3, path.doc, path.suffix, path.branch])
    own = rng.integers(VOCABULARY, size=int(rng.integers(mean // 2, 3 * mean // 2)) + 24)
    if not path.branch:
        tokens = np.concatenate([universe.document(path.doc), own]).astype(np.int32)
    else:
        shared = _tokens(universe, stem(path))[: universe.fork_at(path)]
        tokens = np.concatenate([shared, own]).astype(np.int32)
    tokens.flags.writeable = False
    return tokens


@lru_cache(1024)
def _words(universe: Universe, path: Path) -> Words:
    words = slot_words(universe.namespace(path), universe.tokens(path))
    words.flags.writeable = False
    return words
