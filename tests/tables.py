"""Small comparison files, and a small encoder of their texts, that tests share."""

import json
import shutil

import numpy as np
from record_decoders import FIXTURES, save_tokenizer
from safetensors.numpy import load_file

from pluralprefs.encoders.weights import WEIGHTS
from pluralprefs.registry.files import save_arrays
from pluralprefs.token_batches import Texts


def write(path, users=8, per_user=24, seed=0, **columns):
    """Write comparisons of users who weigh two attributes differently; `columns` maps a name to f(row number)."""
    draw = np.random.default_rng(seed)
    levels = draw.normal(size=(12, 2)).round(3)
    rows = []
    for user in range(users):
        weight = draw.normal(size=2) * 2
        for _ in range(per_user):
            a, b = draw.choice(12, 2, replace=False)
            first = draw.random() < 1 / (1 + np.exp(-weight @ (levels[a] - levels[b])))
            row = {"prompt": "Which?", "first": f"text {a}", "second": f"text {b}", "target": float(first)}
            for i, name in enumerate(("x", "y")):
                row |= {f"attr:{name}:first": levels[a, i], f"attr:{name}:second": levels[b, i]}
            rows.append(row | {"user_id": f"user {user}"} | {name: f(len(rows)) for name, f in columns.items()})
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf8")
    return path


def held(texts):
    """Rendered texts as one process holds them."""
    return Texts(dict(enumerate(texts)), np.array([len(text.ids) for text in texts]))


def letters(path):
    """Write comparisons in which more of the letter a is better."""
    draw, rows = np.random.default_rng(0), []
    for number in range(60):
        texts = [" ".join(draw.choice([*"aabcdefgh"], draw.integers(2, 12))) for _ in range(2)]
        better = texts[0].count("a") > texts[1].count("a")
        rows.append({"prompt": ["tea ?", "coffee ?"][number % 2], "first": texts[0], "second": texts[1],
                     "target": float(better), "user_id": f"user {number % 5}"})  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), "utf8")


def tiny_llama(path):
    """Write a Llama of one layer, which compiles soon, with the tokenizer of `letters`."""
    shutil.copytree(FIXTURES / "llama", path)
    save_tokenizer(path)
    config = json.loads((path / "config.json").read_text("utf8")) | {"num_hidden_layers": 1}
    (path / "config.json").write_text(json.dumps(config), "utf8")
    tensors = {name: leaf for name, leaf in load_file(path / WEIGHTS).items() if ".layers.1." not in name}
    save_arrays(path / WEIGHTS, tensors)
