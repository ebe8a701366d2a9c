"""A really trained output layer to measure gradients on: ``python -m bench.trained_head``.

Trains a small causal transformer (examples/model.py) on the Python sources of this machine, the
standard library's and the installed packages', and keeps its classifier with the hidden states and
next tokens of text that it has not seen. Random matrices do not show what a filter does: they have
neither a sparse softmax nor a direction that all rows share.
"""

from __future__ import annotations

import argparse
import math
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bench.results import CACHE
from cce_ext import linear_cross_entropy
from examples.demo import MIN_STEPS, train
from examples.model import LanguageModel
from examples.text import read_tree, unigram_entropy

DEFAULT_PATH = CACHE / "trained_head.pt"
# Words, digits, runs of signs, line breaks with the next line's indentation; a leading space belongs
# to the piece.
_PIECES = re.compile(r" ?[A-Za-z]+|_+|\d|\n[ \t]*| ?[^\sA-Za-z0-9_]+|\s")
_HELD_OUT_EVERY = 40


class TrainedHead(NamedTuple):
    """e (N, D) and c (V, D) in bfloat16, targets (N,) int64 in [0, V); frequent ids are low."""

    e: Tensor
    c: Tensor
    targets: Tensor


def read_machine(limit: int) -> list[str]:
    """Python files of this machine, up to ``limit`` characters of each of its two or three roots."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), Path(paths["purelib"]), Path(torch.__file__).parents[1]]
    texts: list[str] = []
    for root in dict.fromkeys(root.resolve() for root in roots):
        texts += read_tree(root, limit)
    return texts


def tokenize(texts: list[str], vocab: int) -> tuple[Tensor, Tensor, int]:
    """Tokens of the texts but every 40th, of those, and the size of the vocabulary: the most
    frequent pieces and, for all others, the 256 bytes."""
    pieces = [
        _PIECES.findall(text) for text in tqdm(texts, desc="reading", leave=False, disable=None)
    ]
    training = [p for i, p in enumerate(pieces) if i % _HELD_OUT_EVERY]
    counts: Counter[str] = Counter()
    for p in training:
        counts.update(p)
    ids = {piece: i for i, (piece, _) in enumerate(counts.most_common(vocab - 256))}

    def encode(parts: list[list[str]]) -> Tensor:
        tokens: list[int] = []
        for piece in (piece for part in parts for piece in part):
            known = ids.get(piece)
            if known is not None:
                tokens.append(known)
            else:
                tokens += [len(ids) + byte for byte in piece.encode()]
        return torch.tensor(tokens)

    return encode(training), encode(pieces[::_HELD_OUT_EVERY]), len(ids) + 256


@torch.no_grad()
def harvest(
    model: LanguageModel, tokens: Tensor, count: int, length: int, device: torch.device
) -> TrainedHead:
    """Hidden states and next tokens of ``count`` places of a text."""
    windows = max(1, math.ceil(count / (length - 1)))
    step = max(1, (len(tokens) - length) // windows)
    starts = torch.arange(windows) * step
    x = tokens[starts[:, None] + torch.arange(length)].to(device)
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        h = torch.cat([model(part) for part in x.split(16)])
    e = h[:, :-1].flatten(0, 1)[:count].to(torch.bfloat16)
    c = model.lm_head.weight.detach().to(torch.bfloat16)
    return TrainedHead(e.contiguous(), c, x[:, 1:].flatten()[:count])


def make_head(
    device: torch.device,
    seconds: float,
    vocab: int = 32768,
    limit: int = 12_000_000,
    count: int = 8192,
    least: int = MIN_STEPS,
    path: Path | None = None,
    seed: int = 0,
) -> TrainedHead:
    """Trains for ``seconds``, at least ``least`` steps, on up to ``limit`` characters of each root of
    sources; keeps ``count`` hidden states, at ``path`` if given."""
    training, held_out, size = tokenize(read_machine(limit), vocab)
    gpu = device.type == "cuda"
    width, depth, length, batch = (512, 6, 256, 64) if gpu else (128, 2, 128, 8)
    torch.manual_seed(seed)
    model = LanguageModel(size, length, width, depth, width // 64).to(device)
    print(
        f"{len(training):,} tokens of Python sources, vocabulary {size:,}, entropy of the token "
        f"counts {unigram_entropy(training, size):.2f} nats; width {width}, {depth} layers"
    )
    rate = 1.5e-3 if gpu else 4e-3
    run = train(model, training, seconds, seed, device, batch, length, rate, least)
    model.eval()
    head = harvest(model, held_out, count, length, device)
    loss = linear_cross_entropy(head.e, head.c, head.targets).item()
    print(f"{run.steps} steps; loss {run.last:.2f}, on text that was held out {loss:.2f}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: t.cpu() for name, t in head._asdict().items()}, path)
        print(f"kept in {path}")
    return head


def load_head(path: Path) -> TrainedHead:
    """A head that was kept: a file of this module, or a folder as bench/stored_head.py describes.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return TrainedHead(**torch.load(path, map_location="cpu", weights_only=True))
    if not (path / "head_t.npy").is_file():
        raise FileNotFoundError(
            f"no trained head at {path}: `python -m bench.trained_head` makes one in a few minutes"
        )
    from bench.stored_head import load_folder  # needs NumPy

    return TrainedHead(*load_folder(path))


def main() -> None:
    """Train and keep a head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=150, help="time to train (150)")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--limit", type=int, default=12_000_000, help="characters of a source root")
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH)
    args = parser.parse_args()
    make_head(torch.device(args.device), args.seconds, args.vocab, args.limit, path=args.out)


if __name__ == "__main__":
    main()
