"""A script run in this process: what would take seconds to start takes none."""

import importlib
import io
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from common.arguments import InputError


def run_inside(name, *args, cwd):
    """Run a script's main() as with these arguments in the folder `cwd` -> returncode (0 or 2), stdout, stderr."""
    before, argv, out = Path.cwd(), sys.argv, io.StringIO()
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    os.chdir(cwd)
    sys.argv = [name, *map(str, args)]
    try:
        with redirect_stdout(out):
            module.main()
    except InputError as error:  # start.run() prints it so
        return SimpleNamespace(returncode=2, stdout=out.getvalue(), stderr=f"{name}: {error}\n")
    finally:
        os.chdir(before)
        sys.argv = argv
    return SimpleNamespace(returncode=0, stdout=out.getvalue(), stderr="")
