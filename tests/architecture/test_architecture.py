"""The rules of the code base that a reader should be able to rely on."""

import ast
import dataclasses
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hunyuan_train"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def tracked_text_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    suffixes = {".py", ".yaml", ".toml", ".md", ".sh", ".txt", ".sbatch"}
    return [
        ROOT / name for name in listed if Path(name).suffix in suffixes and (ROOT / name).is_file()
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_and_function_lengths(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "a file does one thing in at most 400 lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring
            assert length <= 60, f"{node.name} has {length} lines besides its docstring; at most 60"


def test_no_catch_all_module_names() -> None:
    banned = {"utils", "common", "helpers", "misc"}
    assert [p for p in SOURCES if p.stem in banned] == []


def test_no_two_test_modules_share_a_name() -> None:
    """They are imported by name, so one of the two would stand in for the other."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    names.pop("conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_kernels_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*config.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_config_modules_do_not_import_torch(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "torch" for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] != "torch"


def config_sections() -> list[tuple[str, type]]:
    from hunyuan_train.config.root import RunConfig

    return [(f.name, f.type) for f in dataclasses.fields(RunConfig) if isinstance(f.type, type)]


def test_every_config_field_is_documented_and_read() -> None:
    """A field that nothing reads is a defect: users would set it and nothing would happen."""
    unread, undocumented = [], []
    code = {path: path.read_text() for path in SOURCES}
    for section, kind in config_sections():
        home = next(p for p in SOURCES if re.search(rf"^class {kind.__name__}\b", code[p], re.M))
        body = next(
            node
            for node in ast.walk(ast.parse(code[home]))
            if isinstance(node, ast.ClassDef) and node.name == kind.__name__
        )
        for position, node in enumerate(body.body):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            name = node.target.id
            after = body.body[position + 1] if position + 1 < len(body.body) else None
            if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                undocumented.append(f"{section}.{name}")
            reads = rf"\.{name}\b|getattr\(\w+, \"{name}\"\)|\"{name}\""
            elsewhere = any(re.search(reads, text) for path, text in code.items() if path != home)
            inside = any(
                isinstance(used, ast.Attribute) and used.attr == name
                for method in body.body
                if isinstance(method, ast.FunctionDef) and method.name != "__post_init__"
                for used in ast.walk(method)
            )
            if not elsewhere and not inside:
                unread.append(f"{section}.{name}")
    assert undocumented == []
    assert unread == []


def test_every_shipped_stage_and_curriculum_composes() -> None:
    from hunyuan_train.config.compose import compose_config, conf_folder, stage_names

    recipes = {path.stem for path in (conf_folder() / "recipe").glob("*.yaml")}
    for stage in stage_names():
        family = stage.split("_")[0]  # a stage named after a recipe is meant for it
        recipe = family if family in recipes else "none"
        assert compose_config([f"recipe={recipe}", f"stage={stage}"]).stage.steps > 0
    for path in sorted((conf_folder() / "curriculum").glob("*.yaml")):
        cfg = compose_config([f"curriculum={path.stem}"])
        files = {node.stage or name for name, node in cfg.curriculum.stages.items()}
        assert files <= set(stage_names())


def test_texts_hold_no_machine_paths_or_registry_hosts() -> None:
    pattern = re.compile(
        r"(?<![\w.])/(?:work|root|home|tmp)/\w|pypi\.org|files\.pythonhosted|npmjs\.(?:org|com)"
    )
    found = [
        f"{path.relative_to(ROOT)}: {match.group(0)}"
        for path in tracked_text_files()
        if path != Path(__file__).resolve()
        for match in pattern.finditer(path.read_text(errors="replace"))
    ]
    assert found == []


def test_no_large_file_is_tracked() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    assert [n for n in listed if (ROOT / n).is_file() and (ROOT / n).stat().st_size > 400_000] == []
