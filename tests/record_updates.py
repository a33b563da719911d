"""Record what the released LoRe and PAL codes compute, for tests that run without PyTorch. Run by hand:

    git clone https://github.com/facebookresearch/LoRe && git clone https://github.com/RamyaLab/pluralistic-alignment
    python tests/record_updates.py LoRe pluralistic-alignment

It writes tests/fixtures/updates.npz: data, the parameters at the start, and those after some steps of the released
update rules. PAL's language model is replaced by a table of vectors, one token per text. CPU, float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FIXTURE = Path(__file__).parent / "fixtures" / "updates.npz"
USERS, ROWS, DIM, STEPS = 3, 24, 6, 20


def arrays(module: Any, prefix: str) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": value.detach().numpy().copy() for name, value in module.named_parameters()}


def lore(found: dict[str, np.ndarray], user: np.ndarray, difference: np.ndarray) -> None:
    """Joint maximum likelihood of the basis and everyone's logits: Adam, learning rate 0.5, no regulariser."""
    import torch
    import utils  # type: ignore[import-not-found]

    torch.manual_seed(0)
    rows = [torch.from_numpy(difference[user == u]) for u in range(USERS)]
    model = utils.LoRe(None, 0, USERS, DIM, 2, STEPS, 0.5)
    found |= arrays(model, "lore/start")
    model.train(rows)
    found |= arrays(model, "lore/end")


class Vectors:
    """A language model that is a table: token ids [rows, 1] to hidden states [rows, 1, dim]."""

    def __init__(self, table: np.ndarray) -> None:
        import torch

        self.table = torch.from_numpy(table)

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[input_ids])


def pal(found: dict[str, np.ndarray], variant: str, user: np.ndarray, sides: tuple[np.ndarray, np.ndarray],
        table: np.ndarray, prompts: np.ndarray) -> None:  # fmt: skip
    """PAL-A ("a"): distances, hinge. PAL-B ("b"): cosines, cross-entropy. AdamW with the released learning rates."""
    import importlib

    import torch

    learner = importlib.import_module(f"src.pal_rm_{variant}.learner")
    users = importlib.import_module(f"src.pal_rm_{variant}.userLearner")
    items = importlib.import_module(f"src.pal_rm_{variant}.itemLearner")
    losses = importlib.import_module("src.loss_function")
    torch.manual_seed(1)
    softmax = learner.CustomSoftMax("softmax", 1.0, False)
    project = lambda: learner.Connector(cnct_arch="mlp2-gelu-dropout0", in_dims=DIM, out_dims=5)  # noqa: E731
    model = (learner.PrefLearner_dist if variant == "a" else learner.PrefLearner_angle).__new__(
        learner.PrefLearner_dist if variant == "a" else learner.PrefLearner_angle
    )
    torch.nn.Module.__init__(model)
    projector, language = project(), Vectors(table)
    model.trainable_params = {}
    model.item_learner = items.ItemLearner(language, projector)
    if variant == "a":
        start = learner.TensorInitializer("gaussian", 42)
        model.user_learner = users.UserLearner_FPw(DIM, 5, 2, "f(Pw)", projector, start, softmax)
    else:
        model.logit_scale = torch.nn.Parameter(torch.ones([]) * np.log(1 / 0.07))
        model.user_learner = users.UserLearner(2, Vectors(prompts), [project(), project()], softmax)
    model.user_learner.init_weight([str(u) for u in range(USERS)])
    found |= arrays(model, f"pal_{variant}/start")
    groups = [{"params": list(projector.parameters()), "lr": 1e-4, "weight_decay": 0.01},
              {"params": list(model.user_learner.W.parameters()), "lr": 5e-3, "weight_decay": 0.0}]  # fmt: skip
    if variant == "a":
        groups.append({"params": [model.user_learner.P], "lr": 5e-3, "weight_decay": 0.0})
    else:
        heads = list(model.user_learner.projectors.parameters())
        groups += [{"params": heads, "lr": 1e-4, "weight_decay": 0.01},
                   {"params": [model.logit_scale], "lr": 1e-1, "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    left, right = (torch.from_numpy(side)[:, None] for side in sides)
    texts = {"left_input_ids": left, "left_attention_mask": None, "right_input_ids": right,
             "right_attention_mask": None}  # fmt: skip
    names = [str(u) for u in user]
    for _ in range(STEPS):
        optimizer.zero_grad()
        if variant == "a":  # the left response is preferred: its distance must be the smaller one
            loss = losses.hinge_loss(model((names, texts))[:, 0], -torch.ones(len(user))).mean()
        else:
            asked = {"input_ids": torch.zeros(len(user), 1, dtype=torch.long), "attention_mask": None}
            outputs = model((names, asked, texts))[:, 0]
            loss = losses.cross_entropy_loss(outputs, torch.zeros(len(user), dtype=torch.long)).mean()
        loss.backward()
        optimizer.step()
    found |= arrays(model, f"pal_{variant}/end") | {f"pal_{variant}/loss": np.asarray(loss.item(), np.float32)}


def main() -> None:
    sys.path[:0] = sys.argv[1:3]
    draw = np.random.default_rng(0)
    table = draw.normal(size=(12, DIM)).astype(np.float32)
    prompts = draw.normal(size=(1, DIM)).astype(np.float32)
    user = np.concatenate([np.arange(USERS), draw.integers(0, USERS, ROWS - USERS)])
    first, second = draw.permuted(np.tile(np.arange(12), (ROWS, 1)), axis=1)[:, :2].T
    found: dict[str, np.ndarray] = {
        "user": user, "first": first, "second": second, "table": table, "prompts": prompts, "steps": np.asarray(STEPS)
    }  # fmt: skip
    lore(found, user, 20 * (table[first] - table[second]))
    for variant in ("a", "b"):
        pal(found, variant, user, (first, second), table, prompts)
    np.savez_compressed(FIXTURE, **found)  # type: ignore[arg-type]
    print(f"{FIXTURE}: {len(found)} arrays, {FIXTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
