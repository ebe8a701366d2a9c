"""Heads that are sharded over several ranks."""

from cce_ext.distributed.vocab_parallel import VocabParallelOptions

__all__ = ["VocabParallelOptions"]
