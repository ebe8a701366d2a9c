"""The training script: learns, resumes, and gives the same with stored logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import families
from training.data import load_blocks
from training.train import main

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
    lines = [json.dumps({"text": sentence}) for sentence in SENTENCES]
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


def test_data(folder: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    blocks = load_blocks([folder / "a.jsonl"], tokenizer, 8, "text")
    assert len(blocks) == len(SENTENCES)  # seven words and the end
    assert tokenizer.decode(blocks[1]["labels"]) == SENTENCES[1] + " <end>"
    assert torch.equal(blocks[1]["labels"], blocks[1]["input_ids"])
    with pytest.raises(ValueError, match="fewer than one block"):
        load_blocks([folder / "a.jsonl"], tokenizer, 1000, "text")
    with pytest.raises(ValueError, match=r"line 1: expected a JSON object with the field 'words'"):
        load_blocks([folder / "a.jsonl"], tokenizer, 8, "words")
