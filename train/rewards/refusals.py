"""Tells why a server of OpenAI's chat completions has refused a request: some refusals concern one text alone."""

import re
from typing import Any

TOO_LONG = (
    *("context_length_exceeded", "context length", "maximum context", "available context size"),  # OpenAI, llama.cpp
    *("maximum model length", "prompt is too long", "maximum number of tokens"),  # vLLM, and others
)
TOO_LONG_COUNTS = re.compile(r"inputs\b.{0,60}must (be <=|have less than) *\d")  # TGI
FILTERED = (
    *("content_policy_violation", "content_filter", "content management policy", "usage policy"),  # OpenAI, Azure
    *("content filtering", "responsibleaipolicyviolation", "safety system", "prohibited_content"),  # and Gemini
    *(
        "content exists risk",
        "data_inspection_failed",
        "datainspectionfailed",
        "inappropriate content",
    ),  # DeepSeek, Qwen
    *("considered high risk", "input was flagged"),  # Moonshot, OpenRouter
)


def error_text(error: Any) -> str:
    """Joins a server error's message, code and parameter name into one text."""
    return f"{error} {getattr(error, 'code', '')} {getattr(error, 'param', '')}".lower()


def too_long(error: Any) -> bool:
    """Whether a request was refused because it exceeds the model's context."""
    text = error_text(error)
    return any(words in text for words in TOO_LONG) or bool(TOO_LONG_COUNTS.search(text))


def filtered(error: Any) -> bool:
    """Whether a content filter refused the question; others may still be answered."""
    text = error_text(error)
    return any(words in text for words in FILTERED)
