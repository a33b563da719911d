"""A live server: each caller gets their own answer, together; what is malformed, too much or unknown is said."""

import asyncio
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import jax
import numpy as np
import polars as pl
import pytest
from decoder_run import TALK, attribute_table, copied, decoder_run, word_pairs
from handmade import handmade
from typer.testing import CliRunner

from pluralprefs import deploy_cli
from pluralprefs.adapting import adapt_units
from pluralprefs.answering import Answer, Question, Scorer, ServeError
from pluralprefs.cli import app
from pluralprefs.data import batches, comparisons
from pluralprefs.serve import Batcher, Limits, Refused, listen

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run that kept the rows of three users, and their states."""
    folder = tmp_path_factory.mktemp("serve")
    made = decoder_run(copied("llama", folder / "llama"), folder / "runs", joint=True)
    said = word_pairs(18, seed=3, users=3, community_id=lambda row: "b" if row % 3 == 1 else "a")
    made = replace(made, vocabulary=made.vocabulary._replace(users=tuple(sorted(set(said["user_id"])))))
    items, rows = made.arrays(said)
    known = adapt_units(made.model, made.users, items, rows, np.asarray(rows.user))
    table = made.users.replace(user=jax.tree.map(lambda *x: np.stack(x), *(known[user].mean for user in range(3))))
    judged = tuple(batches.item_table(said)["item_id"])
    return replace(made, items=items, rows=rows, judged=judged, users=table), known


@pytest.fixture(scope="module")
def run(kept):
    return kept[0]


@pytest.fixture(scope="module")
def states(run, tmp_path_factory):
    """A file of two users, ana and bo, and their states."""
    path, draw, found = tmp_path_factory.mktemp("states") / "users.safetensors", np.random.default_rng(1), {}
    for name in ("ana", "bo"):
        prior = run.prior()
        moved = jax.tree.map(lambda x: x + draw.normal(size=x.shape).astype(np.float32), prior.mean)
        found[run.known_as(name)] = prior.replace(mean=moved)
    run.save_users(path, found)
    return path, found


@contextmanager
def served(scorer, **limits):
    """A server in a thread, and a client of it."""
    ends = limits.pop("ends", ())
    listening = listen(scorer, port=0, limits=Limits(**limits), ends=ends)
    thread = threading.Thread(target=listening.run)
    thread.start()
    try:
        with httpx.Client(base_url=listening.url, timeout=60) as client:
            for _ in range(200):  # the socket is bound: whoever connects waits until it is answered
                if client.get("/health").status_code == 200:
                    break
            yield client
    finally:
        listening.stop()
        thread.join()


@pytest.fixture(scope="module")
def scorer(run, states):
    return Scorer(run, states[0])


@pytest.fixture(scope="module")
def client(scorer):
    with served(scorer, body=20_000, batch=64, queue=128, ends=("<end>",)) as found:
        yield found


def post(client, path, content, status=200, **options):
    answer = client.post(path, json=content, **options)
    assert answer.status_code == status, answer.text
    return answer.json()


def compared(run, prompt, responses, users, user=None, community=None):
    """What `Run.score` says of the first response against the others."""
    first, *others = responses
    rows = {"prompt": prompt, "first": first, "second": others, "user_id": user, "target": 1.0}
    table = pl.DataFrame(rows, schema_overrides={"user_id": pl.Utf8})
    table = comparisons.from_trl(table).with_columns(community_id=pl.lit(community, pl.Utf8))
    return run.score(table, users)


def talk(draw, count=1):
    return [" ".join(draw.choice(TALK, draw.integers(1, 8))) for _ in range(count)]


# --- what is answered


@pytest.mark.parametrize(
    ("user", "community", "source"),
    [("ana", None, "adapted"), ("bo", "a", "adapted"), ("user 1", None, "seen"), ("user 2", "b", "seen"),
     ("nobody", "a", "community"), ("nobody", "c", "population"), (None, None, "population")],
)  # fmt: skip
def test_an_answer_is_that_of_the_run_and_says_whose_state_it_was(user, community, source, kept, states, client):
    responses = ["good tea", "coffee", "tea or coffee ?"]
    found = post(client, "/score", {"prompt": "a b ?", "responses": responses, "user": user, "community": community})
    run, known = kept
    own = {run.vocabulary.users[number]: state for number, state in known.items()}
    if source == "seen" and community is None:  # who departs from the community that most of their rows name
        mine = run.rows.community[run.rows.user == run.vocabulary.users.index(run.known_as(user))]
        community = run.vocabulary.communities[np.bincount(mine).argmax()]
        assert not compared(run, "a b ?", responses, states[1] | own, user).equals(
            compared(run, "a b ?", responses, states[1] | own, user, community)
        )
    expected = compared(run, "a b ?", responses, states[1] | own, user, community)
    assert expected["user_source"][0] == ("adapted" if source == "seen" else source)
    assert found.pop("user_source") == source
    rewards = [expected["reward_first"][0], *expected["reward_second"]]
    named = {"rewards": rewards, "probability_first": expected["probability"]}
    named |= {name: expected[name] for name in ("log_odds", "log_odds_std")}
    assert found.keys() == named.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, named[name], rtol=1e-3, atol=2e-4, err_msg=name)
    np.testing.assert_allclose(found["rewards"][0] - np.array(found["rewards"][1:]), found["log_odds"], atol=1e-4)


def test_trl_and_openrlhf_get_the_rewards_of_score(client):
    prompts, completions = ["a b ?", "c ?", "c ?"], ["good tea", "coffee", "tea"]
    users = ["ana", None, "user 1"]
    alone = [
        post(client, "/score", {"prompt": prompt, "responses": [said], "user": user})
        for prompt, said, user in zip(prompts, completions, users, strict=True)
    ]
    assert [each["probability_first"] for each in alone] == [[], [], []]
    rewards = [each["rewards"][0] for each in alone]
    assert len(set(np.round(rewards, 4))) == 3
    trl = post(client, "/rewards", {"prompts": prompts, "completions": completions, "user": users, "step": 3})
    np.testing.assert_allclose(trl["rewards"], rewards, atol=1e-4)
    assert trl["user_source"] == ["adapted", "population", "seen"]
    query = [f"{prompt}{said}<end> a b" for prompt, said in zip(prompts, completions, strict=True)]
    body = {"query": query, "prompts": prompts, "labels": ["", "", ""]}
    openrlhf = post(client, "/get_reward", body | {"user": users})
    np.testing.assert_allclose(openrlhf["rewards"], rewards, atol=1e-4)
    # A tokenizer there and back may change spaces: OpenRLHF sends what it decodes.
    decoded = [f" {prompt.replace(' ', '  ')}{said}<end>" for prompt, said in zip(prompts, completions, strict=True)]
    spaced = post(client, "/get_reward", body | {"query": decoded, "user": users})
    np.testing.assert_allclose(spaced["rewards"], rewards, atol=1e-4)
    ana = post(client, "/get_reward", body, params={"user": "ana"})  # where the body cannot carry a user
    assert ana["user_source"] == ["adapted"] * 3
    assert ana["rewards"][0] == pytest.approx(rewards[0], abs=1e-4)
    assert ana["rewards"][1] != pytest.approx(rewards[1], abs=1e-2)


def test_conversations_are_read_as_texts_are(client):
    chat = [{"role": "user", "content": "a b ?"}]
    said = [{"role": "assistant", "content": "good tea"}]
    plain = post(client, "/score", {"prompt": "a b ?", "responses": ["good tea"]})
    as_chat = post(client, "/score", {"prompt": chat, "responses": [said]})
    np.testing.assert_allclose(as_chat["rewards"], plain["rewards"], atol=1e-4)
    both = post(client, "/rewards", {"prompts": [chat, "a b ?"], "completions": [said, "good tea"]})
    np.testing.assert_allclose(both["rewards"], plain["rewards"] * 2, atol=1e-4)


def test_a_user_departs_from_their_own_community(run, tmp_path):
    user = run.adapt(prior="community:b")
    user = replace(user, name=run.known_as("ana"))
    user.save(tmp_path / "u.safetensors")
    scorer = Scorer(run, tmp_path / "u.safetensors")
    asked = [("ana", None), ("ana", "a"), ("nobody", "b"), ("nobody", "a"), ("nobody", None)]
    rewards = [scorer([Question("a ?", ("tea",), *each)])[0].rewards[0] for each in asked]
    assert rewards[0] == pytest.approx(rewards[2], abs=1e-5)
    assert rewards[1] == pytest.approx(rewards[3], abs=1e-5)
    assert len(set(np.round(rewards, 3))) == 3


# --- together


def test_those_who_come_together_are_scored_in_one_call_and_each_gets_their_own(scorer):
    draw = np.random.default_rng(5)
    questions = [
        {"prompt": f"{talk(draw)[0]} ?", "responses": talk(draw, 2), "user": ["ana", "bo", "user 0", None][i % 4]}
        for i in range(24)
    ]
    with served(scorer, wait=0.05, batch=64, queue=128) as client, ThreadPoolExecutor(24) as pool:
        alone = [scorer([Question(each["prompt"], tuple(each["responses"]), each["user"])])[0] for each in questions]
        before = client.get("/info").json()
        found = list(pool.map(lambda each: post(client, "/score", each), questions))
        after = client.get("/info").json()
    assert after["answered"] - before["answered"] == 24
    assert after["calls"] - before["calls"] <= 12
    for answer, expected in zip(found, alone, strict=True):
        np.testing.assert_allclose(answer["rewards"], expected.rewards, atol=1e-4)
        assert answer["user_source"] == expected.user_source
    assert len({round(each["rewards"][0], 4) for each in found}) > 18


def test_after_a_few_calls_nothing_is_compiled(scorer):
    compiled, draw = [], np.random.default_rng(6)
    users = ["ana", "bo", "user 0", None]

    def ask(rows):
        responses = talk(draw, rows + 1)
        rest = [Question(f"{word} ?", (word,), users[i % 4]) for i, word in enumerate(responses[:-1])]
        return rest if rows % 2 else [Question("a ?", tuple(responses), users[rows % 4])]

    for rows in (16, 15, 1, 2, 6, 14, 4):
        scorer(ask(rows))
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    jax.jit(lambda x: 3 * x + 1)(np.ones(77))
    assert compiled, "the listener hears of compilations"
    compiled.clear()
    for rows in draw.integers(1, 17, 12):
        scorer(ask(int(rows)))
    assert not compiled
    jax.monitoring.clear_event_listeners()


def test_texts_are_not_kept_in_the_feature_cache(scorer, run, tmp_path, monkeypatch):
    monkeypatch.setenv("PLURALPREFS_CACHE", str(tmp_path))
    Scorer(replace(run, cache=None))([Question("a ?", ("tea", "coffee"))])
    assert not list(tmp_path.rglob("*"))


# --- what waits, and what does not


class Panic(BaseException):
    """As libraries in Rust raise: no Exception."""


class Slow:
    """Answers with the response's own number; a call holds until it is let go."""

    def __init__(self):
        self.go, self.sizes = threading.Event(), []
        self.go.set()

    def __call__(self, questions):
        self.go.wait(20)
        self.sizes.append(len(questions))
        if any("coffee" in question.responses for question in questions):
            raise ValueError("no coffee\nhere")
        if any("secret" in question.responses for question in questions):
            raise RuntimeError("what ana said")
        if any("panic" in question.responses for question in questions):
            raise Panic("what ana said")
        return [Answer([float(question.prompt or 0)], [], [], [], "population") for question in questions]

    def info(self):
        return {}


