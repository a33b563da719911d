"""Populations of users whose true preferences are known, and the best that any method could do on them."""

from pluralprefs.data.simulate.bayes import (
    bayes_accuracy,
    bayes_predictions,
    oracle_predictions,
    posterior_predictive,
    summarise,
)
from pluralprefs.data.simulate.coverage import covered
from pluralprefs.data.simulate.states import Noise
from pluralprefs.data.simulate.worlds import (
    World,
    attribute_table,
    cyclic,
    hierarchical,
    ideal_direction,
    ideal_point,
    low_rank,
    noisy,
)

__all__ = [
    "Noise",
    "World",
    "attribute_table",
    "bayes_accuracy",
    "bayes_predictions",
    "covered",
    "cyclic",
    "hierarchical",
    "ideal_direction",
    "ideal_point",
    "low_rank",
    "noisy",
    "oracle_predictions",
    "posterior_predictive",
    "summarise",
]
