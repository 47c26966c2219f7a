"""What the README says that one can do, word for word."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def image_expressions() -> dict[str, str]:
    """The README's Nix expressions that build images: "with nixpkgs" and "without"."""
    blocks = re.findall(r"^```nix\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    found = {"with nixpkgs" if "<nixpkgs>" in block else "without": block for block in blocks if "buildImage" in block}
    assert len(found) == 2
    return found


def checkout(directory: Path, expression: str) -> Path:
    """A directory as the README has it in mind: an expression beside nixlet's own; the expression's file."""
    directory.mkdir()
    (directory / "nix").symlink_to(ROOT / "nix")
    (directory / "image.nix").write_text(expression)
    return directory / "image.nix"


def blocks(language: str, heading: str) -> list[str]:
    """The README's blocks of a language below a heading, up to the next heading."""
    text = (ROOT / "README.md").read_text()
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ [A-Z]|\Z)", text, re.MULTILINE | re.DOTALL)
    found = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found


def commands(block: str) -> list[str]:
    """The commands of a block, one after the other, without what is said of them."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [part for line in lines for part in re.sub(r" {2,}#.*", "", line).split(" ; ")]
