"""A small language model trained on Python's own sources, without ever storing its logits.

Run from the root of the repository: ``python -m examples.demo`` (it trains for a minute, and takes
two or three on two CPU cores).
"""

from __future__ import annotations

import argparse
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bench.methods import cce, eager
from bench.problems import Config, make_problem
from bench.speed import Work, measure
from bench.timing import Timer
from cce_ext import linear_cross_entropy
from examples.model import LanguageModel
from examples.text import HELD_OUT, Corpus, load_corpus, sample_batch, unigram_entropy, windows

VOCAB, LENGTH, BATCH = 4096, 128, 16
MIN_STEPS = 50  # on a busy machine the time may not be enough to learn anything


class Training(NamedTuple):
    """What the training loop saw."""

    steps: int
    first: float
    last: float


class Cost(NamedTuple):
    """Peak memory beyond inputs and gradients, and time, of one step."""

    megabytes: float
    milliseconds: float


def train(
    model: LanguageModel,
    tokens: Tensor,
    seconds: float,
    seed: int,
    device: torch.device,
    batch: int = BATCH,
    length: int = LENGTH,
    rate: float = 4e-3,
    least: int = MIN_STEPS,
) -> Training:
    """AdamW for ``seconds`` and ``least`` steps at least on windows (batch, length) of a text; the batches
    depend on the seed alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    start, shown = time.monotonic(), 0.0
    form = "{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=seconds, desc="training", bar_format=form) as bar:
        while len(losses) < least or time.monotonic() - start < seconds:
            inputs = sample_batch(tokens, batch, length, generator).to(device)
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate(len(losses))
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                h = model(inputs)
                # Position i predicts token i + 1; the (batch, length, vocab) logits never exist.
                loss = linear_cross_entropy(h, model.lm_head.weight, inputs, shift=1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            elapsed = min(time.monotonic() - start, seconds)
            bar.set_postfix(step=len(losses), loss=f"{losses[-1]:.2f}", refresh=False)
            bar.update(elapsed - shown)
            shown = elapsed
    tail = losses[-max(1, len(losses) // 10) :]
    return Training(len(losses), losses[0], sum(tail) / len(tail))


def learning_rate(done: int) -> float:
    """Factor of the rate: ten steps of warm-up, then constant, then 1/sqrt: a matter of the step, not
    of the clock."""
    return min((done + 1) / 10, 1.0, math.sqrt(150 / (done + 1)))


@torch.no_grad()
def token_losses(model: LanguageModel, tokens: Tensor, device: torch.device) -> Tensor:
    """Loss of each token of a text but the first, in nats."""
    inputs, targets = (x.to(device) for x in windows(tokens, LENGTH))
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        h = model(inputs)
        loss = linear_cross_entropy(h, model.lm_head.weight, targets, shift=1, reduction="none")
    return loss[targets[:, 1:] != -100].float().cpu()


def print_extremes(corpus: Corpus, losses: Tensor) -> None:
    """The five tokens that the model found hardest, and the five easiest."""
    order = losses.argsort()
    for title, picked in (("hardest", order.flip(0)[:5]), ("easiest", order[:5])):
        print(f"\nThe five {title} tokens of {HELD_OUT}:")
        print(f"  {'probability':>11}  {'token':<16}  after")
        for i in picked.tolist():
            context = "".join(
                corpus.decode(t) for t in corpus.held_out[max(0, i - 9) : i + 1].tolist()
            )
            token = repr(corpus.decode(int(corpus.held_out[i + 1])))
            print(f"  {math.exp(-losses[i]):>11.2g}  {token:<16}  ...{context[-40:]!r}")


def gradient_error(config: Config, device: torch.device) -> float:
    """Largest relative error of both gradients against float32 logits."""
    problem = make_problem(config, device)
    e, c = (x.detach().float().requires_grad_() for x in (problem.e, problem.c))
    exact = torch.autograd.grad(eager(problem._replace(e=e, c=c)), (e, c))
    ours = torch.autograd.grad(cce(problem), (problem.e, problem.c))
    errors = [
        torch.linalg.norm(x.float() - y) / torch.linalg.norm(y)
        for x, y in zip(ours, exact, strict=True)
    ]
    return max(error.item() for error in errors)


def costs(config: Config, device: torch.device) -> tuple[Cost, Cost]:
    """One step with stored logits, and without; the two take turns."""
    methods, kind = ("eager", "cce"), "loss-fw-bw"
    rows = measure(config, Work(methods, (kind,)), Timer(device))
    found = {row["method"]: row for row in rows}
    for method in methods:
        if "error" in found[method]:
            raise RuntimeError(f"{method}: {found[method]['error']}")
    stored, ours = (Cost(found[m]["extra_mb"], found[m]["runtime_ms"]) for m in methods)
    return stored, ours


def print_table(rows: list[tuple[str, str, str]], header: tuple[str, str, str]) -> None:
    """A plain table of three columns."""
    width = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
    line = "+".join("-" * (w + 2) for w in width)
    for i, row in enumerate([header, *rows]):
        print(f" {row[0]:<{width[0]}} | {row[1]:>{width[1]}} | {row[2]:>{width[2]}}".rstrip())
        if i == 0:
            print(line)


def main() -> None:
    """Train, look at the held-out file, compare with stored logits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="time to train (60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="10 seconds, less text, small sizes")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    seconds = 10.0 if args.quick else args.seconds
    n, v, d = (1024, 16384, 128) if args.quick else (4096, 32768, 256)

    corpus = load_corpus(1024 if args.quick else VOCAB, 2_000_000 if args.quick else 6_000_000)
    unigram = unigram_entropy(corpus.train, corpus.vocab)
    print(
        f"Text: {len(corpus.train):,} {corpus.tokenizer} tokens of Python's standard library, "
        f"a vocabulary of {corpus.vocab:,}.\nA model that ignores the context cannot do better "
        f"than the entropy of the token counts, {unigram:.2f} nats."
    )
    torch.manual_seed(args.seed)
    model = LanguageModel(corpus.vocab, LENGTH).to(device)
    result = train(model, corpus.train, seconds, args.seed, device)
    model.eval()
    losses = token_losses(model, corpus.held_out, device)
    perplexity = losses.mean().exp().item()
    print_extremes(corpus, losses)

    print(
        f"\nThe same output layer with stored logits and without: {n} tokens, {v} classes, "
        f"width {d}."
    )
    config = Config("demo", n, v, d, dtype)
    error = gradient_error(config, device)
    stored, ours = costs(config, device)

    print(f"\nTraining ({result.steps} steps on {device}), in nats per token:")
    nats = [
        ("entropy of the token counts", f"{unigram:.2f}", f"{math.exp(unigram):.0f}"),
        ("loss of the first step", f"{result.first:.2f}", f"{math.exp(result.first):.0f}"),
        (
            "loss of the last tenth of the steps",
            f"{result.last:.2f}",
            f"{math.exp(result.last):.0f}",
        ),
        (f"{HELD_OUT}, never trained on", f"{math.log(perplexity):.2f}", f"{perplexity:.0f}"),
    ]
    print_table(nats, ("", "nats", "perplexity"))
    print(f"\nOne step, forward and backward ({n} x {v} x {d}, {dtype}):")
    table = [
        ("extra memory, MB", f"{stored.megabytes:.0f}", f"{ours.megabytes:.0f}"),
        ("time, ms", f"{stored.milliseconds:.1f}", f"{ours.milliseconds:.1f}"),
        ("relative error of the gradients", "(reference)", f"{error:.1e}"),
    ]
    print_table(table, ("", "stored logits", "cce_ext"))
    print(
        f"demo: loss={result.last:.4f} unigram={unigram:.4f} grad_error={error:.3e} "
        f"perplexity={perplexity:.3f}"
    )


if __name__ == "__main__":
    main()
