"""The sources keep to the glossary and to the limits of size; each rule is tested on snippets that break it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hack.source_report.draw import draw_functions
from hack.source_report.glossary import Glossary, RefusedWord, Scope, parse_glossary, read_glossary
from hack.source_report.language import Occurrence, find_refused
from hack.source_report.sizes import collect_functions, find_duplicate_classes, find_sources, find_test_helpers, measure

ROOT = Path(__file__).parents[2]
PACKAGES = [ROOT / "operator/sailvl_operator", ROOT / "trainer/sailvl_trainer"]

ALLOWED = {
    "refused words in names": 0,
    "refused words in docstrings": 0,
    "refused openings of docstrings": 0,
    "refused words in comments": 0,
    "refused words in strings": 0,
    "classes of one name": 0,
    "top-level test helpers": 0,
    "refused words in names of tests": 0,
    "refused words in docstrings of tests": 0,
    "refused words in comments of tests": 0,
    "classes of one name in tests": 0,
}
"""Violations of each rule that are left; a change may only lower a number.

`Engine` and `Stage` are types of the API and also of the trainer.
"""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MEDIAN_FILE_LINES = (120, 260)
MAX_SHORT_FILES = 4
"""Files of less than 40 lines in each package."""


@pytest.fixture(scope="module")
def sources() -> dict[Path, str]:
    """Return the text of both packages' modules by path relative to the root."""
    paths = [path for package in PACKAGES for path in find_sources(package)]
    return {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}


@pytest.fixture(scope="module")
def glossary() -> Glossary:
    """Return the project's glossary."""
    return read_glossary(ROOT / "docs/glossary.md")


@pytest.fixture(scope="module")
def tests_by_path() -> dict[Path, str]:
    """Return the text of all tests, their helpers and the benchmarks by path relative to the root."""
    paths = [path for folder in ("tests", "bench") for path in find_sources(ROOT / folder)]
    return {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}


@pytest.fixture(scope="module")
def occurrences_in_tests(tests_by_path: dict[Path, str], glossary: Glossary) -> list[Occurrence]:
    """Return every use of a refused word in tests; `_a_` is allowed there, as the article in a sentence."""
    refused = [word for word in glossary.refused if word.word != "_a_"]
    return [o for path, text in tests_by_path.items() for o in find_refused(path, text, refused)]


@pytest.fixture(scope="module")
def occurrences(sources: dict[Path, str], glossary: Glossary) -> list[Occurrence]:
    """Return every use of a refused word in both packages."""
    return [o for path, text in sources.items() for o in find_refused(path, text, glossary.refused)]


def require_at_most(rule: str, violations: Sequence[object]) -> None:
    """Fail with all violations of a rule if there are more than it allows."""
    if len(violations) > ALLOWED[rule]:
        lines = "\n".join(map(str, violations))
        pytest.fail(f"{rule}: found {len(violations)}, allowed {ALLOWED[rule]}\n{lines}", pytrace=False)


def test_glossary_is_well_formed(glossary: Glossary) -> None:
    assert not glossary.problems
    assert len(glossary.terms) >= 40
    assert glossary.refused


def test_names_use_no_refused_word(occurrences: list[Occurrence]) -> None:
    require_at_most("refused words in names", [o for o in occurrences if o.kind == "name"])


def test_docstrings_use_no_refused_word(occurrences: list[Occurrence]) -> None:
    require_at_most("refused words in docstrings", [o for o in occurrences if o.kind == "docstring"])


def test_docstrings_begin_with_a_sentence(occurrences: list[Occurrence]) -> None:
    require_at_most("refused openings of docstrings", [o for o in occurrences if o.kind == "opening"])


def test_comments_use_no_refused_word(occurrences: list[Occurrence]) -> None:
    require_at_most("refused words in comments", [o for o in occurrences if o.kind == "comment"])


def test_strings_use_no_refused_word(occurrences: list[Occurrence]) -> None:
    require_at_most("refused words in strings", [o for o in occurrences if o.kind == "string"])


def test_names_of_tests_use_no_refused_word(occurrences_in_tests: list[Occurrence]) -> None:
    require_at_most("refused words in names of tests", [o for o in occurrences_in_tests if o.kind == "name"])


def test_docstrings_of_tests_use_no_refused_word(occurrences_in_tests: list[Occurrence]) -> None:
    violations = [o for o in occurrences_in_tests if o.kind in ("docstring", "opening")]
    require_at_most("refused words in docstrings of tests", violations)


def test_comments_of_tests_use_no_refused_word(occurrences_in_tests: list[Occurrence]) -> None:
    require_at_most("refused words in comments of tests", [o for o in occurrences_in_tests if o.kind == "comment"])


def test_class_names_are_unique(sources: dict[Path, str]) -> None:
    duplicates = find_duplicate_classes(sources)
    lines = [f"class {name} is defined in {', '.join(places)}" for name, places in duplicates.items()]
    require_at_most("classes of one name", lines)


