"""LoRA heads on one GPU: what a step costs, and whether training with it is the same.

``python -m bench.lora [--json FILE]``, about a minute on an H200; ``--device cpu --quick`` runs both
parts small. Part one: forward and backward of an output layer with a frozen classifier and float32
adapters (what PEFT makes of a bfloat16 model), beside stored logits, as ratios to
``torch.mm(E, C.T)``; medians with a cold L2 cache; memory beyond inputs and gradients. Part two: a
small Llama with adapters on embed_tokens, lm_head and attention, trained from one seed with its own
loss and with cce_patch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bench.llm_data import llm_like
from cce_ext import build_info, diagnostics, linear_cross_entropy

SCALE = 2.0  # alpha / R of the usual settings
MB = 1e6


class Shape(NamedTuple):
    """N tokens, an output layer (V, D), adapters of rank R."""

    n: int
    v: int
    d: int
    rank: int


GEMMA2_2B = Shape(8192, 256000, 2304, 256)
QUICK = Shape(64, 2000, 64, 8)


class Head(NamedTuple):
    """Inputs of the loss: e (N, D), c (V, D) in bfloat16, targets (N,), a (R, D) and b (V, R) in
    float32; all but c and targets get gradients."""

    e: Tensor
    c: Tensor
    targets: Tensor
    a: Tensor
    b: Tensor

    def gradient_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.e, self.a, self.b))

    def step(self, loss: Callable[[Head], Tensor]) -> tuple[Tensor, ...]:
        """Gradients of e, a and b."""
        return torch.autograd.grad(loss(self), (self.e, self.a, self.b))


def make_head(shape: Shape, data: str, device: str) -> Head:
    """Random numbers ("random", logits of unit variance), or like a trained model's ("llm")."""
    n, v, d, rank = shape
    g = torch.Generator(device).manual_seed(1)
    if data == "llm":
        e, c, targets = llm_like(n, v, d, torch.bfloat16, device)
    else:
        e = torch.randn(n, d, generator=g, device=device, dtype=torch.bfloat16)
        c = torch.randn(v, d, generator=g, device=device, dtype=torch.bfloat16) * d**-0.5
        targets = torch.randint(v, (n,), generator=g, device=device)
    a = torch.randn(rank, d, generator=g, device=device) * d**-0.5
    b = torch.randn(v, rank, generator=g, device=device) * 0.1 * rank**-0.5
    return Head(e.requires_grad_(), c, targets, a.requires_grad_(), b.requires_grad_())


def stored_logits(h: Head) -> Tensor:
    """What PEFT's layer and a cross-entropy do."""
    z = F.linear(h.e, h.c)
    z = (z + F.linear(F.linear(h.e.float(), h.a), h.b) * SCALE).to(z.dtype)
    return F.cross_entropy(z.float(), h.targets)


def fused(impl: str) -> Callable[[Head], Tensor]:
    """linear_cross_entropy with the adapters."""
    return lambda h: linear_cross_entropy(
        h.e, h.c, h.targets, impl=impl, lora_a=h.a, lora_b=h.b, lora_scale=SCALE
    )