def reward_of(client, number, said="tea", status=200):
    return post(client, "/rewards", {"prompts": [str(number)], "completions": [said]}, status)


def test_a_full_queue_says_come_again_and_those_who_wait_are_answered_when_the_server_stops():
    slow = Slow()
    listening = listen(slow, port=0, limits=Limits(batch=4, queue=6, wait=0.0))
    url = listening.url
    thread = threading.Thread(target=listening.run)
    thread.start()
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(12) as pool:
        assert client.get("/health").json() == {"status": "ok"}
        slow.go.clear()
        try:
            first = pool.submit(reward_of, client, 0)
            time.sleep(0.3)  # it is being scored: what comes now waits
            waiting = [pool.submit(reward_of, client, number) for number in range(1, 7)]
            time.sleep(0.3)
            refused = httpx.post(f"{url}/rewards", json={"prompts": ["7"], "completions": ["tea"]}, timeout=5)
        finally:
            listening.stop()
            time.sleep(0.3)
            slow.go.set()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "queue is full" in refused.json()["error"]
        assert [each.result()["rewards"] for each in [first, *waiting]] == [[float(number)] for number in range(7)]
    thread.join()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health", timeout=5)
    assert sum(slow.sizes[1:]) == 7  # behind the first call of all, by which `listen` tries the run
    assert max(slow.sizes) == 4


