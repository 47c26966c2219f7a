"""Which packet filter rules go with a network or a container."""

from nixlet.host import iptables

#: What iptables-save prints of the bridge and portmap plugins: two networks, one with a port mapping.
SAVED = r"""
*nat
:PREROUTING ACCEPT [0:0]
:CNI-0123456789abcdef01234567 - [0:0]
:CNI-DN-0123456789abcdef01234 - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-aaaaaaaaaaaaaaaaaaaaaaaa - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -s 10.63.0.2/32 -m comment --comment "name: \"nixlet-nixlet0\" id: \"c1\"" -j CNI-0123456789abcdef01234567
-A POSTROUTING -s 10.99.0.2/32 -m comment --comment "name: \"nixlet-nixlet01\" id: \"c2\"" -j CNI-aaaaaaaaaaaaaaaaaaaaaaaa
-A CNI-0123456789abcdef01234567 -d 10.63.0.0/16 -m comment --comment "name: \"nixlet-nixlet0\" id: \"c1\"" -j ACCEPT
-A CNI-0123456789abcdef01234567 ! -d 224.0.0.0/4 -m comment --comment "name: \"nixlet-nixlet0\" id: \"c1\"" -j MASQUERADE
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"nixlet-nixlet0\" id: \"c1\"" -m multiport --dports 8080 -j CNI-DN-0123456789abcdef01234
-A CNI-DN-0123456789abcdef01234 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.63.0.2:80
COMMIT
"""


def test_the_rules_of_a_network_go_and_no_others() -> None:
    removals = iptables.removals(SAVED, network="nixlet-nixlet0")
    deleted = [each[1:] for each in removals if each[0] == "-D"]
    assert [each[0] for each in deleted] == [
        "POSTROUTING",
        "CNI-0123456789abcdef01234567",
        "CNI-0123456789abcdef01234567",
        "CNI-HOSTPORT-DNAT",
    ]
    assert 'name: "nixlet-nixlet0" id: "c1"' in deleted[0]
    chains = ["CNI-0123456789abcdef01234567", "CNI-DN-0123456789abcdef01234"]
    # Emptied before they are removed, and after nothing jumps to them.
    assert removals[len(deleted) :] == [["-F", each] for each in chains] + [["-X", each] for each in chains]


def test_without_rules_nothing_is_removed() -> None:
    assert iptables.removals(SAVED, network="nixlet-other") == []
    assert iptables.removals(SAVED, network="nixlet-nixlet0", container="c2") == []


def test_the_rules_of_a_container() -> None:
    assert iptables.removals(SAVED, container="c1") == iptables.removals(SAVED, network="nixlet-nixlet0")
    chain = "CNI-aaaaaaaaaaaaaaaaaaaaaaaa"
    (rule, *chains) = iptables.removals(SAVED, container="c2")
    assert (rule[:2], rule[-1], chains) == (["-D", "POSTROUTING"], chain, [["-F", chain], ["-X", chain]])


def test_the_masquerading_of_a_network_goes_and_its_port_mappings_stay() -> None:
    chain = "CNI-0123456789abcdef01234567"
    (rule, *chains) = iptables.removals(SAVED, network="nixlet-nixlet0", chain="POSTROUTING")
    assert (rule[:2], rule[-1], chains) == (["-D", "POSTROUTING"], chain, [["-F", chain], ["-X", chain]])


KUBELETS = """
*filter
:INPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FIREWALLED - [0:0]
-A INPUT -m comment --comment "mine" -j ACCEPT
-A INPUT -j KUBE-FIREWALL
-A INPUT -j KUBE-FIREWALLED
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -j DROP
COMMIT
"""


def test_chains_go_with_what_leads_to_them() -> None:
    assert iptables.chain_removals(KUBELETS, ("KUBE-FIREWALL", "KUBE-IPTABLES-HINT")) == [
        ["-D", "INPUT", "-j", "KUBE-FIREWALL"],
        ["-F", "KUBE-FIREWALL"],
        ["-X", "KUBE-FIREWALL"],
    ]
    assert iptables.chain_removals(SAVED, ("KUBE-FIREWALL",)) == []
