"""Looks every package of requirements.lock up among the known vulnerabilities (pip-audit).

    .venv/bin/python .ci/audit.py          (make audit)

Exit status 1 where a package has one that is not excused below. Where the advisories cannot be reached it says so, and fails
nothing: no answer is no finding.
"""

import json
import subprocess
import sys

# Advisory → why it does not concern this project. Empty is best.
EXCUSED: dict[str, str] = {}


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--requirement", "requirements.lock", "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        print(f"audit: the advisories cannot be reached: {(done.stderr.strip().splitlines() or ['no answer'])[-1]}")
        return 0
    looked_up = [package for package in packages if "vulns" in package]
    without = "" if looked_up else " (the advisories cannot be reached from here)"
    print(f"audit: {len(looked_up)} of {len(packages)} locked packages looked up{without}.")
    found = [
        (package["name"], package["version"], vulnerability["id"], vulnerability["fix_versions"])
        for package in looked_up
        for vulnerability in package["vulns"]
        if vulnerability["id"] not in EXCUSED
    ]
    for name, version, advisory, fixes in found:
        print(f"audit: {name} {version}: {advisory}, mended in {', '.join(fixes) or 'no release yet'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
