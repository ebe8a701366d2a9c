"""Local texts as blocks of tokens of one length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm


class Blocks(Dataset):
    """Texts joined, with an end token after each, and cut to blocks of the same length.

    Each entry has input_ids and labels, both (length,) int64 and equal: models shift their labels.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        count = tokens.numel() // length
        if count == 0:
            raise ValueError(
                f"the texts have {tokens.numel()} tokens, fewer than one block of {length}; "
                "give more text or a smaller --length"
            )
        self.blocks = tokens[: count * length].view(count, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def read_texts(path: Path, field: str) -> Iterator[str]:
    """The texts of a file: the field of each line of a .jsonl file, or all of any other file.

    Raises:
        ValueError: a line that is no JSON object with this field, by its number.
    """
    if path.suffix != ".jsonl":
        yield path.read_text(encoding="utf-8")
        return
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)[field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with the field {field!r} "
                    f"(--field names another); {type(error).__name__}: {error}"
                ) from error


def load_blocks(paths: list[Path], tokenizer: Any, length: int, field: str) -> Blocks:
    """All texts of these files, tokenised, as blocks of `length` tokens.

    Raises:
        ValueError: a malformed line, or less text than one block.
    """
    end = tokenizer.eos_token_id
    pieces: list[Tensor] = []
    for path in paths:
        for text in tqdm(read_texts(path, field), desc=f"tokens of {path.name}", unit=" texts"):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            pieces.append(torch.tensor(ids if end is None else [*ids, end], dtype=torch.int64))
    return Blocks(torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64), length)
