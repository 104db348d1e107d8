"""The names of all tests, whether this run of pytest has collected all of them or some."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.article import ROOT

COLLECTED = pytest.StashKey[list[str]]()  # node ids of what this run collected, before -k and -m


def all_node_ids(config: pytest.Config) -> list[str]:
    """Every test there is, as pytest names it. Collecting all of them again takes half a minute."""
    node_ids = config.stash[COLLECTED]
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")}
    if files <= {node.partition("::")[0] for node in node_ids}:
        return node_ids
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert listed.returncode == 0, listed.stdout + listed.stderr
    return [line for line in listed.stdout.splitlines() if "::" in line]
