"""The model card of an exported run: what it is, whose preferences it has, how it was measured, how it reads texts.

It names no user, no machine and no folder. Its code makes the tokens that the run itself makes of a text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pluralprefs.encoders.tokens import Renderer, Text
from pluralprefs.registry.environment import package_versions
from pluralprefs.registry.files import RegistryError
from pluralprefs.results import results_table

if TYPE_CHECKING:
    from pluralprefs.adapted import AdaptedUser
    from pluralprefs.run import Run

PAGE = """---
library_name: transformers
pipeline_tag: text-classification
{base}tags:
- reward-model
- pluralprefs
---

# A reward model of {whose}

The reward of a response is a linear function of the hidden state of its last token, and the difference of two rewards
is the log-odds that the first response is preferred to the second. {what} Written by `pluralprefs export` {version}
from a run of the family `{family}` of {date}.

## How to load it

```python
{code}```

{reading} The padding token is one that no text holds: transformers scores the last token that is not padding.

## What it was fitted to

- {rows} comparisons; SHA-256 of the data: {data}
- fingerprint of the parameters: {fingerprint}
- computed in {dtype}; the decoder's weights are the original's, as they were stored

Results of the run on held-out comparisons: accuracy in per cent with its 95 % interval over users, then nats. A cell
`@4` is after four comparisons of a user whom the model had not met. They are of the whole run, in which every user has
a state of their own; one reward for all does without.

{metrics}

## Limits

{limits}
"""
LOADING = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.{dtype}).eval()


{ids}

def rewards(pairs):
    inputs = tokenizer.pad({{"input_ids": [ids(prompt, response) for prompt, response in pairs]}}, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[:, 0].tolist()


print(rewards([("Which tea?", "Assam"), ("Which tea?", "Sencha")]))
"""
ALONE = """def ids(prompt, response):  # the response alone
    return tokenizer(response, truncation=True).input_ids
"""
JOINED = """def ids(prompt, response):
    prompt, response = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, response))
    room = {room} - len(response)  # the prompt is cut on the left; what is too long goes alone
    if not prompt or room < 1:
        return [*{alone.before}, *response[:{most}], *{alone.after}]
    return [*{frame.before}, *prompt[-room:], *{frame.between}, *response, *{frame.after}]
"""
CHAT = """def ids(prompt, response):
    chat = [{{"role": "user", "content": prompt}}, {{"role": "assistant", "content": response}}]
    begin = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt={opened})
    end = tokenizer.apply_chat_template(chat, tokenize=False)[len(begin) :]
    begin, end = (tokenizer(text, add_special_tokens=False).input_ids for text in (begin, end))
    begin = begin[{strip}:]
    end = end[:{room}]
    begin = begin[max(len(begin) + len(end) - {room}, 0) :]  # the prompt is cut on the left
    return [*{before}, *begin, *end]
"""


def model_card(run: Run, user: AdaptedUser, renderer: Renderer, *, base: str, constant: float, dropped: bool) -> str:
    """Write the card of one user's reward. `base` is the hub id of the decoder, "" where it came from a folder.

    `renderer` is that of the exported tokenizer, `constant` what the head has no place for; `dropped` says that effects
    of single responses were left out.
    """
    about, personal = run.folder.read(), _personal(user)
    return PAGE.format(
        base=f"base_model: {base}\n" if base else "",
        whose=_whose(user, personal),
        what=_what(user, personal),
        version=package_versions().get("pluralprefs", ""),
        family=about.get("model"),
        date=str(about.get("created"))[:10],
        code=loading(run.encoder, renderer),
        reading=_reading(run.encoder, renderer),
        rows=about.get("rows", "An unknown number of"),
        data=about.get("data_fingerprint"),
        fingerprint=run.fingerprint,
        dtype=run.encoder.dtype,
        metrics=_metrics(run),
        limits="\n".join(f"- {line}" for line in _limits(run, personal, constant, dropped)),
    )


def loading(encoder: Any, renderer: Renderer) -> str:
    """Python that loads the folder FOLDER and makes of a prompt and a response the tokens that the encoder makes."""
    frame = renderer.pair
    if not encoder.joint:
        ids = ALONE
    elif renderer.template:
        ids = _chat(renderer)
    else:
        most, alone = renderer.max_length, renderer.single
        ids = JOINED.format(room=most - frame.size, most=most - alone.size, frame=frame, alone=alone)
    return LOADING.format(dtype=encoder.dtype, ids=ids)


def _chat(renderer: Renderer) -> str:
    """The chat's tokens: one opening token whether the template writes it, the tokenizer, or both."""
    tokenizer, bos = renderer.tokenizer, renderer.tokenizer.bos_token_id
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    opened = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    written = tokenizer(opened, add_special_tokens=False).input_ids
    strip = next((at for at, each in enumerate(written) if each != bos), 0) if bos is not None else 0
    before = (
        renderer([Text("a", "b")])[0].ids[:1] if bos is not None and (strip or renderer.single.before == [bos]) else []
    )
    return CHAT.format(
        opened=whole.startswith(opened), strip=strip, room=renderer.max_length - len(before), before=before
    )


def _personal(user: AdaptedUser) -> bool:
    """Whether the user differs from the prior."""
    return any(np.asarray(leaf).any() for leaf in jax.tree.leaves(user.posterior.mean))


def _whose(user: AdaptedUser, personal: bool) -> str:
    if personal:
        return "one user"
    return "a population" if user.prior == "population" else f"a community, {user.prior.partition(':')[2]}"


def _what(user: AdaptedUser, personal: bool) -> str:
    if not personal:
        return "It is what these people like on average, and nobody's own reward."
    said = f", adapted to {len(user.ids)} comparisons of theirs" if user.ids else ""
    return f"It is the mean of one user's posterior{said}; it is personal data, as the user's comparisons are."


def _reading(encoder: Any, renderer: Renderer) -> str:
    how = "It reads a response alone, without its prompt."
    if encoder.joint:
        how = "It reads prompt and response together" + (", in the chat template." if renderer.template else ".")
    return f"{how} It was fitted to texts of at most {renderer.max_length} tokens."


def _metrics(run: Run) -> str:
    try:
        return results_table(run.folder.table("metrics"))
    except RegistryError:
        return "The run has no metrics: no comparison was held out."


def _limits(run: Run, personal: bool, constant: float, dropped: bool) -> list[str]:
    lines = [
        "Rewards of one reward model compare responses; they mean nothing across users or runs.",
        f"A reward here is that of `pluralprefs score` less the constant {constant:.6g}.",
        "It says nothing of how sure the reward is: `pluralprefs score` gives P(first) with its standard deviation.",
    ]
    if personal:
        lines.append("It does not learn: what the user says later needs `pluralprefs adapt` and another export.")
    if dropped:
        lines.append(
            f"Effects of {run.model.items} single responses were left out on request: for those, and only for those, "
            "rewards differ from the run's."
        )
    if run.encoder.dtype != "float32":
        lines.append(f"In {run.encoder.dtype} equal texts score alike up to the rounding of that type.")
    return lines
