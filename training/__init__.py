"""Training of transformers models without stored logits: ``python -m training.train --help``."""
