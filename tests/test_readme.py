"""Every Python example of README.md and of docs/ runs as it stands; those of docs/distributed.md are
one script (test_distributed_docs.py)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
OPTIONAL = ("peft", "transformers")


def python_blocks(path: Path) -> list[tuple[Path, int, str]]:
    """Path, line number and source of each python block."""
    text = path.read_text(encoding="utf-8")
    return [
        (path, text.count("\n", 0, match.start(1)) + 1, match.group(1))
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


DOCS = [path for path in sorted(ROOT.glob("docs/*.md")) if path.stem != "distributed"]
BLOCKS = [b for path in (README, *DOCS) for b in python_blocks(path)]


def test_readme_has_examples() -> None:
    assert len(python_blocks(README)) >= 8


@pytest.mark.parametrize(
    ("path", "line", "source"),
    [pytest.param(*b, id=f"{b[0].stem}-line{b[1]}") for b in BLOCKS],
)
def test_block(path: Path, line: int, source: str) -> None:
    for name in OPTIONAL:
        if re.search(rf"^\s*(from|import) {name}\b", source, re.MULTILINE) and not find_spec(name):
            pytest.skip(f"{name} is not installed")
    # The blank lines make tracebacks point at the line of the document.
    code = compile("\n" * (line - 1) + source, str(path), "exec")
    exec(code, {"__name__": f"{path.stem}_line_{line}"})