def test_class_names_of_tests_are_unique(tests_by_path: dict[Path, str]) -> None:
    duplicates = find_duplicate_classes(tests_by_path)
    lines = [f"class {name} is defined in {', '.join(places)}" for name, places in duplicates.items()]
    require_at_most("classes of one name in tests", lines)


def test_helpers_are_in_packages_of_tests() -> None:
    helpers = find_test_helpers(sorted((ROOT / "tests").iterdir()))
    lines = [f"{path.relative_to(ROOT)}: move it into a package below tests/" for path in helpers]
    require_at_most("top-level test helpers", lines)


def test_files_are_short(sources: dict[Path, str]) -> None:
    lengths = {path: len(text.splitlines()) for path, text in sources.items()}
    assert not [f"{path}: {n} lines, allowed {MAX_FILE_LINES}" for path, n in lengths.items() if n > MAX_FILE_LINES]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_files_are_neither_paragraphs_nor_warehouses(package: Path) -> None:
    sizes = measure({path: path.read_text(encoding="utf-8") for path in find_sources(package)})
    least, most = MEDIAN_FILE_LINES
    assert least <= sizes.median_file <= most, "join files that are read together, or split those with two jobs"
    assert sizes.short_files <= MAX_SHORT_FILES, "join short files with those that are read with them"


def test_functions_are_short(sources: dict[Path, str]) -> None:
    functions = [f for path, text in sources.items() for f in collect_functions(path, text)]
    assert not [
        f"{f.path}:{f.line}: {f.name} has {f.lines} lines, allowed {MAX_FUNCTION_LINES}"
        for f in functions
        if f.lines > MAX_FUNCTION_LINES
    ]


def find_uses(source: str, word: str, scope: Scope, *, path: str = "module.py") -> list[Occurrence]:
    """Return the uses of one refused word in a snippet."""
    return find_refused(Path(path), source, [RefusedWord(word=word, scope=scope, instead="batch")])


BOTH: Scope = "names and docstrings"


@pytest.mark.parametrize(
    ("word", "scope", "source"),
    [
        pytest.param("gulp", BOTH, "def read_gulps(): ...", id="function, in the plural"),
        pytest.param("gulp", BOTH, "class GulpReader: ...", id="class, in camel case"),
        pytest.param("gulp", BOTH, "def read(gulp): ...", id="parameter"),
        pytest.param("gulp", BOTH, "def read(*, gulp=1): ...", id="keyword-only parameter"),
        pytest.param("gulp", BOTH, "self.last_gulp = 1", id="attribute"),
        pytest.param("gulp", BOTH, "class A:\n    gulp: int = 1", id="field"),
        pytest.param("gulp", BOTH, "for gulp in (): ...", id="variable"),
        pytest.param("gulp", BOTH, "import gulps as gulp_module", id="alias"),
        pytest.param("rush", BOTH, "is_rushed = True", id="past tense"),
        pytest.param("put off", BOTH, "def put_off(): ...", id="two words in a name"),
        pytest.param("_a_", "names", "seconds_a_step = 1", id="inside a name"),
        pytest.param("of", "whole names", "def _of(): ...", id="whole name with an underscore"),
        pytest.param("look", "function names", "def _look(): ...", id="whole name of a function"),
        pytest.param("gulp", BOTH, '"""Reads gulps."""', id="docstring of a module"),
        pytest.param("gulp", BOTH, 'def f():\n    """Gulp."""', id="docstring of a function"),
        pytest.param("gulp", BOTH, 'class A:\n    x: int\n    """In gulps."""', id="docstring of a field"),
        pytest.param("put off", "docstrings", '"""Is put\noff."""', id="two words on two lines"),
        pytest.param("Of", "docstring openings", '"""Of the Lease."""', id="opening"),
        pytest.param("gulp", BOTH, "x = 1  # read in gulps", id="comment"),
        pytest.param("put off", "docstrings", "# Writes are put\n# off.", id="comment on two lines"),
        pytest.param("gulp", "strings", "raise ValueError('no gulp was read')", id="message"),
        pytest.param("gulp", "strings", "f'{count} gulps of {size}'", id="formatted message"),
    ],
)
def test_refused_word_is_found(word: str, scope: Scope, source: str) -> None:
    assert len(find_uses(source, word, scope)) == 1


