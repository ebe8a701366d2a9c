"""impl="triton" and its equals: every implementation against the float64 oracle over one list of
shapes, and the Triton pair's raw ops against the blocked pair's. Without a GPU the kernels are
interpreted (tests/conftest.py)."""

from __future__ import annotations

import itertools
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import cce_ext
from cce_ext import VocabParallelOptions, info, linear_cross_entropy, paths
from cce_ext import triton as triton_path
from tests.oracle import Case, compare, ours
from tests.shapes import GPU_HUGE, PARITY

pytest.importorskip("triton", reason="needs Triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF_SLACK = 1e-4 if GPU else 1e-3
SLACK = {torch.float32: 1e-5, torch.bfloat16: HALF_SLACK, torch.float16: HALF_SLACK}
IMPLEMENTATIONS = ("triton", "cce_exact", "blocked", "torch_compile")


def run_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The oracle's ``run`` for an implementation; "blocked" is what serves where nothing is compiled."""
    if name == "blocked":
        monkeypatch.setattr(paths, "_compiled_reason", lambda device, dtype: "forced")
        name = "cce_exact"
    return partial(ours, impl=name)


@pytest.mark.parametrize("dtype", list(SLACK), ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_option(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(name, monkeypatch)
    paths = {"cce_exact": "compiled" if dtype != torch.float32 or not GPU else "blocked"}
    shapes = itertools.cycle(PARITY)
    options = itertools.product((False, True), (None, 5.0), (0, 1), ("mean", "none"), (0.0, 0.1))
    for i, (bias, softcap, shift, reduction, smoothing) in enumerate(options):
        if name == "torch_compile" and i % 31:
            continue  # each is compiled anew: none of the options, all of them
        batch, length, vocab, hidden = next(shapes)
        case = Case(
            batch, length, vocab, hidden, (0, 8, 1)[i % 3], dtype, bias, softcap, shift, reduction,
            ignored=(0.0, 0.4, 1.0)[i // 3 % 3],
            smoothing=smoothing,
            logit_scale=(1.0, 0.7, -0.5)[i // 2 % 3],
            lse_weight=(0.0, 0.1)[i // 2 % 2],
            strided=i % 3 == 0,
            adapter_dtype=torch.float32 if i % 4 == 0 else None,
            seed=i,
            device=DEVICE,
        )  # fmt: skip
        compare(case, run).check(SLACK[dtype])
        assert cce_ext.diagnostics()["path"] == paths.get(name, name)


@pytest.mark.parametrize("dtype", list(SLACK), ids=str)
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Far below zero, saturated by the softcap, and barely bent by it."""
    run = partial(ours, impl="triton")
    for softcap, spread in ((None, 300.0), (2.0, 30.0), (1e5, 1.0)):
        case = Case(2, 20, 300, 64, dtype=dtype, softcap=softcap, spread=spread, device=DEVICE)
        compare(case, run).check(SLACK[dtype])


def arguments(dtype: torch.dtype = torch.float32, n: int = 70, v: int = 300) -> dict[str, Any]:
    """Tensor arguments of a forward op; two rows are ignored."""
    g = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g) * shape[-1] ** -0.5).to(DEVICE, dtype)

    targets = torch.randint(v, (n,), generator=g)
    targets[3:5] = -100
    return {
        "e": make(n, 20) * 5,
        "c": make(v, 20) * 5,
        "targets": targets.to(DEVICE),
        "bias": make(v),
        "u": make(n, 3),
        "lora_b": make(v, 3),
    }


def both(half: str, *args: Any) -> list[tuple[Tensor, ...]]:
    """What the Triton op and the blocked op return."""
    return [getattr(torch.ops.cce, f"{name}_{half}")(*args) for name in ("triton_ce", "blocked_ce")]


OPTIONS = [(-100, 0.0, 1.0, 0.0), (-100, 5.0, -0.7, 0.1)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("metrics", [False, True])
def test_forward_op(options: tuple, metrics: bool) -> None:
    """All seven results, with invalid targets, NaN in an ignored row, one tile at -inf, one row at
    -inf, and more ids than a split."""
    for v in (300, 4400):
        p = arguments(v=v)
        p["targets"][10], p["targets"][11] = v, -1
        p["e"][3] = torch.nan
        p["bias"][:128] = -torch.inf
        mine, theirs = both("forward", *p.values(), *options, 0, 0, metrics)
        for x, y in zip(mine, theirs, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert mine[0].isnan().nonzero().flatten().tolist() == [10, 11]
        p["bias"][:] = -torch.inf
        mine, theirs = both("forward", *p.values(), *options, 0, 0, metrics)
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shards(options: tuple) -> None:
    """Both ops on parts of a vocabulary, one of them empty, and without rows."""
    p = arguments()
    for rows, start, stop in ((70, 0, 130), (70, 130, 300), (70, 130, 130), (0, 130, 300)):
        shard = {
            k: t[start:stop] if k in ("c", "bias", "lora_b") else t[:rows] for k, t in p.items()
        }
        shared = (*options, start, 300)
        mine, theirs = both("forward", *shard.values(), *shared, False)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        e, c, targets, *rest = shard.values()
        dnll = torch.linspace(-1, 1, rows, device=DEVICE)
        whole_lse = theirs[1] + 0.5
        mine, theirs = both(
            "backward", dnll, 2 * dnll, e, c, targets, whole_lse, *rest, *shared, *[True] * 5
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk_bytes", "options"), [(None, OPTIONS[0]), (1, OPTIONS[1])], ids=str)
def test_backward_op(
    chunk_bytes: int | None, options: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any set of wanted gradients, one or no upstream gradient, one chunk and many; twice the same."""
    from cce_ext.triton import pair

    if chunk_bytes:
        monkeypatch.setattr(pair, "CHUNK_BYTES", chunk_bytes)
    p = arguments()
    p["e"][3] *= 1e3  # exp of an ignored row's logits overflows
    options = (*options, 0, 0)
    lse = torch.ops.cce.blocked_ce_forward(*p.values(), *options, False)[1]
    e, c, targets, *rest = p.values()
    upstream = torch.linspace(-1, 1, 70, device=DEVICE)
    upstream[3] = torch.nan  # an ignored row
    every = [(need, (True, False)) for need in itertools.product((True, False), repeat=5)]
    for needs, given in [*every, ((True,) * 5, (True, True)), ((True,) * 5, (False, True))]:
        gradients = [upstream if g else None for g in given]
        args = (*gradients, e, c, targets, lse, *rest, *options, *needs)
        mine, theirs = both("backward", *args)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert (mine[0][3:5] == 0).all()
        again = torch.ops.cce.triton_ce_backward(*args)
        assert all(torch.equal(x, y) for x, y in zip(mine, again, strict=True))


def test_metrics() -> None:
    p = arguments()
    p["targets"][20:40] = (p["e"] @ p["c"].T).argmax(-1)[20:40]
    e, c, targets = p["e"], p["c"], p["targets"]
    results = [
        linear_cross_entropy(e, c, targets, p["bias"] * 0, softcap=8.0, return_metrics=True, impl=i)
        for i in ("triton", "reference")
    ]
    (loss, mine), (truth, theirs) = results
    torch.testing.assert_close(loss, truth)
    assert mine.correct[20:40].all()
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    p = {k: t.requires_grad_(t.is_floating_point()) for k, t in arguments(n=5, v=11).items()}
    forward = torch.ops.cce.triton_ce_forward.default
    torch.library.opcheck(forward, (*p.values(), -100, 5.0, 0.7, 0.1, 0, 0, True))
    torch.library.opcheck(forward, (*p.values(), -100, 0.0, 1.0, 0.0, 0, 0, False))


def test_compiled_callers_and_autocast() -> None:
    p = arguments()
    e, c = p["e"].requires_grad_(), p["c"].requires_grad_()
    run = partial(linear_cross_entropy, targets=p["targets"], impl="triton", softcap=5.0)
    truth = torch.autograd.grad(run(e, c), (e, c))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(e, c), (e, c)), truth)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = run(e, c)
    gradients = torch.autograd.grad(loss, (e, c))
    for x, y in zip(gradients, truth, strict=True):
        assert x.dtype == torch.float32
        assert (x - y).norm() < 2e-2 * y.norm()


def test_float64_is_refused() -> None:
    p = {k: t.double() if t.is_floating_point() else t for k, t in arguments().items()}
    with pytest.raises(TypeError, match=r"e must be float32.*got torch\.float64.*cce_exact"):
        linear_cross_entropy(p["e"], p["c"], p["targets"], impl="triton")
    e, c, targets, *rest = p.values()
    row = torch.ones(70, device=DEVICE, dtype=torch.float64)
    with pytest.raises(TypeError, match="e must be float32"):
        torch.ops.cce.triton_ce_backward(
            row, None, e, c, targets, row, *rest, *OPTIONS[0], 0, 0, *[True] * 5
        )


def test_where_it_cannot_run_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    p = {k: t.cpu() for k, t in arguments().items()}
    run = partial(linear_cross_entropy, p["e"], p["c"], p["targets"], impl="triton")
    with monkeypatch.context() as m:
        m.setattr(triton_path, "interpreted", lambda: False)
        for parallel in (None, VocabParallelOptions(0, 300, vocab_size=300)):
            with pytest.raises(RuntimeError, match=r"cpu tensors.*TRITON_INTERPRET=1.*cce_exact"):
                run(vocab_parallel_options=parallel)
        backend = info._triton_backend()
        assert backend.compiled
        assert backend.available == GPU
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="does not import.*pip install triton"):
        run()
    backend = info._triton_backend()
    assert not backend.compiled
    assert "pip install triton" in backend.reason


def test_it_is_listed_as_available() -> None:
    assert info._triton_backend() == ("triton", True, True, "")


def test_importing_cce_ext_loads_no_kernels() -> None:
    code = "import sys, cce_ext; print([m for m in sys.modules if m.startswith('cce_ext.triton.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cce_ext.triton import kernels

optional = ("bias_ptr", "u_ptr", "lora_b_ptr", "logit_sum_ptr", "weighted_ptr", "argmax_ptr")
for dtype, everything, kernel in itertools.product(
    ("bf16", "fp16", "fp32"), (False, True), (kernels.forward_kernel, kernels.dlogits_kernel)
):
    types = dict(softcap="fp32", logit_scale="fp32", lora_b_ptr="*fp32")
    types |= dict(local_ptr="*i64", argmax_ptr="*i64", valid_ptr="*i8")
    types |= dict.fromkeys(("e_ptr", "c_ptr", "u_ptr", "bias_ptr", "g_ptr"), "*" + dtype)
    constants = dict(D=72, R=5, HAS_SOFTCAP=everything, SPLIT_COLUMNS=4096)
    constants |= {name: getattr(kernels, name) for name in ("BLOCK_N", "BLOCK_V", "BLOCK_K")}
    if not everything:
        constants |= dict.fromkeys(optional)
    constants = {k: x for k, x in constants.items() if k in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants
        else types.get(name, "*fp32" if name.endswith("_ptr") else "i64")
        for name in kernel.arg_names
    }
    for capability in (80, 90):
        source = ASTSource(kernel, signature, constants)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target, dict(num_warps=kernels.NUM_WARPS))
        assert ("mma" in compiled.asm["ptx"]) == (dtype != "fp32"), (dtype, capability)
print("compiled")
"""


def test_kernels_compile_for_gpus(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, which needs no GPU: the interpreter takes more than the compiler does. 16-bit
    products must be on the tensor cores, float32 ones must not."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    out = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False
    )
    assert out.stdout.strip() == "compiled", out.stderr


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_more_than_two_billion() -> None:
    """V x D beyond 2³¹, and hidden states stored the other way round: some rows against the formula."""
    n, v, d = GPU_HUGE[1]
    g = torch.Generator("cuda").manual_seed(0)
    e = torch.randn(d, n, device="cuda", dtype=torch.bfloat16, generator=g).T.requires_grad_()
    c = torch.randn(v, d, device="cuda", dtype=torch.bfloat16, generator=g) * d**-0.5
    t = torch.randint(v, (n,), device="cuda", generator=g)
    t[-1] = v - 1
    loss = linear_cross_entropy(e, c, t, reduction="none", impl="triton")
    (de,) = torch.autograd.grad(loss.sum(), e)
    rows = torch.tensor([0, n // 2, n - 1], device="cuda")
    z = e[rows].detach().float() @ c.float().T
    truth = torch.nn.functional.cross_entropy(z, t[rows], reduction="none")
    torch.testing.assert_close(loss[rows], truth, rtol=1e-4, atol=1e-4)
    p = torch.softmax(z, -1)
    p[torch.arange(3), t[rows]] -= 1
    torch.testing.assert_close(de[rows].float(), p @ c.float(), rtol=2e-2, atol=2e-2)
