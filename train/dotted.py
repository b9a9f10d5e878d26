"""Imports functions that a config names by their dotted path, and checks the options that it gives them."""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from train.user_code import contained


def import_function(dotted: str, setting: str) -> Callable[..., Any]:
    """Returns the function at a dotted path such as my_package.my_module.my_function.

    Raises:
      ValueError: there is no such module or function, or it ends the program; the message names `setting`.
    """
    module, _, name = dotted.rpartition(".")
    with contained(f"{setting}: {dotted}"):
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{setting}: {dotted}: cannot be imported ({error})") from error
    if not callable(function):
        raise ValueError(f"{setting}: {dotted}: expected a function, got {type(function).__name__}")
    return function


def option_names(function: Callable[..., Any]) -> list[str]:
    """Returns the names of the keyword-only parameters: the options of a reward, an advantage or a surrogate."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def check_options(given: Mapping[str, Any], known: Collection[str], setting: str, owner: str) -> None:
    """Refuses an option that a function does not have.

    Raises:
      ValueError: an unknown option; the message lists the known ones.
    """
    if unknown := given.keys() - set(known):
        raise ValueError(
            f"{setting}: {owner} has no {min(unknown)!r}; "
            + (f"expected one of {', '.join(known)}" if known else "it has no options")
        )
