"""Ranks of a sharded loss that disagree, die or stay away: an error on the others, never a hang."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cce_ext import VocabParallelOptions, linear_cross_entropy
from tests.ranks import run_ranks

N, V, D, R = 8, 21, 6, 2
CUT = 10
#: name -> what rank 1 does otherwise, and what both ranks then say.
DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "tokens": ({"n": N - 2}, r"the number of tokens: 8 on rank 0; 6 on rank 1"),
    "width": ({"d": D + 1}, r"e's last dimension: 6 on rank 0; 7 on rank 1"),
    "rank": ({"r": R + 1}, r"the rank of the low-rank update: 2 on rank 0; 3 on rank 1"),
    "dtype": ({"dtype": torch.float64}, r"e's dtype: float32 on rank 0; float64 on rank 1"),
    "targets": ({"seed": 5}, r"the targets \(their checksum\)"),
    "ignore_index": ({"ignore_index": 3}, r"ignore_index: -100 on rank 0; 3 on rank 1"),
    "softcap": ({"softcap": 2.5}, r"softcap: 0 on rank 0; 2.5 on rank 1"),
    "logit_scale": ({"logit_scale": 0.5}, r"logit_scale: 1 on rank 0; 0.5 on rank 1"),
    "smoothing": ({"label_smoothing": 0.1}, r"label_smoothing: 0 on rank 0; 0.1 on rank 1"),
    "reduction": ({"reduction": "sum"}, r"reduction: mean on rank 0; sum on rank 1"),
    "filter_eps": ({"filter_eps": None}, r"filter_eps: 3.05\d*e-05 on rank 0; None on rank 1"),
    "bias": ({"bias": True}, r"whether there is a bias: False on rank 0; True on rank 1"),
    "reduce": ({"reduce_e_grad": False}, r"reduce_e_grad: True on rank 0; False on rank 1"),
    "frozen": ({"trained": False}, r"need gradients: 0b11 on rank 0; 0b10 on rank 1"),
    "gap": ({"start": CUT + 1}, r"without gap or overlap, got \[0, 10\) on rank 0; \[11, 21\)"),
    "overlap": ({"start": CUT - 1}, r"without gap or overlap, got \[0, 10\) on rank 0; \[9, 21\)"),
    "vocab_size": ({"vocab_size": V + 1}, r"a vocabulary of 21, but vocab_size is None.*; 22 on"),
}


def call(rank: int, **changes: Any) -> torch.Tensor:
    """A call that ranks 0 and 1 agree on, but for the changes."""
    has = {"n": N, "d": D, "r": R, "seed": 0, "dtype": torch.float32, "bias": False}
    has |= {"trained": True, "start": 0 if rank == 0 else CUT, "vocab_size": None}
    has |= {"reduce_e_grad": True} | changes
    start, stop = has["start"], CUT if rank == 0 else V
    g = torch.Generator().manual_seed(has["seed"])
    targets = torch.randint(V, (has["n"],), generator=g)
    e = torch.randn(has["n"], has["d"], generator=g).to(has["dtype"])
    e.requires_grad_(has["trained"])
    c = torch.randn(V, has["d"], generator=g).to(has["dtype"])[start:stop]
    a = torch.randn(has["r"], has["d"], generator=g).to(has["dtype"]).requires_grad_()
    b = torch.randn(V, has["r"], generator=g).to(has["dtype"])[start:stop]
    names = ("softcap", "reduction", "logit_scale", "label_smoothing", "ignore_index", "filter_eps")
    return linear_cross_entropy(
        e,
        c,
        targets,
        bias=c.new_zeros(stop - start) if has["bias"] else None,
        lora_a=a,
        lora_b=b,
        vocab_parallel_options=VocabParallelOptions(
            start, stop, reduce_e_grad=has["reduce_e_grad"], vocab_size=has["vocab_size"]
        ),
        **{name: has[name] for name in names if name in has},
    )


def disagree(rank: int, world: int) -> None:
    for name, (changes, message) in DISAGREEMENTS.items():
        with pytest.raises(ValueError, match=message):
            call(rank, **(changes if rank == 1 else {}))
        value = call(rank)  # the group is as it was
        value.backward()
        assert value.isfinite(), name


def test_disagreement_is_an_error_on_every_rank(tmp_path: Path) -> None:
    run_ranks(disagree, 2, tmp_path)


def counted(rank: int, world: int) -> None:
    """Where comparing waits for a GPU, it happens once for each shape and options."""
    calls = []
    gather = dist.all_gather

    def count(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        gather(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", count)
        for expected in (1, 2):  # gloo: at each call
            call(rank)
            assert len(calls) == expected
        patch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
        for changes, expected in (({}, 3), ({}, 3), ({"n": 4}, 4), ({"softcap": 1.0}, 5), ({}, 5)):
            call(rank, **changes)
            assert len(calls) == expected, changes
        with pytest.raises(ValueError, match="the number of tokens"):
            call(rank, n=5 + rank)


def test_agreement_is_remembered_where_it_costs(tmp_path: Path) -> None:
    run_ranks(counted, 2, tmp_path)


def leave(rank: int, world: int) -> None:
    call(rank).backward()
    if rank == 1:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)connection|timed out|gloo"):
        call(rank)
    assert time.monotonic() - began < 20


def leave_before_backward(rank: int, world: int) -> None:
    value = call(rank)
    if rank == 1:
        os._exit(0)
    with pytest.raises(RuntimeError, match=r"(?i)connection|timed out|gloo"):
        value.backward()


@pytest.mark.parametrize("worker", [leave, leave_before_backward])
def test_rank_that_dies(worker: Any, tmp_path: Path) -> None:
    run_ranks(worker, 2, tmp_path, timeout=15)


def stay_away(rank: int, world: int) -> None:
    call(rank)
    if rank == 1:
        time.sleep(6)
        return
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timed out"):
        call(rank)
    assert 1.5 < time.monotonic() - began < 5


def test_rank_that_never_comes(tmp_path: Path) -> None:
    """The group's own timeout ends the wait."""
    run_ranks(stay_away, 2, tmp_path, timeout=2)
