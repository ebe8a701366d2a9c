"""cce_ext inside models of the transformers library: one patch, no table of families."""

from cce_ext.transformers.patch import Audit, audit, cce_patch, cce_unpatch

__all__ = ["Audit", "audit", "cce_patch", "cce_unpatch"]
