"""An experiment is a frozen record of parts; what each step makes of them, from raw comparisons to a fitted seed.

Parts are plain functions or `functools.partial`s, so that an editor jumps to them and `describe` can write them down.
What is known only from the data (`dim`, `items`, `parts`, `prompt_dim`, `key`) is supplied here. Jit and data
placement are decided in the modules that own the loops; this one decides order: data, split, leaks, features, fit,
predict, record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl

from pluralprefs.adapt import laplace_user, stepped_user
from pluralprefs.attributes.source import AttributeSource, Predicted, Stored, checked
from pluralprefs.backbone import BACKBONE, Backbone, restore_backbone, save_backbone, train_backbone
from pluralprefs.baselines import artefact_log_odds, length_only, majority_of_others, prediction_rows
from pluralprefs.data import batches, splits
from pluralprefs.data.validation import TEXTS
from pluralprefs.encoders import load as load_encoder
from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.encoders.cache import encode_items, encode_together, known_texts, require_texts
from pluralprefs.encoders.features import Features, append
from pluralprefs.evaluate import SEEN, UNSEEN, Adapter
from pluralprefs.fitting import Fitted, Rows, take
from pluralprefs.hosts import all_or_none, divided, exchanged, gathered, own_rows, require_same
from pluralprefs.likelihoods import Logistic, pooled_mean, user_tail
from pluralprefs.models.attribute_attention import AttributeAttention
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.fast_weights import FastWeights
from pluralprefs.models.ideal_point import IdealDirection, IdealPoint
from pluralprefs.models.low_rank import LowRank
from pluralprefs.models.meta_reward import MetaReward
from pluralprefs.models.neural_process import NeuralProcess
from pluralprefs.models.residual import Residual
from pluralprefs.models.set_pooled import SetPooled
from pluralprefs.models.variational import Variational
from pluralprefs.train import attribute_dropout
from pluralprefs.training import Report
from pluralprefs.trust import KNOTS
from pluralprefs.types import InfersUser, Item, LearnsFromItems, LinearInUser, Reduction
from pluralprefs.users import Pooled

TRAINING = ("train",)
MOST_ITEMS = 2000  # with an effect of their own, for the population and for each user
FINAL = ("train", "validation", "train_only_final")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Experiment:
    """What to run. `data` returns the table; an `encoder` of None means that `attr:` columns are the features.

    backbone     how the encoder is trained beside the family, before all else; None leaves it frozen
    attributes   source of `Item.attributes` (`AttributeSource`), with `fit` where training items teach it
    unlabelled   returns responses that nobody judged, which teach a family what it learns from items alone
    features   keywords of `Features.fit`: principal components, columns appended (log length, a kernel)
    shots, draws   the shot curve of unseen users; `support` returns published draws instead of drawing
    controls   predict for the wrong user and with reversed labels too
    transform  changes each training batch: `transform(batch, key, step, steps=...)`, such as `train.attribute_dropout`
    epochs     at most; validation rows choose how many
    batch_size   rows of a step, more where an epoch would have over 256 of them
    refit      fit again on training and validation rows once they have chosen exponents and epochs
    save_users     keep the seen users' training rows in the run folder (personal data): needed to score them later
    """

    data: Callable[[], pl.DataFrame]
    model: Callable[..., Any]
    encoder: Callable[[], Any] | None = None
    backbone: Backbone | None = None
    attributes: Callable[[], AttributeSource] | None = None
    unlabelled: Callable[[], Sequence[str]] | None = None
    features: Mapping[str, Any] = field(default_factory=dict)
    users: Pooled = field(default_factory=Pooled)
    community: str = "community_id"
    likelihood: Any = field(default_factory=Logistic)
    reduction: Reduction = pooled_mean
    optimizer: Callable[[], Any] = partial(optax.adamw, learning_rate=5e-3, weight_decay=1e-2)  # noqa: RUF009
    transform: Callable[..., Any] | None = None
    epochs: int = 60
    batch_size: int = 512
    adapter: Adapter = laplace_user
    shots: tuple[int, ...] = (0, 2, 4, 8, 16, 32)
    draws: int = 5
    support: Callable[[], pl.DataFrame] | None = None
    split: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    refit: bool = True
    controls: bool = True
    save_users: bool = False
    name: str = "model"
    data_name: str = "data"


# What stands under a user inferred from shots is Bradley-Terry with a kernel; see `inferring`.
INFERRED: dict[str, Any] = {
    "features": {"log_length": True, "anchors": 256},
    "optimizer": partial(optax.adamw, learning_rate=1e-3, weight_decay=1e-2),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bradley_terry": {"model": BradleyTerry.init, "features": {"log_length": True, "anchors": 256}},
    "bradley_terry_mlp": {"model": partial(BradleyTerry.init, hidden=(64,)), "features": {"log_length": True}},
    "individual": {
        "model": partial(BradleyTerry.init, item_effects=False),
        "users": Pooled(levels=("user",), population=False, gain=False, cross_fit=None),
    },
    "low_rank": {"model": partial(LowRank.init, rank=8), "users": Pooled(covariance="full", gain=False)},
    "lore": {
        "model": partial(LowRank.init, rank=5, weights="simplex"),
        "users": Pooled(gain=False, strength=1.0),
    },
    "ideal_point": {"model": partial(IdealPoint.init, prototypes=4), "users": Pooled(gain=False, strength=1.0)},
    "ideal_direction": {"model": partial(IdealDirection.init, prototypes=4), "users": Pooled(gain=False, strength=1.0)},
    "attribute_attention": {
        "model": AttributeAttention.init, "attributes": partial(load_encoder, "attributes"),
        "users": Pooled(levels=("community", "user"), gain=False), "transform": partial(attribute_dropout, most=0.3),
    },
    "fast_weights": {"model": FastWeights.init, **INFERRED},
    "variational": {"model": Variational.init, **INFERRED},
    "swap_symmetric": {"model": partial(Variational.init, symmetric=True), **INFERRED},
    "neural_process": {"model": NeuralProcess.init, **INFERRED},
    "meta_reward": {
        "model": partial(MetaReward.init, adapter=stepped_user), **INFERRED, "reduction": partial(user_tail, alpha=0.5),
    },
    "set_pooled": {"model": SetPooled.init, **INFERRED},
}  # fmt: skip


def every_family(*, seeds: tuple[int, ...] = (0, 1, 2), **shared: Any) -> dict[str, Experiment]:
    """One experiment a family, by name; `shared` are parts that all have, whatever `FAMILIES` says.

    A family that needs attributes is left out where `shared` names no source of them.

    Families that are fitted by Newton alone have no random part, hence the first seed only.
    """
    found = {}
    for name, parts in FAMILIES.items():
        if "attributes" in parts and "attributes" not in shared:
            continue
        own = seeds[:1] if name in ("bradley_terry", "individual") else seeds
        found[name] = Experiment(name=name, seeds=own, **{**parts, **shared})
    return found


@dataclass(frozen=True)
class Indexed:
    """Data before features: the table with cells, its item table and index rows, in the table's order."""

    table: pl.DataFrame
    items: pl.DataFrame
    rows: Rows
    vocabulary: batches.Vocabulary
    notes: tuple[str, ...]
    unlabelled: tuple[str, ...]


