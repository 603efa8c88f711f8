"""What the README says against what the scripts do: python3 -m pytest tests/test_docs.py"""

import ast
import difflib
import re
import subprocess

from conftest import ROOT, script

import pytest

README = (ROOT / "README.md").read_text()
SCRIPTS = ("TrainUnetDataSet.py", "ddp_train.py", "graph_train.py")
SCRIPTS += ("predict_unet_test.py", "evaluate.py", "plot.py")
BENCHMARKS = ("cpu_step.py", "cpu_accuracy.py", "graph_step.py", "recipe.py", "same_time.py")
BENCHMARKS += ("scaling.py",)
BENCHMARKS = tuple(f"benchmarks/{name}" for name in BENCHMARKS)


def code_of(name):
    """The lines of a script below its docstring."""
    text = (ROOT / name).read_text()
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


DATA_PARALLEL = (
    r"from oneflow\.utils\.data import DataLoader(, RandomSampler)?",
    r"from oneflow\.utils\.data\.distributed import DistributedSampler",
    r"from oneflow\.nn\.parallel import DistributedDataParallel as ddp",
    r"net = ddp\(net\)",
    r"sampler = RandomSampler\(train_set\)",
    r"sampler = DistributedSampler\(train_set, seed=args\.seed\)",
    r"sampler\.set_epoch\(epoch\)",
)
OWN = ("TrainGraph", "keep_count")  # definitions that only graph_train.py has
STATIC_GRAPH = (
    r"import oneflow as flow",
    r"accelerate\(net\)  # on a CPU.*",
    r"if device == \"cpu\":",
    r"print\(.*OneFlow's own slow kernels.*\)",
    r"if args.dropout:",
    r"print\(.*dropout.*\)",
    r"args.dropout = 0.0",
    r"graphs = \{\}",
    r"count = flow\.tensor\(\[schedule\.last_step\], dtype=flow\.int64\)",
    r"losses = \(criterion\(net\(image\), label\) \* weight\)\.mean\(.*\)  # of each slice",
    r"losses\.mean\(\)\.backward\(\)",
    r"optimizer\.(step|zero_grad)\(\)",
    r"schedule\.step\(\)",
    r"return losses",
    r"shape = image\.shape",
    r"if shape not in graphs:",
    r"graphs\[shape\] = TrainGraph\(.*\)",
    r"return graphs\[shape\]\(image, label, weight\)",
    r"keep_count\(net, optimizer, schedule, count\)",
    r"engine\.run\(lambda: Train_Unet\(engine\.parse_args\(__doc__(, amp=True)?\)\)\)",
)


@pytest.mark.parametrize(
    "twin, allowed", [("ddp_train.py", DATA_PARALLEL), ("graph_train.py", STATIC_GRAPH)]
)
def test_the_twins_differ_only_in_what_they_are_for(twin, allowed):
    """The diff of the training scripts is the README's tutorial, and no other line differs."""
    assert not re.search(r"^[A-Z]+-[A-Z-]+$|@@\w", README, re.M)  # a gap left to fill in
    diff = list(
        difflib.unified_diff(code_of("TrainUnetDataSet.py"), code_of(twin), n=1, lineterm="")
    )[2:]
    hunk = re.compile(r"@@.*@@")  # line numbers say nothing to a reader
    shown = [block.splitlines() for block in re.findall(r"```diff\n(.*?)\n```", README, re.S)]
    assert [hunk.sub("@@", line) for line in diff] in shown
    code = (ROOT / twin).read_text()
    own = (node for node in ast.parse(code).body if getattr(node, "name", None) in OWN)
    own = "\n".join(ast.get_source_segment(code, node) for node in own).splitlines()
    changed = [line for line in diff if line[0] in "+-" and line[1:].strip()]
    changed = [line[1:].strip() for line in changed if line[0] == "-" or line[1:] not in own]
    for line in changed:
        assert any(re.fullmatch(pattern, line) for pattern in allowed), line
    for pattern in allowed:
        assert any(re.fullmatch(pattern, line) for line in changed), pattern


def test_flags_are_those_of_help():
    """Every flag in the README exists, and every flag of a script is in the README."""
    flag = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
    helps = {name: script(name, "--help", cwd=ROOT) for name in (*SCRIPTS, "data/prepare.py")}
    assert all(done.returncode == 0 for done in helps.values())
    existing = {f for done in helps.values() for f in flag.findall(done.stdout)} - {"--help"}
    existing |= set(flag.findall(script("data/prepare.py", "isbi", "--help", cwd=ROOT).stdout))
    others = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    others |= {"--long", "--help"}  # not the scripts' own
    for name in BENCHMARKS:
        others |= set(flag.findall(script(name, "--help", cwd=ROOT).stdout))
    assert set(flag.findall(README)) <= existing | others
    assert existing <= set(flag.findall(README)) | {"--help"}


def test_file_tree_is_the_repository():
    """The README's file tree has a line for each file, and no other."""
    tree = re.search(r"## Files\n.*?```\n(.*?)```", README, re.S).group(1)
    listed = {line.split()[0] for line in tree.splitlines() if line.strip()}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    top = {name if "/" not in name else name.split("/")[0] + "/" for name in tracked}
    top = {name for name in top if not name.startswith(".")} - {"data/"} | {"data/prepare.py"}
    assert listed == top


def test_docstrings_hold_the_command():
    """Every script's docstring shows the exact command that runs it."""
    for name in (*SCRIPTS, *BENCHMARKS, "data/prepare.py"):
        docstring = ast.get_docstring(ast.parse((ROOT / name).read_text()))
        assert re.search(rf"^    python3 (-m oneflow\S+ .*)?(\./)?{name}", docstring, re.M), name
