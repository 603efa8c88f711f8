"""What the README says against what the scripts do: python3 -m pytest tests/test_docs.py"""

import ast
import difflib
import re
import subprocess

from conftest import ROOT, script

README = (ROOT / "README.md").read_text()
SCRIPTS = ("TrainUnetDataSet.py", "ddp_train.py", "predict_unet_test.py", "evaluate.py", "plot.py")
BENCHMARKS = ("cpu_step.py", "cpu_accuracy.py", "recipe.py", "same_time.py")
BENCHMARKS = tuple(f"benchmarks/{name}" for name in BENCHMARKS)


def code_of(name):
    """The lines of a script below its docstring."""
    text = (ROOT / name).read_text()
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def test_the_twins_differ_only_in_what_data_parallel_takes():
    """The diff of the training scripts is the README's tutorial, and no other line differs."""
    assert not re.search(r"@@\w", README)  # a gap left to fill in
    diff = list(
        difflib.unified_diff(
            code_of("TrainUnetDataSet.py"), code_of("ddp_train.py"), n=1, lineterm=""
        )
    )[2:]
    changed = [line[1:].strip() for line in diff if line[0] in "+-"]
    allowed = (
        r"from oneflow\.utils\.data import DataLoader(, RandomSampler)?",
        r"from oneflow\.utils\.data\.distributed import DistributedSampler",
        r"from oneflow\.nn\.parallel import DistributedDataParallel as ddp",
        r"net = ddp\(net\)",
        r"sampler = RandomSampler\(train_set\)",
        r"sampler = DistributedSampler\(train_set, seed=args\.seed\)",
        r"sampler\.set_epoch\(epoch\)",
    )
    for line in changed:
        assert any(re.fullmatch(pattern, line) for pattern in allowed), line
    assert len(changed) == len(allowed) + 1  # the import of DataLoader stands on both sides
    shown = re.search(r"```diff\n(.*?)\n```", README, re.S).group(1).splitlines()
    hunk = re.compile(r"@@.*@@")  # line numbers say nothing to a reader
    assert shown == [hunk.sub("@@", line) for line in diff]


def test_flags_are_those_of_help():
    """Every flag in the README exists, and every flag of a script is in the README."""
    flag = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
    helps = {name: script(name, "--help", cwd=ROOT) for name in (*SCRIPTS, "data/prepare.py")}
    assert all(done.returncode == 0 for done in helps.values())
    existing = {f for done in helps.values() for f in flag.findall(done.stdout)} - {"--help"}
    existing |= set(flag.findall(script("data/prepare.py", "isbi", "--help", cwd=ROOT).stdout))
    others = {"--nproc_per_node", "--master_port", "--long", "--help"}  # not the scripts' own
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
