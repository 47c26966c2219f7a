"""Tables of docs/ name a test or a reason for each of their rows; here the tests that they name are looked for."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

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