@dataclass(frozen=True)
class Prepared(Indexed):
    """Data as arrays: `Indexed` with the features of the items, and what the training of the encoder came to.

    `lesson` are the items that teach a `LearnsFromItems` family: those of training rows and the unlabelled, as numpy;
    None without attributes.
    """

    features: Item
    lesson: Item | None
    maps: Features | None
    encoder: Any
    attributes: Any
    backbone: Mapping[str, Any]


def prepare(experiment: Experiment, table: pl.DataFrame | None = None, *, progress: bool = True) -> Prepared:
    """Read, split, index and encode the data of an experiment."""
    return featured(experiment, indexed(experiment, table), progress=progress)


def indexed(experiment: Experiment, table: pl.DataFrame | None = None) -> Indexed:
    """Read, split and index the data of an experiment."""
    table = experiment.data() if table is None else table
    notes: list[str] = []
    if "cell" not in table.columns:
        split = splits.assign(table, **experiment.split)
        table, notes = split.table, list(split.notes)
    notes.append(str(splits.leak_report(table)))
    vocabulary = batches.vocabulary(table, experiment.community)
    items = batches.item_table(table)
    rows = batches.index_rows(table, items, vocabulary, experiment.community)
    vocabulary = vocabulary._replace(items=_effect_items(table))
    return Indexed(table, items, rows, vocabulary, tuple(notes), unlabelled(experiment))


def unlabelled(experiment: Experiment) -> tuple[str, ...]:
    """The responses of `experiment.unlabelled`."""
    return () if experiment.unlabelled is None else tuple(experiment.unlabelled())


