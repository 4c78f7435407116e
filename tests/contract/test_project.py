"""The files around the code: workflows and templates parse, code owners exist, a release agrees with its files.

No committed file names a directory of one machine, or the host of a package registry.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GITHUB_YAML = sorted((ROOT / ".github").rglob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def load_script(path: str) -> ModuleType:
    """Import a script of `hack/`, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = load_script("hack/release.py")
CHANGELOG = """\
# Changelog

## [Unreleased]

- new

## [0.2.0] - 2026-01-31

### Fixed

- a bug

## [0.1.0]

- first
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose files all state version 0.2.0."""
    (tmp_path / "helm/sailvl-operator").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "sailvl"\nversion = "0.2.0"\n')
    (tmp_path / "helm/sailvl-operator/Chart.yaml").write_text(
        'apiVersion: v2\nversion: 0.2.0\nappVersion: "0.2.0"\nkubeVersion: ">=1.33.0-0"\n'
    )
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


@pytest.mark.parametrize(
    ("version", "section"),
    [("0.2.0", "### Fixed\n\n- a bug\n"), ("0.1.0", "- first\n"), ("Unreleased", "- new\n")],
)
def test_changelog_section_ends_at_the_next_version(version: str, section: str) -> None:
    assert release.extract_section(CHANGELOG, version) == section


@pytest.mark.parametrize("changelog", [CHANGELOG, "# Changelog\n\n## [0.3.0]\n\n"], ids=["missing", "empty"])
def test_version_without_changelog_entries_is_refused(changelog: str) -> None:
    with pytest.raises(ValueError, match=r"no entries for 0\.3\.0"):
        release.extract_section(changelog, "0.3.0")


