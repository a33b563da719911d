"""Which responses an attribute predictor learns from, and which it is only tested on.

A fold depends on the text (or the community's name) alone, through a stable hash: a text has the same fold under every
prompt and in every order of the file. Held-out responses and communities are rewritten in wordings of their own where
the teacher has such (`counterfactuals.rewrites`), so that a test never meets a phrase of the training rewrites.
"""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl

from pluralprefs.data.ids import stable_hash

TRAIN, VALIDATION = "train", "validation"  # of the training responses; validation chooses the strength of L2
HELDOUT_RESPONSES, HELDOUT_COMMUNITIES = "heldout_responses", "heldout_communities"
HELDOUT = (HELDOUT_RESPONSES, HELDOUT_COMMUNITIES)


def with_folds(
    responses: pl.DataFrame, *, responses_out: float = 0.2, communities_out: float = 0.2, validation: float = 0.2
) -> pl.DataFrame:
    """Add a column `fold` to responses (text, community_id?): a share of communities out, then of texts, then slices.

    A response of a held-out community belongs to that fold alone. Where chance would hold out none or all of a few
    names, those of the highest hash are taken; a single text and fewer than three communities are never held out.
    """
    texts = responses["text"].to_list()
    named = "community_id" in responses.columns
    communities = responses["community_id"].to_list() if named else [None] * len(texts)
    apart = held_out((name for name in communities if name is not None), "community", communities_out, fewest=3)
    rest = [text for text, community in zip(texts, communities, strict=True) if community not in apart]
    # A text that a held-out community shares with a training one would be trained on: it leaves training.
    shared = {text for text, community in zip(texts, communities, strict=True) if community in apart}
    out = held_out(rest, "response", responses_out) | shared
    checks = held_out((text for text in rest if text not in out), "validation", validation)

    def fold(text: str, community: str | None) -> str:
        if community in apart:
            return HELDOUT_COMMUNITIES
        return HELDOUT_RESPONSES if text in out else VALIDATION if text in checks else TRAIN

    folds = [fold(text, community) for text, community in zip(texts, communities, strict=True)]
    return responses.with_columns(pl.Series("fold", folds, dtype=pl.Utf8))


def held_out(names: Iterable[str], kind: str, share: float, fewest: int = 2) -> set[str]:
    """Return the names in the last `share` of the hash's range: at least one, and never all, of `fewest` or more.

    >>> held_out(["a", "b"], "response", 0.2) == held_out(["b", "a"], "response", 0.2)
    True
    >>> held_out(["a"], "response", 0.2)
    set()
    """
    places = {name: stable_hash(f"attributes|{kind}|{name}") for name in set(names)}
    if share <= 0 or len(places) < fewest:
        return set()
    found = {name for name, place in places.items() if place >= (1 - share) * 2**64}
    if found and len(found) < len(places):
        return found
    number = min(max(1, round(share * len(places))), len(places) - 1)
    return set(sorted(places, key=lambda name: (-places[name], name))[:number])
