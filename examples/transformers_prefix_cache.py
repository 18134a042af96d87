"""Prefix caching for a plain transformers model: what one process has computed, the next one reads.

    kvd serve --model DIR --socket-dir /tmp/kvd &
    python examples/transformers_prefix_cache.py --model DIR --socket-dir /tmp/kvd "Once upon"

The second run with the same beginning finds it cached, and so does a modelworker of the same model.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvd_shared import verbs
from kvd_shared.client import KvdClient
from kvd_shared.errors import NoPages
from kvd_shared.lease import GEOMETRY
from kvd_shared.model_folder import model_fingerprint, read_model_folder
from kvd_shared.namespace import Namespace
from kvd_shared.refs import PageRefs, page_ids
from kvd_shared.socket_dir import default_socket_dir


class PrefixCache:
    """The pool's pages as keys and values for a transformers model.

    Both tensors are the pool: [pages, layers, 2 (k, v), kv_heads, page_size, head_dim].
    """

    def __init__(self, kvd: KvdClient, namespace: Namespace) -> None:
        assert kvd.pool is not None
        assert kvd.mapping is not None
        self.kvd, self.namespace, self.layout = kvd, namespace, kvd.pool.layout
        self._num_bytes = kvd.mapping.num_bytes
        self._read = self._tensor(kvd.mapping.read_address)
        self._write = self._tensor(kvd.mapping.write_address)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.layout.dtype)
        return dtype

    def load(self, prompt: list[int], cache: DynamicCache) -> PageRefs:
        """Put the longest cached prefix of the prompt into an empty cache; returns its pages,
        which are held."""
        found = self.kvd.call(verbs.match(self.namespace, prompt))
        if found.num_matched_pages:
            pages = self._read[rows(found.refs)]
            for layer in range(self.layout.num_layers):
                key, value = (self._joined(pages[:, layer, kv]) for kv in (0, 1))
                cache.update(key, value, layer)
        return found.refs

    def store(self, tokens: list[int], cache: DynamicCache, held: PageRefs) -> int:
        """Publish the full pages of a cache of these tokens, behind the held ones that `load` gave,
        and free all; returns how many were new to the pool."""
        size = self.layout.page_size
        first, last = len(held), len(tokens) // size
        num_new, mine, canonical = 0, held[:0], held[:0]
        if last > first:
            try:
                mine = self.kvd.call(verbs.allocate(last - first))
            except NoPages as e:
                print(f"not cached: {e}")
        if len(mine):
            part = slice(first * size, last * size)
            for number, layer in enumerate(cache.layers):
                for kv, whole in enumerate((layer.keys, layer.values)):
                    self._write[rows(mine), number, kv] = self._in_pages(whole[0, :, part])
            after = int(held[-1]) if first else None
            done = self.kvd.call(verbs.publish(self.namespace, tokens[part], mine, after))
            num_new, canonical = done.num_new, done.refs
        # Where another process had published the same tokens before, its pages are held, too.
        self.kvd.call(verbs.free(list({*held.tolist(), *mine.tolist(), *canonical.tolist()})))
        return num_new

    def _tensor(self, address: int) -> torch.Tensor:
        memory = (ctypes.c_char * self._num_bytes).from_address(address)
        at = self.layout
        shape = (-1, at.num_layers, 2, at.num_kv_heads, at.page_size, at.head_dim)
        return torch.frombuffer(memory, dtype=self.dtype).view(shape)

    def _joined(self, pages: torch.Tensor) -> torch.Tensor:
        """[pages, kv_heads, page_size, head_dim] as [1, kv_heads, tokens, head_dim]"""
        return pages.transpose(0, 1).flatten(1, 2).unsqueeze(0)

    def _in_pages(self, tokens: torch.Tensor) -> torch.Tensor:
        """[kv_heads, tokens, head_dim] as [pages, kv_heads, page_size, head_dim]"""
        heads, num_tokens, head_dim = tokens.shape
        size = self.layout.page_size
        return tokens.reshape(heads, num_tokens // size, size, head_dim).transpose(0, 1)


def rows(refs: PageRefs) -> torch.Tensor:
    return torch.from_numpy(page_ids(refs)).long()


@torch.inference_mode()
def generate(model: Any, prefixes: PrefixCache, prompt: list[int], max_new: int) -> list[int]:
    """The greedy continuation of a prompt, computed behind what is cached of it."""
    cache = DynamicCache(config=model.config)
    held = prefixes.load(prompt, cache)
    num_cached = len(held) * prefixes.layout.page_size
    input_ids = torch.tensor([prompt])
    output: torch.Tensor = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        max_new_tokens=max_new,
        do_sample=False,
    )
    tokens: list[int] = output[0].tolist()
    num_new = prefixes.store(tokens[: cache.get_seq_length()], cache, held)
    print(f"cached: {num_cached} of {len(prompt)} prompt tokens; {num_new} pages added")
    return tokens[len(prompt) :]


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate text behind cached prefixes.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--socket-dir", type=Path, metavar="DIR", help="of the running kvd")
    parser.add_argument("--max-new-tokens", type=int, default=20, metavar="N")
    parser.add_argument("prompt")
    args = parser.parse_args()

    folder = read_model_folder(args.model)
    fingerprint = model_fingerprint(args.model)
    with KvdClient.attach(
        args.socket_dir or default_socket_dir(os.environ),
        name="transformers",
        geometry={name: getattr(folder, name) for name in GEOMETRY},
        model=fingerprint,
    ) as kvd:
        prefixes = PrefixCache(kvd, Namespace(model=fingerprint))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=prefixes.dtype)
        prompt = tokenizer(args.prompt)["input_ids"]
        tokens = generate(model, prefixes, prompt, args.max_new_tokens)
        print(f"tokens: {tokens}")
        print(args.prompt + tokenizer.decode(tokens))


if __name__ == "__main__":
    main()
