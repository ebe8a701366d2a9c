"""Every Python example of README.md runs as it stands."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
OPTIONAL = ("peft", "transformers")


def python_blocks() -> list[tuple[int, str]]:
    """Line number and source of each python block."""
    text = README.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start(1)) + 1, match.group(1))
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def test_readme_has_examples() -> None:
    assert len(python_blocks()) >= 8


@pytest.mark.parametrize(
    ("line", "source"), [pytest.param(*b, id=f"line{b[0]}") for b in python_blocks()]
)
def test_block(line: int, source: str) -> None:
    for name in OPTIONAL:
        if re.search(rf"^\s*(from|import) {name}\b", source, re.MULTILINE) and not find_spec(name):
            pytest.skip(f"{name} is not installed")
    # The blank lines make tracebacks point at the line of the README.
    code = compile("\n" * (line - 1) + source, str(README), "exec")
    exec(code, {"__name__": f"readme_line_{line}"})
