"""Numbers that callers and the ops agree on."""

IGNORE_INDEX = (
    -100
)  #: the default target value of tokens that do not count, as in torch.nn.functional.cross_entropy