def median_ms(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call after warm-up; on a GPU by events, with the L2 cache emptied."""
    for _ in range(2):
        run()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak GPU memory of a call beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def matmul_ms(h: Head, device: str, repeats: int) -> float:
    """Time of the matmul alone, which stores the logits (N, V) in bfloat16: the unit of all times."""
    e = h.e.detach()
    out = torch.empty(e.shape[0], h.c.shape[0], device=device, dtype=e.dtype)
    return median_ms(lambda: torch.mm(e, h.c.T, out=out), device, repeats)


def measure_head(shape: Shape, data: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of part one for one kind of data."""
    h = make_head(shape, data, device)
    matmul = matmul_ms(h, device, repeats)
    rows = [{"data": data, "method": "matmul", "ms": matmul, "ratio": 1.0}]
    methods = {"cce": fused("cce"), "cce_exact": fused("cce_exact"), "stored": stored_logits}
    for name, loss in methods.items():
        ms = median_ms(lambda loss=loss: h.step(loss), device, repeats)
        row = {"data": data, "method": name, "ms": ms, "ratio": ms / matmul}
        if device != "cpu":
            extra = peak_bytes(lambda loss=loss: h.step(loss)) - h.gradient_bytes()
            row["extra_mb"] = extra / MB
            torch.cuda.empty_cache()
        facts = diagnostics() if name != "stored" else {}
        row |= {k: facts[k] for k in ("kept", "dropped_share", "exact_rows") if k in facts}
        rows.append(row)
    return rows


def make_model(device: str, quick: bool) -> nn.Module:
    """A random bfloat16 Llama with stock PEFT adapters, the same at every call."""
    import peft
    import transformers

    torch.manual_seed(0)
    # Above the vocabulary up to which every backward is exact, unless it has to be quick.
    config = transformers.LlamaConfig(
        hidden_size=64 if quick else 512,
        intermediate_size=128 if quick else 1024,
        num_hidden_layers=2 if quick else 4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000 if quick else 32768,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    adapters = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=8 if quick else 64,
        lora_alpha=16 if quick else 128,
        target_modules=["embed_tokens", "lm_head", "q_proj", "v_proj"],
    )
    return peft.get_peft_model(model, adapters).to(device).train()


def sample_texts(vocab: int, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Tokens (batch, length): Zipfian, and every other one is a fixed function of the one before."""
    frequency = 1 / (torch.arange(vocab) + 4.0)
    draw = torch.multinomial(frequency, batch * length, replacement=True, generator=generator)
    tokens = draw.view(batch, length)
    tokens[:, 1::2] = (tokens[:, ::2] * 7 + 3) % vocab
    return tokens


def train(impl: str, steps: int, device: str, quick: bool) -> tuple[list[float], float]:
    """Losses of all steps with the model's own loss ("stored") or a patched one, and how far lm_head's
    B, which starts at zero, has moved (its norm)."""
    from cce_ext.transformers import audit, cce_patch

    model = make_model(device, quick)
    if impl != "stored":
        cce_patch(model, impl=impl)
        found = audit(model)
        if not found.fused:
            raise RuntimeError(f"the model is not fused: {found}")
    vocab = model.get_base_model().config.vocab_size
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in tqdm(range(steps), desc=f"training, {impl}", leave=False, disable=None):
        tokens = sample_texts(vocab, 4 if quick else 16, 32 if quick else 256, generator)
        loss = model(input_ids=tokens.to(device), labels=tokens.to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    moved = model.get_output_embeddings().lora_B["default"].weight.norm().item()
    return torch.stack(losses).tolist(), moved


def compare_training(steps: int, device: str, quick: bool) -> list[dict[str, Any]]:
    """Part two: each way of computing the loss beside the model's own."""
    tail = max(1, steps // 4)
    rows: list[dict[str, Any]] = []
    for impl in ("stored", "cce", "cce_exact"):
        losses, moved = train(impl, steps, device, quick)
        own = rows[0]["losses"] if rows else losses
        gaps = [x - y for x, y in zip(losses, own, strict=True)]
        rows.append(
            {
                "impl": impl,
                "first": losses[0],
                "last": sum(losses[-tail:]) / tail,
                "gap_of_last": sum(gaps[-tail:]) / tail,
                "largest_gap": max(map(abs, gaps)),
                "norm_of_b": moved,
                "losses": losses,
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures and prints; returns what --json writes."""
    parser = argparse.ArgumentParser("bench.lora", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--json", help="also write everything to this file")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick runs small on the CPU")
    shape = QUICK if args.quick else GEMMA2_2B
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    commit = build_info().get("git_commit", "unknown")
    print(f"{name}, torch {torch.__version__}, commit {commit}")
    print(f"\nLoRA head, N {shape.n}, V {shape.v}, D {shape.d}, R {shape.rank}, forward + backward")
    print(f"{'data':<8}{'method':<11}{'ms':>9}{'x matmul':>10}{'extra MB':>10}  sparse backward")
    head: list[dict[str, Any]] = []
    for data in ("random", "llm"):
        for row in measure_head(shape, data, args.device, args.repeats):
            facts = ", ".join(
                f"{k} {row[k]:.4g}" for k in row if k in ("kept", "dropped_share", "exact_rows")
            )
            memory = f"{row['extra_mb']:>10.0f}" if "extra_mb" in row else f"{'':>10}"
            print(
                f"{row['data']:<8}{row['method']:<11}{row['ms']:>9.2f}{row['ratio']:>10.2f}{memory}  {facts}"
            )
            head.append(row)
    print(
        f"\nTraining with adapters, {args.steps} steps; gaps are to the model's own loss (stored)"
    )
    print(
        f"{'loss by':<11}{'first':>8}{'last quarter':>14}{'gap there':>11}{'largest gap':>13}{'norm of B':>11}"
    )
    training = compare_training(args.steps, args.device, args.quick)
    for row in training:
        print(
            f"{row['impl']:<11}{row['first']:>8.4f}{row['last']:>14.4f}{row['gap_of_last']:>11.4f}"
            f"{row['largest_gap']:>13.4f}{row['norm_of_b']:>11.3f}"
        )
    result = {
        "device": name,
        "torch": torch.__version__,
        "shape": shape._asdict(),
        "head": head,
        "training": training,
    }
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return result


if __name__ == "__main__":
    main()