def test_tag_that_agrees_with_all_files_gives_the_version(project: Path) -> None:
    assert release.check_versions(project, "v0.2.0") == "0.2.0"


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("0.2.0", "expected vMAJOR"),
        ("v0.2", "expected vMAJOR"),
        ("v0.1.0", r"pyproject.toml project.version is 0\.2\.0; Chart.yaml version is 0\.2\.0"),
    ],
)
def test_tag_that_disagrees_is_refused(project: Path, tag: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        release.check_versions(project, tag)


def test_files_of_this_project_state_one_version() -> None:
    assert len(set(release.read_versions(ROOT).values())) == 1


@pytest.mark.parametrize("path", GITHUB_YAML, ids=lambda path: path.name)
def test_github_file_is_valid_yaml(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_jobs_are_complete(path: Path) -> None:
    """Every job has a runner, a time limit and steps, needs jobs that exist, and gets no more rights than it states."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True], "YAML reads the key `on` as true"
    for name, job in workflow["jobs"].items():
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job), name
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"]), name
        assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_runs_targets_and_scripts_that_exist(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"run: make ([a-z-]+)", text)) <= targets
    for script in re.findall(r"python (hack/\S+)", text):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_with_their_version(path: Path) -> None:
    used = re.findall(r"uses: *(.*)", path.read_text())
    assert used
    assert [line for line in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_release_signs_everything_that_it_pushes() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    pushing = {name: job for name, job in jobs.items() if job.get("permissions", {}).get("packages") == "write"}
    assert set(pushing) == {"images", "chart"}
    for name, job in pushing.items():
        assert job["permissions"]["id-token"] == "write", name
        assert any("cosign sign --yes" in step.get("run", "") for step in job["steps"]), name


def list_runs(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_job_that_may_write_or_attest_runs_no_build(path: Path) -> None:
    """A build runs code of other projects, which would have the rights of its job."""
    for name, job in yaml.safe_load(path.read_text())["jobs"].items():
        if "write" in job.get("permissions", {}).values():
            assert not re.search(r"\b(pip|uv|make|setup\.py|build)\b", list_runs(job).replace("buildx", "")), name
            scripts = re.findall(r"\bpython[\d.]* +(\S+)", list_runs(job))
            assert set(scripts) <= {"hack/release.py"}, name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_installs_and_builds_with_pinned_tools_alone(path: Path) -> None:
    lines = re.findall(r"pip (?:install|wheel).*", path.read_text())
    for line in lines:
        wanted = {"--require-hashes"} if "install" in line else {"--no-build-isolation", "--no-index", "--no-deps"}
        assert wanted <= set(line.split()), line


def test_wheel_is_attested_as_it_was_built() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    [attestation] = [job for job in jobs.values() if job.get("permissions", {}).get("attestations") == "write"]
    used = [step["uses"].partition("@")[0] for step in attestation["steps"]]
    assert used == ["actions/download-artifact", "actions/attest-build-provenance"]
    assert attestation["steps"][0]["with"]["name"] == jobs["wheel"]["steps"][-1]["with"]["name"] == "wheel"
    assert "attestation" in jobs["release"]["needs"]


def test_build_requirements_are_locked_with_those_of_the_environment() -> None:
    locked = (ROOT / "hack/build.txt").read_text()
    assert locked in (ROOT / "requirements.txt").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {re.match(r"[\w-]+", name)[0] for name in project["build-system"]["requires"]} == set(  # type: ignore[index]
        re.findall(r"^([\w-]+)==", locked, re.M)
    )
    assert all("--hash=sha256:" in requirement for requirement in re.split(r"^(?=\w)", locked, flags=re.M)[1:])


def test_base_images_are_pinned_by_one_digest() -> None:
    files = [(ROOT / f"images/{name}/Dockerfile").read_text() for name in ("operator", "trainer")]
    bases = {base for text in files for base in re.findall(r"^ARG BASE=(.*)$", text, re.M)}
    assert len(bases) == 1
    assert re.fullmatch(r"\S+:[\w.-]+@sha256:[0-9a-f]{64}", bases.pop())


def test_code_owners_own_paths_that_exist() -> None:
    for line in (ROOT / ".github/CODEOWNERS").read_text().splitlines():
        if line and not line.startswith("#"):
            path, *owners = line.split()
            assert path == "*" or (ROOT / path.lstrip("/")).exists(), path
            assert owners, path
            assert all(owner.startswith("@sail-vl/") for owner in owners), path


@pytest.fixture(scope="module")
def committed_texts() -> dict[str, str]:
    """Return the text of every file that git tracks, by path relative to the root; binary files are left out."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository")
    paths = [path for path in listed.stdout.split("\0") if (ROOT / path).is_file()]
    contents = {path: (ROOT / path).read_bytes() for path in paths}
    return {path: content.decode(errors="replace") for path, content in contents.items() if b"\0" not in content}


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"(?<![\w.$}])/(?:work|home|root)/", id="directory of a machine"),
        pytest.param(r"pypi[.]org|pythonhosted[.]org|npmjs[.]org|(?:proxy|sum)[.]golang[.]org", id="package registry"),
    ],
)
def test_no_file_depends_on_the_machine(committed_texts: dict[str, str], pattern: str) -> None:
    found = [
        f"{path}:{number}: {line.strip()[:120]}"
        for path, text in committed_texts.items()
        if re.search(pattern, text)
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found


OPERATOR_IMAGE = f"ghcr.io/team/sailvl-operator@sha256:{'a' * 64}"
TRAINER_IMAGE = f"ghcr.io/team/sailvl-trainer@sha256:{'b' * 64}"


def test_released_chart_has_the_released_images_as_defaults() -> None:
    text = (ROOT / "helm/sailvl-operator/values.yaml").read_text()
    values = yaml.safe_load(release.set_images(text, OPERATOR_IMAGE, TRAINER_IMAGE))
    expected = yaml.safe_load(text)
    expected["image"] |= {"repository": "ghcr.io/team/sailvl-operator", "digest": f"sha256:{'a' * 64}"}
    expected["runs"]["trainerImage"] = TRAINER_IMAGE
    assert values == expected


@pytest.mark.parametrize("image", ["", "ghcr.io/team/sailvl-operator:0.1.0", "ghcr.io/team/sailvl-operator@sha256:12"])
def test_image_without_a_digest_is_refused_for_the_chart(image: str) -> None:
    text = (ROOT / "helm/sailvl-operator/values.yaml").read_text()
    with pytest.raises(ValueError, match="expected REPOSITORY@sha256:DIGEST"):
        release.set_images(text, image, TRAINER_IMAGE)


def test_release_command_writes_each_image_to_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chart = tmp_path / "helm/sailvl-operator"
    chart.mkdir(parents=True)
    shutil.copy(ROOT / "helm/sailvl-operator/values.yaml", chart)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    release.main(["chart", OPERATOR_IMAGE, TRAINER_IMAGE])
    values = yaml.safe_load((chart / "values.yaml").read_text())
    assert f"{values['image']['repository']}@{values['image']['digest']}" == OPERATOR_IMAGE
    assert values["runs"]["trainerImage"] == TRAINER_IMAGE
    with pytest.raises(SystemExit, match=r"has 0 lines .*, expected 1"):
        release.main(["chart", OPERATOR_IMAGE, TRAINER_IMAGE])


def test_release_workflow_writes_the_images_into_the_chart_before_it_is_packaged() -> None:
    workflow = (ROOT / ".github/workflows/release.yml").read_text()
    written = workflow.index("release.py chart")
    line = workflow[written : workflow.index("\n", written)]
    assert line.index("digest-operator/operator") < line.index("digest-trainer/trainer")
    assert written < workflow.index("helm package")


@pytest.mark.parametrize("image", ["", "ghcr.io/team/sailvl-trainer:0.1.0"])
def test_trainer_image_without_a_digest_is_refused_for_the_chart(image: str) -> None:
    text = (ROOT / "helm/sailvl-operator/values.yaml").read_text()
    with pytest.raises(ValueError, match="expected REPOSITORY@sha256:DIGEST"):
        release.set_images(text, OPERATOR_IMAGE, image)
