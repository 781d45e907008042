"""Every operation has a Triton row, or stands here with the reason; every row is compiled, interpreted, explained.

Names and files alone: what the rows compute is tested in tests/kernels/triton.
"""

from pathlib import Path

import pytest

from miss.kernels import compiled, registry

ROOT = Path(__file__).resolve().parents[2]
# Why there is no Triton row. Where this changes, so does this table.
WITHOUT = {
    "attention_quantised": "scores of int8 codes are for CPUs so far; on a GPU its torch row is SDPA",
    "linear": "the library's GEMM is at its roof; ours begin where something is fused into the product",
    "linear_backward": "the same",
    "linear_at": "a gather of a few rows of the vocabulary a state and their products: 40 candidates are 61 KB",
    "linear_at_w8a8": "the same",
    "quant_linear_nf4": "bitsandbytes' own format, by its own kernels",
    "quant_linear_llm_int8": "the same",
    "image_layer": "docs/gpu/decoder_step.md says it of a whole decoder: single operations in a captured graph",
    "text_layer": "the same",
    "decoder_step": "docs/gpu/decoder_step.md: a barrier over the whole grid a phase; a captured graph instead",
}


@pytest.fixture(scope="module", autouse=True)
def every_table() -> None:
    registry.load_all()


def rows() -> dict[str, registry.Impl]:
    """By operation, its Triton row."""
    tables = {name: op for name, op in registry.OPS.items() if not name.startswith("toy")}
    return {name: impl for name, op in tables.items() for impl in op.impls if impl.name == "triton"}


def test_every_operation_has_a_triton_row_or_a_reason() -> None:
    without = {name for name in registry.OPS if not name.startswith("toy")} - rows().keys()
    assert without == set(WITHOUT), "an operation without a row wants a reason here, one with a row wants none"
    assert (ROOT / "docs/gpu/decoder_step.md").is_file()


def test_every_triton_row_is_compiled_interpreted_and_explained() -> None:
    compiled_folders = {path.parent.name for path in (ROOT / "kernels").glob("*/triton_*.py") if _has_cases(path)}
    reported = {row.op for row in compiled.load().rows.values()}
    assert reported <= set(registry.OPS), "the report holds cases of operations that are"
    for name, impl in rows().items():
        folder, module = impl.sources[0].split(".")
        path = ROOT / "kernels" / folder / f"{module}.py"
        assert path.is_file() and folder in compiled_folders, f"{name}: no module, or none of its folder has cases()"
        assert _has_cases(path), f"{name}: {path.name} yields no cases to compile"
        assert (ROOT / f"docs/gpu/{folder}.md").is_file(), f"{name}: no page docs/gpu/{folder}.md"
        tests = [t for t in (ROOT / "tests/kernels/triton").glob("test_*.py") if module in _imports(t, folder)]
        assert tests, f"{name}: no test in tests/kernels/triton imports {folder}.{module}"


def _has_cases(path: Path) -> bool:
    return "\ndef cases(" in path.read_text(encoding="utf-8")


def _imports(test: Path, folder: str) -> str:
    """What a test imports from an operation's folder, as text."""
    text = test.read_text(encoding="utf-8")
    parts = text.split(f"from miss.kernels.{folder} import ")[1:]
    return " ".join(part.split(")")[0] if part.startswith("(") else part.splitlines()[0] for part in parts)
