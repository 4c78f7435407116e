"""The docs agree with the code: links, make targets, verbs, examples, settings, metrics, causes and reasons."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml
from prometheus_client import CollectorRegistry

from sailvl_operator.api import names
from sailvl_operator.api.allow_lists import AllowLists
from sailvl_operator.api.parse import find_unsupported_fields
from sailvl_operator.api.status import Cause, Reason
from sailvl_operator.api.types import RestartPolicy
from sailvl_operator.api.validation import validate
from sailvl_operator.cli.main import VERBS
from sailvl_operator.core.evidence import CAUSE_BY_EXIT_CODE
from sailvl_operator.core.failure import CAUSE_PRECEDENCE
from sailvl_operator.core.restart_policy import find_budget
from sailvl_operator.metrics import Metrics, OperatorCollector
from sailvl_operator.options import OPTIONS, Option
from sailvl_operator.run_series import RunCollector
from sailvl_operator.settings import OperatorSettings
from sailvl_trainer.contract import ExitCode
from sailvl_trainer.model.presets import PRESETS, get_preset
from sailvl_trainer.rank.metrics import TrainerMetrics

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "tests/README.md",
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

ARTIFACTS = {"held-out/", "export/", "models/", "raw/", "sft/", "benchmarks/", "charts/"}
"""Folders of the storage and the registry, which are not of the repository."""
OPERATIONS, QUICKSTART, RECIPE, MULTI_TENANCY = (
    ROOT / "docs" / name
    for name in ("guide/operations.md", "quickstart.md", "guide/recipe.md", "guide/multi-tenancy.md")
)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`|^    [^\n]*$", re.M | re.S)
BLOCK = re.compile(r"^```ya?ml\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def read_code(page: Path) -> str:
    """Return the code spans and code blocks of a page."""
    return "\n".join(CODE.findall(page.read_text()))


def read_section(page: Path, title: str) -> str:
    """Return the text below a heading, up to the next heading."""
    _, found, rest = page.read_text().partition(f"# {title}\n")
    assert found, f"{page.name} has no section {title}"
    return re.split(r"^#", rest, maxsplit=1, flags=re.M)[0]


def read_table(text: str) -> list[list[str]]:
    """Return the rows of the first table without its header, cells without backticks."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[2:]]


