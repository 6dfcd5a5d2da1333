"""What this machine has."""

import argparse
from typing import Any

from hrm_ray.cli.command import add


def doctor(args: argparse.Namespace) -> None:
    from hrm_ray.doctor import report

    print(report())


def register(commands: Any) -> None:
    add(commands, "doctor", doctor, "show what this machine has and what will be used", "hrm-ray doctor")
