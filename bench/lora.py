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
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.methods import METHODS
from bench.problems import Config, make_problem, named
from bench.results import commit_text, commits
from bench.timing import MB, Effort, Timer, cuda_memory, make_call, matmul_call, summarise
from cce_ext import diagnostics

FACTS = ("kept", "dropped_share", "exact_rows")


def measure_head(config: Config, device: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of part one for one kind of data."""
    problem = make_problem(config, device)
    timer, effort = Timer(torch.device(device)), Effort(1, repeats, 0.5)
    matmul = summarise(timer(matmul_call(problem.e, problem.c), effort)).median
    rows: list[dict[str, Any]] = [
        {"data": config.data, "method": "matmul", "ms": matmul, "ratio": 1.0}
    ]
    for name in ("cce", "cce_exact", "eager"):
        call = make_call("loss-fw-bw", METHODS[name], problem)
        ms = summarise(timer(call, effort)).median
        row = {"data": config.data, "method": name, "ms": ms, "ratio": ms / matmul}
        if device != "cpu":
            row["extra_mb"] = cuda_memory(call).allocated - problem.gradient_bytes() / MB
        facts = diagnostics() if name != "eager" else {}
        rows.append(row | {k: facts[k] for k in FACTS if k in facts})
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
    shape, n, rank = ("quick", 64, 8) if args.quick else ("gemma2", 8192, 256)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    measured = commits()
    print(f"{name}, torch {torch.__version__}, {commit_text(measured)}")
    print(f"  {'method':<11}{'ms':>9}{'x matmul':>10}{'extra MB':>10}  sparse backward")
    head: list[dict[str, Any]] = []
    for data in ("random", "llm"):
        config = named(shape, n, "bfloat16", data=data, rank=rank)
        print(config.describe())
        for row in measure_head(config, args.device, args.repeats):
            facts = ", ".join(f"{k} {row[k]:.4g}" for k in FACTS if k in row)
            memory = f"{row['extra_mb']:>10.0f}" if "extra_mb" in row else " " * 10
            print(f"  {row['method']:<11}{row['ms']:>9.2f}{row['ratio']:>10.2f}{memory}  {facts}")
            head.append(row)
    print(f"\n{args.steps} steps of training; gaps are to the model's own loss, with stored logits")
    print("loss by       first  last quarter  gap there  largest gap  norm of B")
    training = compare_training(args.steps, args.device, args.quick)
    for row in training:
        print(
            f"{row['impl']:<11}{row['first']:>8.4f}{row['last']:>14.4f}{row['gap_of_last']:>11.4f}"
            f"{row['largest_gap']:>13.4f}{row['norm_of_b']:>11.3f}"
        )
    result = {"device": name, "torch": torch.__version__, **measured}
    result |= {"head": head, "training": training}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result | {"n": n, "rank": rank}, file, indent=1)
    return result


if __name__ == "__main__":
    main()
