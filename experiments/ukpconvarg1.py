"""Question: on a strong population model (kernel, item effects, length), what is knowing the annotator worth on
arguments?

Reference: the fixed protocol's best pooled users reach 78.9 %, 0.439 nats on seen/testpair and 71.7 % on
seen/newprompt.
Command: PLURALPREFS_DATA=... pluralprefs train experiments/ukpconvarg1.py [--only bradley_terry]
Result (2026-11-21, bradley_terry, one fit, it has no random part; 9 minutes on 2 shared CPU cores; before user
strengths went to the maximum of the evidence): seen/testpair 80.0 [78.0, 81.8]; 0.428, seen/newprompt 71.8
[69.5, 73.9]; 0.536, unseen/testpair at 32 shots 77.5 [75.1, 79.7]; 0.469. The wrong user costs 1.6 [0.6, 2.6] points on
seen/testpair. Intervals are over users. The other families were not run on this set yet.
"""

import os
from dataclasses import replace
from functools import partial

from pluralprefs import encoders
from pluralprefs.data.sources import protocol
from pluralprefs.experiment import FAMILIES, Experiment
from pluralprefs.users import Pooled

DATA = os.environ.get("PLURALPREFS_DATA", "../shared/data")

base = {
    name: Experiment(
        data=partial(protocol.load, DATA, "ukpconvarg1"),
        support=partial(protocol.shots, DATA, "ukpconvarg1"),
        encoder=partial(encoders.load, "minilm"),
        name=name,
        data_name="ukpconvarg1",
        seeds=(0,) if name in ("bradley_terry", "individual") else (0, 1, 2),
        **FAMILIES[name],
    )
    for name in FAMILIES
}

experiments = base | {"bradley_terry": replace(base["bradley_terry"], users=Pooled(levels=("user",), rounds=5))}
