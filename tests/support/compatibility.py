"""Where the conformance suites keep which plug-ins and features they have tried together."""

from __future__ import annotations

import pytest

FILE = "docs/compatibility.json"
PAIRS = pytest.StashKey[dict[str, dict[str, str]]]()
COMPLETE = pytest.StashKey[bool]()
