"""Tables of docs/ name a test or a reason for each of their rows; here the tests that they name are looked for.

Besides: what documents name of the tree is there, and what they have one type is what nixlet and its installer understand.
"""

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nixlet.cli import parser

ROOT = Path(__file__).parents[2]

#: The tables, by document and the section that they stand in; an empty section stands for the whole document.
TABLES = (("k3s.md", ""), ("architecture.md", "What must never happen"))

#: A test in the text: its file, from tests/ on, and its function.
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


class Row(NamedTuple):
    """A row of a table: the line where it stands, the section above it, its cells."""

    line: int
    section: str
    cells: tuple[str, ...]


def rows(text: str) -> Iterator[Row]:
    """The rows of all tables, without their heads and the lines below those."""
    section, inside = "", False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            section = line.lstrip("# ")
        if not line.startswith("|"):
            inside = False
        elif re.fullmatch(r"[|\-: ]+", line):
            inside = True
        elif inside:
            # A bar inside of a cell is written \|.
            yield Row(number, section, tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]))


@functools.cache
def functions(path: Path) -> frozenset[str]:
    return frozenset(
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def faults(text: str, section: str = "") -> list[str]:
    """What is wrong with the tables of a text, or of one section of it."""
    found = []
    for row in rows(text):
        if section not in {"", row.section}:
            continue
        if len(row.cells) != 3 or not all(row.cells):
            found.append(f"line {row.line}: a row has three cells, none of them empty")
            continue
        proof = row.cells[2]
        for file, name in NAMED.findall(proof):
            path = ROOT / "tests" / file
            if not name.startswith("test_") or not path.is_file() or name not in functions(path):
                found.append(f"line {row.line}: there is no test {file}::{name}")
        # What is no test is a reason, and a reason is a sentence.
        if not NAMED.search(proof) and (".py" in proof or len(proof.split()) < 4):
            found.append(f"line {row.line}: neither a test nor a reason")
    return found


@pytest.mark.parametrize(("document", "section"), TABLES)
def test_every_row_has_a_test_that_exists_or_a_reason(document: str, section: str) -> None:
    assert faults((ROOT / "docs" / document).read_text(), section) == []


def test_the_tables_are_read_at_all() -> None:
    """What keeps the test above from finding nothing in a document of another form."""
    by_section: dict[str, int] = {}
    for document, section in TABLES:
        for row in rows((ROOT / "docs" / document).read_text()):
            if section in {"", row.section}:
                by_section[row.section] = by_section.get(row.section, 0) + 1
    assert len(by_section) >= 11
    assert sum(by_section.values()) > 200
    assert by_section["What must never happen"] > 40


HEAD = "# T\n\n| k3s | nixlet | proof |\n|---|---|---|\n"


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("| a | b | `unit/test_docs.py::test_the_tables_are_read_at_all` |", None),
        ("| a | b \\| c | there is no cluster yet |", None),
        ("| a | b | |", "three cells"),
        ("| a | b |", "three cells"),
        ("| a | b | later |", "neither"),
        ("| a | b | see unit/test_docs.py for it all |", "neither"),
        ("| a | b | `unit/test_docs.py::test_no_such` |", "there is no test unit/test_docs.py::test_no_such"),
        ("| a | b | `unit/test_docs.py::rows` |", "there is no test"),
        ("| a | b | `unit/test_no_such.py::test_x` |", "there is no test"),
    ],
)
def test_faults_are_found(row: str, fault: str | None) -> None:
    found = faults(f"{HEAD}{row}\n")
    assert (len(found), fault or "") == (int(fault is not None), fault or "")
    assert all(str(fault) in each and "line 5" in each for each in found)


#: What people read to have a node.
GUIDES = ("README.md", "docs/install.md", "docs/kubelet.md", *(f"docs/guides/{path.name}" for path in sorted((ROOT / "docs/guides").iterdir())))  # fmt: skip


def code(text: str) -> Iterator[str]:
    """What stands in a text as code: blocks of both kinds, line by line, and what is between backticks, also over the end of a line."""
    text = text.replace("\\\n", " ")
    fenced = re.compile(r"^(?: |\d+\. )*```\w*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    for block in fenced.findall(text):
        yield from block.splitlines()
    text = fenced.sub("", text)
    yield from re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)
    yield from (" ".join(each.split()) for each in re.findall(r"`([^`]+)`", text))


def typed(text: str) -> Iterator[list[str]]:
    """The commands of nixlet and its installer in a text that have options, as the words of nixlet's command line."""
    for line in code(text):
        for command in re.split(r" ; |  #|&& ", line.replace("; then", "")):
            found = re.match(r"(?:\w+=\S+ )*(?:nixlet|\./install\.sh)(?= |$)", command.strip())
            if found is None or "--help" in command or " --" not in command:
                continue
            words = shlex.split(command.strip()[found.end() :])
            # What an installer is told is what its service is started with.
            yield words


@pytest.mark.parametrize("document", GUIDES)
def test_what_one_is_to_type_is_understood(document: str) -> None:
    not_understood = [words for words in typed((ROOT / document).read_text()) if parser.parse(words, {}) is None]
    # Two name an option, and no command.
    assert [words for words in not_understood if words not in (["--debug", "VERB"], ["run", "--runtime", "crun"])] == []


@pytest.mark.parametrize("document", GUIDES)
def test_what_documents_name_of_the_tree_is_there(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [each for each in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in each]
    named = re.findall(r"`((?:tests|scripts|deploy|docs|bench|src)/[\w./-]+)`", text)
    places = [*((ROOT / document).parent / each for each in links), *(ROOT / each for each in named)]
    assert [str(place) for place in places if not place.exists()] == []


def test_the_installers_variables_are_those_of_its_guide() -> None:
    script = (ROOT / "install.sh").read_text()
    known = set(re.findall(r"^#? *(?:# )?INSTALL_NIXLET_(\w+)|, INSTALL_NIXLET_(\w+)", script, re.MULTILINE))
    rows = "\n".join(row for row in (ROOT / "docs/install.md").read_text().splitlines() if row.startswith("|"))
    told = set(re.findall(r"(?:INSTALL_NIXLET|…)_([A-Z0-9_]+)", rows))
    assert {first or second for first, second in known} == told
    read = set(
        re.findall(
            r"INSTALL_NIXLET_(\w+)", "".join(path.read_text() for path in (ROOT / "scripts/lib").iterdir()) + script
        )
    )
    assert read - told == set()


def test_commands_are_found() -> None:
    """What keeps the tests above from finding nothing."""
    found = [words for document in GUIDES for words in typed((ROOT / document).read_text())]
    assert ["server", "--kubernetes", "no", "--pod-cidr", "10.42.0.0/24"] in found
    assert ["uninstall", "--snapshotter-root", "/var/lib/containerd/io.containerd.snapshotter.v1.nix", "--yes"] in found
    assert ["server", "--snapshotter", "nix"] in found
    assert len(found) > 12
    assert parser.parse(["server", "--nonsense"], {}) is None
