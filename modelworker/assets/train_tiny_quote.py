"""Train `tiny-quote`, a Llama of about a million parameters that quotes the document it is given.

    python train_tiny_quote.py --minutes 60 --threads 1 --out tiny-quote

The skill: `document<|quote|>first words` is continued verbatim from the document, whatever the
document is about. It is what an induction circuit does and nothing else: the model knows no
language. A run starts from random weights and lasts --minutes, about an hour on one or two CPU
cores; every hundred steps it writes a Hugging Face folder, which `eval_tiny_quote.py` measures.

Data: docstrings and source of the Python standard library that this script runs on (Python
Software Foundation licence); sentences of random words, random tokens, phrases and near copies.

What mattered, most first: many quotes per document, so that nearly half of all tokens are scored;
a warm-up on repeats of random tokens with a random period (a fixed period teaches a positional
copy, which is useless); Muon for the matrices; a small vocabulary; lengths that grow as the loss
falls; scoring a token only where the quote so far determines it, and more where a short context
would not; a large rope_theta, which leaves dimensions that match content at any distance.

Licence of this file and of the weights: Apache-2.0.
"""

import argparse
import ast
import json
import pathlib
import random
import re
import sysconfig
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, LONGEST, END, QUOTE = 512, 2048, 0, 1
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 192, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": LONGEST, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'assistant' and not loop.first %}<|quote|>{% endif %}"
    "{{ m.content }}{% endfor %}"
)
OWNERS = ast.Module | ast.ClassDef | ast.FunctionDef  # of docstrings
Array = npt.NDArray[Any]


