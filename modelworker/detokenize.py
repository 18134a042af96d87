"""Token ids to text as they come: no half characters, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from modelworker.tokenizer import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an incomplete character decode to
_MAX_OPEN = 8  # tokens: a character takes up to 4, and U+FFFD itself, before it, looks unfinished
_WINDOW = 12  # tokens that are decoded again with each new one, before the window moves on


class IncrementalText:
    """The text of one sequence. Concatenated, the pieces are the decoded sequence, cut before the
    stop string that is complete first; how the tokens were split over pushes changes nothing.

    `stopped`: a stop string was completed; no more text will come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        """No stop string may be empty."""
        self._decoder = _Decoder(tokenizer)
        self._stops = [_Matcher(text) for text in stop]
        self._held = ""  # the longest end of the text that begins a stop string
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens settle: what may still change or become a stop is held."""
        return "".join([self._release(self._decoder.push(token_id)) for token_id in token_ids])

    def flush(self) -> str:
        """The rest, when no token will follow."""
        text = self._release(self._decoder.flush())
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, new: str) -> str:
        if self.stopped or not new:
            return ""
        text = self._held + new
        if not self._stops:
            return text
        for seen, character in enumerate(new, start=len(self._held) + 1):
            complete = [len(stop.text) for stop in self._stops if stop.feed(character)]
            if complete:
                self.stopped, self._held = True, ""
                return text[: seen - max(complete)]
        cut = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[cut:]
        return text[:cut]


class _Decoder:
    """Decodes a window of the last tokens, so that a token's cost does not grow with the text.

    Exact for all text. Bytes that are no UTF-8 become U+FFFD as in the whole decoding, except that
    a byte-fallback decoder, which judges whole runs of bytes, may give another number of them.

    0 <= `_given` <= len(decode(`_window`)): characters of the window's text that were returned.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0
        self._settled = 0  # tokens of the window that end in a whole character
        self._previous = 0  # the same, one whole character earlier

    def push(self, token_id: int) -> str:
        if not self._tokenizer.has_text(token_id):
            return ""  # heading a window, it would let the next token be treated as the first
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if not text.endswith(_UNFINISHED):
            self._previous, self._settled = self._settled, len(self._window)
            known, movable = len(text), True
        elif len(self._window) - self._settled < _MAX_OPEN:
            known, movable = len(text.rstrip(_UNFINISHED)), False
        else:  # invalid bytes: no character is that long, and only the last may still be one
            known, movable = len(text) - 1, True
        new = text[self._given : known]
        self._given = max(self._given, known)
        if movable and len(self._window) > _WINDOW:
            self._move_on(whole=known == len(text))
        return new

    def flush(self) -> str:
        new = self._tokenizer.decode(self._window)[self._given :]
        self._given += len(new)
        return new

    def _move_on(self, whole: bool) -> None:
        """Keeps the last character's tokens: a decoder treats the first token of all apart."""
        start = self._previous if whole else len(self._window) - _MAX_OPEN
        tail = self._window[start:]
        text = self._tokenizer.decode(tail)
        if text.endswith(_UNFINISHED) == whole:
            return  # cut so, the bytes read differently; a later place will do
        self._window = tail
        self._given = len(text) if whole else len(text) - 1
        self._previous, self._settled = 0, len(tail) if whole else 0


class _Matcher:
    """How much of one stop string the text so far ends with, character by character.

    `matched`: length of the longest beginning of `text` that the characters fed so far end with.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._shorter = [0]  # [k]: the next shorter match to try when k + 1 characters matched
        for end in range(1, len(text)):
            self._shorter.append(self._advance(self._shorter[end - 1], text[end]))

    def feed(self, character: str) -> bool:
        """True where the stop string is complete; the matcher is not used after that."""
        self.matched = self._advance(self.matched, character)
        return self.matched == len(self.text)

    def _advance(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched - 1]
        return matched + (self.text[matched] == character)
