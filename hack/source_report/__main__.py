"""Print the sizes and the language of a checkout as one table and one JSON line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from hack.source_report.draw import draw_functions
from hack.source_report.glossary import Glossary, read_glossary
from hack.source_report.language import Kind, Occurrence, find_refused
from hack.source_report.reading_path import FIRST_CALLS, measure_path, trace
from hack.source_report.sizes import find_duplicate_classes, find_sources, find_test_helpers, measure

HERE = Path(__file__).parent
PACKAGES = {"operator": "operator/sailvl_operator", "trainer": "trainer/sailvl_trainer"}
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of places in which a word is refused."""
Report = dict[str, dict[str, float]]
"""Values by measure, then by column."""


def main() -> None:
    """Measure the checkout that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m hack.source_report", description=__doc__)
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="checkout to measure (default: this one)")
    parser.add_argument("--glossary", type=Path, default=HERE.parents[1] / "docs/glossary.md")
    parser.add_argument(
        "--scenario", type=Path, default=HERE / "scenario.py", help="file with build_scenario() for that checkout"
    )
    parser.add_argument("--words", action="store_true", help="list the uses of each refused word")
    parser.add_argument("--list", action="store_true", help="list every use of a refused word with its place")
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="print N functions without their bodies")
    parser.add_argument("--seed", type=int, default=1, help="seed of --draw")
    options = parser.parse_args()
    root: Path = options.root.resolve()
    sources = {name: read_sources(root, root / folder) for name, folder in PACKAGES.items()}
    if options.draw:
        files = {path: text for package in sources.values() for path, text in package.items()}
        print(f"seed {options.seed}", *draw_functions(files, options.draw, options.seed), sep="\n\n")
        return
    occurrences = find_all_refused(sources, read_glossary(options.glossary))
    report = measure_sources(root, sources) | measure_language(occurrences) | measure_reconcile(root, options.scenario)
    if options.list:
        for package in occurrences.values():
            print(*package, sep="\n")
    if options.words:
        print_words(occurrences.values(), read_glossary(options.glossary))
    print_table(report)
    print(json.dumps(report))


def read_sources(root: Path, folder: Path) -> dict[Path, str]:
    """Return the text of every Python file below a folder, by its path relative to the root."""
    return {path.relative_to(root): path.read_text(encoding="utf-8") for path in find_sources(folder)}


def find_all_refused(sources: dict[str, dict[Path, str]], glossary: Glossary) -> dict[str, list[Occurrence]]:
    """Return the uses of refused words by package."""
    return {
        name: [o for path, text in files.items() for o in find_refused(path, text, glossary.refused)]
        for name, files in sources.items()
    }


def measure_sources(root: Path, sources: dict[str, dict[Path, str]]) -> Report:
    """Measure sizes of both packages and of the tests, classes of one name, and top-level test helpers."""
    both = {path: text for files in sources.values() for path, text in files.items()}
    tests = read_sources(root, root / "tests")
    columns = {name: asdict(measure(files)) for name, files in {**sources, "both": both, "tests": tests}.items()}
    report = {key: {name: sizes[key] for name, sizes in columns.items()} for key in columns["both"]}
    report["duplicate_classes"] = {
        "both": len(find_duplicate_classes(both)),
        "tests": len(find_duplicate_classes(tests)),
    }
    report["top_level_test_helpers"] = {"tests": len(find_test_helpers((root / "tests").iterdir()))}
    return report


def measure_language(occurrences: dict[str, list[Occurrence]]) -> Report:
    """Count refused words by kind and package."""
    report: Report = {}
    for kind in KINDS:
        counts = {name: sum(o.kind == kind for o in found) for name, found in occurrences.items()}
        report[f"refused_in_{kind}s"] = {**counts, "both": sum(counts.values())}
    return report


def measure_reconcile(root: Path, scenario: Path) -> Report:
    """Trace the scenario with the code of the measured checkout."""
    sys.path[:0] = [str(root / folder) for folder in ("", "tests", "operator", "trainer")]
    spec = importlib.util.spec_from_file_location("traced_scenario", scenario)
    if spec is None or spec.loader is None:
        raise ValueError(f"{scenario} is no Python file; pass a file with build_scenario()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = trace(module.build_scenario())
    parts = {f"first {FIRST_CALLS} calls": calls[:FIRST_CALLS], "whole": calls}
    paths = {name: asdict(measure_path(part)) for name, part in parts.items()}
    return {f"reconcile_{key}": {name: path[key] for name, path in paths.items()} for key in paths["whole"]}


def print_words(occurrences: Iterable[list[Occurrence]], glossary: Glossary) -> None:
    """Print how often each refused word is used, in the order of the glossary."""
    counts = Counter((o.refused.word, o.refused.scope, o.kind) for found in occurrences for o in found)
    for word in glossary.refused:
        uses = {kind: counts[word.word, word.scope, kind] for kind in KINDS}
        print(f"{word.word:<16} {word.scope:<22} " + "  ".join(f"{k} {n}" for k, n in uses.items() if n))


def print_table(report: Report) -> None:
    """Print one line for each measure, with its values by column."""
    for measure_name, values in report.items():
        print(f"{measure_name:<24}" + "  ".join(f"{name} {value:g}" for name, value in values.items()))


if __name__ == "__main__":
    main()