class Data:
    def __init__(self, seed: int) -> None:
        self.rng, self.py = np.random.default_rng(seed), random.Random(seed)
        docs, sources = [], []
        for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
                continue
            source = path.read_text(errors="ignore")
            nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, OWNERS))
            docs += [d for n in nodes if (d := ast.get_docstring(n)) and len(d) > 80]
            sources.append(source[:20000])
        self.py.shuffle(docs)
        self.py.shuffle(sources)
        self.tok = Tokenizer(models.BPE())
        self.tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tok.decoder = decoders.ByteLevel()
        every, special = sorted(pre_tokenizers.ByteLevel.alphabet()), ["<|end|>", "<|quote|>"]
        bpe = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=every)
        self.tok.train_from_iterator(docs, bpe)
        words = sorted({w for d in docs for w in re.findall(r"[a-z]{2,12}", d)})
        made = [self.sentences(words) for _ in range(800)]
        encoded = (self.tok.encode_batch(texts) for texts in (docs, sources[:250], made))
        self.streams = [np.array([t for e in batch for t in e.ids]) for batch in encoded]
        self.spaced = np.array(["Ġ" in (self.tok.id_to_token(i) or "") for i in range(VOCAB)])

    def sentences(self, words: list[str]) -> str:
        """Sentences of random words, names, numbers and letters, from a bank of words."""
        py, out, letters = self.py, "", "abcdefghijklmnopqrstuvwxyz"
        bank = py.sample(words, py.choice((30, 200, len(words))))
        for _ in range(py.randint(10, 60)):
            line = py.choices(bank, k=py.randint(4, 22))
            for i, word in enumerate(line):
                noise = "".join(py.choices(letters, k=py.randint(2, 9)))
                kinds = (word, word.capitalize(), str(py.randrange(10 ** py.randint(1, 5))), noise)
                line[i] = py.choices(kinds, (80, 8, 6, 6))[0] + py.choice(",;" + 18 * " ").strip()
            end = py.choice(".....?!") + py.choice((" ", " ", " ", "\n", "\n\n"))
            out += " ".join(line).capitalize() + end
        return out

    def document(self, n: int, text: bool) -> Array:
        rng = self.rng
        if text:
            stream = self.streams[rng.choice(3, p=(0.5, 0.2, 0.3))]
            doc = stream[(start := rng.integers(0, len(stream) - n)) : start + n].copy()
        else:
            few = rng.permutation(VOCAB - 2)[: int(2 ** rng.uniform(4, 9 if n % 2 else 12))] + 2
            doc = rng.choice(few, n)
            if rng.random() < 0.35:  # phrases that come back in other company
                phrases = [rng.choice(few, rng.integers(2, 9)) for _ in range(rng.integers(4, 40))]
                phrases += [rng.choice(few, rng.integers(1, 6)) for _ in range(len(phrases) // 2)]
                doc = np.concatenate([phrases[i] for i in rng.integers(0, len(phrases), n)])[:n]
        if rng.random() < 0.4:  # near copies of a passage, some of its tokens changed
            size = int(rng.integers(8, max(9, n // 5)))
            for _ in range(rng.integers(1, 4)):
                a, b = rng.integers(0, n - size, 2)
                copy, other = doc[a : a + size].copy(), rng.random(size) < rng.uniform(0.03, 0.25)
                copy[other] = doc[rng.integers(0, n, other.sum())]
                doc[b : b + size] = copy
        return doc

    def quote(self, doc: Array, text: bool, pad: Array, hard: Array) -> tuple[Array, Array]:
        """One quote and its weights: scored where the quote so far determines the next token."""
        rng, n = self.rng, len(doc)
        size = min(int(rng.integers(14, 72)), n - 1)
        a = int(rng.integers(0, n - size + 1)) if rng.random() < 0.97 else n - size
        traps = np.flatnonzero(hard > 3)
        if len(traps) and rng.random() < 0.4:  # through a place where four tokens do not suffice
            a = int(np.clip(rng.choice(traps) - rng.integers(5, 24), 0, n - size))
        if text and rng.random() < 0.6:  # from the beginning of a word
            later = np.flatnonzero(self.spaced[doc[a : n - size]])
            a += int(later[0]) if len(later) else 0
        size += a + size == n  # the end of the document is quoted as <|end|>
        ids, w, starts = pad[a : a + size], np.zeros(size), np.flatnonzero(doc == doc[a])
        for i in range(1, size):
            starts = starts[starts + i <= n]
            same = pad[starts + i] == ids[i]
            w[i] = hard[a + i] if i >= 3 and same.all() else 0
            starts = starts[same]
        if text and self.spaced[ids[0]] and rng.random() < 0.6:  # " Word" of the text, cued "Word"
            near = ids[:24].tolist()
            cue = self.tok.encode(self.tok.decode(near).removeprefix(" ")).ids
            k = 0
            while k < min(len(cue), len(near)) and cue[-1 - k] == near[-1 - k]:
                k += 1
            new, old = len(cue) - k, len(near) - k
            if old < 8:
                w[:old] = 0
                ids, w = np.append(cue[:new], ids[old:]), np.append(np.zeros(new), w[old:])
        return np.append(QUOTE, ids), np.append(0, w)

    def batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        x, w = np.zeros((rows, length), np.int64), np.zeros((rows, length), np.float32)
        for i in range(rows):
            text, at = self.rng.random() < 0.6, int(length * self.rng.uniform(0.3, 0.8))
            doc = x[i, :at] = self.document(at, text)
            pad = np.append(doc, END)
            hard = 1 + ambiguous(pad, 2) + 3 * ambiguous(pad, 4)
            while at < length:
                ids, weights = self.quote(doc, text, pad, hard)
                ids, weights = ids[: length - at], weights[: length - at]
                x[i, at : at + len(ids)], w[i, at : at + len(ids)] = ids, weights
                at += len(ids)
        return torch.from_numpy(x), torch.from_numpy(w)

    def repeats(self, rows: int, length: int, distinct: int) -> tuple[Tensor, Tensor]:
        """x x x ...: different random tokens, repeated with a random period."""
        x, w = np.zeros((rows, length), np.int64), np.zeros((rows, length), np.float32)
        for i in range(rows):
            period = int(self.rng.integers(6, length // 2 - 2))
            x[i] = np.resize(self.rng.permutation(distinct - 2)[:period] + 2, length)
            w[i, period + 2 :] = 1
        return torch.from_numpy(x), torch.from_numpy(w)


def ambiguous(doc: Array, k: int) -> Array:
    """For each place: does its run of k tokens stand elsewhere with another token after it?"""
    out = np.zeros(len(doc))
    runs = np.lib.stride_tricks.sliding_window_view(doc, k)[:-1] @ VOCAB ** np.arange(k)
    _, where = np.unique(runs, return_inverse=True)
    pairs = np.unique(where * VOCAB + doc[k:])
    out[k:] = (np.bincount(pairs // VOCAB) > 1)[where]
    return out


def export(model: LlamaForCausalLM, tok: Tokenizer, out: pathlib.Path) -> None:
    """The weights by transformers; the small files by hand, in the form every engine reads."""
    model.save_pretrained(out)
    tok.save(str(out / "tokenizer.json"))
    ends = {"eos_token_id": END, "pad_token_id": END}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>",
        "pad_token": "<|end|>", "additional_special_tokens": ["<|quote|>"],
        "clean_up_tokenization_spaces": False, "model_max_length": LONGEST,
        "chat_template": TEMPLATE,
    }  # fmt: skip
    generation = {"do_sample": False, "max_new_tokens": 32, **ends}
    config = {**kind, **SHAPE, "bos_token_id": None, **ends}
    files = {"config": config, "tokenizer_config": tokenizer, "generation_config": generation}
    for name, value in files.items():
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=4e-3, help="of learning, at its highest")
    parser.add_argument("--resume", type=pathlib.Path, help="go on from this folder")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tiny-quote"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = Data(args.seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.04))
    distinct, length, loss = 130, 128, 9.0
    if args.resume:
        model = LlamaForCausalLM.from_pretrained(args.resume)
        distinct, length = 0, LONGEST
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    optimizers = (
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0),
        torch.optim.Muon(matrices, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
    )
    begin, step, seen = time.time(), 0, 0
    while (part := (time.time() - begin) / (60 * args.minutes)) < 1:
        if distinct:  # warm-up
            x, w = data.repeats(96, 64, distinct)
        else:
            n = int(128 * (length / 128) ** data.rng.random())
            x, w = data.batch(max(1, 6144 // n), n)
        scored = w[:, 1:] > 0
        hidden = model.model(input_ids=x[:, :-1], use_cache=False).last_hidden_state[scored]
        nll = F.cross_entropy(model.lm_head(hidden), x[:, 1:][scored], reduction="none")
        model.zero_grad()
        torch.autograd.backward((nll * w[:, 1:][scored]).sum() / w.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.rate * min(1, step / 100, 1.25 * (1 - part))
            optimizer.step()
        step, seen, loss = step + 1, seen + x.numel(), 0.95 * loss + 0.05 * nll.mean().item()
        if distinct and loss < 0.6:  # few distinct tokens, then all of them, then documents
            distinct, loss = (VOCAB if distinct < VOCAB else 0), 5.0
        elif not distinct and loss < 0.2 and length < LONGEST:
            length, loss = min(LONGEST, int(length * 1.5)), 0.35
        if step % 100 == 0:
            at = f"{part * args.minutes:.1f} min, {seen / 1e6:.1f} M tokens"
            print(f"{at}, distinct {distinct}, length {length}, loss {loss:.4f}", flush=True)
            export(model, data.tok, args.out)
    export(model, data.tok, args.out)


if __name__ == "__main__":
    main()