def featured(
    experiment: Experiment, found: Indexed, *, progress: bool = True, keep: Path | None = None,
    checkpoints: Path | None = None, report: Report | None = None,
) -> Prepared:  # fmt: skip
    """Train the encoder where the experiment asks for it, and encode the items.

    The trained encoder is kept in the folder `keep` and read back from there; training goes on from the folder
    `checkpoints`; `report` hears of its epochs.
    """
    table, items = found.table, found.items
    encoder: Any = (experiment.encoder or partial(load_encoder, "attributes"))()
    source = _source(experiment, table, items)
    notes: dict[str, Any] = {}
    if experiment.backbone is not None:
        encoder, notes = _trained(experiment, experiment.backbone, encoder, source, found, keep, checkpoints, report)
    encoder, features, maps = encode(experiment, table, items, encoder, progress=progress)
    features = features if source is None else _attached(source, items, features)
    features = features.replace(index=item_positions(items, found.vocabulary))
    lesson = _lesson(experiment, found, features, encoder, maps, source, progress=progress)
    return Prepared(
        **vars(found), features=features, lesson=lesson, maps=maps, encoder=encoder, attributes=source, backbone=notes
    )


def encode(
    experiment: Experiment, table: pl.DataFrame, items: pl.DataFrame, encoder: Any, *, progress: bool = True
) -> tuple[Any, Item, Features | None]:
    """Encode the items and append the feature columns, both fitted on the items of training rows."""
    known = items["item_id"].is_in(_training_items(table)).to_numpy()
    if hasattr(encoder, "fit"):
        if not isinstance(encoder, AttributeEncoder):
            require_texts(items, f"encoder: the texts that {type(encoder).__name__} learns from")
        encoder = encoder.fit(items, items.filter(known)["item_key"])
    item = encode_together(items, encoder, progress=progress)
    maps = None
    embedding = np.asarray(item.embedding, np.float32)
    if experiment.features:
        length = divided(known_texts(items), lambda own: text_lengths(items[own]))
        maps = Features.fit(embedding[known], length[known], **experiment.features)
        embedding = maps(embedding, length)
    item = jax.tree.map(jnp.asarray, item.replace(embedding=embedding))
    return encoder, item, maps


def _lesson(
    experiment: Experiment, found: Indexed, features: Item, encoder: Any, maps: Features | None, source: Any, *,
    progress: bool,
) -> Item | None:  # fmt: skip
    """The items of training rows and the unlabelled responses, with their attributes; None where nothing learns them.

    Raises ValueError for unlabelled responses that nothing reads, or nothing learns from.
    """
    if experiment.unlabelled is not None and not isinstance(source, Predicted):
        raise ValueError("unlabelled: teaches what predictors say of responses, and there are none: give attributes "
                         "that are predicted, or set unlabelled to None")  # fmt: skip
    model = None if source is None else draw_model(experiment, 0, data_sizes(features, found.vocabulary, maps))
    if not (isinstance(model, LearnsFromItems) and model.learns):
        if experiment.unlabelled is not None:
            raise ValueError("unlabelled: the family learns nothing from items; give it model.stand_in=true, or set "
                             "unlabelled to None")  # fmt: skip
        return None
    known = found.items["item_id"].is_in(_training_items(found.table)).to_numpy()
    judged = jax.tree.map(lambda x: np.asarray(x)[known], features.replace(prompt=None, index=None))
    if experiment.unlabelled is None:
        return judged
    if isinstance(encoder, AttributeEncoder) or encoder.joint:
        raise ValueError("unlabelled: are responses alone, and this encoder reads none: set unlabelled to None")
    if not found.unlabelled:
        return judged
    said = pl.DataFrame({"prompt": "", "text": found.unlabelled})
    more = append(encode_items(said, encoder, progress=progress), maps, text_lengths(said)).replace(prompt=None)
    return jax.tree.map(lambda a, b: np.concatenate([a, np.asarray(b)]), judged, attach(source, said, more))


def _source(experiment: Experiment, table: pl.DataFrame, items: pl.DataFrame) -> Any:
    """The source of attributes, fitted to the items of training rows; None where there is none."""
    if experiment.attributes is None:
        return None
    source: Any = experiment.attributes()
    if hasattr(source, "fit"):
        if not isinstance(source, AttributeEncoder):
            require_texts(items, f"attributes: the texts that {type(source).__name__} learns from")
        known = items.filter(pl.col("item_id").is_in(_training_items(table)))
        source = type(source).fit(items, known["item_key"])
    return checked(source)


