"""Check versions, print a changelog section and set the chart's images; called by `.github/workflows/release.yml`.

    release.py check v0.1.0   print 0.1.0 if the tag agrees with pyproject.toml, Chart.yaml and CHANGELOG.md
    release.py notes 0.1.0    print the section of CHANGELOG.md below the heading of that version
    release.py chart OPERATOR@sha256:… TRAINER@sha256:…
                              write both container images into the chart's values.yaml, as its defaults

Uses the standard library alone, so that it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read_versions(root: Path) -> dict[str, str]:
    """Return the version that each file states, by the file and key."""
    chart = (root / "helm/sailvl-operator/Chart.yaml").read_text()
    return {
        "pyproject.toml project.version": tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"],
        "Chart.yaml version": _read_scalar(chart, "version"),
        "Chart.yaml appVersion": _read_scalar(chart, "appVersion"),
    }


def check_versions(root: Path, tag: str) -> str:
    """Return the version of a tag like `v0.1.0`.

    Raises ValueError if the tag has another form, if a file states another version, or if the changelog has no section.
    """
    found = re.fullmatch(r"v(\d+\.\d+\.\d+)", tag)
    if not found:
        raise ValueError(f"tag {tag!r}: expected vMAJOR.MINOR.PATCH, for example v0.1.0")
    version = found[1]
    wrong = [f"{where} is {value}" for where, value in read_versions(root).items() if value != version]
    if wrong:
        raise ValueError(f"tag {tag}: {'; '.join(wrong)}; set each to {version}")
    extract_section((root / "CHANGELOG.md").read_text(), version)
    return version


def extract_section(changelog: str, version: str) -> str:
    """Return the text below the heading `## [VERSION]`, up to the next heading of that level.

    Raises ValueError if there is no such heading or nothing below it.
    """
    parts = re.split(r"^## \[([^\]]+)\][^\n]*\n", changelog, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    section = sections.get(version, "").strip()
    if not section:
        raise ValueError(f"CHANGELOG.md has no entries for {version}; add them below a heading `## [{version}] - DATE`")
    return section + "\n"


def set_images(values: str, operator: str, trainer: str) -> str:
    """Return the chart's values with both container images, given as REPOSITORY@sha256:DIGEST, as the defaults.

    Raises ValueError for an image without a digest, and for values that lack one of the lines to replace.
    """
    for image in (operator, trainer):
        if not re.fullmatch(r"[^@\s]+@sha256:[0-9a-f]{64}", image):
            raise ValueError(f"image {image!r}: expected REPOSITORY@sha256:DIGEST")
    repository, digest = operator.split("@")
    lines = {
        "  repository: sailvl-operator\n": f"  repository: {repository}\n",
        '  digest: ""\n': f'  digest: "{digest}"\n',
        '  trainerImage: ""\n': f'  trainerImage: "{trainer}"\n',
    }
    for old, new in lines.items():
        if values.count(old) != 1:
            raise ValueError(f"values.yaml has {values.count(old)} lines {old.strip()!r}, expected 1")
        values = values.replace(old, new)
    return values


def _read_scalar(text: str, key: str) -> str:
    found = re.search(rf"^{key}: *[\"']?([^\"'\s]+)", text, re.M)
    if not found:
        raise ValueError(f"Chart.yaml has no {key}; add it")
    return found[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the commands; print an error and exit with status 1 if it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check").add_argument("tag")
    commands.add_parser("notes").add_argument("version")
    chart = commands.add_parser("chart")
    chart.add_argument("operator")
    chart.add_argument("trainer")
    given = parser.parse_args(arguments)
    try:
        if given.command == "check":
            print(check_versions(ROOT, given.tag))
        elif given.command == "chart":
            path = ROOT / "helm/sailvl-operator/values.yaml"
            path.write_text(set_images(path.read_text(), given.operator, given.trainer))
        else:
            print(extract_section((ROOT / "CHANGELOG.md").read_text(), given.version), end="")
    except ValueError as error:
        sys.exit(f"release: {error}")


if __name__ == "__main__":
    main()
