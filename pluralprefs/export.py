"""Export a run as a reward model that transformers loads: the reward of one user as a linear head on a decoder.

    r(x, y) = score . h_last(x, y) + constant

h_last is the hidden state of the last token, which a decoder with last-token pooling and without normalisation is read
by here too. Where the family's reward is linear in it, so is every user's, and `score` is the sum of all that the run
knows of the user: population, community, own deviation, care (gain) and scale. Other runs are refused with the reason:
nothing is approximated. The constant, which transformers' head has no place for, changes no comparison and is written
into the model card.

The folder has safetensors in the layout of transformers' classification models, with the decoder's own numbers as they
were stored, config.json, the tokenizer with a padding token of its own, and a model card. Transformers finds the last
token as the last that is not padding, so that the padding token must never be part of a text.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pluralprefs.adapting import user_rewards
from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.encoders.causal import CausalEncoder
from pluralprefs.encoders.decoder_weights import stored_parameters, stored_tensors
from pluralprefs.encoders.lora import merge
from pluralprefs.encoders.tokens import CLOCK, TODAY, Renderer
from pluralprefs.encoders.weights import find, read_json
from pluralprefs.model_card import model_card
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.low_rank import LowRank
from pluralprefs.registry.files import write_bytes, write_json
from pluralprefs.types import Item

if TYPE_CHECKING:
    from pluralprefs.adapted import AdaptedUser
    from pluralprefs.run import Run

ARCHITECTURES = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "opt": "OPTForSequenceClassification",
}
NOT_LINEAR = {
    "IdealPoint": "its reward is a distance from an ideal point, not linear in the hidden state",
    "IdealDirection": "its reward is a cosine with an ideal direction, not linear in the hidden state",
    "AttributeAttention": "its reward attends to attributes beside the hidden state",
    "Residual": "its users are inferred from shots by a network, whose rewards are not linear in the hidden state",
}
ELSEWHERE = "score it with `pluralprefs score`, or, where it reads texts alone, over HTTP with `pluralprefs serve`"


class ExportError(ValueError):
    """A run that does not fold into a linear head, or a folder that cannot be written; one line with the cure."""


class Head(NamedTuple):
    """The reward of an embedding e: `weight` . e + `constant`."""

    weight: Float[np.ndarray, " dim"]
    constant: float


def export(run: Run, out: str | Path, *, user: AdaptedUser | None = None, drop_item_effects: bool = False) -> Path:
    """Write the reward of one user (None: the population's) into a new folder for transformers, whole or not at all.

    `drop_item_effects` leaves effects of single responses out, which a head cannot hold: rewards of responses that had
    one differ then. Raises ExportError for a run that does not fold, a user of whom nothing is known where there is no
    population, and a folder that exists.
    """
    out = Path(out)
    if out.exists():
        raise ExportError(f"{out}: exists; name a new folder, or remove it")
    reason = why_not(run, drop_item_effects=drop_item_effects)
    if reason is not None:
        raise ExportError(f"{run.folder.name} cannot be exported: {reason}; {ELSEWHERE}")
    user = run.adapt(prior="population") if user is None else user
    head = fold(run, user)
    if not head.weight.any():
        raise ExportError(f"{run.folder.name} cannot be exported for this user, who has no state: every reward is 0 "
                          "(individual models have no population); adapt a user and name the file")  # fmt: skip
    name, encoder = encoder_name(run), run.encoder
    folder = find(name)
    with _new_folder(out) as place:
        renderer = _own_tokenizer(folder, encoder.renderer)
        dtype = encoder.dtype if run.experiment.backbone is None else "float32"
        config = classification_config(folder, renderer.tokenizer.pad_token_id, dtype)
        source = folder if run.experiment.backbone is None else _merged(encoder)
        write_weights(place, source, config["model_type"], head.weight, words=config["vocab_size"])
        write_json(place / "config.json", config)
        renderer.tokenizer.save_pretrained(place)
        dropped = drop_item_effects and bool(getattr(run.model, "items", 0))
        base = "" if Path(name).expanduser().is_dir() else name
        card = model_card(run, user, renderer, base=base, constant=head.constant, dropped=dropped)
        write_bytes(place / "README.md", card.encode())
    return out


def why_not(run: Run, *, drop_item_effects: bool = False) -> str | None:
    """Why a run's rewards are no linear head on the last token's hidden state, with what would help; None: they are."""
    encoder, model = run.encoder, run.model
    if isinstance(encoder, AttributeEncoder):
        return "its encoder reads attribute columns, not tokens"
    if not isinstance(encoder, CausalEncoder):
        return f"its encoder is a {encoder.kind} with {encoder.pooling} pooling; a decoder folds (--encoder FOLDER)"
    if encoder.pooling != "last" or encoder.normalise:
        how = f"{encoder.pooling} pooling" + (" and normalised embeddings" if encoder.normalise else "")
        return f"its encoder has {how}; fit with --set encoder.pooling=last --set encoder.normalise=false"
    if run.maps is not None:
        read = {"length_mean": "the length of a text", "anchors": "a kernel's features", "components": "components"}
        extra = " and ".join(what for name, what in read.items() if getattr(run.maps, name) is not None)
        return f"it reads {extra} beside the hidden state or in its place; fit with --set features={{}}"
    if isinstance(model, BradleyTerry):
        if model.mlp is not None:
            return "its MLP is not linear in the hidden state"
        if model.items and not drop_item_effects:
            return (f"{model.items} responses have effects of their own; --drop-item-effects leaves them out, or fit "
                    "with --set model.item_effects=false")  # fmt: skip
        return None
    if isinstance(model, LowRank):
        return "its basis is an MLP, not linear in the hidden state" if len(model.basis) > 1 else None
    kind = type(model).__name__
    return NOT_LINEAR.get(kind, f"the reward of {kind} is not known to be linear in the hidden state")


def fold(run: Run, user: AdaptedUser) -> Head:
    """The reward of a run that folds as a head, for the mean user: what `Run.score` gives as rewards.

    It is read off the rewards of the unit embeddings and of zero.
    """
    size = run.encoder.dim
    items = Item(embedding=jnp.concatenate([jnp.zeros((1, size)), jnp.eye(size)]))
    with jax.default_matmul_precision("highest"):
        rewards = user_rewards(run.model, run.users, items, user.posterior, user.community)
    return Head((rewards[1:] - rewards[0]).astype(np.float32), float(rewards[0]))


def encoder_name(run: Run) -> str:
    """The folder or hub id that a run's encoder was loaded from. Raises ExportError where it has none."""
    made: Any = run.experiment.encoder
    given = (*made.args, *(made.keywords.get(key) for key in ("name", "folder"))) if isinstance(made, partial) else ()
    for name in given:
        if isinstance(name, str | Path):
            return str(name)
    raise ExportError(f"{run.folder.name} cannot be exported: its encoder was not loaded from a folder or a hub id")


def classification_config(folder: Path, padding: int, dtype: str) -> dict[str, Any]:
    """config.json of the classification model of a decoder's folder: one label, regression, a padding token.

    `dtype` is the type that the run computed in, in which transformers computes too unless it is told otherwise.
    """
    raw = read_json(folder / "config.json")
    for name in ("_name_or_path", "torch_dtype", "num_labels"):  # a path of this machine; another name of dtype
        raw.pop(name, None)
    return raw | {
        "architectures": [ARCHITECTURES[raw["model_type"]]],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
        "pad_token_id": padding,
        "vocab_size": max(raw["vocab_size"], padding + 1),
        "dtype": dtype,
        "use_cache": False,
    }


def write_weights(
    out: Path, source: Path | Mapping[str, Any], kind: str, head: Float[np.ndarray, " dim"], *, words: int
) -> None:
    """Write a decoder and its head as safetensors in the layout of transformers' classification model.

    `source` is a checkpoint's folder, whose tensors are written as they are stored, a file for a file; or parameters of
    `encoders.decoder` (trained ones, adapters merged), written in float32. The word table gets rows of zeros up to
    `words`, for a padding token that is new. The language model's head is left out.
    """
    from safetensors.numpy import save_file

    prefix = "model.decoder." if kind == "opt" else "model."
    files = stored_tensors(source) if isinstance(source, Path) else stored_parameters(source, kind)
    places: dict[str, str] = {}
    size = 0
    for file, tensors in files:
        named = {prefix + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        table = f"{prefix}embed_tokens.weight"
        if table in named:
            rows = np.zeros((max(words - len(named[table]), 0), named[table].shape[1]), named[table].dtype)
            named[table] = np.concatenate([named[table], rows])
        if not places:
            named["score.weight"] = head[None]
        save_file(named, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(named, file)
        size += sum(tensor.nbytes for tensor in named.values())
    if set(places.values()) != {"model.safetensors"}:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_json(out / "model.safetensors.index.json", index)


def _merged(encoder: CausalEncoder) -> Mapping[str, Any]:
    """Parameters of an encoder that was trained, adapters in its weights: in float32, or they would be rounded away."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), encoder.params)
    return merge(encoder.replace(params=wide)).params


def _own_tokenizer(folder: Path, renderer: Renderer) -> Renderer:
    """The tokenizer of a folder, read again, so that what is changed here stays here: it pads with a token that no text
    holds, knows the length that the run read, and prints the run's date where its template prints one.
    """
    own = Renderer.load(folder, max_length=renderer.max_length, segments=1, joined=True, vocabulary=renderer.vocabulary)
    tokenizer = own.tokenizer
    ends = read_json(folder / "config.json").get("eos_token_id")
    taken = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, None}
    taken |= set(ends if isinstance(ends, list) else [ends])
    if tokenizer.pad_token_id in taken:
        known, number, word = tokenizer.get_vocab(), 1, "<|pad|>"
        while word in known:
            number, word = number + 1, f"<|pad_{number}|>"
        tokenizer.add_special_tokens({"pad_token": word})
    tokenizer.model_max_length = renderer.max_length
    if own.template:
        tokenizer.chat_template = _dated(tokenizer.get_chat_template())
    return own


def _dated(template: str) -> str:
    """A chat template that prints one date, whatever it is given: the one that `encoders.tokens` gives it."""
    if "strftime_now" in template:
        template = CLOCK + template
    if "date_string" in template:
        template = f"{{% set date_string = '{TODAY.strftime('%d %b %Y')}' %}}\n{template}"
    return template


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` once the block ends, and is gone where it fails."""
    place = out.with_name(f".{out.name}.{os.getpid()}-{secrets.token_hex(2)}.tmp")
    try:
        place.mkdir(parents=True)
        yield place
        os.rename(place, out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
