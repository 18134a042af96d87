"""Train `tiny-quote`, a Llama of about a million parameters that quotes the document it is given.

    python train_tiny_quote.py --minutes 45 --threads 2 --out tiny-quote --held TEXT [TEXT ...]

The skill: `document<|quote|>first words` is continued verbatim from the document, whatever the document is about. It is
what an induction circuit does, and nothing else: the model knows no language. A run takes under an hour on two CPU cores
and is bounded by --minutes; it starts from random weights, writes an ordinary Hugging Face folder, and measures it on
the --held texts. Only the last check (same logits in `transformers`) needs more than torch, numpy, tokenizers, safetensors.

Data: docstrings and source of the Python standard library this script runs on (Python Software Foundation licence),
sentences of random words, random tokens, and phrases and near copies that make short contexts ambiguous. Nothing else.

What mattered, most first: many quotes per document, so that nearly half of all tokens are scored; a warm-up on repeats of
random tokens with a random period (a fixed period teaches a positional copy, which is useless); Muon for the matrices;
a small vocabulary; lengths that grow as the loss falls; scoring a token only where the quote so far determines it, and
scoring it more where a short context would not; a large rope_theta, which leaves dimensions to match content at any distance.

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

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F

VOCAB, HIDDEN, LAYERS, HEADS, HEAD_DIM, FFN = 512, 128, 4, 4, 64, 128
THETA, EPS, LONGEST, END, QUOTE = 1e6, 1e-5, 2048, 0, 1
TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'assistant' and not loop.first %}<|quote|>{% endif %}"
    "{{ m.content }}{% endfor %}"
)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False) for _ in range(3)
        )
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q, k, v = (
            p(x).view(b, t, HEADS, HEAD_DIM).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (u * cos + torch.cat((-u[..., HEAD_DIM // 2 :], u[..., : HEAD_DIM // 2]), -1) * sin
                for u in (q, k))  # fmt: skip
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, FFN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(HIDDEN, eps=EPS) for _ in range(2)
        )

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The names of LlamaForCausalLM, without what training does not need (faster on a CPU)."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        nn.init.normal_(self.embed_tokens.weight, std=0.1)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=EPS)
        freqs = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angle = torch.outer(torch.arange(2 * LONGEST), freqs).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids, where=None):
        x, t = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        return F.linear(self.norm(x if where is None else x[where]), self.embed_tokens.weight)


class Data:
    def __init__(self, seed):
        self.rng, self.py = np.random.default_rng(seed), random.Random(seed)
        docs, sources = [], []
        stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
        for path in sorted(stdlib.rglob("*.py")):
            if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
                continue
            source = path.read_text(errors="ignore")
            try:
                nodes = list(ast.walk(ast.parse(source)))
            except (SyntaxError, ValueError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            texts = [ast.get_docstring(n) for n in nodes if isinstance(n, kinds)]
            docs += [d for d in texts if d and len(d) > 80]
            sources.append(source[:20000])
        self.py.shuffle(docs)
        self.py.shuffle(sources)
        self.tok = Tokenizer(models.BPE())
        self.tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tok.decoder = decoders.ByteLevel()
        self.tok.train_from_iterator(docs, trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=["<|end|>", "<|quote|>"], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))  # fmt: skip
        words = sorted({w for d in docs for w in re.findall(r"[a-z]{2,12}", d)})
        self.streams = [
            np.array([t for e in self.tok.encode_batch(texts) for t in e.ids])
            for texts in (docs, sources[:250], [self.sentences(words) for _ in range(800)])
        ]
        self.spaced = np.array([self.tok.id_to_token(i).startswith("Ġ") for i in range(VOCAB)])

    def sentences(self, words):
        """Sentences of random words, names, numbers and strings of letters, from a bank of words."""
        py, out = self.py, ""
        bank = py.sample(words, py.choice((30, 200, len(words))))
        for _ in range(py.randint(10, 60)):
            line = []
            for _ in range(py.randint(4, 22)):
                kind, word = py.random(), py.choice(bank)
                if kind < 0.08:
                    word = word.capitalize()
                elif kind < 0.14:
                    word = str(py.randrange(10 ** py.randint(1, 5)))
                elif kind < 0.2:
                    word = "".join(py.choices("abcdefghijklmnopqrstuvwxyz", k=py.randint(2, 9)))
                line.append(word + (py.choice(",;:)") if py.random() < 0.1 else ""))
            out += " ".join(line).capitalize() + py.choice(".....?!") + py.choice(("", "", "\n"))
            out += py.choice((" ", "\n")) if out[-1] == "\n" else " "
        return out

    def document(self, n, text):
        rng = self.rng
        if text:
            stream = self.streams[rng.choice(3, p=(0.5, 0.2, 0.3))]
            start = rng.integers(0, len(stream) - n)
            doc = stream[start : start + n]
        else:
            few = int(2 ** rng.uniform(4, 9)) if rng.random() < 0.6 else VOCAB
            few = rng.permutation(VOCAB - 2)[:few] + 2
            doc = few[rng.integers(0, len(few), n)]
            if rng.random() < 0.35:  # phrases that come back in other company
                phrases = [few[rng.integers(0, len(few), rng.integers(2, 9))]
                           for _ in range(rng.integers(4, 40))]  # fmt: skip
                parts = [phrases[rng.integers(len(phrases))] if rng.random() < 0.6 else
                         few[rng.integers(0, len(few), rng.integers(1, 6))]
                         for _ in range(n)]  # fmt: skip
                doc = np.concatenate(parts)[:n]
        if rng.random() < 0.4:  # near copies of a passage, some tokens changed
            doc, size = doc.copy(), int(rng.integers(8, max(9, n // 5)))
            for _ in range(rng.integers(1, 4)):
                a, b = rng.integers(0, n - size, 2)
                copy = doc[a : a + size].copy()
                other = rng.random(size) < rng.uniform(0.03, 0.25)
                copy[other] = doc[rng.integers(0, n, other.sum())]
                doc[b : b + size] = copy
        return doc

    def quote(self, doc, text, pad, hard):
        """Token ids and weights of one quote: scored where the quote so far determines the next token."""
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
        ids, w = pad[a : a + size], np.zeros(size, np.float32)
        starts = np.flatnonzero(doc == doc[a])
        for i in range(1, size):
            starts = starts[starts + i <= n]
            same = pad[starts + i] == ids[i]
            w[i] = i >= 3 and same.all()
            starts = starts[same]
        w *= hard[a : a + size]
        if text and self.spaced[ids[0]] and rng.random() < 0.6:  # " Word" of the text, cued as "Word"
            cue = self.tok.encode(self.tok.decode(ids[:24].tolist()).removeprefix(" ")).ids
            k = 0
            while k < min(len(cue), size, 24) and cue[-1 - k] == ids[min(24, size) - 1 - k]:
                k += 1
            done = min(24, size) - k
            if done < 8:
                w[:done] = 0
                ids = np.concatenate((cue[: len(cue) - k], ids[done:]))
                w = np.concatenate((np.zeros(len(cue) - k, np.float32), w[done:]))
        return np.concatenate(([QUOTE], ids)), np.concatenate(([0], w))

    def batch(self, rows, length, p_text):
        x, w = np.zeros((rows, length), np.int64), np.zeros((rows, length), np.float32)
        for i in range(rows):
            text, at = self.rng.random() < p_text, int(length * self.rng.uniform(0.3, 0.8))
            doc = self.document(at, text)
            pad = np.append(doc, END)
            hard = 1 + ambiguous(pad, 2) + 3 * ambiguous(pad, 4)
            x[i, :at] = doc
            while at < length:
                ids, weights = self.quote(doc, text, pad, hard)
                stop = min(length, at + len(ids))
                x[i, at:stop], w[i, at:stop] = ids[: stop - at], weights[: stop - at]
                at = stop
        return torch.from_numpy(x), torch.from_numpy(w)

    def repeats(self, rows, length, distinct):
        """x x x ...: different random tokens, repeated with a random period."""
        x, w = np.zeros((rows, length), np.int64), np.zeros((rows, length), np.float32)
        for i in range(rows):
            period = int(self.rng.integers(6, length // 2 - 2))
            x[i] = np.resize(self.rng.permutation(distinct - 2)[:period] + 2, length)
            w[i, period + 2 :] = 1
        return torch.from_numpy(x), torch.from_numpy(w)


def ambiguous(doc, k):
    """For each place: does the same run of k tokens stand elsewhere with another token after it?"""
    out = np.zeros(len(doc), np.float32)
    key = sum(doc[i : len(doc) - k + i] * VOCAB ** (k - 1 - i) for i in range(k))
    _, where = np.unique(key, return_inverse=True)
    pairs = np.unique(where * VOCAB + doc[k:])
    out[k:] = (np.bincount(pairs // VOCAB) > 1)[where]
    return out


@torch.no_grad()
def exact(model, texts, length, trials, cue=8, answer=20, seed=5):
    """Share of greedy continuations that are right in every token, for cues that occur once."""
    pick, rows, right = random.Random(seed), [], 0
    while len(rows) < trials:
        ids = pick.choice([t for t in texts if len(t) > length])
        start, at = pick.randrange(len(ids) - length), pick.randrange(length - cue - answer)
        doc = ids[start : start + length]
        if sum(doc[j : j + cue] == doc[at : at + cue] for j in range(length - cue)) == 1:
            rows.append(doc + [QUOTE] + doc[at : at + cue + answer])
    for part in torch.tensor(rows).split(max(1, 8192 // length)):
        # greedy decoding gives the answer exactly when each token of it is the most likely one
        best = model(part[:, :-1])[:, -answer:].argmax(-1)
        right += (best == part[:, -answer:]).all(1).sum().item()
    return right / trials


def export(model, tok, out):
    out.mkdir(parents=True, exist_ok=True)
    state = {f"model.{k}": v.detach().contiguous() for k, v in model.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    tok.save(str(out / "tokenizer.json"))
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCAB,
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HEAD_DIM,
        hidden_act="silu", max_position_embeddings=LONGEST, rope_theta=THETA, rms_norm_eps=EPS,
        attention_bias=False, mlp_bias=False, tie_word_embeddings=True, torch_dtype="float32",
        initializer_range=0.02, use_cache=True, bos_token_id=None, eos_token_id=END,
        pad_token_id=END)  # fmt: skip
    tokenizer = dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|end|>", pad_token="<|end|>",
        additional_special_tokens=["<|quote|>"], clean_up_tokenization_spaces=False,
        model_max_length=LONGEST, chat_template=TEMPLATE)  # fmt: skip
    generation = dict(do_sample=False, eos_token_id=END, pad_token_id=END, max_new_tokens=32)
    for name, value in (("config", config), ("tokenizer_config", tokenizer),
                        ("generation_config", generation)):  # fmt: skip
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="tiny-quote")
    parser.add_argument("--held", type=pathlib.Path, nargs="*", default=[])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data, model = Data(args.seed), Llama()
    held = [data.tok.encode(path.read_text()).ids for path in args.held]
    size = sum(p.numel() for p in model.parameters())
    print(size, "parameters, tokens of text:", [len(s) for s in data.streams], flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0, betas=(0.9, 0.98), weight_decay=0),
    ]
    begin = saved = time.time()
    step, seen, distinct, length, loss = 0, 0, 130, 128, None
    while (part := (time.time() - begin) / (60 * args.minutes)) < 1:
        if distinct:  # warm-up
            x, w = data.repeats(96, 64, distinct)
        else:
            n = length if data.rng.random() < 0.5 else int(data.rng.integers(96, length + 1))
            x, w = data.batch(max(1, 8192 // n), n, 0.6)
        w, target = w[:, 1:], x[:, 1:]
        scored = w > 0
        nll = F.cross_entropy(model(x[:, :-1], scored), target[scored], reduction="none")
        model.zero_grad()
        ((nll * w[scored]).sum() / w.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * min(1, (step + 1) / 100, 2 * (1 - part))
            optimizer.step()
        step, seen, now = step + 1, seen + x.numel(), nll.mean().item()
        loss = now if loss is None else 0.95 * loss + 0.05 * now
        if distinct and loss < 0.6:  # few distinct tokens, then all, then documents
            distinct, loss = (VOCAB if distinct < VOCAB else 0), None
        elif not distinct and loss < 0.2 and length < LONGEST:
            length, loss = min(LONGEST, int(length * 1.5)), 0.35
        if step % 100 == 0:
            print(f"{part * args.minutes:.1f} min, step {step}, {seen / 1e6:.1f} M tokens, "
                  f"distinct {distinct}, length {length}, loss {loss or 9:.4f}", flush=True)  # fmt: skip
        if time.time() - saved > 240 and not distinct:
            saved = time.time()
            export(model, data.tok, args.out)
            if held:
                print({n: exact(model, held, n, 60) for n in (256, 512, 1024)}, flush=True)
    export(model, data.tok, args.out)
    if held:
        print({n: exact(model, held, n, 200) for n in (256, 512, 1024, 1536)}, flush=True)
    from transformers import LlamaForCausalLM

    reference, ids = LlamaForCausalLM.from_pretrained(args.out), torch.randint(2, VOCAB, (1, 600))
    with torch.no_grad():
        print("difference", (reference(ids).logits - model(ids)).abs().max().item(), flush=True)


if __name__ == "__main__":
    main()
