"""The node's interface: what is described is what is answered."""

import varlink

from nixlet.services import nodeinterface


def test_the_description_is_varlinks() -> None:
    parsed = varlink.Interface(nodeinterface.description())
    assert parsed.name == nodeinterface.NAME
