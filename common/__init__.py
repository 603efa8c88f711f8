"""What the scripts share, a noun a file; nothing here imports a script or the data set."""

import signal
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

missing = [name for name in ("numpy", "cv2", "tqdm", "safetensors", "tifffile", "skimage") if find_spec(name) is None]
if missing:
    sys.exit(f"no {', '.join(missing)} in this Python: run `source env.sh` in {ROOT} first")

# A script of this repository that is being started, and nobody else who imports this: until start.run() has its own
# answer to Ctrl-C, that ends the script without a traceback.
if Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parent in (ROOT, ROOT / "data"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
