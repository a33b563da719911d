"""Episodes: shots and questions of one user, never the same pair, a pure function of (seed, epoch)."""

import jax
import numpy as np
import pytest
from families import rows

from pluralprefs.data.episodes import episode_epoch, episode_indices


def judged(users=7, seed=0):
    """Rows of users with 1 to 60 comparisons of 9 items, so that pairs come twice, in both orders."""
    draw = np.random.default_rng(seed)
    user = np.repeat(np.arange(-1, users - 1), draw.integers(1, 60, users)).astype(np.int32)
    user = draw.permutation(np.append(user, users))
    first = draw.integers(0, 9, len(user)).astype(np.int32)
    second = ((first + draw.integers(1, 9, len(user))) % 9).astype(np.int32)
    made = rows(first, second, draw.integers(0, 2, len(user)), np.where(draw.random(len(user)) < 0.1, 0.0, 1.0))
    return jax.tree.map(np.asarray, made.replace(user=user))


def pairs(part):
    """Unordered pairs of the rows that count, a list for every episode."""
    both = np.sort(np.stack([part.first, part.second]), axis=0)
    lines = zip(both[0], both[1], np.asarray(part.weight), strict=True)
    return [{(int(i), int(j)) for i, j, w in zip(*line, strict=True) if w > 0} for line in lines]


def flat(episodes):
    return [take_lines(part) for part in (episodes.support, episodes.query)]


def take_lines(part):
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, x.shape[-1]), part)


def test_no_pair_is_shown_and_asked_and_an_episode_is_one_users():
    table = judged()
    episodes = episode_epoch(0, 3, table, 8, shots=6, queries=4)
    support, query = flat(episodes)
    asked = 0
    for shown, wanted, s_user, s_weight, q_user, q_weight in zip(
        pairs(support), pairs(query), support.user, support.weight, query.user, query.weight, strict=True
    ):
        assert not shown & wanted
        users = {*s_user[s_weight > 0].tolist(), *q_user[q_weight > 0].tolist()}
        assert len(users) <= 1
        assert -1 not in users
        asked += len(wanted)
    assert asked > 30
    assert episodes.query.weight.shape[1:] == (2, 4)  # 8 rows a step are two users of four questions


def test_an_epoch_is_a_function_of_seed_and_number_and_shows_every_number_of_shots():
    table = judged(users=60)
    one, same, other = (episode_epoch(1, n, table, 64, shots=5, queries=8) for n in (2, 2, 3))
    np.testing.assert_array_equal(one.query.first, same.query.first)
    np.testing.assert_array_equal(one.support.weight, same.support.weight)
    assert (np.asarray(one.query.first) != np.asarray(other.query.first)).any()
    counts = (take_lines(one.support).weight > 0).sum(1)
    assert set(counts.tolist()) == set(range(6))


def test_everyone_is_asked_about_in_every_pass_and_one_row_is_a_question_not_a_shot():
    table = judged()
    support, query = episode_indices(np.random.default_rng(0), table, 32, 32)
    usable = (table.user >= 0) & (table.weight > 0)
    counts = np.bincount(table.user[usable])
    users = []
    for line, asked in zip(support, query, strict=True):
        both = np.concatenate([line, asked])
        users.append(table.user[both[both >= 0][0]])
        assert (line >= 0).sum() < counts[users[-1]]
    assert sorted(users) == np.unique(table.user[usable]).tolist()


def test_exactly_many_shots_leave_a_quarter_to_ask_about():
    table = judged(users=30)
    support, query = episode_indices(np.random.default_rng(0), table, 32, 8, exactly=True)
    counts = np.bincount(table.user[(table.user >= 0) & (table.weight > 0)])
    for line, asked in zip(support, query, strict=True):
        total = counts[table.user[asked[asked >= 0][0]]] if (asked >= 0).any() else None
        if total is not None:
            assert (line >= 0).sum() == min(32, total - max(total // 4, 1))


def voted(users=40, statements=12, seed=0):
    """Every user's pairs of an agreed and a disagreed statement, at most 45, as polis makes them."""
    draw = np.random.default_rng(seed)
    found = []
    for user in range(users):
        side = draw.permutation(statements)
        cut = draw.integers(2, statements - 2)
        every = [(user, i, j) for i in side[:cut] for j in side[cut:]]
        found += [every[k] for k in draw.permutation(len(every))[:45]]
    user, first, second = np.array(found, np.int32).T
    made = rows(first, second, np.ones(len(user)), np.ones(len(user)))
    return jax.tree.map(np.asarray, made.replace(user=user))


@pytest.mark.parametrize("exactly", [False, True])
def test_shots_and_questions_share_no_response_where_items_are_kept_apart(exactly):
    table = voted()
    shown_at_all = []
    for seed in range(5):
        draw = np.random.default_rng(seed)
        support, query = episode_indices(draw, table, 32, 8, exactly=exactly, apart="item")
        assert support.shape == (40, 32)
        assert query.shape == (40, 8)
        for shown, asked in zip(support, query, strict=True):
            used = [part[part >= 0] for part in (shown, asked)]
            assert len({*table.user[np.concatenate(used)].tolist()}) <= 1
            responses = [{*table.first[rows_].tolist(), *table.second[rows_].tolist()} for rows_ in used]
            assert not responses[0] & responses[1]
            assert len(set(used[0])) == len(used[0])
            shown_at_all.append(len(used[0]))
        assert (query >= 0).sum() > 40
    assert max(shown_at_all) > 12
    assert exactly or min(shown_at_all) == 0


def test_an_epoch_that_keeps_items_apart_asks_about_as_many_rows_as_there_are():
    table = voted(users=200)
    one, other = (episode_epoch(0, number, table, 64, apart="item") for number in (0, 1))
    assert one.query.weight.shape == other.query.weight.shape  # the step is compiled once
    asked = (one.query.weight > 0).sum()
    assert 0.7 < asked / len(table.user) < 1.5
    assert 32 < asked / one.query.weight.shape[0] < 128  # rows a step
    with pytest.raises(ValueError, match="apart is 'pair' or 'item'"):
        episode_epoch(0, 0, table, 64, apart="prompt")


def test_rows_without_users_make_no_episode():
    with pytest.raises(ValueError, match="user_id"):
        episode_epoch(0, 0, judged().replace(user=np.full_like(judged().user, -1)), 8)
