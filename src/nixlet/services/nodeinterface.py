"""The Varlink interface of the node: its description, and the methods that the node's services answer."""

import os
import re
from collections.abc import Mapping

from nixlet.services import nodeaddress
from nixlet.varlink import server


def description() -> str:
    """The interface in Varlink's language (https://varlink.org/Interface-Definition); it lies beside this module."""
    with open(os.path.join(os.path.dirname(__file__), f"{nodeaddress.INTERFACE}.varlink"), encoding="utf-8") as file:
        return file.read()


def interface(*services: Mapping[str, server.Method]) -> server.Interface:
    """The interface that these services answer together."""
    methods: dict[str, server.Method] = {}
    for service in services:
        methods.update(service)
    text = description()
    # Whoever adds one to either adds it to both.
    assert set(re.findall(r"^method (\w+)", text, re.MULTILINE)) == set(methods)
    return server.Interface(nodeaddress.INTERFACE, text, methods)
