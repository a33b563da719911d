"""Small comparison files that tests of commands share."""

import json

import numpy as np


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
