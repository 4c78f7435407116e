"""Runs an experiment and writes its report, which the tests check and the fault table is built from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.faults.environment.installation import Installation
from tests.faults.environment.registry import copy_image
from tests.faults.environment.volumes import FOLDER, DiskVolume, FolderVolume, build_volume_objects, get_claim_name
from tests.faults.runs.audit import StageAudit, audit_stage
from tests.faults.runs.effects import FaultEffect
from tests.faults.runs.experiment import Experiment, Fault, applied_run, inject_all
from tests.faults.runs.recorder import Observations, ProgressPoint, RunRecorder
from tests.faults.runs.spec import EPOCHS, KINDS, build_run
from tests.support.live.run_plot import parse_seconds

Plan = list[tuple[str, Fault]]
"""Stages and the faults to inject into them, in order."""


@dataclass(kw_only=True, slots=True)
class ExperimentReport:
    """The results of one run."""

    name: str
    title: str
    effects: list[FaultEffect] = field(default_factory=list)
    audits: dict[str, StageAudit] = field(default_factory=dict)
    """Audits of the succeeded stages, by name."""
    goodput_seconds: dict[str, int] = field(default_factory=dict)
    """The operator's goodput ledger, by bucket."""
    wall_clock_seconds: float = 0.0
    """Time from the run's start to its end, without the time in which it had failed and waited for a user."""
    lost_steps: int = 0
    """Lost steps in the run's status."""
    status: dict[str, Any] = field(default_factory=dict)
    points: list[ProgressPoint] = field(default_factory=list)

    def write(self) -> None:
        """Write the report to build/faults, also for a run that failed."""
        (FOLDER / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1))


def run_experiment(installation: Installation, name: str, title: str, plan: Plan) -> ExperimentReport:
    """Run a recipe to its end, inject each fault of a plan once, and return the report."""
    faults = [fault for _, fault in plan]
    report = ExperimentReport(name=name, title=title)
    with open_experiment(
        installation,
        report,
        policy={key: value for fault in faults for key, value in fault.policy.items()},
        needs_disk=any(fault.needs_disk for fault in faults),
        needs_image_copy=any(fault.needs_image_copy for fault in faults),
    ) as experiment:
        inject_all(experiment, plan, report.effects)
    return report


@contextmanager
def open_experiment(
    installation: Installation,
    report: ExperimentReport,
    *,
    policy: dict[str, int],
    needs_disk: bool = False,
    needs_image_copy: bool = False,
) -> Iterator[Experiment]:
    """Apply a run and yield it; at the end collect its results, write the report and delete the run."""
    volume = (DiskVolume if needs_disk else FolderVolume)(report.name)
    recorder = RunRecorder(installation.api, report.name)
    experiment = Experiment(
        api=installation.api,
        kubectl=installation.kubectl,
        recorder=recorder,
        volume=volume,
        run=report.name,
        namespace=installation.namespace,
        system_namespace=installation.system_namespace,
        image=installation.trainer_image,
        image_copy=copy_image(installation.trainer_image) if needs_image_copy else None,
    )
    image = "" if experiment.image_copy is None else experiment.image_copy.image.name
    document = build_run(report.name, installation.namespace, claim=get_claim_name(volume), policy=policy, image=image)
    volume.create()
    try:
        with applied_run(experiment, document, build_volume_objects(volume, installation.namespace)):
            try:
                yield experiment
            finally:
                collect_results(report, recorder, volume.folder)
                report.write()
    finally:
        volume.remove()


def collect_results(report: ExperimentReport, recorder: RunRecorder, storage: Path) -> None:
    """Fill in a report from the observations and from the stages' files."""
    report.status, report.points = recorder.status, recorder.observations.points
    for stage in recorder.status.get("stages", []):
        if stage["state"] == "Succeeded":
            report.audits[stage["name"]] = audit_stage(storage, stage, KINDS[stage["name"]], EPOCHS)
    for effect in report.effects:
        audit = report.audits.get(effect.stage, StageAudit(duplicates=0, missing=0))
        effect.duplicates, effect.missing = audit.duplicates, audit.missing
    goodput = recorder.status.get("goodput", {})
    report.goodput_seconds, report.lost_steps = goodput.get("seconds", {}), goodput.get("lostSteps", 0)
    report.wall_clock_seconds = measure_active_seconds(recorder.observations)


def measure_active_seconds(record: Observations) -> float:
    """Return the time in which the run was active, by the times in its statuses."""
    statuses = [status for _, status in record.statuses]
    if not statuses or not statuses[-1].get("completionTime"):
        return 0.0
    total = parse_seconds(statuses[-1]["completionTime"]) - parse_seconds(statuses[0]["startTime"])
    idle = sum(
        at - parse_seconds(before["completionTime"])
        for (_, before), (at, after) in pairwise(record.statuses)
        if before.get("completionTime") and not after.get("completionTime")
    )
    return total - idle
