"""Keeps passwords out of what is printed and written."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*://[^\s/?#@:]*:)[^\s/?#]*(?=@)", re.IGNORECASE)
SECRET_NAME = r"(?:api[-_]?key|(?:access[-_]?|auth[-_]?)?token|secret|password|passwd|sig|signature)"
SECRET_PARAMETER = re.compile(rf"([?&](?:{SECRET_NAME}|key)=)[^\s&#'\"]+", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """Returns a text in which passwords in addresses, and the values of such parameters, are ***."""
    return SECRET_PARAMETER.sub(rf"\1{HIDDEN}", PASSWORD.sub(rf"\1{HIDDEN}", text))


def hide_secrets(value: Any, name: str = "") -> Any:
    """Returns plain values with the passwords in addresses, and texts under names such as api_key, as ***."""
    if isinstance(value, Mapping):
        return {key: hide_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if value and re.fullmatch(SECRET_NAME, name, re.IGNORECASE) else without_passwords(value)
