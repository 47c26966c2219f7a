"""The node's interface: what is described is what is answered."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import varlink
from varlink import scanner

from nixlet.services import (
    containers,
    executing,
    manifests,
    nodeaddress,
    nodeimages,
    nodeinterface,
    nodelogs,
    nodestatus,
    running,
    sessions,
    stopping,
    withdrawal,
)
from nixlet.varlink import server

SERVICES: tuple[type[Any], ...] = (
    containers.ContainersService,
    executing.ExecutingService,
    manifests.ManifestService,
    nodeimages.ImagesService,
    nodelogs.LogService,
    nodestatus.StatusService,
    running.RunService,
    sessions.Sessions,
    stopping.StoppingService,
    withdrawal.Withdrawals,
)

#: What the description calls simple types; bytes are in base64.
NAMES: dict[type[Any], str] = {
    msgspec.inspect.BoolType: "bool",
    msgspec.inspect.IntType: "int",
    msgspec.inspect.FloatType: "float",
    msgspec.inspect.StrType: "string",
    msgspec.inspect.BytesType: "string",
}

DOCS = Path(__file__).parents[3] / "docs"


def test_the_description_is_varlinks() -> None:
    parsed = varlink.Interface(nodeinterface.description())
    assert parsed.name == nodeaddress.INTERFACE


def test_the_description_is_among_the_docs() -> None:
    assert (DOCS / f"{nodeaddress.INTERFACE}.varlink").read_text() == nodeinterface.description()


def test_the_calls_in_the_docs_are_the_interfaces() -> None:
    parsed = varlink.Interface(nodeinterface.description())
    call = re.compile(rf"varlinkctl .*call \S+ {re.escape(nodeaddress.INTERFACE)}\.(\w+) '(.*)'")
    calls = call.findall((DOCS / "architecture.md").read_text())
    assert len(calls) == 2
    for name, text in calls:
        parameters = json.loads(text)
        wanted = parsed.get_method(name).in_type
        assert set(parameters) == set(wanted.fields)
        # What has another type is refused.
        assert parsed.filter_params(f"{name}.call", wanted, False, (), parameters) == parameters


def methods() -> dict[str, server.Method]:
    # What a service declares doesn't depend on what it is made of.
    return {name: method for each in SERVICES for name, method in object.__new__(each).methods().items()}


def described(kind: object, parsed: varlink.Interface) -> str:
    """A type of the description."""
    match kind:
        case scanner._Maybe():
            return f"?{described(kind.element_type, parsed)}"
        case scanner._Array():
            return f"[]{described(kind.element_type, parsed)}"
        case scanner._CustomType():
            return described(parsed.members[kind.name].type, parsed)
        case scanner._Enum():
            return f"({', '.join(sorted(kind.fields))})"
        case scanner._Struct():
            fields = {name: described(each, parsed) for name, each in kind.fields.items()}
            return f"({', '.join(f'{name}: {fields[name]}' for name in sorted(fields))})"
        case _:
            return {bool: "bool", int: "int", float: "float", str: "string"}[type(kind)]


def taken(kind: msgspec.inspect.Type) -> str:
    """A type that parameters are checked by, in the description's language."""
    match kind:
        case msgspec.inspect.Metadata():
            return taken(kind.type)
        case msgspec.inspect.UnionType():
            (other,) = (each for each in kind.types if not isinstance(each, msgspec.inspect.NoneType))
            return taken(other)
        case msgspec.inspect.CollectionType():
            return f"[]{taken(kind.item_type)}"
        case msgspec.inspect.LiteralType():
            return f"({', '.join(sorted(map(str, kind.values)))})"
        case msgspec.inspect.StructType():
            # What is null counts as what is not there.
            fields = {each.encode_name: ("" if each.required else "?") + taken(each.type) for each in kind.fields}
            return f"({', '.join(f'{name}: {fields[name]}' for name in sorted(fields))})"
        case _:
            return NAMES[type(kind)]


def test_parameters_are_taken_as_they_are_described() -> None:
    parsed = varlink.Interface(nodeinterface.description())
    served = methods()
    assert nodeinterface.interface(served).methods == served
    assert {name: taken(msgspec.inspect.type_info(each.parameters)) for name, each in served.items()} == {
        name: described(parsed.get_method(name).in_type, parsed) for name in served
    }


def test_who_has_to_take_several_replies_is_told() -> None:
    comments = re.findall(r"((?:^#.*\n)+)^method (\w+)", nodeinterface.description(), re.MULTILINE)
    told = {name: re.search(r'(?i)\bto be\s(?:#\s)?called with "more"', text) for text, name in comments}
    assert {name for name, each in methods().items() if each.several is True} == {
        name for name in told if told[name] and name != "Run"
    }
    # Of these it depends on the parameters.
    assert {name for name, each in methods().items() if callable(each.several)} == {
        "Run",
        "StopContainers",
        "RemoveContainers",
    }
