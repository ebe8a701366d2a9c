"""Settings that must be there before any test module is imported."""

import os

import torch

# Without a GPU the Triton kernels are interpreted. Triton reads this when it is first imported, which torch.compile in
# another test of the same process may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
