"""Tiny decoders of every supported type, made by transformers with PyTorch, and what it computes. Run by hand:

    python tests/record_decoders.py [TYPE or ROPE...]

It writes one checkpoint a type under tests/fixtures/decoder, every parameter perturbed (a norm's weight left at one
would hide a missing multiplication) and no rope theta at its default, with the reference hidden states and logits,
for tests that run without PyTorch. Under ropes/ it writes what the Llama of that folder computes with each scaling.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "decoder"
VOCABULARY, LENGTH = 48, 12
WORDS = ["<unk>", "<s>", "</s>", "\n", *"abcdefgh", "user", "assistant", ":", "tea", "or", "coffee", "?", "good"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
# Four tokens, where rows of the example have up to twelve.
SLIDING = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
GEMMA = {"query_pre_attn_scalar": 20, "attention_bias": True}
LOCAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 177.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
}
OPT = {name: SIZES[name] for name in SIZES if name not in ("intermediate_size", "num_key_value_heads", "head_dim")}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZES | THETA | {"rms_norm_eps": 1e-5, "attention_bias": True, "mlp_bias": True},
    "mistral": SIZES | THETA | {"sliding_window": 4},
    "qwen2": SIZES | THETA | SLIDING | {"use_sliding_window": True, "tie_word_embeddings": True},
    "qwen3": SIZES | THETA | SLIDING | {"use_sliding_window": True, "attention_bias": True},
    "gemma2": SIZES | THETA | SLIDING | GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0},
    "gemma3_text": SIZES | SLIDING | GEMMA | {"rope_parameters": LOCAL, "final_logit_softcapping": None},
    "opt": OPT | {"ffn_dim": 24, "word_embed_proj_dim": 12},
}

# Rows of the example are longer and shorter than these lengths, which dynamic and longrope tell apart; the ramps of
# yarn and llama3 begin and end among the four planes of a head.
POSITIONS = 8
YARN = {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 0.5, "beta_slow": 0.1}
ROPES: dict[str, dict[str, Any]] = {
    name: {"rope_type": name.split("-")[0], "rope_theta": 77.0} | entries
    for name, entries in {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": YARN,
        "yarn-mscale": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 0.1,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8,
        },
        "longrope": {
            "short_factor": [1.0, 1.5, 2.0, 2.5],
            "long_factor": [2.0, 3.0, 5.0, 9.0],
            "original_max_position_embeddings": 6,
            "factor": 4.0,
        },
    }.items()
}


def tiny_decoder(kind: str, *, seed: int = 7, **changes: Any) -> Any:
    """A small random language model with every parameter perturbed, in PyTorch."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save_tokenizer(folder: Path, words: list[str] = WORDS, **options: Any) -> None:
    """A tokenizer of whole words that opens every text with <s>, as Llama's does; further special tokens follow."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    # Spaces divide words and are dropped; a line break is a word.
    divide = [("removed", " "), ("isolated", "\n")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(sign, how) for how, sign in divide])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    names = {"pad_token": "</s>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options).save_pretrained(folder)


def example_tokens(side: str = "right", length: int = LENGTH) -> dict[str, np.ndarray]:
    """Token ids of mixed lengths, padded on one side."""
    rng = np.random.default_rng(11)
    sizes = np.array([length, 3, 7, 2, 9])
    columns = np.arange(length)[None]
    mask = columns < sizes[:, None] if side == "right" else columns >= length - sizes[:, None]
    ids = np.zeros(mask.shape, np.int32)
    for row, size in enumerate(sizes):
        ids[row, mask[row]] = rng.integers(3, VOCABULARY, size)
    return {"ids": ids, "mask": mask}


def reference(model: Any, tokens: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hidden states behind the last norm and logits, by transformers; 0 at padding.

    Row by row and without padding: scalings that look at the length then look at that of the row.
    """
    import torch

    shape = tokens["mask"].shape
    hidden = np.zeros((*shape, model.lm_head.in_features), np.float32)
    logits = np.zeros((*shape, model.lm_head.out_features), np.float32)
    for row, (ids, mask) in enumerate(zip(tokens["ids"], tokens["mask"], strict=True)):
        with torch.no_grad():
            found = model.base_model(input_ids=torch.tensor(ids[mask][None]).long())
            hidden[row, mask] = found.last_hidden_state[0].numpy()
            logits[row, mask] = model(input_ids=torch.tensor(ids[mask][None]).long()).logits[0].numpy()
    return {"hidden": hidden, "logits": logits}


def padded_reference(model: Any, tokens: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same from one padded batch, as transformers computes it."""
    import torch

    mask = torch.tensor(tokens["mask"]).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": torch.tensor(tokens["ids"]).long(), "attention_mask": mask, "position_ids": position}
    with torch.no_grad():
        hidden, logits = model.base_model(**inputs).last_hidden_state.numpy(), model(**inputs).logits.numpy()
    real = tokens["mask"][:, :, None]
    return {"hidden": np.where(real, hidden, 0), "logits": np.where(real, logits, 0)}


def greedy(model: Any, tokens: dict[str, np.ndarray], new: int = 10) -> np.ndarray:
    """The continuation by transformers' own generation; rows that ended are filled with 0."""
    import torch

    ids, mask = (torch.tensor(tokens[name]).long() for name in ("ids", "mask"))
    found = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    found = found[:, ids.shape[1] :].numpy()
    return np.pad(found, ((0, 0), (0, new - found.shape[1]))).astype(np.int32)


def record(kind: str) -> None:
    """Write a tiny model of this type and what it computes."""
    folder = FIXTURES / kind
    model = tiny_decoder(kind)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    tokens = example_tokens()
    np.savez_compressed(
        FIXTURES / f"{kind}.npz", **tokens, **reference(model, tokens), greedy=greedy(model, example_tokens("left"))
    )


def record_rope(name: str) -> None:
    """Write what the recorded Llama computes with a scaled rope."""
    import transformers

    folder, tokens = FIXTURES / "llama", example_tokens()
    config = transformers.AutoConfig.from_pretrained(
        folder, rope_parameters=ROPES[name], max_position_embeddings=POSITIONS
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager")
    np.savez_compressed(FIXTURES / "ropes" / f"{name}.npz", **tokens, **reference(model.eval(), tokens))


def main(names: list[str]) -> None:
    for name in names or (*KINDS, *ROPES):
        (record if name in KINDS else record_rope)(name)


if __name__ == "__main__":
    main(sys.argv[1:])
