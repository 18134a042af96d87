"""A chat workload, and what an exact LRU cache makes of it.

200 conversations share a system prompt of 2,048 tokens. In each of its 20 turns a conversation
brings 100 tokens of the user's and takes 200 of the answer, all of which stay in the next turn's
prompt: it grows by 300 a turn. The order of the 4,000 turns is drawn at random (seeded).
With the sizes of the peers' measurement (2,048 / 200 / 20 / 300) an exact LRU of whole pages finds
0.9787 of all prompt tokens when nothing has to go, whatever the order of the turns; in 20,000 pages
it finds 0.66 to 0.67, by the order.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from kvd_shared.layout import pages_needed
from kvd_shared.refs import TOKEN_BYTES
from tests.benchmarks.workload import PAGE_SIZE, Tokens

SYSTEM, QUESTION, ANSWER = 2048, 100, 200  # tokens
CONVERSATIONS, TURNS = 200, 20
ROOMY, TIGHT = 110_000, 20_000  # pages
ROOMY_HIT_RATE = 0.9787


@dataclass(frozen=True, slots=True)
class Turn:
    conversation: int
    prompt: bytes  # token ids
    whole: bytes  # the prompt and its answer


def turns(seed: int = 0) -> Iterator[Turn]:
    """All turns of all conversations, in their order."""
    tokens = Tokens(seed)
    system = tokens.take(SYSTEM)
    texts = [system + tokens.take(TURNS * (QUESTION + ANSWER)) for _ in range(CONVERSATIONS)]
    order = [conversation for conversation in range(CONVERSATIONS) for _ in range(TURNS)]
    random.Random(seed).shuffle(order)
    taken = [0] * CONVERSATIONS
    for conversation in order:
        before = SYSTEM + taken[conversation] * (QUESTION + ANSWER)
        taken[conversation] += 1
        text = texts[conversation]
        prompt = text[: (before + QUESTION) * TOKEN_BYTES]
        yield Turn(conversation, prompt, text[: (before + QUESTION + ANSWER) * TOKEN_BYTES])


def exact_lru_hit_rate(all_turns: list[Turn], num_pages: int) -> float:
    """Matched over asked tokens of a plain model: every page by itself, the least recently used
    one goes, and of those that were used at once the last of the prompt goes first."""
    names = _Names()
    unheld: OrderedDict[int, None] = OrderedDict()
    asked = matched = 0
    for turn in all_turns:
        num_tokens = len(turn.prompt) // TOKEN_BYTES
        full = names.of(turn)
        most = (num_tokens - 1) // PAGE_SIZE
        found = next((i for i, page in enumerate(full[:most]) if page not in unheld), most)
        asked, matched = asked + num_tokens, matched + found * PAGE_SIZE
        for page in full[:found]:  # held now: not to be evicted
            del unheld[page]
        taken = pages_needed(len(turn.whole), PAGE_SIZE * TOKEN_BYTES)
        while len(unheld) + taken > num_pages:
            unheld.popitem(last=False)
        for page in reversed(full):
            unheld[page] = None
            unheld.move_to_end(page)
    return matched / asked


class _Names:
    """A number for every page, the same where the tokens up to its end are the same.

    Invariant: `_known` has, of each conversation, the full pages of its longest text so far.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, bytes], int] = {}  # by the page before and its own tokens
        self._known: dict[int, list[int]] = {}

    def of(self, turn: Turn) -> list[int]:
        """The full pages of the turn's whole text."""
        step = PAGE_SIZE * TOKEN_BYTES
        known = self._known.setdefault(turn.conversation, [])
        count = len(turn.whole) // step
        for i in range(len(known), count):
            key = (known[-1] if known else -1, turn.whole[i * step : (i + 1) * step])
            known.append(self._numbers.setdefault(key, len(self._numbers)))
        return known[:count]
