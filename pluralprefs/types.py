"""The nouns that every module shares.

A comparison is one judgement, by one user, of two responses to one prompt. Every model family answers the same
question about it: for this user, what are the log-odds that the first response is preferred to the second? Whatever
lies between two tables on disk is a pytree made of the classes below. Family code has no batch axis; `jax.vmap` adds
it.

An index batch is `Comparisons` whose `first` and `second` are integer rows of an item table; `data.batches.gather`
turns it into `Comparisons[Item]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int

from pluralprefs.pytrees import pytree, static

T = TypeVar("T")
User = Any  # any pytree of float arrays; () where users do not differ
Key = jax.Array


class Replaceable:
    """What `pytrees.pytree` adds to a class, told to type checkers: a copy with some fields exchanged."""

    if TYPE_CHECKING:

        def replace(self, **changes: Any) -> Self: ...


@pytree
class Item(Replaceable):
    """One response to one prompt, encoded. Absent parts are None; leading axes are free.

    `embedding` is of the response alone or of prompt and response together: the encoder says which, a family declares
    which it needs. `prompt` is the hidden state at the end of the prompt, equal in the two items of a comparison.
    `index` is the row of the item in the table of items seen in training, -1 for an item never seen.

    Before it is encoded, an item holds Tokens in the places of `embedding` and `prompt` (`encoders.text.encode`).
    """

    embedding: Float[Array, "*batch dim"]
    prompt: Float[Array, "*batch prompt_dim"] | None = None
    attributes: Float[Array, "*batch attributes attribute_dim"] | None = None
    attribute_mask: Bool[Array, "*batch attributes"] | None = None
    log_ratio: Float[Array, "*batch"] | None = None
    index: Int[Array, "*batch"] | None = None


@pytree
class Tokens(Replaceable):
    """A rendered (prompt, response), padded. `prompt_end` is the position of the last prompt token."""

    ids: Int[Array, "*batch length"]
    mask: Bool[Array, "*batch length"]
    segment: Int[Array, "*batch length"]
    prompt_end: Int[Array, "*batch"]


@pytree
class Comparisons(Replaceable, Generic[T]):
    """Judgements. `first` and `second` are Items, Tokens or integer rows of an item table.

    target     P(first preferred) in [0, 1], graded or 0/1
    tie        judged equal, which is not the same as a graded 0.5
    user, community, rater, source    rows of their tables, -1 = unknown
    offset     log-odds added to the family's own: the out-of-fold population log-odds minus the in-fold ones where the
               user level is fitted in a second stage, else 0
    weight     0 marks padding; adapters sum weighted nats, so it is also the tempering exponent
    """

    first: T
    second: T
    target: Float[Array, "*batch"]
    tie: Bool[Array, "*batch"]
    user: Int[Array, "*batch"]
    community: Int[Array, "*batch"]
    rater: Int[Array, "*batch"]
    source: Int[Array, "*batch"]
    offset: Float[Array, "*batch"]
    weight: Float[Array, "*batch"]


@pytree
class Episode(Replaceable, Generic[T]):
    """Support and query comparisons of one user each; the leading axis is users."""

    support: Comparisons[T]
    query: Comparisons[T]


@pytree
class Covariance(Replaceable):
    """A covariance kept as factors: `root root' - downdate' downdate`.

    `root` is [size] (a diagonal) or [size, size]; `downdate` is [rows, size], with rows = 0 where the primal Hessian
    was factorised. Nothing of size [size, size] is made when there are fewer comparisons than unknowns.
    """

    root: Float[Array, "*batch size"] | Float[Array, "*batch size size"]
    downdate: Float[Array, "*batch rows size"]


@pytree
class UserPosterior(Replaceable):
    """What every adapter returns: the user's deviation from the community's (or population's) prior user.

    `mean` has the structure of the family's user; `covariance` is over its raveled vector, None for point estimates;
    `base` is the fingerprint of the model it belongs to ("" while inside a jitted function).
    """

    mean: User
    covariance: Covariance | None = None
    base: str = static(default="")


@runtime_checkable
class RewardModel(Protocol):
    """A family: a pytree of parameters that scores one pair for one user."""

    @classmethod
    def init(cls, *, key: Key, **sizes: Any) -> Self:
        """Draw initial parameters. Sizes known only from the data (`dim`, `prompt_dim`, `items`) are keywords."""
        ...

    def init_user(self) -> User:
        """The shape of a user state and its neutral start. The prior belongs to `users`."""
        ...

    def log_odds(self, user: User, first: Item, second: Item) -> Float[Array, ""]:
        """Log-odds that this user prefers `first` to `second`; antisymmetric in the two items."""
        ...


@runtime_checkable
class ScalarReward(Protocol):
    """Capability: the log-odds are a difference of rewards."""

    def reward(self, user: User, item: Item) -> Float[Array, ""]: ...


@runtime_checkable
class LinearInUser(RewardModel, ScalarReward, Protocol):
    """Capability: the reward is linear in the user state; `features` is its constant gradient, shaped like the
    state."""

    def features(self, item: Item) -> User: ...


@runtime_checkable
class ReducesItems(RewardModel, Protocol):
    """Capability: what of an item no user changes is computed once, before users are fitted to it."""

    def reduced(self, items: Item) -> tuple[Self, Item]:
        """Return a model and items [n, ...] with the same log-odds for every user. A second time changes nothing.

        Adapters are given these: what an item was before is not in them.
        """
        ...


@runtime_checkable
class InfersUser(RewardModel, Protocol):
    """Capability: a user is a function of shots, learned over many users, and not a state that is fitted.

    The mean is the family's user, not a deviation. No shots, or shots of weight 0, give the prior user; the order of
    shots, and which response of a shot is called first, change nothing; weights temper.
    """

    def infer_user(self, support: Comparisons[Item]) -> UserPosterior: ...


@runtime_checkable
class LeavesOpen(RewardModel, Protocol):
    """Capability: what is not known of a user lies beside the state, and not in a covariance over it.

    The user's reward of an item is that of the state plus `left_open` @ z, with z standard normal and one a user.
    """

    def left_open(self, user: User, item: Item) -> Float[Array, " directions"]: ...


@runtime_checkable
class Penalised(Protocol):
    """Capability: a term of the training objective in nats per comparison (the one batched method of a family).

    `users` are the states of the batch's rows; of a family that infers its users, their posteriors, one a user.
    """

    def penalty(self, users: Any, batch: Comparisons[Item], key: Key) -> Float[Array, ""]: ...


@runtime_checkable
class LearnsFromItems(Protocol):
    """Capability: a part that is fitted to items alone, before any comparison; no gradient moves it afterwards."""

    @property
    def learns(self) -> bool:
        """Whether these parameters have such a part."""
        ...

    def taught(self, items: Item) -> Self: ...


class Likelihood(Protocol):
    """Nats of one row, given its log-odds. A pytree: may own learned scalars (temperature, tie threshold)."""

    def __call__(self, log_odds: Float[Array, ""], row: Comparisons[Any]) -> Float[Array, ""]: ...


class Encoder(Protocol):
    """Tokens to Item, batched. The same call serves frozen (cached) and end-to-end use."""

    def __call__(self, tokens: Tokens) -> Item: ...


Reduction = Callable[[Float[Array, " rows"], Comparisons[Any]], Float[Array, ""]]
Adapter = Callable[..., UserPosterior]


@pytree
class Params(Replaceable):
    """Everything that is learned: the family, the pooled user table, the likelihood's own scalars, and of the encoder
    what is trained beside them (None where it is frozen)."""

    model: Any
    users: Any
    likelihood: Any
    encoder: Any = None


@pytree
class TrainState(Replaceable):
    """The state of a training loop; a step's randomness is `fold_in(key, step)`."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    key: Key