def test_a_question_that_fails_fails_alone_and_the_log_holds_no_text(caplog):
    slow = Slow()
    with served(slow, wait=0.2) as client, ThreadPoolExecutor(3) as pool, caplog.at_level(logging.DEBUG):
        asked = [(1, "tea", 200), (2, "coffee", 422), (3, "secret", 500)]
        found = list(pool.map(lambda each: reward_of(client, *each), asked))
        panicked, after = reward_of(client, 4, "panic", 500), reward_of(client, 5)
    assert found[0]["rewards"] == [1.0]
    assert "ana" not in str(panicked)
    assert after["rewards"] == [5.0]
    assert found[1] == {"error": "no coffee here"}
    assert "ana" not in str(found[2])
    assert 3 in slow.sizes  # all in one call at first
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert [line for line in ours if "RuntimeError in test_serve.py" in line]
    assert not [line for line in ours if re.search("ana|coffee|secret", line)]


def test_more_than_a_call_or_the_queue_takes_is_refused_and_who_left_is_not_scored():
    async def story():
        slow = Slow()
        batcher = Batcher(slow, Limits(batch=3, queue=4, wait=0.0))
        with pytest.raises(Refused, match="5 comparisons in one request"):
            await batcher.ask([Question("1", ("tea",))] * 5)
        with pytest.raises(Refused, match="the server takes 3 of one prompt"):
            await batcher.ask([Question("1", ("tea",) * 5)])
        small = Batcher(slow, Limits(batch=3, queue=4, wait=0.0, text=20))
        with pytest.raises(Refused, match="21 characters in one request"):  # 3 x (3 + 3) and 3 x 1
            await asyncio.wait_for(small.ask([Question("abc", ("tea", "x", "y", "z"))]), 5)
        slow.go.clear()
        waiting = asyncio.create_task(small.ask([Question("abc", ("tea", "x", "y"))]))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="queue is full"):
            await asyncio.wait_for(small.ask([Question("abc", ("tea",))]), 5)
        waiting.cancel()
        work = asyncio.create_task(batcher.work())
        first = asyncio.create_task(batcher.ask([Question("1", ("tea",))]))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(batcher.ask([Question("2", ("tea",))]))
        await asyncio.sleep(0.05)
        gone.cancel()
        slow.go.set()
        assert (await first)[0].rewards == [1.0]
        assert (await batcher.ask([Question("3", ("tea",))] * 4))[3].rewards == [3.0]
        work.cancel()
        batcher.close()
        return slow.sizes

    assert asyncio.run(story()) == [1, 3, 1]


