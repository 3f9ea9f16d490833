"""What the README and the pages made from code say is still so."""

from __future__ import annotations

import re
from pathlib import Path as File

import apportion
from apportion.cli import app
from bench import tables

ROOT = File(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def between(page: str, name: str) -> str:
    begin, end = tables.marks(name)
    return page.split(begin)[1].split(end)[0].strip()


def test_every_command_named_exists():
    named = set(re.findall(r"^apportion (\w+)", README, re.MULTILINE))
    known = {command.name or (command.callback.__name__ if command.callback else "") for command in app.registered_commands}
    assert named and named <= known
    assert {"adapt", "run", "bench", "report", "systems", "doctor"} <= named


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make (demo|test|new|bench|docs|fast|setup|\w+)(?=[ `])", README))
    assert {"demo", "test", "new"} <= named <= targets


def test_every_public_name_used_exists():
    used = set(re.findall(r"apportion\.(\w+)\(", README))
    assert used and all(getattr(apportion, name) is not None for name in used)
    assert all(getattr(apportion, name) is not None for name in apportion.__all__)


def test_table_of_results_is_made_from_the_results():
    assert between(README, "results") == tables.results().strip()


def test_page_on_deciding_shows_the_results():
    assert between((ROOT / "docs" / "control.md").read_text(), "control") == tables.deciding().strip()


def test_page_of_methods_is_made_from_the_cards():
    assert (ROOT / "docs" / "methods.md").read_text() == tables.shelf()


def test_page_of_peers_is_made_from_the_results():
    assert (ROOT / "docs" / "peers.md").read_text() == tables.peers()


def test_page_of_checkpoints_is_made_from_the_results():
    assert (ROOT / "docs" / "checkpoints.md").read_text() == tables.checkpoints()


def test_page_of_systems_is_made_from_the_results():
    assert (ROOT / "docs" / "systems.md").read_text() == tables.systems()
