"""Texts, from files or from the hub, as blocks of tokens of one length."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

IGNORE = -100


class Fields(NamedTuple):
    """What is read of a JSON object or a row: its text, and before it a prompt whose tokens do not
    count in the loss (None: there is no prompt)."""

    text: str = "text"
    prompt: str | None = None


class Blocks(Dataset):
    """Texts joined, with an end token after each, and cut to blocks of the same length.

    Each entry has input_ids and labels, both (length,) int64: labels are the tokens, or -100 in
    prompts. Models shift their labels.
    """

    def __init__(self, tokens: Tensor, labels: Tensor, length: int) -> None:
        count = tokens.numel() // length
        if count == 0:
            raise ValueError(
                f"the texts have {tokens.numel()} tokens, fewer than one block of {length}; "
                "give more text or a smaller --length"
            )
        self.tokens = tokens[: count * length].view(count, length)
        self.labels = labels[: count * length].view(count, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def read_file(path: Path, fields: Fields) -> Iterator[tuple[str, str]]:
    """Prompt and text of each line of a .jsonl file; any other file is one text without a prompt.

    Raises:
        ValueError: a line that is no JSON object with these fields, by its number.
    """
    if path.suffix != ".jsonl":
        yield "", path.read_text(encoding="utf-8")
        return
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _pair(json.loads(line), fields)
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    name = error.args[0] if isinstance(error, KeyError) else fields.text
                    raise ValueError(
                        f"{path}, line {number}: expected a JSON object with the field {name!r} "
                        f"(--field names another); {type(error).__name__}: {error}"
                    ) from error


def read_hub(name: str, split: str, fields: Fields) -> Iterator[tuple[str, str]]:
    """Prompt and text of each row of a data set of the Hugging Face hub.

    Raises:
        ValueError: there is no such file, and no `datasets` package to look further with; or the
            data set does not have these columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"--data {name}: there is no such file; for a data set of the hub install the package "
            "`datasets`"
        ) from error
    rows = datasets.load_dataset(name, split=split)
    missing = {fields.text, fields.prompt} - {None, *rows.column_names}
    if missing:
        raise ValueError(
            f"--data {name} has no column {sorted(missing)}, but {rows.column_names}; "
            "--field and --prompt-field choose others"
        )
    return (_pair(row, fields) for row in rows)


def _pair(row: Any, fields: Fields) -> tuple[str, str]:
    return row[fields.prompt] if fields.prompt else "", row[fields.text]


def load_blocks(
    sources: Iterable[str], tokenizer: Any, length: int, fields: Fields, split: str = "train"
) -> Blocks:
    """All texts of these files, or of data sets of the hub where there is no such file, tokenised,
    as blocks of `length` tokens.

    Raises:
        ValueError: a malformed line, an unknown source, or less text than one block.
    """
    tokens: list[int] = []
    labels: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    for source in sources:
        path = Path(source)
        rows = read_file(path, fields) if path.is_file() else read_hub(source, split, fields)
        # One bar, not one a rank.
        hidden = os.environ.get("RANK", "0") != "0"
        for prompt, text in tqdm(rows, f"tokens of {path.name}", unit=" texts", disable=hidden):
            before, after = encode(prompt) if prompt else [], encode(text) + end
            tokens += before + after
            labels += [IGNORE] * len(before) + after
    return Blocks(torch.tensor(tokens), torch.tensor(labels), length)
