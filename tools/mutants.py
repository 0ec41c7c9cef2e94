"""Small wrong changes to the code, one at a time, and which of them no test notices: mutmut over a part of the package.

python tools/mutants.py --output docs/mutants.md     the fixed sample below
python tools/mutants.py --base main                  the functions that this branch has changed since main

It works in a copy of the checkout in a temporary directory. Each module is tried with the test files below, or else
with those that its place gives: tests/ops/test_nf4.py for lora_kernels/ops/nf4.py.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Module -> functions of the fixed sample, as mutmut's patterns spell them.
SAMPLE = {
    "lora_kernels/backends/choice.py": ["x_time_ms", "x_choose", "xǁChoicesǁ*"],
    "lora_kernels/train/rl.py": ["*"],
    "lora_kernels/ops/cross_entropy.py": ["*"],
}
TESTS = {"lora_kernels/train/rl.py": ["tests/train/test_rl.py", "tests/train/test_trl.py"]}
ARGUED = "\n## What is argued\n"
OUTCOMES = {"🎉": "caught", "⏰": "caught", "🙁": "survived", "🫥": "survived"}


def changed_functions(base: str) -> dict[str, list[str]]:
    """Module -> patterns of the functions and methods whose lines differ from `base`."""
    diff = subprocess.run(["git", "diff", "-U0", base, "--", "lora_kernels/*.py"], capture_output=True, text=True)
    diff.check_returncode()
    found: dict[str, set[str]] = {}
    path = None
    for line in diff.stdout.splitlines():
        if line.startswith("+++ "):
            path = None if line.endswith("/dev/null") else line.removeprefix("+++ b/")
        elif path and (hunk := re.match(r"@@ .*\+(\d+)(?:,(\d+))? @@", line)):
            first, count = int(hunk[1]), int(hunk[2] or 1)
            touched = [name for name, start, end in functions_of(Path(path)) if start < first + count and first <= end]
            found.setdefault(path, set()).update(touched)
    return {path: sorted(names) for path, names in found.items() if names}


def functions_of(path: Path) -> list[tuple[str, int, int]]:
    """(mutmut's name, first line, last line) of each function of a module and each method of its classes."""
    found = []
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"xǁ{node.name}ǁ" if isinstance(node, ast.ClassDef) else "x_"
        functions = [member for member in members if isinstance(member, ast.FunctionDef)]
        found += [(prefix + f.name, f.lineno, f.end_lineno or f.lineno) for f in functions]
    return found


def mirror(path: str) -> str:
    """The test file of a module of the package."""
    inside = Path(path).relative_to("lora_kernels")
    return f"tests/{inside.with_name(f'test_{inside.name}')}"


def run_module(path: str, functions: list[str], processes: int) -> tuple[Counter, list[str]]:
    """How many mutants of these functions were caught and survived, and the survivors' diffs."""
    module = path.removesuffix(".py").replace("/", ".")
    tests = TESTS.get(path, [mirror(path)])
    with tempfile.TemporaryDirectory() as folder:
        for name in ("lora_kernels", "tests", "tools"):
            shutil.copytree(name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        settings = {"source_paths": ["lora_kernels"], "only_mutate": [path], "also_copy": ["lora_kernels", "tools"]}
        settings["pytest_add_cli_args_test_selection"] = tests
        lines = [f"{key} = {value}" for key, value in settings.items()]
        text = Path("pyproject.toml").read_text() + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n"
        Path(folder, "pyproject.toml").write_text(text)

        def mutmut(*arguments: str) -> str:
            command = [sys.executable, "-m", "mutmut", *arguments]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if result.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
            return result.stdout

        patterns = [f"{module}.{function}__mutmut_*" for function in functions]
        output = mutmut("run", "--max-children", str(processes), *patterns)
        results = re.findall(rf"^(\S+) ({re.escape(module)}\.\S+__mutmut_\d+)$", output, re.MULTILINE)
        if not results:
            raise SystemExit(f"mutmut tried no mutant of {path}:\n{output[-3000:]}")
        counts = Counter(OUTCOMES.get(symbol, f"not judged ({symbol})") for symbol, _ in results)
        survivors = [name for symbol, name in results if OUTCOMES.get(symbol) == "survived"]
        return counts, [mutmut("show", name).strip() for name in survivors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a commit: only what has changed since; default: the fixed sample")
    parser.add_argument("--only", help="only modules whose path has this text")
    parser.add_argument("--output", type=Path, help="a Markdown file to write; default: standard output")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    modules = changed_functions(args.base) if args.base else SAMPLE
    modules = {path: names for path, names in modules.items() if not args.only or args.only in path}
    rows, details = [], []
    total: Counter[str] = Counter()
    for path, functions in modules.items():
        counts, survivors = run_module(path, functions, args.processes)
        total += counts
        others = sum(counts.values()) - counts["caught"] - counts["survived"]
        rows.append(f"| `{path}` | {', '.join(functions)} | {counts['caught']} | {counts['survived']} | {others} |")
        details += [f"```diff\n{diff}\n```" for diff in survivors]
        print(rows[-1], file=sys.stderr, flush=True)
    judged = total["caught"] + total["survived"]
    lines = [f"{total['caught']} of {judged} mutants were caught.", ""]
    lines += ["| module | functions | caught | survived | not judged |", "|---|---|---|---|---|", *rows]
    lines += ["", "## Survivors", "", *(details or ["None."])]
    text = "# Mutants\n\nMade by `make mutants`; `tools/mutants.py` says how.\n\n" + "\n".join(lines) + "\n"
    if args.output:
        # What people have written about survivors stays.
        before = args.output.read_text() if args.output.exists() else ""
        args.output.write_text(text + "".join(before.partition(ARGUED)[1:]))
    else:
        print(text)


if __name__ == "__main__":
    main()
