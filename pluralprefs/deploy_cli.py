"""`pluralprefs export | serve`: a run's rewards for programs that know nothing of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pluralprefs.run_options import RUNS, Debug, Named, New, Root, Seed, opened
from pluralprefs.terminal import plainly, say, warn

if TYPE_CHECKING:
    from pluralprefs.adapted import AdaptedUser
    from pluralprefs.run import Run


@plainly
def export(
    run: Named,
    out: Annotated[Path, typer.Option(help="A new folder.")],
    user: Annotated[
        Path | None, typer.Option(help="One user's reward, from a file of `adapt`; none: the prior's.")
    ] = None,
    prior: Annotated[str, typer.Option(help='Whose, without --user: "population" or "community:NAME".')] = "population",
    drop_item_effects: Annotated[
        bool, typer.Option("--drop-item-effects", help="Leave out effects of single responses.")
    ] = False,
    format: Annotated[str, typer.Option(help='"hf": safetensors, config and tokenizer for transformers.')] = "hf",
    communities: New = None,
    root: Root = RUNS,
    seed: Seed = None,
    debug: Debug = False,
) -> None:
    """Write the reward of a population or of one user as a classification model of transformers, with a model card.

    It works where the reward is linear in the last token's hidden state: low_rank, lore, bradley_terry and individual
    on a decoder, without further columns: fit my.jsonl --model low_rank --encoder FOLDER. Other runs say why not.
    """
    from pluralprefs.export import export as write

    if format != "hf":
        raise ValueError(f'--format {format}: the one format is "hf"')
    loaded = opened(run, root, seed, communities)
    found = write(loaded, out, user=_person(loaded, user, prior), drop_item_effects=drop_item_effects)
    say(f"{found}: written; its README.md says how to load it")


@plainly
def serve(
    run: Named,
    users: Annotated[Path | None, typer.Option(help="User states from `adapt`, of one user or of many.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; nobody is asked who they are.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    end: Annotated[
        list[str] | None, typer.Option(help="Mark that ends the policy's responses, cut off; may be repeated.")
    ] = None,
    wait: Annotated[float, typer.Option(help="Milliseconds that a question waits for company.")] = 5.0,
    batch: Annotated[int, typer.Option(help="Comparisons in one call, at most.")] = 256,
    queue: Annotated[int, typer.Option(help="Comparisons that may wait; more are answered by 503.")] = 4096,
    body: Annotated[float, typer.Option(help="Megabytes of a request, at most.")] = 8.0,
    communities: New = None,
    root: Root = RUNS,
    seed: Seed = None,
    debug: Debug = False,
) -> None:
    """Score over HTTP, for a user named in the request, in the shapes of TRL and OpenRLHF and in our own.

    POST /score, /rewards, /get_reward; GET /health, /info. Needs the extra `serve`. Ctrl-C or SIGTERM stops it once
    what was asked is answered.
    """
    from pluralprefs.answering import Scorer
    from pluralprefs.serve import Limits, listen

    limits = Limits(batch=batch, queue=queue, wait=wait / 1000, body=int(body * 2**20))
    scorer = Scorer(opened(run, root, seed, communities), users)
    listening = listen(scorer, host=host, port=port, limits=limits, ends=end or ())
    if host not in ("127.0.0.1", "::1", "localhost"):
        warn(f"{host}: whoever reaches this address may ask for any user; let a proxy ask them who they are")
    say(f"listening on {listening.url}")
    listening.run()


def _person(loaded: Run, path: Path | None, prior: str) -> AdaptedUser:
    """The one user of a file, or the prior."""
    from dataclasses import replace

    from pluralprefs.adapted import is_one_user

    if path is None:
        return loaded.adapt(prior=prior)
    if is_one_user(path):
        return loaded.load_user(path)
    states = loaded.load_users(path)
    if len(states) != 1:
        raise ValueError(f"{path}: holds {len(states)} users, and a model is one's: adapt one with --prior population")
    [(name, posterior)] = states.items()
    return replace(loaded.adapt(prior=prior), name=name, posterior=posterior)