@pytest.mark.parametrize(
    ("word", "scope", "source"),
    [
        pytest.param("gulp", BOTH, "read(gulp=1)", id="argument that another module names"),
        pytest.param("gulp", BOTH, "text = 'gulp'", id="string"),
        pytest.param("memo", BOTH, "memory = 1", id="part of a longer word"),
        pytest.param("gulp", BOTH, '"""Writes `gulp/` and `gulps`."""', id="code in a docstring"),
        pytest.param("words", "names", '"""Words."""', id="docstring where names alone are refused"),
        pytest.param("tell", "docstrings", "def tell(): ...", id="name where docstrings alone are refused"),
        pytest.param("_a_", "names", "a = a_b = b_a = 1", id="not inside the name"),
        pytest.param("look", "function names", "look = 1", id="variable where functions are refused"),
        pytest.param("look", "function names", "def look_up(): ...", id="function with a longer name"),
        pytest.param("learning", "whole names", "learning_rate = 1", id="longer name where whole names are refused"),
        pytest.param("Of", "docstring openings", '"""Offset of a sample."""', id="longer word as the opening"),
        pytest.param("Of", "docstring openings", '"""Part. Of all."""', id="second sentence"),
        pytest.param("Of", "docstring openings", "# Of the Lease.", id="opening of a comment"),
        pytest.param("put off", "docstrings", "# put\nx = 1\n# off", id="two comments"),
        pytest.param("gulp", "strings", '"""Gulp."""\ngulp = 1  # gulp', id="all but strings"),
    ],
)
def test_similar_text_is_not_refused(word: str, scope: Scope, source: str) -> None:
    assert not find_uses(source, word, scope)


def test_module_name_is_searched() -> None:
    assert find_uses("", "gulp", BOTH, path="cluster/gulps.py")


def test_message_says_where_the_word_is_and_what_to_use() -> None:
    name, docstring = find_uses('x = 1\ngulps = 2\n"""One\nin gulps, always."""', "gulp", BOTH)
    assert str(name) == "module.py:2: name `gulps` uses refused word `gulp`; the glossary says `batch`"
    assert str(docstring) == (
        'module.py:4: docstring "One in gulps, always." uses refused word `gulp`; the glossary says `batch`'
    )


TERMS = "| Term | Means | Not |\n|---|---|---|\n"
REFUSED = "| Refused | Where | Instead |\n|---|---|---|\n"


def test_glossary_reads_bold_and_backticked_entries() -> None:
    glossary = parse_glossary(
        f"{TERMS}| batch | a group | chunk, **gulp** |\n\n{REFUSED}| `tell` | docstrings | say |\n"
    )
    assert glossary == Glossary(
        terms=("batch",),
        refused=(
            RefusedWord(word="gulp", scope=BOTH, instead="batch"),
            RefusedWord(word="tell", scope="docstrings", instead="say"),
        ),
        problems=(),
    )


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"{TERMS}| batch | a group |\n", id="missing cell"),
        pytest.param(f"{TERMS}| batch | | |\n", id="term without a meaning"),
        pytest.param("| Word | Use |\n|---|---|\n| a | b |\n", id="unknown table"),
        pytest.param(f"{REFUSED}| `gulp` | comments | batch |\n", id="unknown scope"),
        pytest.param(f"{REFUSED}| gulp | names | batch |\n", id="word without backticks"),
        pytest.param(f"{REFUSED}| `gulp` | names | |\n", id="nothing to use instead"),
        pytest.param(f"{TERMS}| batch | a group | |\n| batch | a set | |\n", id="term listed twice"),
        pytest.param(f"{TERMS}| batch | a group | **gulp** |\n| set | a set | **gulp** |\n", id="word refused twice"),
        pytest.param(f"{TERMS}| batch | a group | **set** |\n| set | a set | |\n", id="term that is refused"),
    ],
)
def test_malformed_glossary_is_reported(text: str) -> None:
    assert len(parse_glossary(text).problems) == 1


def test_class_defined_in_two_files_is_found() -> None:
    files = {Path("a.py"): "class A: ...\nclass B: ...", Path("b.py"): "x = 1\nclass A: ..."}
    assert find_duplicate_classes(files) == {"A": ["a.py:1", "b.py:2"]}


def test_helper_next_to_the_folders_of_tests_is_found() -> None:
    files = [Path("tests") / name for name in ("builders.py", "conftest.py", "__init__.py", "README.md", "unit")]
    assert find_test_helpers(files) == [Path("tests/builders.py")]


def test_functions_are_measured_without_decorators() -> None:
    (function,) = collect_functions(Path("a.py"), "@cache\ndef f():\n    x = 1\n    return x\n")
    assert (function.line, function.lines) == (2, 3)


def test_files_are_measured_without_package_markers() -> None:
    files = {Path("a/__init__.py"): "x = 1", Path("a/b.py"): "def f(): ...\n\ndef g():\n    return 1\n"}
    sizes = measure(files)
    assert (sizes.files, sizes.lines, sizes.functions, sizes.longest_function) == (1, 4, 2, 2)


def test_drawn_functions_show_signature_and_docstring_without_body() -> None:
    source = '''def count_steps(epochs: int) -> int:
    """Return the steps of some epochs."""
    total = 0
    for _ in range(epochs):
        total += 1
    return total

def is_short() -> bool:
    """Left out, since its body says as much."""
    return True
'''
    sources = {Path("a.py"): source}
    drawn = ["a.py:1\n    def count_steps(epochs: int) -> int\n        Return the steps of some epochs."]
    assert draw_functions(sources, 5, seed=1) == drawn
