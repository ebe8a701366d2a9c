"""The training script: learns, resumes, plots, and gives the same with stored logits and on two
ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import families
from training.data import Fields, load_blocks
from training.train import main

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = [f"the {a} {b} sees the {c} ." for a in ["red", "big", "old"]
             for b in ["cat", "dog", "fox"] for c in ["sun", "moon"]]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer, a tiny configuration and texts."""
    import tokenizers
    import transformers

    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    vocabulary = {word: i for i, word in enumerate(["<end>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(tmp_path)
    families.tiny_config("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    lines = [
        json.dumps({"text": sentence, "instruction": "the sun sees", "output": sentence})
        for sentence in SENTENCES
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "b.txt").write_text("\n".join(SENTENCES))
    return tmp_path


def run(folder: Path, output: str, *more: str, source: str = "--config") -> dict[str, Any]:
    with families.silence():
        return main(
            [source, str(folder), "--tokenizer", str(folder), "--data", str(folder / "a.jsonl"),
             str(folder / "b.txt"), "--eval-data", str(folder / "b.txt"), "--length", "12",
             "--batch", "4", "--lr", "1e-2", "--warmup", "2", "--output", str(folder / output),
             *more]
        )  # fmt: skip


def test_learns_and_resumes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    whole = run(folder, "whole", "--steps", "60", "--accumulate", "2", "--save-every", "40")
    assert whole["eval_loss"] < 1.2  # ln of the vocabulary is 2.7
    assert "patched; fused" in capsys.readouterr().out
    stored = run(folder, "stored", "--steps", "60", "--accumulate", "2", "--stored-logits")
    assert stored["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-3)
    assert "not patched" in capsys.readouterr().out

    log = json.loads((folder / "whole" / "checkpoint-60" / "trainer_state.json").read_text())
    rows = [row for row in log["log_history"] if "loss" in row]
    assert [row["step"] for row in rows] == list(range(6, 61, 6))
    assert all(row["memory_mb"] > 1 for row in rows)
    plots = [folder / "whole" / name for name in ("loss.png", "memory.png")]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)

    # Stopped after step 40: the rest is trained again, and gives the same.
    for name in ("checkpoint-60", "model.safetensors"):
        path = folder / "whole" / name
        path.rename(folder / f"old-{name}")
    again = run(folder, "whole", "--steps", "60", "--accumulate", "2", "--save-every", "40")
    assert "going on from" in capsys.readouterr().out
    assert again["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-3)


@pytest.mark.parametrize("targets", [["all-linear"], ["embed_tokens", "lm_head"]])
def test_adapters(folder: Path, targets: list[str]) -> None:
    base = run(folder, "base", "--steps", "10")
    for name in ("a.jsonl", "b.txt"):
        (folder / "base" / name).write_bytes((folder / name).read_bytes())
    adapters = ["--lora-rank", "4", "--lora-targets", *targets]
    curves = [
        run(folder / "base", output, "--steps", "20", *adapters, *more, source="--model")
        for output, more in (("mine", []), ("theirs", ["--stored-logits"]))
    ]
    assert curves[0]["eval_loss"] < base["eval_loss"] - 0.05
    assert curves[0]["eval_loss"] == pytest.approx(curves[1]["eval_loss"], abs=1e-3)
    saved = load_file(folder / "base" / "mine" / "adapter_model.safetensors")
    assert any("lm_head" in name for name in saved) == ("lm_head" in targets)
    if "lm_head" in targets:  # tied, and still so on whatever device it was trained
        a, b, embedding_a, embedding_b = (
            next(x for name, x in saved.items() if part in name)
            for part in ("lm_head.lora_A", "lm_head.lora_B", "embedding_A", "embedding_B")
        )
        assert torch.equal(a, embedding_b.T)
        assert torch.equal(b, embedding_a.T)


def test_dora_with_a_bfloat16_base(folder: Path, capsys: pytest.CaptureFixture) -> None:
    # Untied: the padding token's embedding is zero, and so would be the length of its row.
    families.tiny_config("llama", tie_word_embeddings=False).save_pretrained(folder)
    options = ["--lora-rank", "4", "--lora-targets", "lm_head", "--dora", "--dtype", "bfloat16"]
    metrics = run(folder, "dora", "--steps", "20", "--eval-every", "10", *options)
    assert "patched; fused" in capsys.readouterr().out
    stored = run(folder, "stored", "--steps", "20", "--stored-logits", *options)
    assert metrics["eval_loss"] == pytest.approx(stored["eval_loss"], abs=2e-2)
    assert metrics["eval_loss"] < 4.4  # ln 96 is 4.56
    assert (folder / "dora" / "loss.png").exists()


def test_data(folder: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    source = str(folder / "a.jsonl")
    blocks = load_blocks([source], tokenizer, 8, Fields())
    assert len(blocks) == len(SENTENCES)  # seven words and the end
    assert tokenizer.decode(blocks[1]["labels"]) == SENTENCES[1] + " <end>"
    assert torch.equal(blocks[1]["labels"], blocks[1]["input_ids"])
    prompted = load_blocks([source], tokenizer, 11, Fields("output", "instruction"))
    assert tokenizer.decode(prompted[1]["input_ids"]) == f"the sun sees {SENTENCES[1]} <end>"
    assert prompted[1]["labels"][:3].tolist() == [-100] * 3
    assert torch.equal(prompted[1]["labels"][3:], blocks[1]["labels"])
    with pytest.raises(ValueError, match="fewer than one block"):
        load_blocks([source], tokenizer, 1000, Fields())
    with pytest.raises(ValueError, match=r"line 1: expected a JSON object with the field 'words'"):
        load_blocks([source], tokenizer, 8, Fields("words"))


def test_data_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the package `datasets`: there are no downloads in tests."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="no such file.*`datasets`"):
        load_blocks(["some/name"], tokenizer, 8, Fields())

    class Rows(list):
        column_names = ("text",)

    def load_dataset(name: str, split: str) -> Rows:
        assert (name, split) == ("some/name", "validation")
        return Rows({"text": sentence} for sentence in SENTENCES)

    package = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", package)
    blocks = load_blocks(["some/name"], tokenizer, 8, Fields(), "validation")
    assert len(blocks) == len(SENTENCES)
    with pytest.raises(ValueError, match=r"no column \['words'\]"):
        load_blocks(["some/name"], tokenizer, 8, Fields("words"), "validation")


def launched(folder: Path, ranks: int, launch: str, output: str, *more: str) -> float:
    """eval_loss of training/finetune_llama.sh on a tiny model, by `accelerate launch` on CPU ranks."""
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "LAUNCH": f"--num_machines 1 --main_process_port 0 --num_processes {ranks} {launch}",
        "PYTHON": sys.executable, "MODEL": str(folder),
        "DATA": str(folder / "a.jsonl"), "OUTPUT": str(folder / output), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    result = subprocess.run(
        [str(ROOT / "training" / "finetune_llama.sh"), "--steps", "6", "--length", "12", "--lr",
         "1e-2", "--warmup", "1", "--lora-rank", "4", "--lora-alpha", "8", "--eval-data",
         str(folder / "a.jsonl"), *more],
        env=environment, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"cpu x {ranks};" in result.stdout
    assert ("patched; fused" in result.stdout) == ("--stored-logits" not in more)
    metrics = result.stdout.splitlines()[-1]
    assert load_file(folder / output / "adapter_model.safetensors").keys()
    return float(dict(pair.split() for pair in metrics.split(", "))["eval_loss"])


def pretrain(folder: Path) -> None:
    """Puts a model that can be loaded into the folder."""
    run(folder, "base", "--steps", "1")
    (folder / "base" / "model.safetensors").rename(folder / "model.safetensors")


@pytest.mark.slow
def test_finetuning_script_on_one_and_two_ranks(folder: Path) -> None:
    # Untied: of several CPU ranks the Trainer moves the model, to "cpu:0", which takes tied adapters apart.
    families.tiny_config("llama", tie_word_embeddings=False).save_pretrained(folder)
    pretrain(folder)
    one = launched(folder, 1, "--cpu", "one", "--batch", "4")
    two = launched(folder, 2, "--multi_gpu", "two", "--batch", "2")
    assert two == pytest.approx(one, abs=2e-2)


@pytest.mark.slow
def test_finetuning_script_with_fsdp2(folder: Path) -> None:
    """The same as with stored logits. (Adapters that PEFT ties are trained by FSDP as two.)"""
    pretrain(folder)
    fsdp = (
        "--use_fsdp --fsdp_version 2"
        " --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_state_dict_type SHARDED_STATE_DICT"
    )
    mine = launched(folder, 2, fsdp, "mine", "--batch", "2")
    theirs = launched(folder, 2, fsdp, "theirs", "--batch", "2", "--stored-logits")
    assert mine == pytest.approx(theirs, abs=2e-3)
