"""YAML for others to read: the same text for the same values, in the order in which they are given.

What is text stays text for whoever reads it: Kubernetes takes plain scalars (``y``, ``1e3``, ``0o7``) otherwise than PyYAML does, so
that text is quoted wherever one of the two would see something else in it.
"""

from collections.abc import Mapping, Sequence

import yaml

from nixlet.encoding import yamlscalars

#: What can be written: what JSON has.
Value = str | int | float | bool | None | Sequence["Value"] | Mapping[str, "Value"]


class _Dumper(yaml.SafeDumper):
    """Blocks all the way down, lists within their keys, no anchors."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 (PyYAML's own signature)
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002 (likewise)
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # (YAML knows more ends of lines than the common one)
    quoted = yamlscalars.tag(value) != yamlscalars.STR or not value.replace("\n", "").isprintable()
    style = '"' if quoted else "|" if "\n" in value else None
    return dumper.represent_scalar(yamlscalars.STR, value, style=style)


_Dumper.add_representer(str, _text)


def document(value: Mapping[str, Value]) -> str:
    """A mapping as a YAML document."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=1 << 30
    )
    return text
