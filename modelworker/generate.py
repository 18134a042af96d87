"""`modelworker generate`: one continuation in this process alone, over pages of its own."""

from __future__ import annotations

from collections.abc import Iterator

from kvd_shared.errors import BadRequest
from kvd_shared.layout import pages_needed
from modelworker.detokenize import IncrementalText
from modelworker.model import Model
from modelworker.pool_view import PoolView
from modelworker.requests import BadLogits, RequestTooLong, SamplingParams
from modelworker.runner import ModelRunner, SequenceChunk
from modelworker.sampler import new_generator, sample
from modelworker.tokenizer import Tokenizer

PAGE_SIZE = 16


def generate(
    model: Model, tokenizer: Tokenizer, prompt: str, params: SamplingParams
) -> Iterator[str]:
    """The text as it comes. Raises RequestTooLong where prompt and max_tokens pass the context."""
    token_ids = tokenizer.encode(prompt)
    if not token_ids:
        raise BadRequest("the prompt has no tokens")
    config, total = model.config, len(token_ids) + params.max_tokens
    if total > config.context_length:
        raise RequestTooLong(
            f"{len(token_ids)} prompt tokens and max_tokens {params.max_tokens} make {total}; "
            f"the model's context is {config.context_length} tokens",
            wanted=total,
            limit=config.context_length,
        )
    block_table = range(pages_needed(total, PAGE_SIZE))
    runner = ModelRunner(model, PoolView.private(config.layout(PAGE_SIZE), len(block_table)))
    generator = new_generator(params.seed)
    text = IncrementalText(tokenizer, params.stop)
    start, new = 0, token_ids
    for _ in range(params.max_tokens):
        logits = runner.run([SequenceChunk(new, start, block_table, wants_logits=True)])
        (token,) = sample(logits, [params], [generator])
        if token is None:
            raise BadLogits("the model computed NaN or infinity: are its weights whole?")
        if token in tokenizer.eos_ids:
            break
        start, new = start + len(new), [token]
        yield text.push(new)
        if text.stopped:
            return
    yield text.flush()
