"""Whether the sparse gradient trains as well: ``python -m bench.training_curves [--quick] [--json
FILE] [--plot FILE]``

A small transformer learns the Python sources of this machine from each of three seeds with several
losses: the default one, the one with filter_eps="high", the exact one and stored logits. Same
batches, same start; what is compared is the loss on held-out text after the same number of steps.
``--quick`` is a small version for a CPU, where the default gradient comes from its reference
(cce_ext/sparse/reference.py), because the CPU kernels are always exact. ``--from FILE`` draws the
plot of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bench.trained_head import read_machine, tokenize
from cce_ext import diagnostics, linear_cross_entropy
from cce_ext.options import LossOptions
from cce_ext.sparse.reference import sparse_gradients
from examples.model import LanguageModel
from examples.text import sample_batch

#: the default gradient's held-out loss may lie this far above the exact one's, in nats
LIMIT = 0.003


class Setting(NamedTuple):
    """Sizes of a run. characters: of each root of sources; evaluate: steps between two looks at the
    held-out text; eps: the reference's threshold on a CPU, where the vocabulary is small."""

    vocab: int
    characters: int
    width: int
    batch: int
    length: int
    steps: int
    seeds: int
    evaluate: int
    held_out: int
    eps: float


FULL = Setting(32768, 12_000_000, 256, 64, 128, 1000, 3, 100, 65536, 2.0**-13)
QUICK = Setting(2048, 400_000, 64, 4, 64, 30, 1, 10, 2048, 2.0**-13)


class Facts(NamedTuple):
    """What a step's backward did: the share of the tokens that went the exact way; T, the share of
    the probability mass that the filter dropped or would have dropped, and candidates and kept
    entries a token (NaN where there is no filter)."""

    exact_share: float = 1.0
    dropped_share: float = math.nan
    candidates: float = math.nan
    kept: float = math.nan


class Losses(NamedTuple):
    """Loss(hidden (N, D), lm_head weight (V, D), targets (N,)), and what the last backward did."""

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    facts: Callable[[], Facts]


class _Reference(torch.autograd.Function):
    """The mean loss with the reference's sparse gradient; stores the logits."""

    facts = Facts()

    @staticmethod
    def forward(ctx: Any, e: Tensor, c: Tensor, targets: Tensor, eps: float) -> Tensor:
        n = e.shape[0]
        found = sparse_gradients(
            e.new_full((n,), 1 / n), None, e, c, targets, None, None, None, LossOptions(), eps
        )
        share, exact = found.dropped_share, found.exact_rows
        counts = [x.double().mean().item() for x in (exact, share, found.candidates, found.kept)]
        _Reference.facts = Facts(*counts)
        ctx.save_for_backward(found.de, found.dc)
        return F.cross_entropy(e @ c.T, targets)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        de, dc = ctx.saved_tensors
        return upstream * de, upstream * dc, None, None


