"""What README and docs/ say against what the scripts do: python3 -m pytest tests/test_docs.py

Each failure names the file that is wrong and prints what belongs there.
"""

import ast
import difflib
import re

from conftest import ROOT, script

import pytest

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
SCRIPTS = ("TrainUnetDataSet.py", "ddp_train.py", "graph_train.py", "predict_unet_test.py", "evaluate.py", "plot.py")
SCRIPTS += ("data/prepare.py",)
BENCHMARKS = tuple(f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks").glob("*.py")))
# Flags of the launcher, of pytest and of other programs that the pages show.
OTHERS = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--long", "--help"}
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z]\w*")


def code_of(name):
    """The lines of a script below its docstring."""
    text = (ROOT / name).read_text()
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


@pytest.mark.parametrize("twin", ["ddp_train.py", "graph_train.py"])
def test_the_diff_of_the_twins_is_shown(twin):
    """The pages show the diff of the training scripts, below their docstrings, as it is."""
    diff = difflib.unified_diff(code_of(SCRIPTS[0]), code_of(twin), n=1, lineterm="")
    diff = [re.sub("@@.*@@", "@@", line) for line in diff][2:]  # line numbers say nothing to a reader
    blocks = [block for page in PAGES for block in re.findall(r"```diff\n(.*?)\n```", page.read_text(), re.S)]
    shown = [[re.sub("@@.*@@", "@@", line) for line in block.splitlines()] for block in blocks]
    text = "\n".join(diff)
    assert diff in shown, f"{' or '.join(page.name for page in PAGES)}: put this into a block of ```diff\n{text}"


def test_flags_exist():
    """Every flag that a page names is one of a script's, by its --help; a benchmark's, by its text."""
    helps = [script(name, "--help", cwd=ROOT) for name in SCRIPTS if name not in ("ddp_train.py", "graph_train.py")]
    helps += [script("data/prepare.py", command, "--help", cwd=ROOT) for command in ("isbi", "sample", "labels")]
    assert [done.stderr for done in helps if done.returncode] == []
    texts = [done.stdout for done in helps] + [(ROOT / name).read_text() for name in BENCHMARKS]
    existing = OTHERS | {flag for text in texts for flag in FLAG.findall(text)}
    for page in PAGES:
        commands = "\n".join(re.findall(r"^(?:    .*|[^`\n]*`[^`\n]*`.*)$", page.read_text(), re.M))
        unknown = set(FLAG.findall(commands)) - existing
        assert not unknown, f"{page.name}: no script has {', '.join(sorted(unknown))}"


def test_links_lead_somewhere():
    """Every relative link of a page is a file here, and the README links every page of docs/."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: links {target}, which is not here"
    text = README.read_text()
    missing = [f"docs/{page.name}" for page in PAGES[1:] if f"docs/{page.name}" not in text]
    assert not missing, f"README.md: no link to {', '.join(missing)}"


def test_files_are_named():
    """The README says of every file and folder at the top what it is."""
    names = {path.name for ending in ("*.py", "*.sh") for path in ROOT.glob(ending)}
    names |= {f"{name}/" for name in ("common", "data", "tests", "docs", "benchmarks", "checkpoints")}
    names |= {"cpu_kernels/"} if (ROOT / "cpu_kernels").is_dir() else set()
    missing = sorted(name for name in names if name not in README.read_text())
    assert not missing, f"README.md: doesn't name {', '.join(missing)}"


def test_the_readme_is_read_at_a_sitting():
    """At most 200 lines and 1,800 words, no line over 120 characters; nor the pages' but in tables."""
    text = README.read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 1800
    for page in PAGES:
        long = [
            i
            for i, line in enumerate(page.read_text().splitlines(), 1)
            if len(line) > 120 and (page == README or line[0] != "|")
        ]
        assert not long, f"{page.name}: lines over 120 characters: {long}"


def test_docstrings_hold_the_command():
    """Every script's docstring shows the exact command that runs it."""
    for name in (*SCRIPTS, *BENCHMARKS):
        docstring = ast.get_docstring(ast.parse((ROOT / name).read_text()))
        assert re.search(rf"^    python3 (-m oneflow\S+ .*)?(\./)?{name}", docstring, re.M), name
