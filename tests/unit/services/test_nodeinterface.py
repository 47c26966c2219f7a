"""The node's interface: what is described is what is answered."""

import json
import re
from pathlib import Path

import varlink

from nixlet.services import nodeaddress, nodeinterface

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
