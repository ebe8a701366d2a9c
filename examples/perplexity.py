"""Perplexity token by token: which tokens of a text surprise a model.

    python -m examples.perplexity --model NAME_OR_FOLDER --text FILE
    python -m examples.perplexity                  # a small random model reads this file's bytes

`cce_patch(model, reduction="none")` makes a model's loss the loss of each token; no logits are stored,
however large the vocabulary. Works for any model and adapter that cce_patch knows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from cce_ext.transformers import cce_patch


@torch.no_grad()
def token_losses(model: nn.Module, tokens: Tensor, window: int, stride: int) -> Tensor:
    """Loss in nats (N - 1,) of each token of a text (N,) but the first, given those before it.

    ``model``: patched with reduction="none". A text longer than ``window`` is read in windows that
    move by ``stride``; each token counts once, with at least window - stride tokens before it after
    the first window.

    Raises:
        ValueError: windows that do not overlap, so that the first token of one has no context.
    """
    if not 0 < stride < window:
        raise ValueError(f"stride must be from 1 to window - 1 = {window - 1}, got {stride}")
    losses = torch.empty(tokens.numel() - 1)
    done = 0  # losses known
    for first in tqdm(range(0, tokens.numel(), stride), desc="windows", disable=None):
        part = tokens[None, first : first + window]
        if first + part.shape[1] - 1 <= done:
            break
        labels = part.clone()
        labels[:, : done + 1 - first] = -100  # context
        fresh = model(input_ids=part, labels=labels).loss[0, done - first :]
        losses[done : done + fresh.numel()] = fresh.cpu()
        done += fresh.numel()
    return losses


def random_model() -> nn.Module:
    """A Llama of two layers over bytes, with random weights: its perplexity is about 256."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def load(name: str | None, text: str) -> tuple[nn.Module, Tensor, Callable[[int], str]]:
    """A patched model in eval mode, the text's tokens (N,), and how a token is written."""
    if name is None:
        model, tokens = random_model(), torch.tensor(list(text.encode()))
        spell = lambda token: repr(chr(token))  # noqa: E731
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        spell = lambda token: repr(tokenizer.decode([token]))  # noqa: E731
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return cce_patch(model.eval().to(device), reduction="none"), tokens.to(device), spell


def main(arguments: Sequence[str] | None = None) -> float:
    """Prints the perplexity and the most surprising tokens; returns the perplexity."""
    parser = argparse.ArgumentParser("examples.perplexity", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a name; a small random model if left out")
    parser.add_argument("--text", type=Path, default=Path(__file__))
    parser.add_argument("--window", type=int, default=1024, help="tokens read at a time")
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--show", type=int, default=10, help="how many surprising tokens")
    options = parser.parse_args(arguments)
    model, tokens, spell = load(options.model, options.text.read_text(encoding="utf-8"))
    losses = token_losses(model, tokens, options.window, options.stride)
    perplexity = losses.mean().exp().item()
    print(f"{losses.numel()} tokens, perplexity {perplexity:.2f}; the most surprising:")
    for loss, place in zip(*losses.topk(min(options.show, losses.numel())), strict=True):
        print(f"  {place + 1:>6}  {loss:6.2f} nats  {spell(int(tokens[place + 1]))}")
    return perplexity


if __name__ == "__main__":
    main()
