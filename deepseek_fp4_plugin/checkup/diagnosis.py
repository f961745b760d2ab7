"""The whole list of findings on a checkpoint: headers, values, the small files, and against the source."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.checkpoint.findings import Fault, Finding, Severity
from deepseek_fp4_plugin.checkpoint.json_files import read_json
from deepseek_fp4_plugin.checkpoint.reader import CheckpointReader
from deepseek_fp4_plugin.checkpoint.shards import Shards, anywhere
from deepseek_fp4_plugin.checkup.consequences import CONSEQUENCES, RUNTIMES, mending
from deepseek_fp4_plugin.checkup.text_files import examine_text_files
from deepseek_fp4_plugin.checkup.values import Values, examine_values
from deepseek_fp4_plugin.models.declarations import declared_findings
from deepseek_fp4_plugin.models.examination import Examination, examine


@dataclass(frozen=True)
class Diagnosis:
    """examination: of the headers.  values: None where nothing could be read.  findings: all, errors first."""

    examination: Examination
    values: Values | None
    findings: tuple[Finding, ...]
    source: CheckpointReader | None

    @property
    def folder(self) -> Path:
        return self.examination.folder

    @property
    def spent(self) -> int:
        """Bytes of values that were read, beside the headers."""
        return self.values.spent if self.values else 0

    def modules(self, fault: Fault) -> set[str]:
        """Those that have it, as far as values told."""
        return set(self.values.modules.get(fault, ())) if self.values else set()

    def to_json(self) -> dict[str, Any]:
        total = sum(info.nbytes for info in self.examination.shards.tensors.values())
        return {
            "folder": str(self.folder),
            "source": str(self.source.folder) if self.source else None,
            "healthy": not self.findings,
            "bytes": total,
            "bytes_read": self.spent,
            "compared_with_source": self.values.judged if self.values else 0,
            "findings": [finding_json(finding) for finding in self.findings],
        }


def finding_json(finding: Finding) -> dict[str, Any]:
    content: dict[str, Any] = {
        "severity": str(finding.severity),
        "fault": str(finding.fault) if finding.fault else None,
        "subject": finding.subject,
        "finding": str(finding),
        "count": finding.count,
    }
    if finding.fault:
        consequence = CONSEQUENCES[finding.fault]
        content["runtimes"] = {name: getattr(consequence, field) for field, name in RUNTIMES.items()}
        content["repair"] = str(mending(finding.fault))
    return content


def diagnose(folder: Path, source: Path | None = None, everything: bool = False) -> Diagnosis:
    """Look at a checkpoint; nothing is raised for what is wrong with it.

    source: the FP8 or BF16 checkpoint that it was made from; CheckpointError where that one cannot be used.
    everything: read every value, not a hundredth of them.
    """
    original = None if source is None else examine(source).usable()[1]
    examination = examine(folder)
    findings = [finding for finding in examination.findings if not _published(finding)]
    values = None
    if folder.is_dir() and examination.config is not None:
        findings += declared_findings(folder, examination.shards.tensors, examination.config, examination.quantization)
        findings += examine_text_files(folder, read_json(folder / "config.json"))
        reader = CheckpointReader(folder, Shards(examination.shards.names, examination.shards.tensors, []))
        values = examine_values(reader, examination.config, original, everything)
        reader.close()
        findings += values.findings()
    findings.sort(key=lambda finding: list(Severity).index(finding.severity))
    return Diagnosis(examination, values, tuple(findings), original)


def _published(finding: Finding) -> bool:
    """What is no fault: published NVFP4 checkpoints have indexes without the scales, and buffers that nobody reads."""
    return finding.severity is Severity.NOTE and finding.fault is None


def every_tensor(examination: Examination) -> CheckpointReader:
    """A reader of all that lies in the folder: what the index says, and what it forgot."""
    found, chosen = anywhere(examination.folder), examination.shards.tensors
    names = sorted({info.shard for info in found.values()} | set(examination.shards.names))
    return CheckpointReader(examination.folder, Shards(names, {**found, **chosen}, []))
