"""What a run's folder holds beside tables: names, sizes, feature maps, encoder, and each seed's parameters.

`run.load` reads all of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pluralprefs.adapted import flat
from pluralprefs.attributes.reading import SentenceEncoder
from pluralprefs.attributes.source import COLUMNS
from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.experiment import Experiment, Prepared, data_sizes
from pluralprefs.fitting import Fitted
from pluralprefs.hosts import writes
from pluralprefs.registry.files import save_arrays, write_json
from pluralprefs.registry.folder import RunFolder
from pluralprefs.train import CheckpointStore

SENTENCES = "sentences.safetensors"  # the kernel of a sentence encoder, in a run folder
ROW_FIELDS = ("first", "second", "target", "tie", "user", "community", "rater", "source", "offset", "weight")


def save_shared(folder: RunFolder, experiment: Experiment, prepared: Prepared) -> None:
    """Write what all seeds of a run share: names, sizes, feature maps, encoder.

    Names and items of users are written only where the experiment says so: they are personal data.
    """
    path = Path(folder.path)
    names = prepared.vocabulary._asdict()
    names["judged"] = tuple(prepared.items["item_id"]) if experiment.save_users else ()  # rows of items.safetensors
    if not experiment.save_users:
        names["users"] = ()
    maps = prepared.maps
    sizes = data_sizes(prepared.features, prepared.vocabulary, maps)
    write_json(path / "vocabulary.json", {name: list(values) for name, values in names.items()})
    write_json(path / "sizes.json", sizes)
    if maps is not None:
        save_arrays(path / "features.safetensors", flat(maps))
    if isinstance(prepared.encoder, AttributeEncoder):
        prepared.encoder.save(path / "encoder.json")
    if isinstance(prepared.encoder, SentenceEncoder):
        prepared.encoder.save(path / SENTENCES)
    if isinstance(prepared.attributes, AttributeEncoder):
        prepared.attributes.save(path / COLUMNS)
    elif prepared.attributes is not None:
        prepared.attributes.save(path)
    if experiment.save_users:
        save_arrays(path / "items.safetensors", flat(prepared.features))


def save_seed(folder: RunFolder, experiment: Experiment, seed: int, fitted: Fitted) -> None:
    """Write the parameters of a fitted seed, then its notes: a seed that has notes in run.json is whole."""
    path = Path(folder.path)
    users = fitted.users
    if not experiment.save_users:
        users = users.replace(user=jax.tree.map(lambda x: x[:0], users.user))
    if full_covariance(experiment) and users.user_root.ndim == 1:  # no user to learn a matrix from
        users = users.replace(user_root=jnp.diag(users.user_root))
    shutil.rmtree(path / "params" / f"seed-{seed}", ignore_errors=True)  # of a process that ended before the notes
    store = CheckpointStore(path / "params" / f"seed-{seed}", keep=1, alone=True)
    if writes():
        store.save(0, {"model": fitted.model, "users": users})
    store.close()
    if experiment.save_users:
        arrays = {name: np.asarray(getattr(fitted.rows, name)) for name in ROW_FIELDS}
        save_arrays(path / f"support-{seed}.safetensors", arrays)
    folder.update(notes={**folder.read().get("notes", {}), str(seed): fitted.notes})


def full_covariance(experiment: Experiment) -> bool:
    """Whether the users' prior root is a matrix."""
    return experiment.users.covariance == "full" and "user" in experiment.users.levels
