"""`python -m tools.hosts [version ...]`: the suite on every ComfyUI of host.VERSIONS, as a Markdown table."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from . import host


def row(version: str) -> str:
    """Run the suite on one ComfyUI; its line of the table."""
    found = host.bring(version, needs=host.TEST_MODULES)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [found.python, "-m", "pytest", "-q", f"--junit-xml={report}"]
        subprocess.run(words, cwd=host.ROOT, env=host.environment(found), stdout=sys.stderr)
        if not report.is_file():
            return f"| {version} | the suite did not start | | | |"
        return f"| {version} | {counts(report)} |"


def counts(report: Path) -> str:
    """Passed, failed, skipped and seconds of a JUnit report, as cells."""
    total = xml.parse(report).getroot().find("testsuite")
    assert total is not None
    tests, failed, errors, skipped = (int(total.attrib[key]) for key in ("tests", "failures", "errors", "skipped"))
    passed = tests - failed - errors - skipped
    return f"{passed} | {failed + errors} | {skipped} | {float(total.attrib['time']):.0f}"


def work(arguments: list[str]) -> int:
    if os.environ.get("COMFYUI_PATH"):
        raise host.HostError("COMFYUI_PATH is set, so only one ComfyUI would be tried; unset it")
    lines = ["| ComfyUI | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    for version in arguments or host.VERSIONS:
        lines.append(row(version))
        host.say(lines[-1])
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(host.main(work))
