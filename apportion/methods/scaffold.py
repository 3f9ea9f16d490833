"""The two files of a new method, from templates: `make new slot=reducer name=diffrate arxiv=2305.17997`. The shelf finds them by their place."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path as File

from apportion.errors import ApportionError, PlanError
from apportion.files import write_atomic
from apportion.methods import SLOTS, names, slots

ROOT = File(__file__).parents[2]

METHOD = '''"""What it does, in one sentence.

Authors year, "Title", arXiv {arxiv}, section. Shapes and units. Cost. When not to use it.
"""

from __future__ import annotations
{imports}

class {title}(nn.Module):
    card = Card("Title", "Authors year", "{arxiv}", None, exact=True, needs="nothing")

    @classmethod
    def from_dense(cls, part: nn.Module) -> Self:
        return cls()
{methods}

METHOD = {title}
'''

TEST = '''"""What the paper claims of {name}; the contract of the {slot} slot has already found it."""

from __future__ import annotations

from tests.conftest import fitted


def test_it_is_the_definition():
    {name}, _ = fitted("{slot}", "{name}")
    raise AssertionError(f"write the definition of {{type({name}).__name__}} as a plain loop, and compare")
'''


def new(slot: str, name: str, arxiv: str, *, root: File = ROOT) -> tuple[File, File]:
    """Write a method's file and its test's file and return both; neither does anything yet, so contracts and test fail until they are filled in.

    Raises PlanError for a slot that does not exist, a name that is taken or is no name, and an arXiv number of the wrong shape.
    """
    method, test = root / "apportion" / "methods" / slot / f"{name}.py", root / "tests" / "methods" / slot / f"test_{name}.py"
    if name in names(slot) or method.exists() or test.exists():
        raise PlanError(f"{name!r} in slot {slot!r}, which exists", wanted="a new name", do="Choose another name, or edit the file.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise PlanError(f"name {name!r}", wanted="lower-case letters, digits and underscores", do="Name it as its paper does.")
    if not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
        raise PlanError(f"arXiv number {arxiv!r}", wanted="a number such as 2111.15667", do="Look it up on the paper's first page.")
    signatures = _signatures(slot)
    title = "".join(part.capitalize() for part in name.split("_"))
    write_atomic(method, METHOD.format(title=title, arxiv=arxiv, methods=signatures, imports=_imports(signatures)))
    write_atomic(test, TEST.format(slot=slot, name=name))
    return method, test


def _signatures(slot: str) -> str:
    """The methods that the slot's protocol asks for, each raising until it is written; none where the slot has no protocol."""
    protocol = getattr(slots, {"ffn": "FeedForward"}.get(slot, slot.capitalize()), None)
    lines = inspect.getsource(protocol).splitlines()[1:] if protocol else []
    written = []
    for line in lines:
        signature = line.removesuffix(" ...")
        if signature != line:
            # A module's call is its forward.
            written += ["", signature.replace("def __call__", "def forward"), '        raise NotImplementedError("not written yet")']
        elif line.strip():
            written += ["", f"{line}  # say which"]
    return "".join(f"{line}\n" for line in written)


def _imports(signatures: str) -> str:
    words = set(re.findall(r"\w+", signatures))
    torch = ", ".join([*(["Tensor"] if "Tensor" in words else []), "nn"])
    shared = sorted(words & {"Contribution", "Mixed", "Weight"})
    vocab = ", ".join(sorted({"Card"} | words & {"Notes", "Tokens"}))
    from_slots = f"from apportion.methods.slots import {', '.join(shared)}\n" if shared else ""
    return f"\nfrom typing import Self\n\nfrom torch import {torch}\n\n{from_slots}from apportion.vocab import {vocab}\n"


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print("Usage: make new slot=SLOT name=NAME arxiv=NUMBER\nSlots: " + ", ".join(SLOTS), file=sys.stderr)
        return 2
    try:
        files = new(arguments[0], arguments[1], arguments[2])
    except ApportionError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(*(file.relative_to(ROOT) for file in files), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