def _trained(
    experiment: Experiment, backbone: Backbone, encoder: Any, source: Any, found: Indexed, keep: Path | None,
    checkpoints: Path | None, report: Report | None,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Train the encoder beside a fresh model of the family, on rows of `TRAINING` alone, or read it from `keep`.

    Items bring no effect of their own and no feature columns: the encoder is to learn what they would say.
    """
    if keep is not None and (keep / BACKBONE).exists():
        return restore_backbone(keep / BACKBONE, backbone, encoder), {}
    cell, items = found.table["cell"].to_numpy(), found.items
    blank: Any = np.broadcast_to(np.float32(0), (items.height, getattr(encoder, "dim", 0)))
    features = Item(embedding=blank, prompt=blank if encoder.prompt else None)
    features = features if source is None else _attached(source, items, features)
    model = draw_model(experiment, backbone.seed, data_sizes(features, found.vocabulary._replace(items=()), None))
    if getattr(model, "stand_in", None) is not None:  # it is taught when the encoder is done
        model = model.replace(stand_in=None)
    if isinstance(model, Residual):
        raise ValueError(f"backbone: {type(model.family).__name__} infers its users from episodes, beside which no "
                         "encoder is trained here: train it with another family, or set backbone to None")  # fmt: skip
    joint = not isinstance(model, LinearInUser) and "user" in experiment.users.levels
    trained, parameters, notes = train_backbone(
        backbone, encoder, model, table=items, items=jax.tree.map(np.asarray, features),
        rows=take(found.rows, np.flatnonzero(np.isin(cell, TRAINING))),
        validation=take(found.rows, np.flatnonzero(cell == "validation")), pooled=experiment.users,
        users=len(found.vocabulary.users) if joint else 0, likelihood=experiment.likelihood,
        reduction=experiment.reduction, transform=experiment.transform,
        checkpoints=checkpoints and checkpoints / backbone.folder(encoder), report=report,
    )  # fmt: skip
    if keep is not None:
        save_backbone(keep / BACKBONE, encoder, parameters)
    return trained, notes


def attach(source: Any, items: pl.DataFrame, features: Item) -> Item:
    """Put the attributes of a source beside the features of the same items, in the same order."""
    values, mask = source.attributes(items)
    return features.replace(attributes=jnp.asarray(values), attribute_mask=jnp.asarray(mask))


def _attached(source: Any, items: pl.DataFrame, features: Item) -> Item:
    """The same by all processes of a run, of which each may have some texts only."""
    if isinstance(source, (Stored, AttributeEncoder)):  # which read no texts
        return attach(source, items, features)
    if not isinstance(source, Predicted):
        require_texts(items, f"attributes: the texts that {type(source).__name__} may read")
        return attach(source, items, features)
    own = own_rows(known_texts(items))
    with all_or_none():
        read = source.attributes(items[own])
    values, mask = (gathered(part, own, items.height) for part in read)
    return features.replace(attributes=jnp.asarray(values), attribute_mask=jnp.asarray(mask))


def text_lengths(items: pl.DataFrame) -> np.ndarray:
    """Characters of each response; message lists count their contents."""
    column = items["text"]
    if column.dtype == pl.Utf8:
        return column.fill_null("").str.len_chars().to_numpy().astype(float)
    return np.array([sum(len(m["content"] or "") for m in messages or ()) for messages in column.to_list()], float)


def item_positions(items: pl.DataFrame, vocabulary: batches.Vocabulary) -> np.ndarray:
    """Position of each row's item id among the items of training, -1 if never seen. One item may have many prompts."""
    place = {name: i for i, name in enumerate(vocabulary.items)}
    return np.array([place.get(name, -1) for name in items["item_id"]], np.int32)


def _training_items(table: pl.DataFrame) -> tuple[str, ...]:
    """The item ids of training rows."""
    rows = table.filter(pl.col("cell").is_in(FINAL))
    return tuple(sorted(set(rows["first_id"]) | set(rows["second_id"])))


def _effect_items(table: pl.DataFrame) -> tuple[str, ...]:
    """The items that get an effect of their own: judged in two training rows or more, and at most `MOST_ITEMS`.

    The effect of an item that was judged once says nothing about another row; the most judged come first.
    """
    rows = table.filter(pl.col("cell").is_in(FINAL))
    counts = pl.concat([rows["first_id"], rows["second_id"]]).alias("item").value_counts()
    often = counts.filter(pl.col("count") > 1).sort(["count", "item"], descending=[True, False])
    return tuple(sorted(often["item"][:MOST_ITEMS]))


def new_model(experiment: Experiment, prepared: Prepared, seed: int) -> Any:
    """Draw the family's initial parameters at the sizes of the data; a family that learns from items is taught."""
    model = draw_model(experiment, seed, data_sizes(prepared.features, prepared.vocabulary, prepared.maps))
    lesson = prepared.lesson
    return model.taught(lesson) if lesson is not None and isinstance(model, LearnsFromItems) else model


def draw_model(experiment: Experiment, seed: int, sizes: Mapping[str, Any]) -> Any:
    """Draw the family's initial parameters; one that infers its users stands on a Bradley-Terry population."""
    key = jax.random.key(seed)
    model = experiment.model(key=key, **sizes)
    if not isinstance(model, InfersUser):
        return model
    return Residual.init(population=BradleyTerry.init(key=key, **sizes), family=model, knots=len(KNOTS),
                         dim=sizes["dim"])  # fmt: skip


def data_sizes(features: Item, vocabulary: batches.Vocabulary, maps: Features | None) -> dict[str, Any]:
    """What a family is told about the data, beside its own parameters."""
    dim = int(features.embedding.shape[-1])
    extra = 0 if maps is None else dim - sum(maps.parts(0).values())
    found = {
        "dim": dim,
        "items": len(vocabulary.items),
        "parts": None if maps is None else maps.parts(extra),
        "prompt_dim": 0 if features.prompt is None else int(features.prompt.shape[-1]),
    }
    if features.attributes is not None:
        _, found["attributes"], found["attribute_dim"] = map(int, features.attributes.shape)
    return found


def support(experiment: Experiment, table: pl.DataFrame) -> pl.DataFrame:
    """The support draws of unseen users: published ones, or drawn here."""
    if experiment.support is not None:
        return experiment.support()
    return splits.support_draws(table, shots=experiment.shots, draws=experiment.draws)


def baseline_predictions(table: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The baselines that every table carries: majority of other users, length only, artefact probe."""
    test = table.filter(pl.col("cell").is_in([*SEEN, *UNSEEN]))
    train = table.filter(pl.col("cell").is_in(FINAL))
    tested = table["cell"].is_in(test["cell"].unique().implode()).fill_null(value=False).to_numpy()
    majority = majority_of_others(table)[tested]
    found = {
        "majority of others (oracle)": majority,
        "length only": length_only(train, test),
        "artefact probe": artefact_log_odds(train, test),
    }
    return pl.concat([prediction_rows(test, values, name, seed=seed) for name, values in found.items()])


def fingerprint(table: pl.DataFrame, unlabelled: Sequence[str] = ()) -> str:
    """SHA-256 of every column of the judgements and of the unlabelled responses, whatever the order of either."""
    ordered = table.select(sorted(table.columns))
    digests = divided(ordered["first"].is_not_null().to_numpy(), lambda own: _row_digests(ordered[own]))
    lines = sorted(row.tobytes() for row in digests)
    lines += sorted(hashlib.sha256(text.encode()).digest() for text in unlabelled)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def require_same_rows(table: pl.DataFrame) -> None:
    """Raise ValueError on every process where they do not hold the same judgements, and the same texts of those rows
    of which they all have the texts (`data.parts`)."""
    if jax.process_count() == 1:
        return
    texts = [name for name in TEXTS if name in table.columns]
    rest = table.drop(texts)
    require_same(f"{rest.schema} {hashlib.sha256(_row_digests(rest).tobytes()).hexdigest()}")
    known = table["first"].is_not_null()
    own = hashlib.sha256(_row_digests(table.filter(known).select(texts)).tobytes()).digest()
    sent = exchanged(hashlib.sha256(known.to_numpy().tobytes()).digest() + own)
    several = len({said[:32] for said in sent}) < len(set(sent))  # the same rows with other texts
    require_same(str(jax.process_index()) if several else "")


def _row_digests(table: pl.DataFrame) -> np.ndarray:
    """SHA-256 of every row, [rows, 32] bytes."""
    lines = ("\t".join(map(repr, row)) for row in table.iter_rows())
    found = b"".join(hashlib.sha256(line.encode()).digest() for line in lines)
    return np.frombuffer(found, np.uint8).reshape(-1, 32)


def summary_line(fitted: Fitted) -> str:
    """What the fit decided, in one line."""
    if "spread" in fitted.notes:  # users are inferred
        return f"users are inferred; before any shot they differ by {fitted.notes['spread']:.2g} log-odds"
    strength = fitted.notes.get("user_strength", {})
    spread = ", ".join(f"{name} {value:.2g}" for name, value in strength.items())
    return f"temper {fitted.notes.get('temper', 1.0):g}; prior spread of users: {spread or 'none'}"
