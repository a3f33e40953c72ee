"""The ranges of setup.cfg: what is locked and what make test-oldest installs lie in them."""

import configparser
import re

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT


def ranges() -> dict[str, Requirement]:
    """What users install: requirements by name, without the tools of the tests."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    lines = config["options"]["install_requires"]
    lines += "".join(extras[name] for name in ("app", "files", "lora", "onnx", "search"))
    requirements = [Requirement(line) for line in lines.strip().splitlines()]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pins(name: str) -> dict[str, str]:
    """Versions by name in a file of `name==version`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.M)}


def test_the_oldest_end_pins_every_lower_bound():
    lower = {
        name: bound.version
        for name, requirement in ranges().items()
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    assert lower == pins(".ci/oldest.txt")


def test_every_range_ends():
    for name, requirement in ranges().items():
        assert sorted(bound.operator for bound in requirement.specifier) == ["<", ">="], name


def test_what_is_locked_lies_in_the_ranges():
    locked = pins("requirements.lock")
    locked["torch"] = re.search(r"torch==([\d.]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1]
    for name, requirement in ranges().items():
        assert locked[name] in requirement.specifier, name
