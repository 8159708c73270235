"""Two domains that are on every machine with Python: its documentation, and its library's code.

Split by whole topics and modules, so that no text to test on is of a page that was learned from.
What the text is depends on the version of Python and on nothing else.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

BYTES = 256  # the vocabulary

# Of pydoc's topics many repeat others'; of these, pieces of 40 characters are shared by less than
# two in a hundred. Modules: plain files in all versions of Python since 3.10.
_TOPICS = {
    "train": (
        "specialnames compound types formatstrings string-methods typesseq debugger calls "
        "operator-summary identifiers objects raise binary"
    ),
    "validation": "typesmapping assignment strings",
    "test": "comparisons execmodel import",
}
_MODULES = {
    "train": (
        "argparse configparser contextlib enum fractions functools imaplib inspect mailbox "
        "optparse pickle shutil statistics subprocess tarfile threading"
    ),
    "validation": "ftplib tempfile traceback",
    "test": "plistlib smtplib uuid",
}


@dataclass(frozen=True)
class Domain:
    """A kind of text: bytes (N,) to learn from, to choose a strength by, and to report on."""

    train: Tensor
    validation: Tensor
    test: Tensor


@cache
def documentation() -> Domain:
    """Return the language reference as ``help()`` prints it: English prose with short examples."""
    return Domain(**{part: _joined(_pages(names)) for part, names in _TOPICS.items()})


@cache
def code() -> Domain:
    """Return modules of the standard library without their comments and docstrings.

    Raises
    ------
    OSError
        If Python came without its library's sources.
    """
    return Domain(**{part: _joined(_sources(names)) for part, names in _MODULES.items()})


def draw(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return sequences (count, length), each from a random place of the text."""
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def in_order(text: Tensor, length: int) -> Tensor:
    """Return the text as sequences (N, length), without what is left at its end."""
    return text[: len(text) // length * length].view(-1, length).long()


def _pages(names: str) -> list[str]:
    return [topics[name] for name in names.split()]


def _sources(names: str) -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{name}.py" for name in names.split()]
    return [without_words(file.read_text(encoding="utf-8")) for file in files]


def without_words(source: str) -> str:
    """Return Python source without comments and docstrings, in the form of ``ast.unparse``."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _joined(texts: Sequence[str]) -> Tensor:
    content = bytearray("\n\n".join(texts).encode())
    return torch.frombuffer(content, dtype=torch.uint8)