# --- what is malformed

GOOD = {"prompts": ["a"], "completions": ["b"]}


@pytest.mark.parametrize(
    ("path", "content", "status", "message"),
    [
        ("/score", b"{", 400, "is not JSON"),
        ("/score", b"[1]", 400, "no JSON object"),
        ("/score", b"\xff\xfe", 400, "is not JSON"),
        ("/score", b"[" * 9000, 400, "is not JSON"),
        ("/score", b'{"prompt": "' + b"a" * 30_000 + b'"}', 413, "larger than 20000 bytes"),
        ("/score", {"prompt": "a"}, 422, "responses: is missing"),
        ("/score", {"prompt": "a", "responses": []}, 422, "responses: is missing"),
        ("/score", {"prompt": "a", "responses": ["b", 3]}, 422, "responses[1]: is no text"),
        ("/score", {"prompt": "a", "responses": ["b", [{"role": "user", "content": "b"}]]}, 422, "texts and messages"),
        ("/score", {"prompt": [{"role": "user"}], "responses": ["b"]}, 422, "prompt: is no text"),
        ("/score", {"prompt": "a", "responses": ["b"], "user": 7}, 422, "user: is no text"),
        ("/score", {"prompt": "a", "responses": ["b"], "usr": "ana"}, 422, "'usr': no such field"),
        ("/score", {"prompt": "a", "responses": ["b"] * 70}, 413, "takes 64 of one prompt"),
        ("/rewards", GOOD | {"prompts": ["a", "b"]}, 422, "prompts: holds 2, but there are 1"),
        ("/rewards", GOOD | {"user": ["ana", "bo"]}, 422, "user: holds 2, but there are 1"),
        ("/rewards", GOOD | {"user": [1]}, 422, "user[0]: is no text"),
        ("/get_reward", {"query": ["ab"]}, 422, "prompts: is missing"),
        ("/get_reward", {"query": ["ab"], "prompts": ["b"]}, 422, "no text that begins with prompts[0]"),
        ("/scores", {}, 404, "there are /score"),
    ],
)
def test_a_malformed_request_is_answered_by_one_line_that_says_what_is_wrong(path, content, status, message, client):
    options = {"content": content} if isinstance(content, bytes) else {"json": content}
    answer = client.post(path, **options)
    assert answer.status_code == status
    assert message in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert client.get("/health").status_code == 200


