"""What one sequence computes in one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvd_shared.refs import page_ids
from modelworker.runner import SequenceChunk
from modelworker.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_complete(self) -> bool:
        """Its last token is the sequence's newest: the logits give the next one."""
        return self.num_tokens == self.sequence.num_uncomputed

    def for_runner(self) -> SequenceChunk:
        """The chunk as the model computes it; its last token's logits give the next token."""
        s = self.sequence
        return SequenceChunk(
            s.token_ids[s.num_computed : s.num_computed + self.num_tokens],
            s.num_computed,
            page_ids(np.array(s.refs, dtype=np.int64)),
            self.is_complete,
        )
