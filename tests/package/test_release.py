"""The workflow that publishes a version: what it takes, and that it holds no secret."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
BUILD, PUBLISH = WORKFLOW["jobs"]["build"], WORKFLOW["jobs"]["publish"]


def test_it_runs_for_tags_of_versions_alone() -> None:
    assert WORKFLOW[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true


def test_only_the_job_that_publishes_may_ask_for_an_identity() -> None:
    assert "secrets." not in TEXT
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in BUILD
    assert PUBLISH["permissions"] == {"id-token": "write"}
    assert PUBLISH["needs"] == "build"


def test_it_builds_checks_and_hands_on_both_archives() -> None:
    commands = "\n".join(step.get("run", "") for step in BUILD["steps"])
    order = [commands.index(each) for each in ("make package", "auditwheel repair", "twine check", "GITHUB_REF_NAME#v")]
    assert order == sorted(order)
    kept, fetched = BUILD["steps"][-1]["with"], PUBLISH["steps"][0]["with"]
    assert kept["name"] == fetched["name"]
    assert kept["path"] == fetched["path"] == "dist"


def test_it_has_the_history_that_the_version_is_counted_from() -> None:
    assert BUILD["steps"][0]["with"]["fetch-depth"] == 0


def test_the_changelog_has_dates_and_its_newest_version_is_the_fallback() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.*?)\](.*)$", changelog, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    versions = [(name, re.fullmatch(r" - \d{4}-\d\d-\d\d", date)) for name, date in headings[1:]]
    assert all(date for _, date in versions)
    project = (REPOSITORY / "python" / "pyproject.toml").read_text(encoding="utf-8")
    assert f'fallback_version = "{versions[0][0]}"' in project
