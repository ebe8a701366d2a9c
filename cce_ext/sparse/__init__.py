"""The default backward: a sparse gradient that keeps every row's and every (row, group)'s mass.

Entries with a probability of at least the filter threshold, and the target, are kept as they are;
what the others weigh is known exactly per row and group of vocabulary ids, and is spread over the
group in the shape that a few sampled rows have. `reference` is the whole algorithm on stored
logits; `tail` the small dense products that it shares with the GPU path; `forward` and `backward`
the GPU path.
"""
