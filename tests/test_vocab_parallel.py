"""Vocabulary parallelism on gloo ranks: the loss and every gradient against one process that holds the whole head."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cce_ext import VocabParallelOptions, linear_cross_entropy
from tests.ranks import run_ranks

N, V, D, R = 17, 53, 12, 3
NOT_OF_THE_LOSS = ("bias", "rank", "ignored", "reduce_e_grad", "dtype")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 5.0, "label_smoothing": 0.1, "reduction": "sum", "bias": True},
    {"shift": 1, "reduction": "none", "logit_scale": 0.5, "rank": R},
    {"rank": R, "bias": True, "reduce_e_grad": False},
    {"ignored": 1.0},
    {"dtype": torch.bfloat16, "rank": R, "bias": True},
]


def problem(options: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    leaves = {"e": torch.randn(2, N, D, generator=g), "c": torch.randn(V, D, generator=g)}
    if options.get("bias"):
        leaves["bias"] = torch.randn(V, generator=g)
    if options.get("rank"):
        leaves["lora_a"] = torch.randn(R, D, generator=g)
        leaves["lora_b"] = torch.randn(V, R, generator=g)
    leaves = {name: t.to(options.get("dtype", torch.float32)) for name, t in leaves.items()}
    targets = torch.randint(V, (2, N), generator=g)
    targets[torch.rand(2, N, generator=g) < options.get("ignored", 0.2)] = -100
    return leaves, targets


def loss_and_gradients(
    leaves: dict[str, Tensor], targets: Tensor, options: dict[str, Any], parallel: Any = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    arguments = {k: v for k, v in options.items() if k not in NOT_OF_THE_LOSS}
    e, c, *rest = leaves.values()
    named = {name: t for name, t in leaves.items() if name not in ("e", "c")}
    loss, lse = linear_cross_entropy(
        e, c, targets, return_lse=True, vocab_parallel_options=parallel, **named, **arguments
    )
    total = (loss * torch.linspace(1, 2, loss.numel()).view(loss.shape)).sum() + lse.square().mean()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return loss.detach(), lse.detach(), dict(zip(leaves, gradients, strict=True))


def bounds(world: int, uneven: bool) -> list[int]:
    """Where the shards begin and end; an uneven split has an empty shard."""
    if uneven:
        return [0, *([V // 3] * (world - 1)), V]
    each, extra = divmod(V, world)
    return [rank * each + min(rank, extra) for rank in range(world + 1)]


def worker(rank: int, world: int, uneven: bool) -> None:
    for impl, each in itertools.product(("cce", "reference"), OPTIONS):
        options = {"impl": impl, **each}
        leaves, targets = problem(options)
        loss, lse, truth = loss_and_gradients(leaves, targets, options)
        edges = bounds(world, uneven)
        mine = slice(edges[rank], edges[rank + 1])
        reduce = options.get("reduce_e_grad", True)
        parallel = VocabParallelOptions(mine.start, mine.stop, reduce_e_grad=reduce)
        if not uneven:
            even = VocabParallelOptions.from_vocab(V, reduce_e_grad=reduce)
            assert (even.start, even.stop) == (mine.start, mine.stop)
            parallel = even
        sharded = ("c", "bias", "lora_b")
        shard = {k: t[mine] if k in sharded else t for k, t in leaves.items()}
        got, got_lse, gradients = loss_and_gradients(shard, targets, options, parallel)
        torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got_lse, lse, rtol=1e-5, atol=1e-5)
        if not reduce:
            dist.all_reduce(gradients["e"])
        for name, gradient in gradients.items():
            expected = truth[name][mine] if name in sharded else truth[name]
            error = (gradient - expected).float().norm() / truth[name].float().norm().clamp(min=1)
            # In bfloat16 each rank's part is rounded before the sum.
            assert error < (1e-5 if gradient.dtype == torch.float32 else 1e-2), (
                f"{options}: d{name} is off by {error:.1e}"
            )


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("world", [2, 4])
def test_sharded_equals_whole(world: int, uneven: bool, tmp_path: Path) -> None:
    run_ranks(worker, world, tmp_path, uneven)


def compiled(rank: int, world: int) -> None:
    """One graph without a break, collectives included, equals the same call without torch.compile."""
    stores = {"impl": "reference", **OPTIONS[1]}
    for options in (*OPTIONS[1:4], stores):
        torch._dynamo.reset()
        leaves, targets = problem(options)
        parallel = VocabParallelOptions.from_vocab(V)
        mine = slice(parallel.start, parallel.stop)
        leaves = {k: t if k in ("e", "lora_a") else t[mine] for k, t in leaves.items()}
        names = [name for name in leaves if name not in ("e", "c")]
        arguments = {k: v for k, v in options.items() if k not in NOT_OF_THE_LOSS}

        def loss_of(
            e: Tensor, c: Tensor, *rest: Tensor, names=names, arguments=arguments, **fixed: Any
        ) -> Tensor:
            named = dict(zip(names, rest, strict=True))
            e = torch.tanh(e)  # something of the caller's in the same graph
            return linear_cross_entropy(e, c, **fixed, **named, **arguments).sum()

        results = []
        for run in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
            trained = [t.clone().requires_grad_() for t in leaves.values()]
            loss = run(*trained, targets=targets, vocab_parallel_options=parallel)
            results.append((loss.detach(), *torch.autograd.grad(loss, trained)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_compiled(tmp_path: Path) -> None:
    run_ranks(compiled, 2, tmp_path)


def stored(rank: int, world: int) -> None:
    """Each rank's logits by torch.compile, as without shards."""
    for options in OPTIONS[:2]:
        options = {"impl": "torch_compile", **options}
        leaves, targets = problem(options)
        loss, lse, truth = loss_and_gradients(leaves, targets, options)
        parallel = VocabParallelOptions.from_vocab(V)
        mine = slice(parallel.start, parallel.stop)
        shard = {k: t if k == "e" else t[mine] for k, t in leaves.items()}
        got, got_lse, gradients = loss_and_gradients(shard, targets, options, parallel)
        torch.testing.assert_close((got, got_lse), (loss, lse), rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            expected = truth[name] if name == "e" else truth[name][mine]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        targets[0, 0] = V + 5
        with pytest.raises(IndexError, match="targets"):
            loss_and_gradients(shard, targets, options, parallel)


def test_stored_logits_of_torch_compile(tmp_path: Path) -> None:
    run_ranks(stored, 2, tmp_path)


def autocast(rank: int, world: int) -> None:
    """As without shards: computed in bfloat16, gradients in the inputs' dtype."""
    options = {"rank": R, "bias": True}
    leaves, targets = problem(options)
    parallel = VocabParallelOptions.from_vocab(V)
    mine = slice(parallel.start, parallel.stop)
    shard = {k: t if k in ("e", "lora_a") else t[mine] for k, t in leaves.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, truth = loss_and_gradients(leaves, targets, options)
        got, _, gradients = loss_and_gradients(shard, targets, options, parallel)
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        expected = truth[name] if name in ("e", "lora_a") else truth[name][mine]
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 1e-2 * expected.norm(), name


def test_autocast(tmp_path: Path) -> None:
    run_ranks(autocast, 2, tmp_path)


def whole_found(rank: int, world: int) -> None:
    """Without a check and without vocab_size the vocabulary is found all the same, once."""
    leaves, targets = problem({})
    truth = linear_cross_entropy(leaves["e"], leaves["c"], targets)
    mine = slice(0, 20) if rank == 0 else slice(20, V)
    parallel = VocabParallelOptions(mine.start, mine.stop, check=False)
    for _ in range(2):
        loss = linear_cross_entropy(
            leaves["e"], leaves["c"][mine], targets, vocab_parallel_options=parallel
        )
        torch.testing.assert_close(loss, truth)
    assert parallel.vocab_size == V


def test_unchecked(tmp_path: Path) -> None:
    run_ranks(whole_found, 2, tmp_path)


def test_wrong_shards_are_named() -> None:
    e, c, t = torch.randn(4, D), torch.randn(V, D), torch.randint(V, (4,))
    parallel = VocabParallelOptions(0, V - 1)
    with pytest.raises(ValueError, match="c must hold vocab_parallel_options' rows, 52"):
        linear_cross_entropy(e, c, t, vocab_parallel_options=parallel)
    parallel = VocabParallelOptions(0, V, vocab_size=V)
