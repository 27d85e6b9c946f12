"""Which metrics an expression of PromQL reads, and which ones the server exports.

Only as much of the grammar as that takes: what stands in braces, brackets, strings and label
lists is no metric; a name before a parenthesis is a function; words of the language are known.
"""

from __future__ import annotations

import re

from service.metrics import Metrics

_LANGUAGE = """
    and or unless on ignoring by without group_left group_right offset bool inf nan start end
    atan2 sum min max avg group stddev stdvar count count_values bottomk topk quantile
"""
_WORDS = frozenset(_LANGUAGE.split())
_COMMENT = re.compile(r"#[^\n]*")
_STRING = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|`[^`]*`')
_BRACES_OR_BRACKETS = re.compile(r"\{[^{}]*\}|\[[^\[\]]*\]")
_LABELS = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)")
_NUMBER = re.compile(r"(?<![\w:])\d[\w.]*")  # durations and hexadecimal too
_NAME = re.compile(r"[a-zA-Z_:][\w:]*(?!\w)(\s*\()?")


def names_in(expression: str) -> set[str]:
    """The names of metrics and recorded series that an expression selects by name."""
    for noise in (_STRING, _COMMENT, _BRACES_OR_BRACKETS, _LABELS, _NUMBER):
        expression = noise.sub(" ", expression)
    return {
        found[0]
        for found in _NAME.finditer(expression)
        if found[1] is None and found[0].lower() not in _WORDS
    }


def exported() -> set[str]:
    """The names of all series that the server's page can hold."""
    endings = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    page = Metrics().page().decode()
    kinds = re.findall(r"^# TYPE (\w+) (\w+)$", page, flags=re.MULTILINE)
    return {name + ending for name, kind in kinds for ending in endings[kind]}
