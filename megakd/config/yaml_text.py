"""YAML as configuration files use it: YAML 1.2's plain values, no key twice, a line number in every complaint."""

from __future__ import annotations

import re
from typing import Any

import yaml

from megakd.common.errors import UserError

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?[0-9][0-9_]*$|0x[0-9a-fA-F]+$|0o[0-7]+$")


class _DuplicateKey(yaml.MarkedYAMLError):
    """A key twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """Plain values as YAML 1.2's core schema reads them.

    PyYAML's own YAML 1.1 makes text of 1e-3, a date of 2025-01-01, 90 of 1:30 and 8 of 010.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping; PyYAML would silently keep the last of two equal keys."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in lines:
                    problem = f"'{key.value}' stands here and on line {lines[key.value]}"
                    raise _DuplicateKey(None, None, problem, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))


def _construct_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    """Join the two escapes that JSON, hence whoever writes an override with it, makes of one character."""
    return str(loader.construct_scalar(node)).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


for _tag, _pattern, _first in (
    ("null", re.compile(r"~$|null$|Null$|NULL$|$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Dumper.add_representer(list, _represent_list)


def parse_yaml(text: str, source: str) -> Any:
    """The value that YAML text stands for; `source` begins the message where there is none.

    Raises:
        UserError: not YAML, more than one document, a key twice in a mapping, or a tag.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}" if mark is not None and "\n" in text.strip() else ""
        problem = " ".join(str(error.problem or error.context).split())
        remedy = "Keep one." if isinstance(error, _DuplicateKey) else "Correct it, or quote text with special signs."
        raise UserError(f"{source}{place} is not valid: {problem}. {remedy}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}. Correct it.") from error
    except ValueError as error:
        raise UserError(f"{source} holds a number that cannot be read ({error}). Write a smaller one.") from error
    except RecursionError as error:
        raise UserError(f"{source} is nested too deeply to be read. Remove levels.") from error


def format_yaml(value: dict[str, Any]) -> str:
    """YAML text, in ASCII and in the mapping's order, that `parse_yaml` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=100)
