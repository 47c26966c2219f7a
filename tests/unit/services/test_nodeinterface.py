"""The node's interface: what is described is what is answered."""

import varlink

from nixlet.services import nodeaddress, nodeinterface


def test_the_description_is_varlinks() -> None:
    parsed = varlink.Interface(nodeinterface.description())
    assert parsed.name == nodeaddress.INTERFACE
