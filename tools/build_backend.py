"""The build backend: setuptools, plus the torch that is already there.

The extension compiles against torch's headers. An isolated build sees nothing that is
installed, so naming torch as a build requirement would download a second one, gigabytes
of it, for every build. This backend asks the interpreter for its installed torch instead
and lets setup.py import that one. Where no suitable torch is installed, it becomes a build
requirement after all.
"""

import json
import subprocess
import sys

import torch_range
from setuptools.build_meta import *  # noqa: F403  (every hook that is not replaced below)

# pip isolates by PYTHON* variables, so an interpreter that ignores them (-E) sees everything.
LOOK_FOR_TORCH = """
import importlib.metadata, json, sys
print(json.dumps([importlib.metadata.version("torch"), [p for p in sys.path if p]]))
"""


def share_installed_torch() -> bool:
    """Make the installed torch importable here, after everything that is; False if none fits."""
    command = [sys.executable, "-E", "-c", LOOK_FOR_TORCH]
    look = subprocess.run(command, capture_output=True, text=True, cwd=sys.prefix, check=False)
    if look.returncode != 0:
        return False
    version, path = json.loads(look.stdout)
    if not torch_range.fits(version):
        print(f"adagrad_kernels: torch {version} is installed, not {torch_range.REQUIREMENT}")
        return False
    sys.path.extend(entry for entry in path if entry not in sys.path)
    return True


BUILD_REQUIREMENTS = [] if share_installed_torch() else [torch_range.REQUIREMENT]


# setuptools would run setup.py to answer these, which imports torch; there is more to know
# only for packages with setup_requires.
def get_requires_for_build_wheel(config_settings=None):
    return BUILD_REQUIREMENTS


def get_requires_for_build_editable(config_settings=None):
    return BUILD_REQUIREMENTS


def get_requires_for_build_sdist(config_settings=None):
    return BUILD_REQUIREMENTS
