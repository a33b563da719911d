"""Synthetic users: people described in words, what a teacher writes for them, and what it says they would prefer.

The recipe of FSPO (arXiv 2502.19312, section 5) over any teacher of `attributes.teacher`: `questions` that differ,
`responses` steered by people and by points of view, `refinement` of a description until it decides, `labels` asked in
both orders and kept only if they agree, and a matrix of who disagrees with whom (`disagreement`). The same judgement in
both orders gives `winrates` of generated text. Differences from the paper: the wording is ours, near-repeated questions
are dropped by their words instead of by embeddings, and a refined description is kept only if it decides more.
"""
