"""Train steps of a 1B Llama-shaped reward model on packed rows in bfloat16: tokens/s, share of the matmul rate, memory.

    python benchmarks/backbone.py             # 1B; on a CPU the tiny shape all the same
    python benchmarks/backbone.py --small     # a tiny shape, to see that it runs

Random weights, full fine-tuning by SGD on a pairwise loss over the two sequences of each packed row, remat of every
layer, attention by cuDNN where it can be had. Model FLOPs are 6 a parameter of the linear maps and token, plus
12 x layers x heads x head_dim x (mean length seen) a token for attention; what remat computes again is not counted.
The rate that they are compared with is measured here, on one large bfloat16 product. **Not run on a GPU**: none was at
hand.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pluralprefs.encoders.attention import nvidia_capability
from pluralprefs.encoders.decoder import Decoder
from pluralprefs.encoders.decoder_config import DecoderConfig
from pluralprefs.encoders.memory import SHAPES, llama, parameters
from pluralprefs.types import Tokens


def main() -> None:
    """Print one line a figure."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--small", action="store_true", help="a tiny shape")
    small = asked.parse_args().small or jax.default_backend() == "cpu"
    config = llama(64, 128, 2, 8, 8, vocabulary=256) if small else SHAPES["1B"]
    rows, length, steps = (2, 64, 2) if small else (8, 2048, 10)
    seconds, loss = measure(config, rows, length, steps)
    rate = matmul_rate(256 if small else 8192)
    tokens, flops = rows * length, model_flops(config, rows, length)
    device = jax.devices()[0]
    kernel = "XLA" if nvidia_capability() is None else "cuDNN if it fits"
    print(f"device: {device.device_kind}, attention by {kernel}")
    print(f"model: {parameters(config) / 1e9:.3f} B parameters, {rows} rows of {length} tokens, two sequences a row")
    print(f"step: {seconds:.3f} s, {tokens / seconds:,.0f} tokens/s, loss {loss:.4f}")
    share = 100 * flops / seconds / rate
    print(f"model FLOPs: {flops / seconds / 1e12:.3f} T/s, {share:.1f} % of a product's {rate / 1e12:.3f}")
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    print(f"peak memory: {'not told by this device' if peak is None else f'{peak / 1e9:.2f} GB'}")


def measure(config: DecoderConfig, rows: int, length: int, steps: int) -> tuple[float, float]:
    """Seconds of a step after compilation, and the loss of the last."""
    make = partial(Decoder, config, head=False, dtype=jnp.bfloat16, remat="nothing_saveable")
    graphdef, state = nnx.split(make(rngs=nnx.Rngs(0)))
    params = {"backbone": nnx.to_pure_dict(state), "reward": jnp.zeros(config.word_dim) + 0.01}
    half = length // 2
    segment = np.repeat(np.repeat([[0, 1]], half, axis=1), rows, axis=0).astype(np.int32)
    ids = np.random.default_rng(0).integers(0, config.vocabulary, (rows, length)).astype(np.int32)
    tokens = Tokens(*map(jnp.asarray, (ids, np.ones((rows, length), bool), segment, np.zeros(rows, np.int32))))

    def loss(params, tokens):
        hidden = nnx.merge(graphdef, params["backbone"])(tokens)
        ends = hidden[:, jnp.array([half - 1, length - 1])].astype(jnp.float32)
        reward = ends @ params["reward"]
        return jnp.mean(jax.nn.softplus(reward[:, 1] - reward[:, 0]))

    @partial(jax.jit, donate_argnums=0)
    def step(params, tokens):
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        return jax.tree.map(lambda leaf, slope: leaf - 1e-4 * slope, params, gradient), value

    params, value = step(params, tokens)
    value.block_until_ready()
    begun = time.perf_counter()
    for _ in range(steps):
        params, value = step(params, tokens)
    value.block_until_ready()
    return (time.perf_counter() - begun) / steps, float(value)


def model_flops(config: DecoderConfig, rows: int, length: int) -> float:
    """Floating-point operations that a step of the model needs: forward, and twice that backward."""
    linear = parameters(config) - config.vocabulary * config.word_dim
    seen = length / 4  # two causal sequences a row: a token sees a quarter of the row on average
    attention = 12 * config.layers * config.heads * config.head_dim * seen
    return rows * length * (6 * linear + attention)


def matmul_rate(size: int, repeats: int = 10) -> float:
    """Floating-point operations a second of a square bfloat16 product."""
    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    begun = time.perf_counter()
    for _ in range(repeats):
        last = product(a)
    last.block_until_ready()
    return 2 * size**3 * repeats / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
