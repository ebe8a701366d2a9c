"""What a training run looks like from outside: memory beside each logged loss, and two plots."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
import transformers

MB = 1e6


class Recorder(transformers.TrainerCallback):
    """Adds memory_mb to each entry of the Trainer's log, and draws loss.png and memory.png into the
    output folder whenever a checkpoint is saved and at the end.

    memory_mb: peak since the last entry of what PyTorch has on the GPU; without one, the peak
    resident memory of the process so far. Checkpoints keep the log, so that a resumed run's plots
    are whole.
    """

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        state.log_history[-1]["memory_mb"] = peak / MB

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            plot(state.log_history, Path(args.output_dir))

    on_train_end = on_save
    on_evaluate = on_save


def plot(log: list[dict[str, float]], folder: Path) -> None:
    """Draws loss.png and memory.png from a Trainer's log."""
    from matplotlib.figure import Figure

    def points(name: str) -> tuple[list[float], list[float]]:
        rows = [row for row in log if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    for file, names, title in (
        ("loss.png", ("loss", "eval_loss"), "loss, nats a token"),
        ("memory.png", ("memory_mb",), "peak memory, MB"),
    ):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=title)
        for name in names:
            steps, values = points(name)
            if steps:
                axes.plot(steps, values, marker="o" if len(steps) < 20 else "", label=name)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / file, dpi=120)
