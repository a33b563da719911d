"""Question: on a strong population model (kernel, item effects, length), what is knowing the annotator worth on
arguments?

Reference: the fixed protocol's best pooled users reach 78.9 %, 0.439 nats on seen/testpair and 71.7 % on
seen/newprompt.
Command: PLURALPREFS_DATA=... pluralprefs train experiments/ukpconvarg1.py [--only bradley_terry]
Result (2026-11-21, bradley_terry, one fit, it has no random part; 12 minutes on 2 CPU cores under other load):
seen/testpair 80.4 [78.3, 82.3]; 0.419, seen/newprompt 71.9 [69.7, 74.1]; 0.545, unseen/testpair 77.2; 0.475 at 0 shots
to 77.9 [75.5, 80.2]; 0.466 at 32, unseen/newprompt 75.3; 0.507 to 75.2 [70.1, 78.7]; 0.503. Intervals are over users.

lore, seeds 0 to 2, with --set controls=false (7 minutes): seen/testpair 74.3 [72.7, 75.7]; 0.512, seen/newprompt 66.7
[65.2, 68.2]; 0.613, unseen/testpair 71.6; 0.542 at 0 shots to 72.3 [69.5, 75.0]; 0.539 at 32 (released LoRe, rank 5:
71.4; 0.566, 66.0; 0.636, 70.5; 0.568). individual, with the same: seen/testpair 69.9 [66.9, 72.4]; 0.566,
seen/newprompt 62.5 [60.8, 63.9]; 0.642, unseen/testpair 61.6 [58.8, 63.9]; 0.656 at 32. The other families were not run
on this set.
"""

import os
from dataclasses import replace
from functools import partial

from pluralprefs import encoders
from pluralprefs.data.sources import protocol
from pluralprefs.experiment import every_family
from pluralprefs.users import Pooled

DATA = os.environ.get("PLURALPREFS_DATA", "../shared/data")

base = every_family(
    data=partial(protocol.load, DATA, "ukpconvarg1"),
    support=partial(protocol.shots, DATA, "ukpconvarg1"),
    encoder=partial(encoders.load, "minilm"),
    data_name="ukpconvarg1",
)

experiments = base | {"bradley_terry": replace(base["bradley_terry"], users=Pooled(levels=("user",), rounds=5))}
