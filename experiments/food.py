"""Question: does a person's taste, fitted on two menus, carry over to a third?

Reference: the fixed protocol's best pooled users reach 70.2 %, 0.594 nats on seen/newprompt (population: 57 %).
Command: PLURALPREFS_DATA=... pluralprefs train experiments/food.py [--only bradley_terry]
Result (2026-11-21, bradley_terry, one fit, it has no random part; 43 s on 2 shared CPU cores): seen/newprompt 72.4
[69.3, 75.1]; 0.548, unseen/newprompt at 32 shots 64.1 [57.6, 70.2]; 0.621. Much of it is dishes that the user had
already ranked (23 % of the rows follow from the user's other rows by transitivity, says the leak report). Intervals
are over users.
"""

import os
from functools import partial

from pluralprefs import encoders
from pluralprefs.data.sources import protocol
from pluralprefs.experiment import FAMILIES, Experiment

DATA = os.environ.get("PLURALPREFS_DATA", "../shared/data")

experiments = {
    name: Experiment(
        data=partial(protocol.load, DATA, "food"),
        support=partial(protocol.shots, DATA, "food"),
        encoder=partial(encoders.load, "attributes"),
        name=name,
        data_name="food",
        seeds=(0,) if name in ("bradley_terry", "individual") else (0, 1, 2),
        **{**FAMILIES[name], "features": {}},
    )
    for name in FAMILIES
}
