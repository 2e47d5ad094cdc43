"""The shape of the repository itself: four files a primitive, private JAX in one file."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxmetal_linalg"
# Primitives that no GPU kernel serves yet: their plan for a device that runs kernels is "none".
WITHOUT_KERNEL: set[str] = set()
STEMS = sorted(p.stem for p in (PACKAGE / "primitives").glob("*.py") if p.stem != "__init__")


def test_there_is_a_primitive() -> None:
    assert "svd" in STEMS


def test_four_files_with_one_stem() -> None:
    for stem in STEMS:
        for path in (f"csrc/{stem}.cc", f"tests/test_{stem}.py"):
            assert (ROOT / path).is_file(), f"{stem}: {path} is missing"
        has_kernel = (ROOT / f"kernels/{stem}.metal").is_file()
        assert has_kernel == (stem not in WITHOUT_KERNEL), f"{stem}: kernels/{stem}.metal"


def test_one_import_line_a_name() -> None:
    text = (PACKAGE / "__init__.py").read_text()
    for stem in STEMS:
        pattern = rf"^from jaxmetal_linalg\.primitives\.{stem} import {stem} as {stem}$"
        assert re.search(pattern, text, re.M), f"{stem} is not re-exported"
    imports = re.findall(r"^from jaxmetal_linalg\.\S+ import (.*)$", text, re.M)
    for line in imports:
        assert re.fullmatch(r"(\w+) as \1", line), f"not of the form X as X: {line}"


def test_private_jax_is_in_one_file() -> None:
    private = re.compile(r"jax\._src|jax\.extend|\bfrom jaxlib|\bimport jaxlib")
    for path in PACKAGE.rglob("*.py"):
        # _measure.py and _doctor.py print jaxlib's version and touch nothing else of it.
        text = re.sub(r"^\s*import jaxlib$|jaxlib\.__version__", "", path.read_text(), flags=re.M)
        if path.name == "_compat.py":
            assert private.search(text)
        else:
            assert not private.search(text), path


def test_primitive_files_keep_the_house_order() -> None:
    headings = ("public functions", "shape and dtype rule", "JVP", "plan", "lowering")
    for stem in STEMS:
        text = (PACKAGE / "primitives" / f"{stem}.py").read_text()
        places = [text.find(f"# --- {heading} ") for heading in headings]
        assert -1 not in places, stem
        assert places == sorted(places), stem
        assert len(re.findall(r"_registry\.linalg_primitive\(", text)) == 1


def test_kernels_hold_no_dialect() -> None:
    kernels = list((ROOT / "kernels").glob("*.metal"))
    assert kernels
    for path in kernels:
        text = path.read_text()
        for word in ("__CUDACC__", "__CUDA_ARCH__", "__METAL_VERSION__", "__METAL__", "JM_SIM"):
            assert not re.search(rf"#\s*(if|ifdef|ifndef|elif).*\b{word}\b", text), (path, word)


def test_every_test_is_collected() -> None:
    for path in (ROOT / "tests").glob("*.py"):
        if path.name not in ("conftest.py", "harness.py"):
            assert path.name.startswith("test_"), path
