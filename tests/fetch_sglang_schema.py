"""Put SGLang's own request schema beside the tests' environment: one file out of its wheel.

SGLang itself lives in another environment (requirements/sglang.txt). Tests that need the schema
skip with a reason when it is not there, so a machine without a package index only loses those.
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

REQUIREMENT = "sglang==0.5.23"
MEMBER = "sglang/api/v1/api_types.py"
TARGET = Path(sys.prefix) / "sglang-api"


def main() -> None:
    if (TARGET / MEMBER).exists():
        return
    with TemporaryDirectory() as folder:
        command = ["pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT]
        if subprocess.run([sys.executable, "-m", *command], check=False).returncode:
            sys.stderr.write(f"{REQUIREMENT} could not be fetched: its schema tests will skip\n")
            return
        wheel = next(Path(folder).glob("sglang-*.whl"))
        zipfile.ZipFile(wheel).extract(MEMBER, TARGET)


if __name__ == "__main__":
    main()
