"""A small text world without a language model: answers expressed at graded levels of attributes, by phrases of our own.

`express` rewrites an answer at a level (0..4) of one attribute or of several. Phrases are split into a training and a
held-out part, so that a model can be tested on wordings it never saw. `corpus` lets users with known weights over the
attributes compare such texts: the corpus of `make demo`.
"""

from pluralprefs.data.lexicon.corpus import corpus, corpus_world, palette, palette_world
from pluralprefs.data.lexicon.express import BaseAnswer, attributes, base_answers, express

__all__ = ["BaseAnswer", "attributes", "base_answers", "corpus", "corpus_world", "express", "palette", "palette_world"]
