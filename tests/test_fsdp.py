"""Heads under FSDP2, tensor parallelism, both, and DDP on gloo ranks: the loss and every gradient
against one process that holds everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cce_ext import LinearCrossEntropyHead, VocabParallelOptions, linear_cross_entropy
from tests.ranks import run_ranks

B, T, V, D, R = 4, 8, 53, 12, 3
#: V = 9 on four ranks: torch.chunk's 3, 3, 3 and nothing.
KINDS: dict[str, dict[str, Any]] = {
    "trained": {"bias": True, "softcap": 5.0, "label_smoothing": 0.1},
    "lora": {"rank": R, "lora_scale": 2.0},
    "few": {"vocab": 9},
}


class LinearHead(nn.Module):
    """A user's own head: the output layer is a submodule, and the loss is inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(D, V)

    def forward(self, h: Tensor, targets: Tensor, num_items: float | None = None) -> Tensor:
        weight = self.output.weight
        parallel = None
        if isinstance(weight, DTensor):
            parallel = VocabParallelOptions.from_dtensor(weight)
        return linear_cross_entropy(
            h, self.output, targets, num_items=num_items, vocab_parallel_options=parallel
        )


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(D, D)
        if kind == "linear":
            self.head: nn.Module = LinearHead()
        else:
            options = dict(KINDS[kind])
            self.head = LinearCrossEntropyHead(D, options.pop("vocab", V), **options)
        for name, parameter in self.head.named_parameters():
            if name == "lora_b":  # zero at the start, when every mistake in dA looks right
                nn.init.normal_(parameter)

    def forward(self, x: Tensor, targets: Tensor, num_items: float | None = None) -> Tensor:
        return self.head(torch.tanh(self.trunk(x)), targets, num_items)


def problem(kind: str) -> tuple[Tensor, Tensor]:
    """Inputs (B, T, D) and targets (B, T); the last sequence does not count at all."""
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(KINDS.get(kind, {}).get("vocab", V), (B, T), generator=g)
    targets[torch.rand(B, T, generator=g) < 0.2] = -100
    targets[-1] = -100
    return torch.randn(B, T, D, generator=g), targets


