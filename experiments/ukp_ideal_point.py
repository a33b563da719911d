"""Question: how many ideal points do the annotators of arguments need?

The smallest experiment file: one `experiment`. Any part of it can be overridden from the command line.
Command: PLURALPREFS_DATA=... pluralprefs train experiments/ukp_ideal_point.py --set model.prototypes=8 --seeds 0,1,2
Result: experiments/ukpconvarg1.py has the table (4 prototypes, three seeds).
"""

import os
from functools import partial

from pluralprefs import encoders
from pluralprefs.data.sources import protocol
from pluralprefs.experiment import FAMILIES, Experiment

DATA = os.environ.get("PLURALPREFS_DATA", "../shared/data")

experiment = Experiment(
    data=partial(protocol.load, DATA, "ukpconvarg1"),
    support=partial(protocol.shots, DATA, "ukpconvarg1"),
    encoder=partial(encoders.load, "minilm"),
    name="ideal_point",
    data_name="ukpconvarg1",
    seeds=(0,),
    **FAMILIES["ideal_point"],
)
