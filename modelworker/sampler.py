"""Choose the next token of each sequence from its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modelworker.requests import SamplingParams

GREEDY_BELOW = 1e-5  # a temperature; dividing by less overflows float32


def new_generator(seed: int | None, index: int = 0) -> torch.Generator:
    """A sequence's own source of chance; `index` tells the continuations of one request apart.

    The same seed and index give the same draws; seed None draws a fresh seed.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed + index) % 2**63)
    return generator


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[int | None]:
    """One token id per row of logits [B, vocab]; row b by params[b], drawing from generators[b].

    A row's token depends on its own logits, params and generator alone; a greedy row draws
    nothing. None where a row holds NaN or infinity: its model computed nonsense.
    """
    best, ids = logits.max(dim=-1)  # NaN is the greatest to max, so it cannot hide
    sound: list[bool] = best.isfinite().tolist()
    tokens: list[int | None] = list(ids.tolist())
    for b, (row_params, generator) in enumerate(zip(params, generators, strict=True)):
        if not sound[b]:
            tokens[b] = None
        elif row_params.temperature >= GREEDY_BELOW:
            tokens[b] = _draw(logits[b], row_params, generator)
    return tokens


def _draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    probabilities, ids = candidates(logits, params)
    choice = int(torch.multinomial(probabilities, 1, generator=generator))
    return choice if ids is None else int(ids[choice])


def candidates(
    logits: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What may be drawn from logits [vocab]: probabilities and, unless all in order, token ids.

    Temperature first, then the `top_k` likeliest, then of those the fewest whose share reaches
    `top_p`; at least one is left. The probabilities need not sum to 1.
    """
    scaled = (logits - logits.max()).float() / params.temperature  # at most 0: exp cannot overflow
    if not params.top_k and params.top_p >= 1:
        return scaled.softmax(dim=-1), None
    top_k = min(params.top_k, len(scaled)) or len(scaled)
    scaled, ids = scaled.topk(top_k)  # falling
    probabilities = scaled.softmax(dim=-1)
    if params.top_p < 1:
        share_before = probabilities.cumsum(dim=-1) - probabilities
        kept = max(1, int((share_before < params.top_p).sum()))
        probabilities, ids = probabilities[:kept], ids[:kept]
    return probabilities, ids
