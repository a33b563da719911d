"""Question: can few votes tell which of four personas, or which mixture of them, a user holds?

Reference: the fixed protocol's best pooled users reach 99.8 % from 2 shots on unmixed personas, and 76.5 %, 0.475 nats
at 32 shots on mixtures (ideal: 77.3 %, 0.443).
Command: PLURALPREFS_DATA=... pluralprefs train experiments/persona.py [--only mix_low_rank]
Result (2026-11-21, low_rank, seed 0, under a minute on 2 shared CPU cores): cross 99.9 [99.7, 100.0] from 2 shots;
mixtures 76.7 [73.6, 80.0]; 0.470 at 32 shots. Intervals are over users. The other families were not run here yet.
"""

import os
from functools import partial

from pluralprefs import encoders
from pluralprefs.data.sources import protocol
from pluralprefs.experiment import FAMILIES, Experiment

DATA = os.environ.get("PLURALPREFS_DATA", "../shared/data")

experiments = {
    f"{world}_{name}": Experiment(
        data=partial(protocol.load, DATA, f"persona_{world}"),
        support=partial(protocol.shots, DATA, f"persona_{world}"),
        encoder=partial(encoders.load, "minilm"),
        name=name,
        data_name=f"persona_{world}",
        seeds=(0,) if name in ("bradley_terry", "individual") else (0, 1, 2),
        **FAMILIES[name],
    )
    for world in ("cross", "mix")
    for name in FAMILIES
}