def eager_loss(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
    """What most training code does: logits, float32 logits, cross-entropy."""
    return F.cross_entropy(F.linear(e, c).float(), targets)


def methods(device: torch.device, eps: float) -> dict[str, Losses]:
    """The losses to compare, by name; eps: the reference's threshold."""

    def exact(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(e, c, targets, filter_eps=None)

    def reference(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        return _Reference.apply(e, c, targets, eps)

    def last() -> Facts:
        found = diagnostics()
        if found.get("exact") != "":
            return Facts()
        n = found["shape"][0]
        exact, candidates, kept = (found[x] / n for x in ("exact_rows", "candidates", "kept"))
        return Facts(exact, found["dropped_share"], candidates, kept)

    def high(e: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(e, c, targets, filter_eps="high")

    if device.type == "cpu":
        default = {"default": Losses(reference, lambda: _Reference.facts)}
    else:
        default = {"default": Losses(linear_cross_entropy, last), "high": Losses(high, last)}
    return default | {"exact": Losses(exact, Facts), "eager": Losses(eager_loss, Facts)}


def learning_rate(step: int, steps: int) -> float:
    """Fifty steps of warm-up, then down to a tenth along a line."""
    return 2e-3 * min(1.0, (step + 1) / min(50, steps // 4)) * (1 - 0.9 * step / steps)


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor, setting: Setting) -> float:
    """Mean loss of the held-out windows (W, length)."""
    total, count = 0.0, 0
    for part in tokens.split(setting.batch):
        with torch.autocast(part.device.type, torch.bfloat16, enabled=part.is_cuda):
            h = model(part)
            loss = linear_cross_entropy(h, model.lm_head.weight, part, shift=1, reduction="sum")
        total += loss.double()
        count += part[:, 1:].numel()
    return float(total) / count


def train(
    losses: Losses,
    tokens: Tensor,
    held_out: Tensor,
    vocab: int,
    setting: Setting,
    seed: int,
    bar: tqdm,
) -> dict[str, Any]:
    """One run: held-out losses by step, and what the backward did on average since the look before."""
    device = held_out.device
    torch.manual_seed(seed)
    model = LanguageModel(vocab, setting.length, setting.width).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    generator = torch.Generator().manual_seed(seed)
    curve: dict[int, float] = {}
    steps: dict[int, dict[str, float]] = {}
    since: list[Facts] = []
    for step in range(setting.steps):
        batch = sample_batch(tokens, setting.batch, setting.length, generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, setting.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            h = model(batch)[:, :-1].flatten(0, 1)
            loss = losses.loss(h, model.lm_head.weight, batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.update()
        since.append(losses.facts())  # before another call
        if (step + 1) % setting.evaluate == 0:
            means = map(statistics.fmean, zip(*since, strict=True))
            steps[step + 1] = Facts(*means)._asdict()
            since.clear()
            curve[step + 1] = held_out_loss(model, held_out, setting)
    return {"seed": seed, "held_out": curve, "backward": steps}


def run(setting: Setting, device: torch.device) -> dict[str, Any]:
    """All runs, and what they come to."""
    tokens, rest, vocab = tokenize(read_machine(setting.characters), setting.vocab)
    kept = min(setting.held_out, len(rest)) // setting.length * setting.length
    held_out = rest[:kept].view(-1, setting.length).to(device)
    found = methods(device, setting.eps)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
    with tqdm(total=setting.steps * setting.seeds * len(found), desc="training") as bar:
        for seed in range(setting.seeds):
            for name, losses in found.items():
                bar.set_postfix(loss=name, seed=seed)
                runs[name].append(train(losses, tokens, held_out, vocab, setting, seed, bar))
    last = {n: [r["held_out"][setting.steps] for r in of] for n, of in runs.items()}
    gaps = {
        name: [x - y for x, y in zip(values, last["exact"], strict=True)]
        for name, values in last.items()
    }
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "setting": setting._replace(vocab=vocab)._asdict(),
        "tokens": len(tokens),
        "runs": runs,
        "gaps": gaps,
        "sparse_share": statistics.mean(
            1 - facts["exact_share"] for r in runs["default"] for facts in r["backward"].values()
        ),
    }


def plot(facts: dict[str, Any], path: str) -> None:
    """Held-out losses over the steps, and how far they lie above the exact run of the same seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    colors = {name: f"C{i}" for i, name in enumerate(facts["runs"])}
    for name, runs in facts["runs"].items():
        for i, (one, exact) in enumerate(zip(runs, facts["runs"]["exact"], strict=True)):
            steps = [int(step) for step in one["held_out"]]
            values, base = list(one["held_out"].values()), list(exact["held_out"].values())
            label = name if i == 0 else None
            left.plot(steps, values, color=colors[name], label=label, lw=1)
            gap = [x - y for x, y in zip(values, base, strict=True)]
            right.plot(steps, gap, color=colors[name], label=label, lw=1, marker=".")
    left.set(xlabel="step", ylabel="held-out loss, nats")
    right.set(xlabel="step", ylabel="held-out loss above exact, nats")
    right.axhline(LIMIT, color="grey", ls=":", label="limit")
    for axes in (left, right):
        axes.legend()
    s = facts["setting"]
    figure.suptitle(
        f"{len(facts['runs']['exact'])} seeds, vocabulary {s['vocab']}, {facts['device']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show(facts: dict[str, Any]) -> None:
    """The table."""
    s = facts["setting"]
    print(
        f"{facts['device']}, torch {facts['torch']}: {s['steps']} steps of {s['batch']} x {s['length']} "
        f"tokens, vocabulary {s['vocab']}, {s['seeds']} seeds; the default gradient was sparse for "
        f"{facts['sparse_share']:.0%} of all tokens"
    )
    print(f"{'loss':<10}{'held-out, nats':>16}{'above exact':>13}   by seed")
    for name, runs in facts["runs"].items():
        values = [list(r["held_out"].values())[-1] for r in runs]
        gaps = facts["gaps"][name]
        print(
            f"{name:<10}{statistics.mean(values):>16.4f}{statistics.mean(gaps):>+13.4f}   "
            + " ".join(f"{gap:+.4f}" for gap in gaps)
        )
    print("default, first seed:     step     exact  dropped  candidates  kept (shares; a token)")
    for step, f in facts["runs"]["default"][0]["backward"].items():
        print(
            f"{step:>29}{f['exact_share']:>10.0%}{f['dropped_share']:>9.1%}"
            f"{f['candidates']:>12.0f}{f['kept']:>6.0f}"
        )
    gap = statistics.mean(facts["gaps"]["default"])
    print(f"default above exact: {gap:+.4f}, limit {LIMIT} ({'met' if gap <= LIMIT else 'missed'})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one seed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="instead of the setting's")
    parser.add_argument("--vocab", type=int, help="instead of the setting's; above 16384 on a GPU")
    parser.add_argument("--seeds", type=int, help="instead of the setting's")
    parser.add_argument("--json", help="also write everything to this file")
    parser.add_argument("--plot", help="also draw the curves (PNG or SVG; needs matplotlib)")
    parser.add_argument("--from", dest="earlier", help="JSON of an earlier run: nothing is trained")
    args = parser.parse_args()
    if args.earlier:
        with open(args.earlier) as f:
            facts = json.load(f)
    else:
        setting = QUICK if args.quick else FULL
        setting = setting._replace(
            steps=args.steps or setting.steps,
            seeds=args.seeds or setting.seeds,
            vocab=args.vocab or setting.vocab,
        )
        setting = setting._replace(evaluate=min(setting.evaluate, setting.steps))
        setting = setting._replace(steps=setting.steps // setting.evaluate * setting.evaluate)
        facts = run(setting, torch.device(args.device))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(facts, f, indent=1)
    show(facts)
    if args.plot:
        plot(facts, args.plot)


if __name__ == "__main__":
    main()
