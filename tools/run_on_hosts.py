"""`python -m tools.run_on_hosts [version ...]`: tests on all supported ComfyUI versions, as a Markdown table."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from . import host, real_photos


def run_suite(version: str) -> str:
    """Run all tests on one ComfyUI; the row of the table."""
    comfyui = host.prepare_host(version, required_modules=host.TEST_MODULES)
    real_photos.prepare_photos(comfyui.python)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [comfyui.python, "-m", "pytest", "-q", f"--junit-xml={report}"]
        subprocess.run(command, cwd=host.ROOT, env=host.build_environment(comfyui), stdout=sys.stderr)
        if not report.is_file():
            return f"| {version} | pytest did not start | | | |"
        return f"| {version} | {format_counts(report)} |"


def format_counts(report: Path) -> str:
    """Passed, failed, skipped and seconds of a JUnit report, as cells of the table."""
    total = xml.parse(report).getroot().find("testsuite")
    assert total is not None
    tests, failed, errors, skipped = (int(total.attrib[key]) for key in ("tests", "failures", "errors", "skipped"))
    passed = tests - failed - errors - skipped
    return f"{passed} | {failed + errors} | {skipped} | {float(total.attrib['time']):.0f}"


def main(arguments: list[str]) -> int:
    if os.environ.get("COMFYUI_PATH"):
        raise host.HostError("COMFYUI_PATH is set, so only that ComfyUI would be tested; unset it")
    lines = ["| ComfyUI | passed | failed | skipped | seconds |", "|---|---|---|---|---|"]
    for version in arguments or host.COMFYUI_ARCHIVES:
        lines.append(run_suite(version))
        host.print_status(lines[-1])
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(host.run_tool(main))
