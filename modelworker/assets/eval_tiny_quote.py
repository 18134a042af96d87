"""Measure how exactly a folder of `train_tiny_quote.py` quotes texts that it never saw.

    python eval_tiny_quote.py FOLDER KIND=FILE[,FILE...] [KIND=FILE...] --trials 150

Per kind of text and length of the document, the share of trials in which every token was right:

    cue 8, cue 5   20 tokens after a cue of 8 or 5 tokens, from any place in the document, often the
                   middle of a word (tokens of the document itself, cut out at any place)
    sentence       the rest of a sentence, up to 24 tokens, after its first five words: the document
                   is whole sentences, and everything goes through the chat template as text

A cue counts only if it stands once in the document; otherwise there is no one right answer.
Greedy decoding gives an answer exactly when each of its tokens is the most likely one after those
before it, so one forward pass decides a trial; --generate also decodes that many token by token.
"""

import argparse
import pathlib
import random
import re
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

Trial = tuple[list[int], list[int]]  # prompt, answer


def anywhere(tok: Any, texts: list[str], length: int, cue: int, pick: random.Random) -> Trial:
    quote = tok.convert_tokens_to_ids("<|quote|>")
    ids = tok(pick.choice(texts)).input_ids
    while True:
        start, at = pick.randrange(len(ids) - length + 1), pick.randrange(length - cue - 20)
        doc = ids[start : start + length]
        first = doc[at : at + cue]
        if sum(doc[j : j + cue] == first for j in range(length - cue + 1)) == 1:
            return [*doc, quote, *first], doc[at + cue : at + cue + 20]


def sentence(tok: Any, texts: list[str], length: int, pick: random.Random) -> Trial:
    while True:
        parts = re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", pick.choice(texts))
        start, words = pick.randrange(len(parts)), 0
        doc = ""
        for part in parts[start:]:
            if len(tok(doc + " " + part).input_ids) > length:
                break
            doc, words = (doc + " " + part).strip(), words + 1
        if not words or len(tok(doc).input_ids) < 0.8 * length:
            continue
        chosen = pick.choice(parts[start : start + words])
        found = re.match(r"\S+(?: \S+){4}(?= )", chosen)
        if not found or doc.count(found[0]) != 1 or len(chosen) < len(found[0]) + 10:
            continue
        chat = [{"role": "system", "content": doc}, {"role": "user", "content": found[0]}]
        prompt = tok(tok.apply_chat_template(chat, tokenize=False)).input_ids
        answer = tok(chosen[len(found[0]) :]).input_ids[:24]
        return prompt, answer


@torch.no_grad()
def exact(model: LlamaForCausalLM, trials: list[Trial]) -> float:
    right = 0
    for prompt, answer in trials:
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, -len(answer) :]
        right += logits.argmax(-1).tolist() == answer
    return right / len(trials)


@torch.no_grad()
def decoded(model: LlamaForCausalLM, trials: list[Trial]) -> float:
    right = 0
    for prompt, answer in trials:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=len(answer), do_sample=False)
        right += out[0, len(prompt) :].tolist() == answer
    return right / len(trials)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("texts", nargs="+", metavar="KIND=FILE[,FILE...]")
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tok: Any = AutoTokenizer.from_pretrained(args.folder)
    model = LlamaForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    for text in args.texts:
        kind, files = text.split("=")
        texts = [pathlib.Path(f).read_text() for f in files.split(",")]
        for length in args.lengths:
            pick = random.Random(length)
            long = [t for t in texts if len(tok(t).input_ids) >= length]
            ways: dict[str, Any] = {
                "cue 8": lambda n, t, p: anywhere(tok, t, n, 8, p),
                "cue 5": lambda n, t, p: anywhere(tok, t, n, 5, p),
                "sentence": lambda n, t, p: sentence(tok, t, n, p),
            }
            line = f"{kind:12} {length:5}"
            for way, make in ways.items():
                if way == "sentence" and kind.startswith("code"):
                    continue
                trials = [make(length, long, pick) for _ in range(args.trials)]
                line += f"  {way} {exact(model, trials):.3f}"
                if args.generate:
                    line += f" (generated {decoded(model, trials[: args.generate]):.3f})"
            print(line, flush=True)


if __name__ == "__main__":
    main()
