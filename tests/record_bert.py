"""Record what transformers with PyTorch computes, for tests that run without PyTorch. Run by hand:

    python tests/record_bert.py [TYPE...]

It writes, under tests/fixtures/bert, a tiny model of each type whose parameters are all perturbed (a norm's weight left
at one would hide a missing multiplication), one vocabulary, the reference hidden states and pooled vectors, and the
embeddings of three sentences by all-MiniLM-L6-v2 if its weights are there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "bert"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "tea", "or", "coffee", "?", "the", "first", "##s"]
WORDS += [*"defgh", "second", "is", "better", "warm", "cold", "##er", "user", "assistant", ":", "good", "bad", "."]
SENTENCES = [
    "The council should plant more trees along the ring road.",
    "I disagree: buses first, because they help those who have no car.",
    "Ein kurzer Satz.",
]
SIZES: dict[str, dict[str, Any]] = {
    "bert": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    },
    # The table has rows for the ids of padding and before; 62 positions remain.
    "roberta": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-5,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    },
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "activation": "gelu"},
    # The second layer sees two tokens on either side, where rows of the example have up to twelve.
    "modernbert": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "local_attention": 4,
        "norm_eps": 1e-4,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 177.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
        },
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    },
}


def tiny_model(kind: str, **changes: Any) -> Any:
    """A small random model with every parameter perturbed, in PyTorch."""
    import torch
    import transformers

    torch.manual_seed(7)
    sizes = SIZES[kind.removeprefix("xlm-")] | changes
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer over WORDS with BERT's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names).save_pretrained(folder)


def example_tokens(config: Any, side: str = "right") -> dict[str, np.ndarray]:
    """Token ids of mixed lengths, padded on one side; two segments in some rows, which DistilBERT ignores.

    RoBERTa tells padding from its id alone, when it counts positions: one of its texts names the padding token.
    """
    rng = np.random.default_rng(11)
    lengths, columns = np.array([12, 3, 7, 2, 9])[:, None], np.arange(12)[None]
    mask = columns < lengths if side == "right" else columns >= 12 - lengths
    ids = np.where(mask, rng.integers(2, len(WORDS), mask.shape), config.pad_token_id)
    if "roberta" in config.model_type:
        ids[0, 4] = config.pad_token_id
    segment = np.where(mask & (columns >= 5) & (config.model_type in ("bert", "distilbert")), 1, 0)
    return {"ids": ids.astype(np.int32), "mask": mask, "segment": segment.astype(np.int32)}


def reference(model: Any, tokens: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hidden states of the real tokens (0 at padding), their mean and the first token, by transformers."""
    import torch

    inputs = {"input_ids": torch.tensor(tokens["ids"]).long(), "attention_mask": torch.tensor(tokens["mask"]).long()}
    if model.config.model_type == "bert":
        inputs["token_type_ids"] = torch.tensor(tokens["segment"]).long()
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state.numpy()
    mask = tokens["mask"]
    hidden = hidden * mask[:, :, None]
    cls = hidden[np.arange(len(mask)), mask.argmax(1)]
    return {"hidden": hidden, "mean": hidden.sum(1) / mask.sum(1)[:, None], "cls": cls}


def sentence_embeddings(folder: Path, sentences: list[str]) -> np.ndarray:
    """The published pipeline of all-MiniLM-L6-v2: 256 tokens, mean over real tokens, L2 norm."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()


def main(kinds: list[str]) -> None:
    from pluralprefs.encoders import weights

    for kind in kinds or SIZES:
        folder = FIXTURES / kind
        model = tiny_model(kind)
        model.save_pretrained(folder)
        save_tokenizer(folder)
        tokens = example_tokens(model.config, "left" if kind == "roberta" else "right")
        np.savez(FIXTURES / f"{kind}.npz", **tokens, **reference(model, tokens))
    if not kinds:
        np.savez(FIXTURES / "minilm.npz", embedding=sentence_embeddings(weights.find_minilm(), SENTENCES))


if __name__ == "__main__":
    main(sys.argv[1:])
