"""Question: does training the encoder beside the head beat the same head on frozen features?

Command: PLURALPREFS_DATA=... python experiments/backbone.py [--folder backbone] [--only pal_trained,...]

A tiny Llama is made on the spot, random weights and a tokenizer of its own learned from the training texts. Attribute
attention (PrefPalette) and ideal directions (PAL-B with a trained backbone, which its paper calls large) are fitted to
features of the untrained model, of the same model trained beside them, and of MiniLM, on the votes of ukpconvarg1 by
the fixed protocol: 12,000 training rows drawn with seed 0, all validation rows and all rows of the test cells.
Attributes are shares of letters and signs in a text, not its length. Test rows are scored for the population, no user
is known; the training of the encoder has no users either. What was run is not run again (`--folder` keeps predictions).
Result (2026-11-22, one seed; one CPU core beside other jobs, 13 and 31 minutes a trained arm): accuracy [95 %
interval over users]; nats.
                      seen/testpair                seen/newprompt
length only           69.2 [66.5, 71.7]; 0.593     67.7 [64.3, 70.7]; 0.595
attention, frozen     75.9 [74.2, 77.7]; 0.504     52.0 [50.9, 53.1]; 1.051
attention, trained    77.6 [75.7, 79.6]; 0.479     63.2 [61.0, 65.4]; 0.648
attention, MiniLM     77.1 [75.3, 78.9]; 0.488     60.3 [58.9, 61.8]; 0.718
PAL-B, frozen         76.3 [74.6, 78.0]; 0.487     52.5 [51.3, 53.6]; 0.909
PAL-B, trained        77.8 [76.1, 79.5]; 0.478     65.8 [63.5, 67.7]; 0.621
PAL-B, MiniLM         77.4 [75.7, 79.0]; 0.482     67.4 [65.5, 69.3]; 0.626
Trained minus frozen, paired: attention +1.7 points [+0.8, +2.5], -0.025 nats [-0.036, -0.014] on pairs of known prompts
and +11.2 [+8.9, +13.6], -0.402 [-0.454, -0.351] on new prompts; PAL-B +1.5 [+0.8, +2.2], -0.010 [-0.015, -0.005] and
+13.2 [+10.5, +16.0], -0.288 [-0.325, -0.253]. On new prompts length alone is still better than all of them (negative).
With 2,000 training rows of 60 users and texts cut at 48 tokens (the first form of this file) attention had been worse
trained than frozen on new prompts, 57.1 against 59.5. Three of four epochs were chosen. Adapters (lora) were not run.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from flax import nnx
from jax.tree_util import tree_leaves_with_path
from rich.console import Console

from pluralprefs import encoders
from pluralprefs.backbone import Backbone
from pluralprefs.baselines import prediction_rows
from pluralprefs.contrasts import paired_difference
from pluralprefs.data import comparisons
from pluralprefs.data.files import write_atomically
from pluralprefs.data.sources import protocol
from pluralprefs.encoders.checkpoint import stored_name
from pluralprefs.encoders.decoder import Decoder
from pluralprefs.encoders.decoder_config import DecoderConfig
from pluralprefs.encoders.decoder_weights import LLAMA_NAMES
from pluralprefs.encoders.lora import Lora
from pluralprefs.evaluate import SEEN
from pluralprefs.experiment import FAMILIES, Experiment, baseline_predictions, featured, indexed
from pluralprefs.fitting import row_log_odds, take
from pluralprefs.metrics import summarise
from pluralprefs.registry.files import save_arrays
from pluralprefs.seeds import fit_seed
from pluralprefs.users import Pooled

DATA = os.environ.get("PLURALPREFS_DATA", "../shared/data")
ROWS = {"train": 12000, "validation": None, **dict.fromkeys(SEEN)}  # drawn; None: all
VOCABULARY, LENGTH = 2000, 128
TRAINED = ("trained", "lora")
SIGNS = {
    "capitals": r"[A-Z]",
    "digits": r"[0-9]",
    "questions": r"\?",
    "exclamations": r"!",
    "commas": r",",
    "me": r"\bI\b",
}
console = Console(width=160, soft_wrap=True)


def judged() -> pl.DataFrame:
    """Rows of known users, with the attributes of their texts."""
    table = protocol.load(DATA, "ukpconvarg1")
    parts = ((table.filter(cell=cell), count) for cell, count in ROWS.items())
    table = pl.concat([part if count is None else part.sample(count, seed=0) for part, count in parts])
    return table.with_columns(
        (100 * pl.col(side).str.count_matches(sign) / pl.col(side).str.len_chars()).alias(f"attr:{name}:{side}")
        for name, sign in SIGNS.items()
        for side in ("first", "second")
    )


def tiny_llama(folder: Path, texts: list[str], seed: int = 0) -> None:
    """A random Llama of two layers, and a tokenizer of pieces of words learned from `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    names = {"pad_token": "</s>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=2, bos_token_id=1, eos_token_id=2,
        architectures=["LlamaModel"],
    ).save_pretrained(folder)  # fmt: skip
    model = Decoder(DecoderConfig.read(folder), head=False, dtype=jnp.float32, remat=None, rngs=nnx.Rngs(seed))
    leaves = tree_leaves_with_path(nnx.to_pure_dict(nnx.split(model)[1]))
    found = {stored_name(path, LLAMA_NAMES): np.asarray(leaf) for path, leaf in leaves}
    kernels = {stored_name(path, LLAMA_NAMES) for path, _ in leaves if path[-1].key == "kernel"}
    save_arrays(folder / "model.safetensors", {n: leaf.T if n in kernels else leaf for n, leaf in found.items()})


def experiments(folder: Path) -> dict[str, Experiment]:
    """Both heads on each encoder."""
    tiny, data = str(folder / "llama"), partial(comparisons.read, str(folder / "ukp.jsonl"), pseudonymise=False)
    rates = {
        "backbone": partial(optax.adamw, learning_rate=2e-3, weight_decay=1e-2),
        "head": partial(optax.adamw, learning_rate=5e-3, weight_decay=1e-2),
    }
    full = Backbone(lora=None, optimizers=rates, epochs=4, batch_tokens=4096)
    backbones = {"trained": full, "lora": Backbone(Lora(rank=16, targets="/kernel$"), **_same(full)), "frozen": None}
    heads = {"attention": FAMILIES["attribute_attention"], "pal": FAMILIES["ideal_direction"]}
    found = {}
    for head, parts in heads.items():
        own = {**parts, "users": Pooled(levels=(), gain=False, cross_fit=None)}
        joined = {"joint": head == "attention", "prompt": head == "pal", "max_length": LENGTH}
        arms: dict[str, Any] = {name: (tiny, backbone) for name, backbone in backbones.items()}
        for arm, (encoder, backbone) in (arms | {"minilm": ("minilm", None)}).items():
            found[f"{head}_{arm}"] = Experiment(
                data=data, encoder=partial(encoders.load, encoder, **joined), backbone=backbone,
                name=f"{head}_{arm}", data_name="ukpconvarg1", refit=False,
                **own,
            )  # fmt: skip
    return found


def _same(backbone: Backbone) -> dict[str, Any]:
    return {"optimizers": backbone.optimizers, "epochs": backbone.epochs, "batch_tokens": backbone.batch_tokens}


def main(folder: Path, only: str | None) -> None:
    """Make what is missing, run what is asked for and was not run, and print accuracy and nats of all that was run."""
    if not (folder / "llama" / "model.safetensors").exists():
        (folder / "llama").mkdir(parents=True, exist_ok=True)
        table = judged()
        comparisons.write(table, folder / "ukp.jsonl")
        train = table.filter(cell="train")
        texts = pl.concat([train[side] for side in ("prompt", "first", "second")])
        tiny_llama(folder / "llama", texts.unique(maintain_order=True).to_list())
    table = comparisons.read(folder / "ukp.jsonl", pseudonymise=False)
    show("length only", baseline_predictions(table, 0).filter(model="length only"))
    arms = experiments(folder)
    unknown = set(only.split(",") if only else ()) - set(arms)
    if unknown:
        raise SystemExit(f"--only: {min(unknown)!r} is not one of {', '.join(arms)}")
    for name in arms if only is None else only.split(","):
        if not (folder / f"{name}.parquet").exists():
            write_atomically(folder / f"{name}.parquet", predictions(arms[name], table).write_parquet)
    found = {
        name: pl.read_parquet(folder / f"{name}.parquet") for name in arms if (folder / f"{name}.parquet").exists()
    }
    for name, rows in found.items():
        show(name, rows)
    for name, rows in found.items():
        head, _, arm = name.partition("_")
        if arm in TRAINED and f"{head}_frozen" in found:
            compare(name, rows, found[f"{head}_frozen"])


def predictions(asked: Experiment, table: pl.DataFrame) -> pl.DataFrame:
    """Prediction rows of the test cells by the population of a fit: no user is known."""
    begun = time.monotonic()
    prepared = featured(asked, indexed(asked, table), progress=False, report=partial(epoch_done, asked.name))
    fitted = fit_seed(asked, prepared, 0)
    tested = np.flatnonzero(table["cell"].is_in(SEEN).to_numpy())
    logits = row_log_odds(fitted.model, fitted.users, prepared.features, take(prepared.rows, tested))
    console.print(f"{asked.name}: {time.monotonic() - begun:.0f} s, {dict(prepared.backbone)}", highlight=False)
    return prediction_rows(table[tested], logits, asked.name, seed=0)


def epoch_done(name: str, done: int, epochs: int, loss: float) -> None:
    """Report the training of an encoder."""
    console.print(f"{name}: epoch {done} of {epochs}, loss {loss:.3f}", highlight=False)


def show(name: str, rows: pl.DataFrame) -> None:
    """Accuracy and nats a cell, with 95 % intervals over users."""
    found = summarise(rows).filter(pl.col("metric").is_in(["accuracy", "nll"]), pl.col("community").is_null())
    for row in found.sort("cell", "metric").iter_rows(named=True):
        console.print(f"{name:18} {row['cell']:15} {row['metric']:9} {row['value']:.3f} [{row['ci_low']:.3f}, "
                      f"{row['ci_high']:.3f}]", highlight=False, markup=False)  # fmt: skip


def compare(name: str, rows: pl.DataFrame, frozen: pl.DataFrame) -> None:
    """Trained minus frozen on the same rows, with 95 % intervals over users."""
    for cell in SEEN:
        for metric in ("accuracy", "nll"):
            gain = paired_difference(rows.filter(cell=cell), frozen.filter(cell=cell), metric)
            console.print(f"{name + ' - frozen':26} {cell:15} {metric:9} {gain.value:+.3f} [{gain.ci_low:+.3f}, "
                          f"{gain.ci_high:+.3f}]", highlight=False, markup=False)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("backbone"), help="of model, data and runs")
    parser.add_argument("--only", help="names of experiments, with commas")
    asked = parser.parse_args()
    main(asked.folder, asked.only)
