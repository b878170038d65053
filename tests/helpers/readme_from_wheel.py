"""Runs the README's blocks with the installed package, in an empty folder: `python -P tests/helpers/readme_from_wheel.py`.

It imports nothing from the checkout, and says what it ran.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    # The page in the browser serves until it is stopped, and needs a package that the wheel's environment does without.
    commands = [line for line in re.findall(r"`(diffusers-infogain [^`]+)`", readme) if line.split()[1] != "app"]
    # The installation is what the caller has done, from the wheel; what follows it in the same line is run here.
    for block in re.findall(r"^```bash\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE):
        commands += [part.strip().removeprefix(".venv/bin/") for part in block.split("&&") if "/bin/diffusers-infogain" in part]
    assert programs, "README.md has no block of Python"
    assert len(commands) > 1, commands
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    scripts = sysconfig.get_path("scripts")
    with tempfile.TemporaryDirectory() as folder:
        found = "import diffusers_infogain; print(diffusers_infogain.__file__)"
        command = [sys.executable, "-P", "-c", found]
        file = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout
        assert ROOT not in Path(file.strip()).parents or "site-packages" in file, f"the package is imported from {file}"
        for program in programs:
            print(f"README, {len(program.splitlines())} lines of Python", flush=True)
            subprocess.run([sys.executable, "-P", "-c", program], cwd=folder, env=environment, check=True)
        for line in commands:
            print(line, flush=True)
            name, *arguments = shlex.split(line)
            subprocess.run([Path(scripts, name), *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        print("written:", *sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.png")))


if __name__ == "__main__":
    main()
