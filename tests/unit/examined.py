"""How findings are written out and compared."""

from deepseek_fp4_plugin.checkpoint.findings import Finding


def said(findings: list[Finding]) -> list[str]:
    lines = [f"{finding.severity}: {finding}" for finding in findings]
    assert not any("\n" in line or len(line) > 700 for line in lines)
    return lines
