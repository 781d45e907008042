"""nf4 and LLM.int8: the bytes are bitsandbytes' own, and the products those of the matrices that they stand for."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from miss.kernels.quant_linear import (
    PackingError,
    from_flat,
    library,
    pack_llm_int8,
    pack_nf4,
    quant_linear,
    to_flat,
    unpack,
)
from miss.kernels.registry import use

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: its products are not tested",
)
PACKS = {"nf4": (pack_nf4, library.NF4_OP), "llm-int8": (pack_llm_int8, library.LLM_INT8_OP)}


def tensors(rows: int = 5, columns: int = 128, outputs: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, columns)
    x[:, 3] *= 20  # an outlier channel
    return x, torch.randn(outputs, columns) * 0.1, torch.randn(outputs)


@installed
class TestPacking:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
    def test_nf4_unpacks_to_the_librarys_numbers(self, rows: int, blocks: int, seed: int) -> None:
        """Where rows end with a block; elsewhere its dequantisation on CPU takes some scales from other blocks."""
        import bitsandbytes.functional as functional

        weight = torch.randn(rows, 64 * blocks, generator=torch.Generator().manual_seed(seed))
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        packed = pack_nf4(weight)
        assert torch.equal(packed.data, codes.flatten())
        assert torch.equal(unpack(packed), functional.dequantize_4bit(codes, state).reshape(weight.shape))

    def test_llm_int8_is_within_half_a_step(self) -> None:
        _, weight, _ = tensors()
        packed = pack_llm_int8(weight)
        assert ((unpack(packed) - weight).abs() <= 0.51 * packed.scale[:, None] + 1e-4).all()

    @pytest.mark.parametrize("name", PACKS)
    def test_files_keep_it(self, name: str) -> None:
        packed = PACKS[name][0](tensors()[1])
        read = from_flat(to_flat(packed, "a"), "a")
        assert read.scheme == name and read.shape == packed.shape
        assert torch.equal(unpack(read), unpack(packed))

    @pytest.mark.parametrize("name", PACKS)
    def test_a_file_with_a_part_of_another_shape(self, name: str) -> None:
        flat = to_flat(PACKS[name][0](tensors()[1]), "a")
        with pytest.raises(PackingError, match=r"a\.scale"):
            from_flat(flat | {"a.scale": flat["a.scale"][1:]}, "a")

    def test_what_cannot_be_packed(self) -> None:
        with pytest.raises(PackingError, match="even"):
            pack_nf4(torch.randn(3, 5))
        with pytest.raises(PackingError, match="float16"):
            pack_llm_int8(torch.full((2, 2), 1e6))


@installed
class TestProducts:
    @pytest.mark.parametrize("name", PACKS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("rows", [0, 1, 5])
    def test_the_library_and_the_reference_agree(self, name: str, dtype: torch.dtype, rows: int) -> None:
        x, weight, bias = tensors(rows)
        pack, op = PACKS[name]
        packed, x, bias = pack(weight), x.to(dtype), bias.to(dtype)
        results = {}
        for implementation in ("bitsandbytes", "torch", "reference"):
            with use(**{op.name: implementation}):
                results[implementation] = quant_linear(x, packed, bias)
            assert results[implementation].dtype == dtype and results[implementation].shape == (rows, len(weight))
        if rows:
            truth = results["reference"].double()
            for y in results.values():
                assert (y.double() - truth).norm() / truth.norm() < 8e-3  # float16 codes of the library's rows
            assert (truth - F.linear(x.double(), weight.double(), bias.double())).norm() / truth.norm() < 0.12

    def test_blocks_that_run_over_the_ends_of_rows(self) -> None:
        """Shapes on which the library's own product is wrong: (64, 160) among them."""
        for outputs, columns in ((64, 160), (12, 100), (64, 64), (7, 128)):
            x, weight, _ = tensors(3, columns, outputs)
            packed = pack_nf4(weight)
            torch.testing.assert_close(quant_linear(x, packed), x @ unpack(packed).T, atol=1e-4, rtol=1e-4)

    def test_shapes_that_the_library_gets_wrong_are_refused_and_others_right(self) -> None:
        """LLM.int8 of bitsandbytes 0.50.2 on a CPU: a matrix of one column gives what lies in memory."""
        for outputs, columns in ((7, 1), (5, 3), (1, 64), (33, 100), (2, 7)):
            x, weight, bias = torch.randn(3, columns), torch.randn(outputs, columns) * 0.1, torch.randn(outputs)
            packed = pack_llm_int8(weight)
            with use(quant_linear_llm_int8="reference"):
                want = quant_linear(x.double(), packed, bias.double())
            got = quant_linear(x, packed, bias)
            assert (got - want).norm() / want.norm() < 8e-3, (outputs, columns)
            if columns == 1:
                with use(quant_linear_llm_int8="bitsandbytes"), pytest.raises(NotImplementedError, match="one column"):
                    quant_linear(x, packed, bias)

    @pytest.mark.parametrize("name", PACKS)
    def test_the_gradient_is_that_of_the_unpacked_matrix(self, name: str) -> None:
        x, weight, bias = tensors()
        packed = PACKS[name][0](weight)
        x.requires_grad_()
        quant_linear(x, packed, bias).sum().backward()
        torch.testing.assert_close(x.grad, unpack(packed).sum(0).expand_as(x), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("name", PACKS)
    def test_opcheck(self, name: str) -> None:
        x, weight, bias = tensors()
        packed = PACKS[name][0](weight)
        args = (x.requires_grad_(), packed.data, packed.scale, bias)
        run = library._nf4 if name == "nf4" else library._llm_int8
        torch.library.opcheck(run, (*args, packed.shape[1]) if name == "nf4" else args)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from miss.kernels.quant_linear import bitsandbytes_impl

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pip install 'miss-engine\[bitsandbytes\]'"):
        bitsandbytes_impl.pack_nf4(torch.randn(2, 4))
