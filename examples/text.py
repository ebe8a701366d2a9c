"""Real text that every Python has: the sources of its standard library, as tokens."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HELD_OUT = "textwrap.py"
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


class Corpus(NamedTuple):
    """Token ids of the training text and of one held-out file, and how to read them."""

    train: Tensor
    held_out: Tensor
    vocab: int
    decode: Callable[[int], str]
    tokenizer: str


def read_tree(root: Path, limit: int) -> list[str]:
    """Up to ``limit`` characters of a folder's Python files, in the order of their paths; tests and
    installed packages inside it are left out."""
    texts: list[str] = []
    size = 0
    for path in sorted(root.rglob("*.py")):
        if path.name == HELD_OUT or _SKIPPED & set(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        texts.append(text)
        size += len(text)
        if size > limit:
            break
    return texts


def read_sources(limit: int) -> tuple[list[str], str]:
    """Up to ``limit`` characters of the standard library's modules, and the held-out file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return read_tree(root, limit), (root / HELD_OUT).read_text(encoding="utf-8")


def load_corpus(vocab: int, limit: int = 6_000_000) -> Corpus:
    """The corpus in a byte-pair vocabulary made on the spot; in bytes without tokenizers."""
    texts, held_out = read_sources(limit)
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        return _byte_corpus(texts, held_out)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    train = [i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids]
    return Corpus(
        train=torch.tensor(train),
        held_out=torch.tensor(tokenizer.encode(held_out).ids),
        vocab=tokenizer.get_vocab_size(),
        decode=lambda i: tokenizer.decode([i]),
        tokenizer="byte-pair",
    )


def _byte_corpus(texts: list[str], held_out: str) -> Corpus:
    return Corpus(
        train=torch.tensor(list("".join(texts).encode())),
        held_out=torch.tensor(list(held_out.encode())),
        vocab=256,
        decode=lambda i: bytes([i]).decode("latin-1"),
        tokenizer="byte",
    )


def unigram_entropy(tokens: Tensor, vocab: int) -> float:
    """Entropy of the token counts, in nats: the best loss of a model that ignores its context."""
    p = torch.bincount(tokens, minlength=vocab).double()
    p = p[p > 0] / p.sum()
    return -(p * p.log()).sum().item()


def sample_batch(tokens: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Windows (batch, length) at random places of the text."""
    starts = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def windows(tokens: Tensor, length: int, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """The whole text as windows that overlap by one token: each but the first is predicted once.

    Returns:
        inputs (W, length) and targets (W, length); the last window is padded, its padding ignored.
    """
    stride = length - 1
    count = max(1, -(-(len(tokens) - 1) // stride))
    padding = count * stride + 1 - len(tokens)
    targets = torch.cat([tokens, tokens.new_full((padding,), ignore_index)])
    targets = targets.unfold(0, length, stride)
    return targets.clamp(min=0), targets