def slugs(page: Path) -> set[str]:
    """Return the anchors that GitHub generates for the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def metric_names(*, operator: bool = True, trainer: bool = True) -> dict[str, str]:
    """Return the type of every metric by its exposed name."""
    found: dict[str, str] = {}
    registry = CollectorRegistry()
    if operator:
        Metrics(registry)
        registry.register(OperatorCollector(queue=lambda: (0, 0.0), watches=lambda: (), is_leading=lambda: True))
        registry.register(RunCollector(lambda: ()))
    if trainer:
        TrainerMetrics(registry)
    for family in registry.collect():
        found[family.name + ("_total" if family.type == "counter" else "")] = family.type
    return found


def codes_in(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"\b\d{2,3}\b", text)}


@each_page
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} does not exist"
        assert not anchor or anchor in slugs(target), f"{link}: no such heading"


@each_page
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", read_code(page))) <= known


def test_every_make_target_is_documented() -> None:
    known = set(re.findall(r"^([a-z][a-z0-9-]*):.*##", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"make ([a-z][a-z0-9-]*)", read_section(ROOT / "docs/development.md", "Targets")))
    assert known - named <= {"help", "data"}


@each_page
def test_verbs_exist(page: Path) -> None:
    assert set(re.findall(r"(?<![\w/.-])sailvl ([a-z][a-z-]*+)(?![\w/])", read_code(page))) <= set(VERBS)


@each_page
def test_metrics_exist(page: Path) -> None:
    named = set(re.findall(r"`(sailvl_[a-z_]+)`", page.read_text())) - {"sailvl_operator", "sailvl_trainer"}
    assert named <= set(metric_names())


def find_runs() -> Iterator[tuple[str, dict[str, object]]]:
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            for document in yaml.safe_load_all(block):
                if isinstance(document, dict) and document.get("kind") == names.KIND:
                    yield page.name, document


def test_example_runs_are_valid() -> None:
    runs = list(find_runs())
    assert runs, "no page shows a run"
    for page, document in runs:
        assert validate(document) == [], page


def shown_default(option: Option) -> str:
    """Return the default as the table shows it; empty if the option is unset."""
    if option.flag == "--identity":
        return "the host's name"
    group, _, name = option.target.rpartition(".")
    settings = OperatorSettings()
    value = getattr(getattr(settings, group) if group else settings, name)
    if value in ("", ()):
        return ""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def test_settings_table_matches_the_code() -> None:
    wanted = [[o.flag, o.variable, o.value, shown_default(o), o.help] for o in OPTIONS]
    assert read_table(read_section(OPERATIONS, "Settings")) == wanted


@pytest.mark.parametrize(
    ("titles", "side"),
    [
        (["Metrics of the operator"], {"trainer": False}),
        (["Metrics of the workers"], {"operator": False}),
    ],
    ids=["operator", "workers"],
)
def test_metrics_tables_match_the_code(titles: list[str], side: dict[str, bool]) -> None:
    text = "".join(read_section(OPERATIONS, title) for title in titles)
    listed = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.M))
    assert listed == metric_names(**side)


def test_causes_are_listed_in_order_of_precedence() -> None:
    rows = read_table(read_section(OPERATIONS, "Causes and budgets"))
    assert [row[0] for row in rows] == [cause.value for cause in CAUSE_PRECEDENCE]


@pytest.mark.parametrize("cause", Cause, ids=str)
def test_budgets_and_exit_codes_match_the_code(cause: Cause) -> None:
    rows = {row[0]: row[1:] for row in read_table(read_section(OPERATIONS, "Causes and budgets"))}
    seen_as, restarts = rows[cause]
    assert codes_in(seen_as) == {code for code, known in CAUSE_BY_EXIT_CODE.items() if known is cause}
    policy = RestartPolicy(max_restarts=111, max_infra_restarts=222)
    texts = {None: "any number", 111: "maxRestarts", 222: "maxInfraRestarts"}
    allowed = find_budget(cause, policy)
    assert restarts.split(",")[0] == texts.get(allowed, str(allowed))


def test_every_exit_code_has_cause_and_advice() -> None:
    rows = read_table(read_section(QUICKSTART, "StageFailed"))
    listed = {code: row[1] for row in rows for code in codes_in(row[0])}
    assert listed == {int(code): cause.value for code, cause in CAUSE_BY_EXIT_CODE.items()}
    assert {int(code) for code in ExitCode} - {0} <= set(listed)


def test_reasons_of_stuck_runs_are_explained() -> None:
    _, _, text = QUICKSTART.read_text().partition("## Troubleshooting by reason\n")
    explained = set(re.findall(r"^### (\w+)$", text, re.M))
    assert explained <= {reason.value for reason in Reason}
    assert explained >= {
        Reason.UNSCHEDULABLE,
        Reason.VOLUME_NOT_READY,
        Reason.IMAGE_PULL_FAILED,
        Reason.CONTAINER_CONFIG_ERROR,
    }


def test_presets_table_matches_the_code() -> None:
    rows = {row[0]: row for row in read_table(read_section(RECIPE, "The model"))}
    assert set(rows) == set(PRESETS)
    for name, row in rows.items():
        assert row[3:] == [f"{get_preset(name).image_size} px", str(get_preset(name).tokens_per_tile)], name


def test_limits_list_every_unsupported_field() -> None:
    """Every unsupported field is listed in the table of the README."""
    text = read_section(ROOT / "README.md", "Status and limits")
    source = Path(find_unsupported_fields.__code__.co_filename).read_text()
    for field in re.findall(
        r"[.{]?\b(activeDeadlineSeconds|ttlSecondsAfterFinished|gate|schedule|zeroStage)\b", source
    ):
        assert field in text
    for value in ("fsdp2", "adalrs", "caption", "judge", "balance", "parquet", "jsonl"):
        assert value in text


def test_allow_lists_table_matches_the_chart() -> None:
    schema = json.loads((ROOT / "helm/sailvl-operator/values.schema.json").read_text())
    rows = read_table(read_section(MULTI_TENANCY, "Allow-lists"))
    assert [row[0] for row in rows] == list(schema["properties"]["allowed"]["properties"])


def test_values_in_the_guide_are_accepted_by_the_chart() -> None:
    schema = json.loads((ROOT / "helm/sailvl-operator/values.schema.json").read_text())
    text = MULTI_TENANCY.read_text()
    blocks = BLOCK.findall(text) + re.findall(r"(?:^    .*\n)+", BLOCK.sub("", text), re.M)
    values = [v for block in blocks for v in yaml.safe_load_all(block) if isinstance(v, dict) and "kind" not in v]
    assert {name for value in values for name in value} == {"watchNamespaces", "allowed", "networkPolicy"}
    for value in values:
        jsonschema.validate(value, schema)


def test_example_of_teams_is_within_its_allow_lists() -> None:
    folder = ROOT / "examples/06-team-namespaces"
    given = yaml.safe_load((folder / "values.yaml").read_text())["allowed"]
    options = {option.value.partition(".")[2]: option.target.partition(".")[2] for option in OPTIONS}
    allowed = AllowLists(**{options[name]: tuple(entries) for name, entries in given.items()})
    assert validate(yaml.safe_load((folder / "run.yaml").read_text()), allowed) == []
    assert validate(yaml.safe_load((folder / "run.yaml").read_text()), AllowLists(toleration_keys=("other",))) != []


RECORDS = sorted((ROOT / "docs/adr").glob("0*.md"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_decision_record_is_complete(record: Path) -> None:
    text = record.read_text()
    number = int(record.stem[:4])
    assert re.match(rf"# {number}\. \w", text)
    assert re.search(r"^Status: (accepted|replaced).* · Date: \d{4}-\d\d-\d\d$", text, re.M)
    assert re.findall(r"^## (.+)$", text, re.M) == ["Context", "Decision", "Alternatives", "Consequences"]
    assert f"]({record.name})" in (ROOT / "docs/adr/README.md").read_text()


ROOTS = (ROOT, ROOT / "operator/sailvl_operator", ROOT / "trainer/sailvl_trainer", ROOT / "trainer/sailvl_trainer/data")


@each_page
def test_named_modules_exist(page: Path) -> None:
    """Every `core/observe.py`, `core/` or `tests/unit/operator/core` in backticks is a file or a folder."""
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.py|(?:[\w-]+/)+)`", page.read_text()):
        assert any((root / name).exists() for root in (*ROOTS, page.parent)) or name in ARTIFACTS, name
    for name in re.findall(r"pytest(?: -q)?((?: tests/[\w/.]+)+)", page.read_text()):
        assert all((ROOT / path).exists() for path in name.split()), name


@pytest.mark.parametrize("drawing", ["operator", "trainer"])
def test_modules_in_drawings_exist(drawing: str) -> None:
    """Every text in monospace is a module or a package, in full or below the folder of its neighbour."""
    svg = (ROOT / f"docs/pictures/{drawing}.svg").read_text()
    texts = re.findall(r'class="mono[^"]*"[^>]*>([^<]+)<', svg)
    assert texts
    folders = [*ROOTS, ROOT / "operator/sailvl_operator/cluster", ROOT / "trainer/sailvl_trainer/train"]
    for name in ", ".join(texts).split(", "):
        assert any((folder / name).is_dir() or (folder / f"{name}.py").is_file() for folder in folders), name


@each_page
def test_pages_have_no_path_of_a_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(work|home|root)/", page.read_text())


def test_alerts_table_matches_the_chart() -> None:
    groups = yaml.safe_load(re.sub(r"<\w+>,?", "", (ROOT / "helm/sailvl-operator/alerts/sailvl.yaml").read_text()))
    alerts = [[rule["alert"], rule["labels"]["severity"]] for group in groups["groups"] for rule in group["rules"]]
    assert [row[:2] for row in read_table(read_section(OPERATIONS, "Alerts and dashboard"))] == alerts
