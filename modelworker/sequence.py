"""One continuation of one prompt, and where it stands."""

from __future__ import annotations

import torch

from kvd_shared.layout import pages_needed
from kvd_shared.namespace import Namespace
from modelworker.detokenize import IncrementalText
from modelworker.requests import Emit, GenerationRequest

NEVER = float("-inf")  # a time


class Sequence:
    """Tokens, and the pages that hold their K and V.

    ```
    token_ids   [0 ............ prompt ............)[ generated )
    refs        [ in the tree, held )[ full, ours )[ filling )[ for later )[ leased ahead )
                0                   num_published           num_computed tokens
    ```
    Invariants: num_published pages are full and, as kvd has answered, in the tree; num_published <=
    num_offered, of which kvd has been told; num_computed <= num_tokens; while waiting a sequence
    holds no page and nothing of it is computed. Those that follow a leader have no token of their
    own as long as they are in its `followers`.
    """

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        namespace: Namespace,
        text: IncrementalText,
        generator: torch.Generator,
        emit: Emit,
        arrived_s: float,
    ) -> None:
        self.request = request
        self.index = index  # of the request's n
        self.namespace = namespace
        self.text = text
        self.generator = generator
        self.emit = emit
        self.arrived_s = arrived_s
        self.number: int | None = None  # kvd's, by age
        self.leader: Sequence | None = None  # until it is forked from it, or starts by itself
        self.followers: list[Sequence] = []  # those that take its prompt and their first token
        self.finished = False
        self.publishes = request.use_cache  # False also once its KV is not wanted any more
        self.token_ids: list[int] = list(request.prompt_ids)
        self.refs: list[int] = []
        self.num_computed = 0  # tokens whose K and V are in the pages
        self.num_published = 0  # pages
        self.num_offered = 0  # pages
        self.num_leased = 0  # of the last pages, which are not to be written yet
        self.cached_tokens: int | None = None  # found at the first admission
        self.refused = False  # when it last asked to be admitted: kvd keeps pages for it now
        self.probed_tokens = 0  # what the cache would give, when it was last asked
        self.probed_s = NEVER
        self.futile_waits = 0  # for others' computing, in a row
        self.strikes = 0  # sessions that ended by what looks like a bug while it was there

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def age(self) -> int:
        """Its number: a lower one is older."""
        assert self.number is not None
        return self.number

    @property
    def is_forking(self) -> bool:
        """It has its first token, and kvd has been asked for its pages."""
        return self.leader is not None and self.num_generated > 0

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is to be computed."""
        return self.num_computed > 0 and self.num_uncomputed == 1

    def pages_missing(self, page_size: int) -> int:
        """Pages that its tokens need and it does not have."""
        return max(0, pages_needed(self.num_tokens, page_size) - len(self.refs))

    def num_full_pages(self, page_size: int) -> int:
        return self.num_computed // page_size

    def pages_reached(self, page_size: int) -> list[int]:
        """Leased pages that its tokens need now. They count as in use from here."""
        first = len(self.refs) - self.num_leased
        reached = self.refs[first : pages_needed(self.num_tokens, page_size)]
        self.num_leased -= len(reached)
        return reached

    def pages_ahead(self) -> list[int]:
        """Gives up the leased pages that it has not reached; returns their references."""
        first = len(self.refs) - self.num_leased
        ahead = self.refs[first:]
        del self.refs[first:]
        self.num_leased = 0
        return ahead

    def back_to_waiting(self) -> list[int]:
        """Forget all pages; returns their references. The tokens stay, to be computed again."""
        refs, self.refs = self.refs, []
        self.num_computed = self.num_published = self.num_offered = self.num_leased = 0
        return refs

    def begin_anew(self) -> None:
        """The pool is gone, and with it the number. The tokens stay."""
        self.back_to_waiting()
        self.number = None
        self.refused = False
        self.probed_tokens, self.probed_s, self.futile_waits = 0, NEVER, 0
        self.publishes = self.request.use_cache
        if self.num_generated:
            self.leader = None

    def __repr__(self) -> str:
        return f"<sequence {self.number} of {self.request.request_id}>"
