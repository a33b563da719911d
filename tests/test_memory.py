"""The memory table: from published parameter counts and the bytes of each part."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from record_decoders import FIXTURES

from pluralprefs.encoders.decoder_weights import read_decoder
from pluralprefs.encoders.memory import SHAPES, lora_parameters, parameters, table, training_memory


@pytest.mark.parametrize(
    ("name", "published"),
    # Of Llama 3.2 1B, 3B and of Llama 3.1 8B without its head of 128,256 x 4,096.
    [("1B", 1_235_814_400), ("3B", 3_212_749_824), ("8B", 8_030_261_248 - 128_256 * 4096)],
)
def test_parameters_are_as_many_as_published(name, published):
    assert parameters(SHAPES[name]) == published


def test_parameters_and_adapters_are_counted_as_they_are():
    loaded = read_decoder(FIXTURES / "llama")
    assert parameters(loaded.config) == sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    layer = loaded.params["layers"][0]
    sides = [np.shape(part["kernel"]) for part in layer.values() if "kernel" in part]
    assert len(sides) == 7
    assert lora_parameters(loaded.config, 3) == 3 * loaded.config.layers * sum(map(sum, sides))


def test_full_training_takes_sixteen_bytes_a_parameter_and_frozen_four():
    whole = parameters(SHAPES["1B"])
    assert sum(training_memory(SHAPES["1B"], "full", tokens=0)) == 16 * whole
    assert sum(training_memory(SHAPES["1B"], "frozen", tokens=0)) == 4 * whole
    rank = lora_parameters(SHAPES["1B"], 16)
    assert sum(training_memory(SHAPES["1B"], "lora", tokens=0, rank=16)) == 4 * whole + 16 * rank
    activations = [training_memory(SHAPES["1B"], "full", tokens=tokens).activations for tokens in (1000, 2000)]
    assert activations[1] == 2 * activations[0] > 16 * 1000 * 2048 * 2


def test_the_guide_shows_the_table_as_computed():
    assert table() in (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
