"""The `attributes` encoder: an item's features are its attribute columns, standardised on the training fold.

For column a, with mean and standard deviation over the distinct items that occur in training rows,

    feature_a = (value_a - mean_a) / std_a

A missing value becomes 0, the training mean. A column that is constant in training (or missing throughout) carries no
information there and is dropped; `note` says so. Columns are kept by name: their order in a later table does not
matter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from pluralprefs.encoders.weights import EncoderError, read_json
from pluralprefs.types import Item

PREFIX = "attr:"
FARTHEST = 1e6  # standard deviations from the training items' mean


@dataclass(frozen=True)
class AttributeEncoder:
    """Standardised attribute columns as embeddings. Empty until `fit` or `restore` has given it columns."""

    names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dropped: tuple[str, ...] = ()
    joint: ClassVar[bool] = False
    prompt: ClassVar[bool] = False

    @classmethod
    def fit(cls, items: pl.DataFrame, train_item_keys: Iterable[Any]) -> AttributeEncoder:
        """Take mean and standard deviation of every `attr:<name>` column over the distinct training items.

        An item that answers several prompts counts once. Raises EncoderError where no column varies.
        """
        columns = [column for column in items.columns if column.startswith(PREFIX)]
        if not columns:
            raise EncoderError("the table has no attr: columns; add attr:<name>:first and attr:<name>:second")
        train = items.filter(pl.col("item_key").is_in(list(train_item_keys)))
        if train.is_empty():
            raise EncoderError("no item occurs in a training row, so attributes cannot be standardised")
        values = _values(train.unique(subset=["item_id", *columns], maintain_order=True), columns)
        mean, std = zip(*map(_moments, values.T), strict=True)
        varies = [at for at in range(len(columns)) if std[at] > 1e-12 * max(1.0, abs(mean[at]))]
        names = [column.removeprefix(PREFIX) for column in columns]
        if not varies:
            raise EncoderError(f"no attribute varies among the training items: {', '.join(names)}")
        return cls(
            names=tuple(names[at] for at in varies),
            mean=tuple(mean[at] for at in varies),
            std=tuple(std[at] for at in varies),
            dropped=tuple(name for at, name in enumerate(names) if at not in varies),
        )

    @property
    def dim(self) -> int:
        """Number of features of an item."""
        return len(self.names)

    @property
    def note(self) -> str:
        """What a reader of the run should know: which columns were dropped. Empty where none was."""
        return f"constant in training, dropped: {', '.join(self.dropped)}" if self.dropped else ""

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the features of an item: an entry of run.json."""
        return {"encoder": "attributes", **asdict(self)}

    def __call__(self, items: pl.DataFrame) -> Item:
        """Item with embedding [items, dim] (float32 numpy), rows in the table's order.

        Raises EncoderError naming a column that is missing, or one that was not there when the encoder was fitted.
        """
        if not self.names:
            raise EncoderError("the attributes encoder has no columns yet; call fit(items, train_item_keys)")
        found = {column.removeprefix(PREFIX) for column in items.columns if column.startswith(PREFIX)}
        for name in self.names:
            if name not in found:
                raise EncoderError(f"column {PREFIX}{name} is missing, which the encoder was fitted with: give "
                                   f"{PREFIX}{name}:first and {PREFIX}{name}:second, empty where unknown")  # fmt: skip
        unknown = sorted(found - {*self.names, *self.dropped})
        if unknown:
            raise EncoderError(f"column {PREFIX}{unknown[0]} is unknown; the encoder has {', '.join(self.names)}")
        values = _values(items, [PREFIX + name for name in self.names])
        features = (values - np.array([self.mean])) / np.array([self.std])
        rows, places = np.nonzero(np.abs(features) > FARTHEST)
        if len(rows):
            wrong, item = PREFIX + self.names[places[0]], items.row(int(rows[0]), named=True)
            where = f"column {wrong}: {item[wrong]:.3g} of response {item['item_id']!r}"
            raise EncoderError(f"{where} is more than {FARTHEST:.0e} standard deviations from the mean of training; "
                               "correct it, or leave it empty")  # fmt: skip
        embedding = np.nan_to_num(features, nan=0.0).astype(np.float32)
        return Item(embedding=embedding)  # pyright: ignore[reportArgumentType]

    def attributes(
        self, items: pl.DataFrame
    ) -> tuple[Float[np.ndarray, "items attributes 1"], Bool[np.ndarray, "items attributes"]]:
        """The same features as attribute embeddings of size 1, and which of them are not missing: `Item.attributes`."""
        values = np.asarray(self(items).embedding)[:, :, None]
        return values, ~np.isnan(_values(items, [PREFIX + name for name in self.names]))

    def save(self, path: str | Path) -> None:
        """Write names, means and standard deviations as JSON, atomically."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(self.identity, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def restore(cls, path: str | Path) -> AttributeEncoder:
        """Read what `save` wrote."""
        raw = read_json(Path(path))
        try:
            encoder = cls(*(tuple(raw[field]) for field in ("names", "mean", "std", "dropped")))
        except (KeyError, TypeError) as error:
            raise EncoderError(f"{path}: not an attributes encoder ({error})") from error
        if not len(encoder.names) == len(encoder.mean) == len(encoder.std):
            raise EncoderError(f"{path}: names, mean and std differ in length")
        return encoder


def _values(items: pl.DataFrame, columns: list[str]) -> Float[np.ndarray, "items attributes"]:
    """The columns as float64, missing values as NaN."""
    for column in columns:
        if not (items[column].dtype.is_numeric() or items[column].dtype in (pl.Boolean, pl.Null)):
            raise EncoderError(f"column {column} holds {items[column].dtype}, expected numbers")
    values = items.select(pl.col(columns).cast(pl.Float64).fill_null(float("nan"))).to_numpy()
    rows, places = np.nonzero(np.isinf(values))
    if len(rows):
        raise EncoderError(f"column {columns[places[0]]} is infinite for item {items['item_id'][int(rows[0])]!r}")
    return values


def _moments(values: Float[np.ndarray, " items"]) -> tuple[float, float]:
    """Mean and (population) standard deviation of the values that are there; (0, 0) where none is."""
    present = values[~np.isnan(values)]
    return (float(present.mean()), float(present.std())) if len(present) else (0.0, 0.0)