def test_the_wrong_method_is_said(client):
    assert client.get("/score").status_code == 405
    assert "error" in client.get("/score").json()


def test_info_names_no_user(client, run):
    found = client.get("/info").json()
    assert (found["users"], found["communities"], found["family"]) == (5, 2, "low_rank")
    assert found["limits"]["body"] == 20_000
    assert not re.search(r"u_[0-9a-f]{16}|ana", json.dumps(found))


# --- what cannot be served, and the command


def test_a_run_of_columns_and_a_state_without_a_name_are_refused(run, states, tmp_path):
    with pytest.raises(ServeError, match="reads attribute columns, which no request carries"):
        Scorer(handmade(attribute_table()))
    run.save_users(tmp_path / "u.safetensors", {"": run.prior()})
    with pytest.raises(ServeError, match="a state without a name"):
        Scorer(run, tmp_path / "u.safetensors")
    with pytest.raises(ServeError, match="at least 1"):
        Limits(batch=0)


def test_a_port_that_is_taken_and_a_missing_library_are_said(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServeError, match="choose another --host or"):
        listen(Slow(), port=taken.getsockname()[1])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ServeError, match=r'pip install "pluralprefs\[serve\]"'):
        listen(Slow())


def test_the_command_says_where_it_listens_and_warns_of_other_addresses(run, states, monkeypatch):
    said = []
    monkeypatch.setattr(deploy_cli, "opened", lambda *_: run)
    monkeypatch.setattr("pluralprefs.serve.Listening.run", lambda self: said.append((self.url, self.socket.close())))
    arguments = ["serve", "RUN", "--users", str(states[0]), "--port", "0", "--wait", "1", "--batch", "16"]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.output.strip() == f"listening on {said[0][0]}"
    done = CliRunner().invoke(app, [*arguments, "--host", "0.0.0.0"])
    assert "whoever reaches this address may ask for any user" in done.stderr
    done = CliRunner().invoke(app, [*arguments, "--queue", "3"])
    assert (done.exit_code, len(done.stderr.strip().splitlines())) == (2, 1)


