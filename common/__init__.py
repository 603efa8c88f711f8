"""What the scripts share, a noun a file; nothing here imports a script or the data set."""

import signal
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if missing := [name for name in ("numpy", "cv2", "tqdm", "safetensors", "tifffile", "skimage") if not find_spec(name)]:
    sys.exit(f"no {', '.join(missing)} in this Python: run `source env.sh` in {ROOT} first")

# Until start.run() has its own answer, Ctrl-C ends a script of this repository, not who else imports this, silently.
if Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parent in (ROOT, ROOT / "data"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
