"""What sampling settings need to know of a completion's tokens so far; without such settings there is nothing of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.sharding import Layout, constrain
from models.stop_strings import StopTable, read_token


class Tracked(NamedTuple):
    """What a program keeps of the tokens so far, known before it is compiled."""

    seen: bool = False  # for the repetition penalty
    stops: bool = False  # for stop strings


class History(NamedTuple):
    """Of each completion's tokens so far; None: not tracked."""

    seen_PGV: jax.Array | None = None  # True for the tokens in the prompt and the completion
    stop_PG: jax.Array | None = None  # int32, the state of the automaton of the stop strings


UNTRACKED, NO_HISTORY = Tracked(), History()


def prompt_history(
    tracked: Tracked, prompt_PS: jax.Array, lengths_P: jax.Array, G: int, V: int, layout: Layout | None
) -> History:
    """Returns the history of G completions of each prompt that have no token yet."""
    P, S = prompt_PS.shape
    seen_PGV = stop_PG = None
    if tracked.seen:
        token_PS = jnp.where(jnp.arange(S) < lengths_P[:, None], prompt_PS, V)  # V: there is no such token
        seen_PV = jnp.zeros((P, V), bool).at[jnp.arange(P)[:, None], token_PS].set(True, mode="drop")
        seen_PGV = constrain(layout, jnp.repeat(seen_PV[:, None], G, axis=1), "prompt", "group", None)
    if tracked.stops:
        stop_PG = jnp.zeros((P, G), jnp.int32)
    return History(seen_PGV, stop_PG)


def with_token(history: History, token_PG: jax.Array, stop: StopTable | None) -> tuple[History, jax.Array | None]:
    """Returns the history with one more token, and where a stop string ends in it; None without stop strings."""
    seen_PGV, stop_PG, ends_PG = history.seen_PGV, history.stop_PG, None
    if seen_PGV is not None:  # no scatter: a TPU would write one element after the other
        seen_PGV |= jnp.arange(seen_PGV.shape[-1]) == token_PG[..., None]
    if stop is not None and stop_PG is not None:
        stop_PG, ends_PG = read_token(stop, stop_PG, token_PG)
    return History(seen_PGV, stop_PG), ends_PG
