"""YAML that people read: comments before each document, and no text that a reader takes for a number."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

WIDTH = 110  # of lines that people read


def yaml_with_comments(documents: Iterable[tuple[Sequence[str], Mapping[str, Any]]], header: Sequence[str] = ()) -> str:
    """One stream: the header, then each document after its own comments."""
    return comment_lines(header) + "".join(
        "---\n"
        + comment_lines(comments)
        + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=WIDTH, allow_unicode=True)
        for comments, document in documents
    )


def manifests_yaml(document: Mapping[str, Any]) -> str:
    """One stream for `kubectl apply -f`, what is to be known first as comments."""
    header = [*document["header"], "", *document["notes"]]
    return yaml_with_comments(zip(document["comments"], document["manifests"], strict=True), header)


def comment_lines(comments: Iterable[str]) -> str:
    """Sentences over as many lines as they need; what is to be copied, a command, on one."""
    lines = [
        line for text in comments for line in (textwrap.wrap(text, WIDTH) if text.endswith((".", ":")) else [text])
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


class _Dumper(yaml.CSafeDumper):
    """PyYAML's safe dumper in C, which reads YAML 1.1; Kubernetes also takes 1e3 and 0o7 for numbers and y for yes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.CSafeDumper, text: str) -> yaml.Node:
    doubtful = not text[:1].isalpha() or text.lower() in ("y", "n")
    style = "|" if "\n" in text else '"' if doubtful else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