@pytest.mark.slow
def test_from_comparisons_to_a_server_and_a_model_by_commands_alone(tmp_path):
    """fit, adapt, serve and export as somebody types them; a signal stops the server once it has answered."""
    folder = copied("llama", tmp_path / "llama")
    word_pairs(240, users=6).write_ndjson(tmp_path / "data.jsonl")
    word_pairs(12, seed=9).with_columns(user_id=pl.lit("ana")).write_ndjson(tmp_path / "ana.jsonl")

    def command(*arguments, begin=False):
        call = [sys.executable, "-c", "from pluralprefs.cli import main; main()", *map(str, arguments)]
        options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        if begin:
            return subprocess.Popen(call, **options)
        done = subprocess.run(call, **options, check=False, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    run = command("fit", tmp_path / "data.jsonl", "--model", "bradley_terry", "--encoder", folder, "--set",
                  "encoder.joint=true", "--set", "features={}", "--set", "model.item_effects=false", "--set",
                  "encoder.max_length=24", "--set", "users.rounds=2", "--set", "shots=[0]", "--root",
                  tmp_path / "runs")  # fmt: skip
    user = tmp_path / "ana.safetensors"
    command("adapt", run, "--comparisons", tmp_path / "ana.jsonl", "--prior", "population", "--out", user)
    assert "written" in command("export", run, "--user", user, "--out", tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text("utf8")
    assert "adapted to 12 comparisons" in card
    assert "seen/testpair" in card
    scores = tmp_path / "scores.parquet"
    command("score", run, "--user", user, "--input", tmp_path / "ana.jsonl", "--out", scores)
    server = command("serve", run, "--users", user, "--port", "0", begin=True)
    try:
        url = server.stdout.readline().split()[-1]
        table, expected = pl.read_ndjson(tmp_path / "ana.jsonl"), pl.read_parquet(scores)
        body = {"prompts": table["prompt"].to_list(), "completions": table["first"].to_list(), "user": "ana"}
        found = httpx.post(f"{url}/rewards", json=body, timeout=60).json()
        assert found["user_source"] == ["adapted"] * 12
        np.testing.assert_allclose(found["rewards"], expected["reward_first"], atol=1e-4)
        table = pl.read_ndjson(tmp_path / "data.jsonl").head(6)  # of every user, most of whom the run kept
        table.write_ndjson(tmp_path / "seen.jsonl")
        command("score", run, "--input", tmp_path / "seen.jsonl", "--out", scores)
        expected = pl.read_parquet(scores)
        assert set(expected["user_source"]) == {"seen", "population"}
        for row, said in zip(table.iter_rows(named=True), expected.iter_rows(named=True), strict=True):
            body = {"prompt": row["prompt"], "responses": [row["first"], row["second"]], "user": row["user_id"]}
            found = httpx.post(f"{url}/score", json=body, timeout=60).json()
            assert found["user_source"] == said["user_source"]
            np.testing.assert_allclose(found["log_odds"], said["log_odds"], rtol=1e-2, atol=1e-3)
            np.testing.assert_allclose(found["log_odds_std"], said["log_odds_std"], rtol=1e-2)
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
    assert server.returncode == 0
