"""Executes the Dockerfile without Docker: its COPY and RUN lines in a clean folder, then prediction and the page.

    python .ci/check_dockerfile.py --python python3.12 [--build-arg TORCH_INDEX=URL]

A virtual environment of the base image's Python stands for the image, a temporary folder for its root: /app in the Dockerfile
becomes FOLDER/app. The environment is that of the Dockerfile, with this machine's settings of pip. Some gigabytes are
downloaded. Not covered: what only Docker does (layers, USER, VOLUME, ports) and the base image's system libraries.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "earlier_models" / "ddcbe54"
# How pip reaches its index from here.
PIP_SETTINGS = re.compile(r"PIP_\w+|(https?|no)_proxy|SSL_CERT_FILE|REQUESTS_CA_BUNDLE", re.I)
PROVED_BY_DOCKER_ALONE = {"USER", "VOLUME", "EXPOSE"}


def parse(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with what follows each, without comments, continued lines joined."""
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in lines if line.strip()]


class Image:
    """What the instructions made so far: a folder and an environment."""

    def __init__(self, root: Path, python: str, arguments: dict[str, str]):
        self.root, self.python, self.arguments = root, python, arguments
        self.folder = root
        self.environment = {name: value for name, value in os.environ.items() if PIP_SETTINGS.fullmatch(name)}
        self.environment |= {"PATH": f"{root}/usr/bin{os.pathsep}{os.defpath}", "HOME": str(root), "LANG": "C.UTF-8"}
        self.command: list[str] = []
        self.health = ""

    def map_paths(self, text: str) -> str:
        """Absolute paths in the image → paths in the folder."""
        return re.sub(r"(?<![\w./:])/(?=\w)", f"{self.root}/", text)

    def execute(self, instruction: str, rest: str) -> None:
        if instruction == "FROM":
            code = "import sys; print('python:%d.%d-slim' % sys.version_info[:2])"
            found = self.run([self.python, "-c", code], stdout=subprocess.PIPE).stdout.strip()
            if found != rest:
                raise ValueError(
                    f"The image is {rest}, and {self.python} would be {found}: pass its Python as --python."
                )
            self.run([self.python, "-m", "venv", f"{self.root}/usr"])
        elif instruction == "ARG":
            name, _, default = rest.partition("=")
            self.environment[name] = self.arguments.get(name, default)
        elif instruction == "ENV":
            self.environment |= dict(word.split("=", 1) for word in shlex.split(self.map_paths(rest)))
        elif instruction == "WORKDIR":
            self.folder = Path(self.map_paths(rest))
            self.folder.mkdir(parents=True, exist_ok=True)
        elif instruction == "COPY":
            source, target = rest.split()
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, self.folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, self.folder / target)
        elif instruction == "RUN":
            self.run(["sh", "-c", self.map_paths(rest)])
        elif instruction == "HEALTHCHECK":
            self.health = self.map_paths(rest.split("CMD ", 1)[1])
        elif instruction == "CMD":
            self.command = json.loads(self.map_paths(rest))
        elif instruction not in PROVED_BY_DOCKER_ALONE:
            raise ValueError(f"{instruction} {rest}: this script does not know how to execute it.")

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=self.folder, env=self.environment, check=True, text=True, **options)

    def is_healthy(self) -> bool:
        command = ["sh", "-c", self.health]
        return not subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True).returncode

    def serve(self, seconds: float = 180) -> None:
        """Start the command, wait until its health check passes, and stop it."""
        if self.is_healthy():
            raise ValueError(
                "The health check passes before the command is started: does another program use its port?"
            )
        server = subprocess.Popen(self.command, cwd=self.folder, env=self.environment)
        deadline = time.monotonic() + seconds
        try:
            while not self.is_healthy():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise ValueError(f"{self.command}: the health check did not pass.")
                time.sleep(1)
        finally:
            server.terminate()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3.12", help="interpreter of the base image's version")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of docker build")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = shutil.which(options.python) or options.python
        image = Image(Path(folder), python, dict(given.split("=", 1) for given in options.build_arg))
        for instruction, rest in parse((ROOT / "Dockerfile").read_text(encoding="utf-8")):
            print(f"→ {instruction} {rest}", flush=True)
            image.execute(instruction, rest)
        image.run(["python", "-m", "pip", "check"])
        (image.root / "model").symlink_to(MODEL)
        predict = ["python", "-m", "scripts.predict", "--model", f"{image.root}/model"]
        done = image.run(predict, input="Once upon a time.", stdout=subprocess.PIPE)
        print(f"→ scripts.predict: {json.loads(done.stdout)['label']}", flush=True)
        image.serve()
    print("The Dockerfile's lines work here. No image was built.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
