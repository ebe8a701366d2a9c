"""What must hold before any test module is imported: no downloads, Triton's interpreter where there
is no GPU, and no tests of what is not installed."""

import os
from importlib.util import find_spec

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
# Without a GPU the Triton kernels are interpreted. Triton reads this when it is first imported, which torch.compile in
# another test of the same process may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One process a core (pytest -n): more threads only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

NEEDS = {
    "test_transformers*.py": ("transformers",),
    "test_examples.py": ("transformers", "peft", "tqdm"),
    "test_training.py": ("transformers", "accelerate", "peft", "tqdm"),
}

collect_ignore_glob = [
    pattern for pattern, names in NEEDS.items() if not all(find_spec(name) for name in names)
]
