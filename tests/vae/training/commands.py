"""The command line of some settings."""

import dataclasses
import json
import sys


def command(settings):
    """Return the words of the command line that has these settings."""
    words = [sys.executable, "-m", "pyro_flowguides.vae"]
    for setting in dataclasses.fields(settings):
        value = getattr(settings, setting.name)
        flag = "--" + setting.name.replace("_", "-")
        if value is False and setting.default is True:
            words.append(f"--no-{setting.name}")
        elif value is True and setting.default is False:
            words.append(flag)
        elif setting.name == "shape" and value:
            words += [flag, "x".join(map(str, value))]
        elif not isinstance(value, bool | tuple):
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