def truth(kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one process."""
    model = Model(kind)
    loss = model(*problem(kind))
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            grad = parameter.grad
            full = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name.removeprefix("module.")] = full.clone()
    return found


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1)
        assert error <= 1e-5, f"{name} is off by {error:.1e}"


def equal(loss: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)


def my_tokens(kind: str, part: int, parts: int, dim: int = 0) -> tuple[Tensor, Tensor, float]:
    """This rank's share of the tokens, and the num_items that makes the ranks' average the mean of
    all tokens."""
    x, targets = problem(kind)
    items = (targets != -100).sum().item() / parts
    return x.chunk(parts, dim)[part], targets.chunk(parts, dim)[part], items


def mean_over(loss: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    loss = loss.detach().clone()
    dist.all_reduce(loss, group=group)
    return loss / dist.get_world_size(group)


def shard_head(head: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism of the head: everything with a row a vocabulary entry is Shard(0)."""
    owner = head.output if isinstance(head, LinearHead) else head
    for name, parameter in list(owner.named_parameters(recurse=False)):
        if name != "lora_a":
            shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            setattr(owner, name, nn.Parameter(shard, parameter.requires_grad))


def fsdp(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for kind in ("trained", "lora", "linear"):
        loss, expected = truth(kind)
        model = Model(kind)
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        x, targets, items = my_tokens(kind, rank, world)
        with pytest.raises(TypeError, match="c is a torch.distributed.tensor.DTensor.*own forward"):
            linear_cross_entropy(x, next(model.head.parameters()), targets)
        if kind == "trained":  # FSDP2's own shards are not a vocabulary-parallel head
            parallel = VocabParallelOptions.from_dtensor(model.head.weight)
            with pytest.raises(ValueError, match="disagree on the targets"):
                linear_cross_entropy(x, model.head.weight, targets, vocab_parallel_options=parallel)
        found = model(x, targets, items)
        found.backward()
        equal(mean_over(found), loss)
        check(gradients(model), expected)


def tensor_parallel(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for kind in ("trained", "lora", "linear", "few"):
        loss, expected = truth(kind)
        model = Model(kind)
        shard_head(model.head, mesh)
        found = model(*problem(kind))
        found.backward()
        equal(found, loss)
        check(gradients(model), expected)


def fsdp_and_tensor_parallel(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for kind in ("trained", "lora", "linear"):
        loss, expected = truth(kind)
        model = Model(kind)
        shard_head(model.head, mesh["tensor"])
        fully_shard(model.head, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        found = model(*my_tokens(kind, mesh["data"].get_local_rank(), 2))
        found.backward()
        equal(mean_over(found, mesh["data"].get_group()), loss)
        check(gradients(model), expected)


def data_parallel(rank: int, world: int) -> None:
    """Each rank has whole sequences, or (dim 1) its own part of every sequence."""
    for kind in ("trained", "lora", "linear"):
        loss, expected = truth(kind)
        for dim in (0, 1):
            model = DistributedDataParallel(Model(kind), find_unused_parameters=False)
            for _ in range(2):  # a gradient left out of the first step fails in the second
                model.zero_grad()
                found = model(*my_tokens(kind, rank, world, dim))
                found.backward()
                equal(mean_over(found), loss)
                check(gradients(model), expected)


def sequence_parallel(rank: int, world: int) -> None:
    """The trunk sees this rank's part of each sequence, the head all of them and its part of the
    vocabulary: an all-gather before it, whose backward is a reduce-scatter."""
    mesh = init_device_mesh("cpu", (world,))
    for kind in ("trained", "lora"):
        loss, expected = truth(kind)
        model = Model(kind)
        shard_head(model.head, mesh)
        model.head.reduce_e_grad = False
        x, targets = problem(kind)
        h = torch.tanh(model.trunk(x.chunk(world, 1)[rank]))
        h = DTensor.from_local(h, mesh, [Shard(1)])
        with pytest.raises(TypeError, match=r"e is a .*DTensor.*Partial\(\).*reduce_e_grad=False"):
            model.head(h, targets)
        h = h.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        found = model.head(h, targets)
        found.backward()
        equal(found, loss)
        for parameter in model.trunk.parameters():  # each rank has its own tokens' part
            dist.all_reduce(parameter.grad)
        check(gradients(model), expected)


class LoraLinear(nn.Module):
    """A LoRA layer with PEFT's attributes, base and B sharded over the vocabulary."""

    def __init__(self, mesh: DeviceMesh, a: Tensor) -> None:
        super().__init__()
        model = Model("lora")
        shard_head(model.head, mesh)
        self.base_layer = nn.Linear(D, V, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(D, R, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(R, V, bias=False)})
        self.base_layer.weight = model.head.weight
        self.lora_A["default"].weight = nn.Parameter(a)
        self.lora_B["default"].weight = model.head.lora_b
        self.scaling, self.active_adapters = {"default": 2.0}, ["default"]


def placements(rank: int, world: int) -> None:
    """A LoRA layer given as a module, and what the errors say of placements that do not serve."""
    mesh = init_device_mesh("cpu", (world,))
    loss, expected = truth("lora")
    model = Model("lora")
    x, targets = problem("lora")
    h = torch.tanh(model.trunk(x))
    for a in (
        model.head.lora_a.detach(),
        distribute_tensor(model.head.lora_a, mesh, [Replicate()]),
    ):
        layer = LoraLinear(mesh, a.detach())
        parallel = VocabParallelOptions.from_dtensor(layer.base_layer.weight)
        assert (parallel.start, parallel.stop) == ((0, 27) if rank == 0 else (27, V))
        found = linear_cross_entropy(h.detach(), layer, targets, vocab_parallel_options=parallel)
        found.backward()
        equal(found, loss)
        names = {"lora_A.default.weight": "head.lora_a", "lora_B.default.weight": "head.lora_b"}
        found_gradients = {names[name]: g for name, g in gradients(layer).items()}
        check(found_gradients, {name: expected[name] for name in names.values()})

    weight = distribute_tensor(torch.randn(V, D), mesh, [Shard(0)])
    a, b = distribute_tensor(torch.randn(world, D), mesh, [Shard(0)]), torch.randn(V, world)
    parallel = VocabParallelOptions.from_dtensor(weight)
    b = b[parallel.start : parallel.stop]
    with pytest.raises(ValueError, match=r"lora_a must be a plain tensor or .* Replicate\(\)"):
        linear_cross_entropy(
            x, weight, targets, lora_a=a, lora_b=b, vocab_parallel_options=parallel
        )
    columns = distribute_tensor(torch.randn(V, D), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"c must be Shard\(0\) on a one-dimensional mesh"):
        linear_cross_entropy(x, columns, targets, vocab_parallel_options=parallel)
    flat = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
    both = distribute_tensor(torch.randn(V, D), flat, [Shard(0), Shard(0)])
    for wrong in (columns, both):
        with pytest.raises(ValueError, match=r"weight must be Shard\(0\).*head's own forward"):
            VocabParallelOptions.from_dtensor(wrong)
    with pytest.raises(TypeError, match="weight must be a DTensor, got Tensor.*from_vocab"):
        VocabParallelOptions.from_dtensor(torch.randn(V, D))
    head = LinearCrossEntropyHead(D, V)
    shard_head(head, mesh)
    with pytest.raises(ValueError, match="targets must be given: the head is sharded"):
        head(x)


def test_placements(tmp_path: Path) -> None:
    run_ranks(placements, 2, tmp_path)


def compiled(rank: int, world: int) -> None:
    """torch.compile over a model with a tensor-parallel head, in one graph."""
    mesh = init_device_mesh("cpu", (world,))
    for kind in ("trained", "lora"):
        torch._dynamo.reset()
        loss, expected = truth(kind)
        model = Model(kind)
        shard_head(model.head, mesh)
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(*problem(kind))
        found.backward()
        equal(found, loss)
        check(gradients(model), expected)


def test_compiled(tmp_path: Path) -> None:
    run_ranks(compiled, 2, tmp_path)


@pytest.mark.parametrize("worker", [fsdp, tensor_parallel, data_parallel, sequence_parallel])
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(worker: Any, world: int, tmp_path: Path) -> None:
    run_ranks(worker, world, tmp_path)


def test_fsdp_and_tensor_parallel(tmp_path: Path) -> None:
    run_ranks(fsdp_and_tensor_parallel, 4, tmp_path)
