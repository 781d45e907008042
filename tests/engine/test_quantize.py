"""Packing checkpoints: what is kept, what it costs, what a budget buys, and what a damaged packed file does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from miss import Engine, SamplingParams
from miss.cli import run
from miss.engine.data.processor import build_tokenizer
from miss.engine.runtime.calibration import Moments, collect
from miss.engine.runtime.compensate import output_error, pack_int4_compensated, pack_int8_compensated
from miss.engine.runtime.gate import judged, verdict
from miss.engine.runtime.loading import CHECKPOINTS, check_float8, load_model
from miss.engine.runtime.quantize import (
    FORMS,
    Options,
    QuantizeError,
    agreement,
    corrected_bias,
    form_bytes,
    quantize,
)
from miss.engine.runtime.smoothing import apply_fold, folds, smooth, w8a8_error
from miss.kernels import extension
from miss.kernels.quant_linear import pack_int4, pack_int8, unpack
from miss.kernels.registry import use
from miss.models.config import ConfigError, MissConfig, PreprocessConfig, TextConfig, TokenConfig, VisionConfig
from miss.models.linear import QuantLinear
from miss.models.packed_loading import load_int8, load_packed
from miss.models.quantized import QuantCrossKV, linear_modules, packed_weights, use_int8, use_packed
from miss.models.tensor_file import map_tensors, read_tensors
from miss.models.vqa import MissVQA, VQABatch
from miss.models.weights import CheckpointError, load_checkpoint, save_checkpoint, saved_state, write_checkpoint

QKV = "vision.blocks.0.attention.qkv.weight"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "this", "a", "lung", "##s", "yes", "no"]


def tiny() -> MissConfig:
    text = TextConfig(14, 64, 2, 2, 160, 48, dropout=0.0, attention_dropout=0.0, source_width=64)
    return MissConfig(
        VisionConfig(12, 4, 64, 2, 2, 160),
        text,
        text,
        PreprocessConfig(12, rescale_factor=1 / 255),
        TokenConfig(pad=0, cls=2, sep=3, dec=12, enc=13),
        tie_embeddings=True,
        max_question_length=16,
        name="tiny",
    )


def make_model(scale: float = 0.15) -> MissVQA:
    torch.manual_seed(0)
    model = MissVQA(tiny()).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=scale)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_batch(seed: int = 0, rows: int = 6) -> VQABatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (rows,), generator=generator, dtype=torch.int32)
    answer_lengths = torch.randint(3, 5, (rows,), generator=generator, dtype=torch.int32)
    ids = torch.randint(5, 12, (rows, 7), generator=generator)
    answers = torch.randint(5, 12, (rows, 4), generator=generator)
    ids[:, 0], answers[:, 0] = 13, 12
    return VQABatch(
        torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8, generator=generator),
        None,
        ids.where(torch.arange(7) < lengths[:, None], 0),
        lengths,
        torch.arange(rows, dtype=torch.int32) * 2 // rows,
        answers.where(torch.arange(4) < answer_lengths[:, None], 0),
        answer_lengths,
    )


def write(folder: Path, options: Options, batches: tuple[VQABatch, ...] = ()) -> Path:
    packed = quantize(make_model(), options, batches)
    write_checkpoint(packed.config, packed.tensors, folder, quantization=packed.quantization.to_dict())
    return folder


class TestSchemes:
    @pytest.mark.parametrize(
        ("scheme", "most"), [("int8", 0.012), ("fp8", 0.03), ("int4", 0.16), ("small-mixed", 0.012)]
    )
    def test_what_is_loaded_is_near_what_was_packed(self, tmp_path: Path, scheme: str, most: float) -> None:
        original = saved_state(make_model())
        loaded, report = load_checkpoint(write(tmp_path / "c", Options(scheme)))  # type: ignore[arg-type]
        state = saved_state(loaded)
        assert state.keys() == original.keys() and not report.missing
        for name, value in original.items():
            assert state[name].dtype == torch.float32 and state[name].shape == value.shape
            gap = (state[name] - value).norm() / value.norm().clamp_min(1e-9)
            assert gap < most, (name, gap)

    def test_the_models_own_weights_become_the_packed_ones(self, tmp_path: Path) -> None:
        model = make_model()
        packed = quantize(model, Options("int4"), (make_batch(),))
        write_checkpoint(packed.config, packed.tensors, tmp_path / "c", quantization=packed.quantization.to_dict())
        loaded, _ = load_checkpoint(tmp_path / "c")
        for name, weight in linear_modules(loaded).items():
            assert torch.equal(weight.weight, linear_modules(model)[name].weight), name
        with torch.inference_mode():
            a, b = (m.encode_images(make_batch().pixels) for m in (model, loaded))  # type: ignore[arg-type]
        assert (a - b).norm() / a.norm() < 2e-3  # norms and biases in half precision

    def test_positions_are_cut(self, tmp_path: Path) -> None:
        loaded, _ = load_checkpoint(write(tmp_path / "c", Options("int8", max_positions=24)))
        assert loaded.config.encoder.max_positions == loaded.config.decoder.max_positions == 24
        kept = make_model().encoder.embeddings.position.weight[:24]
        assert torch.equal(loaded.encoder.embeddings.position.weight, kept)
        with pytest.raises(ConfigError, match="max_question_length"):
            quantize(make_model(), Options("int8", max_positions=10))

    def test_it_keeps_what_it_was_made_from(self, tmp_path: Path) -> None:
        save_checkpoint(make_model(), tmp_path / "parent")
        _, parent = load_checkpoint(tmp_path / "parent")
        values = json.loads((write(tmp_path / "c", Options("int4")) / "config.json").read_text())
        assert values["quantization"]["parent"] == parent.digest
        assert values["quantization"]["report"]["forms"] == {"int4-64": len(linear_modules(make_model()))}


class TestBudget:
    def test_bytes_are_what_is_stated(self) -> None:
        for shape in ((5, 64), (3, 160), (7, 33)):
            weight = torch.randn(shape)
            for form in FORMS:
                made = pack_int8(weight) if form == "int8" else pack_int4(weight, int(form[5:]))
                assert form_bytes(weight, form) == made.nbytes

    def test_more_bytes_give_less_error(self) -> None:
        batch = make_batch()
        most = quantize(make_model(), Options()).nbytes
        with pytest.raises(QuantizeError, match="wanted at least") as error:
            quantize(make_model(), Options(budget=1000))
        least = int(str(error.value).split("at least ")[1].replace(",", ""))
        losses = []
        for third in (0, 1, 3):
            allowed, model = least + (most - least) * third // 3, make_model()
            packed = quantize(model, Options(budget=allowed, compensate=False), (batch,))
            layouts = 48 * (len(packed.forms) + 3)  # the parts that describe the others
            assert packed.nbytes - layouts <= allowed
            with torch.inference_mode():
                parent, child = (m.encode_images(batch.pixels) for m in (make_model(), model))  # type: ignore[arg-type]
            losses.append(float((parent - child).norm() / parent.norm()))
        assert losses[0] > losses[1] > losses[2]

    def test_what_matters_to_the_answers_gets_the_bytes(self) -> None:
        model = make_model()
        with torch.no_grad():  # an image encoder that the joint encoder hardly reads
            model.encoder.cross_kv.weight.mul_(1e-3)
        free = quantize(make_model(), Options()).nbytes
        packed = quantize(model, Options(budget=free * 8 // 10, compensate=False), (make_batch(),))
        share = {
            tower: np.mean([form == "int8" for name, form in packed.forms.items() if name.startswith(tower)])
            for tower in ("vision", "decoder")
        }
        assert share["decoder"] > share["vision"]


class TestCompensation:
    @settings(max_examples=10, deadline=None)
    @given(st.integers(16, 40), st.sampled_from([33, 64, 100]), st.sampled_from([32, 64]), st.integers(0, 99))
    def test_it_lowers_the_error_of_the_outputs(self, rows: int, columns: int, group: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, columns, generator=generator)
        # Inputs that go together, as those of a network do.
        hidden = torch.randn(400, columns // 4, generator=generator)
        mixing = torch.randn(columns // 4, columns, generator=generator)
        x = hidden @ mixing
        hessian = x.T @ x / len(x) + 0.05 * torch.eye(columns)
        plain = unpack(pack_int4(weight, group, importance=hessian.diagonal()))
        compensated = unpack(pack_int4_compensated(weight, hessian, group))
        assert output_error(weight, compensated, hessian) < 0.8 * output_error(weight, plain, hessian)

    def test_independent_inputs_leave_nothing_to_compensate(self) -> None:
        weight = torch.randn(8, 64)
        a, b = pack_int4(weight, 32), pack_int4_compensated(weight, torch.eye(64), 32)
        torch.testing.assert_close(unpack(a), unpack(b))

    def test_inputs_that_are_always_zero_or_too_few(self) -> None:
        weight = torch.randn(4, 64)
        hessian = torch.zeros(64, 64)
        assert torch.isfinite(unpack(pack_int4_compensated(weight, hessian, 32))).all()
        hessian[0, 0] = 1.0
        packed = unpack(pack_int4_compensated(weight, hessian, 32))
        assert (packed - weight).norm() / weight.norm() < 0.2

    def test_the_bias_keeps_the_mean_output(self) -> None:
        torch.manual_seed(0)
        weight, bias, x = torch.randn(6, 64), torch.randn(6), torch.randn(500, 64) + 1
        moments = Moments(torch.zeros(64, 64), torch.zeros(64), torch.zeros(6))
        moments.add(x, torch.ones(500, 6))
        packed = pack_int4(weight, 32)
        new = corrected_bias(bias, weight, packed, moments)
        got, want = (x @ unpack(packed).T + new).mean(0), (x @ weight.T + bias).mean(0)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


class TestCalibration:
    def test_moments_are_those_of_the_real_tokens(self) -> None:
        model, batch = make_model(), make_batch()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        moments = collect(model, [batch], lambda name: name.endswith(("qkv.weight", "mlp.input.weight")))
        assert len(moments) == 12
        question_tokens = int(batch.question_lengths.sum())
        # A padding position's query may read, but nothing reads it: it must not count.
        assert moments["encoder.layers.1.mlp.input.weight"].tokens == question_tokens
        assert moments["decoder.layers.1.mlp.input.weight"].tokens == int((batch.answer_lengths - 1).sum())
        assert moments["vision.blocks.0.mlp.input.weight"].tokens == 2 * 10
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert "gelu" not in vars(model.decoder.layers[0].mlp.input)

    def test_weights_of_tokens(self) -> None:
        x = torch.eye(3, 4)
        moments = Moments(torch.zeros(4, 4), torch.zeros(4), torch.zeros(2))
        moments.add(x, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]]))
        assert moments.tokens == 2
        # Sizes 1 and 9, mean 5: 0.2 is raised to the floor of one half.
        torch.testing.assert_close(moments.inputs.diagonal(), torch.tensor([0.0, 0.5, 1.8, 0.0]))
        torch.testing.assert_close(moments.hessian.diagonal(), torch.tensor([0.0, 0.5, 1.8, 0.0]) / 2.3)
        torch.testing.assert_close(moments.outputs, torch.tensor([1.0, 9.0]))

    def test_agreement(self) -> None:
        model, batch = make_model(), make_batch()
        same = agreement(model, make_model(), [batch])
        assert same["rows"] == 6 and same["same_tokens"] == 1.0 and same["loss"] == pytest.approx(same["parent_loss"])
        other = agreement(model, make_model(0.3), [batch])
        assert other["same_tokens"] < 1.0


class TestPackedModules:
    def test_packed_layers_compute_what_unpacked_ones_do(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "c", Options("int4"))
        dense, _ = load_checkpoint(folder)
        packed, _ = load_checkpoint(folder)
        use_packed(packed, packed_weights(load_file(folder / "model.safetensors")))
        assert isinstance(packed.encoder.cross_kv, QuantCrossKV) and not linear_modules(packed)
        with torch.inference_mode():
            a, b = (m(make_batch()).loss_per_row for m in (dense, packed))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

    def test_int8_on_the_fly(self) -> None:
        with torch.inference_mode():
            want = make_model()(make_batch()).loss_per_row
            for dynamic in (False, True):
                got = use_int8(make_model(), dynamic)(make_batch()).loss_per_row
                assert (got - want).abs().max() / want.abs().max() < 0.05


class TestInt8:
    """Weights and activations: scaled channels, layers that keep their activations, what a report says."""

    def outliers(self) -> MissVQA:
        """Channels 40 times as large in front of every product that something can take them up for."""
        model = make_model()
        with torch.no_grad():
            for block in model.vision.blocks:
                block.norm1.weight[5] *= 40  # type: ignore[union-attr]
                block.norm2.bias[9] += 30  # type: ignore[union-attr]
        return model

    def test_scaling_changes_nothing_but_where_the_large_numbers_are(self) -> None:
        model, same = self.outliers(), self.outliers()
        moments = collect(model, [make_batch()], lambda name: True)
        before = w8a8_error(model.vision.blocks[0].attention.qkv.weight, moments[QKV].sample)  # type: ignore[union-attr,arg-type]
        alphas = smooth(model, saved_state(model), moments)
        assert {QKV, "vision.blocks.1.mlp.input.weight"} <= alphas.keys()
        after = w8a8_error(model.vision.blocks[0].attention.qkv.weight, moments[QKV].sample)  # type: ignore[union-attr,arg-type]
        assert after < 0.5 * before
        with torch.inference_mode():
            a, b = (m(make_batch()).loss_per_row for m in (model, same))
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)

    def test_every_fold_is_exact(self) -> None:
        model, same = make_model(), make_model()
        tensors, found = saved_state(model), list(folds(model))
        assert len(found) == 2 * 3 + 2 * 2 * 2  # a block's two norms and values; a text layer's two attentions
        for fold in found:
            scale = torch.rand(tensors[fold.layer].shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
            apply_fold(tensors, fold, scale)
        with torch.inference_mode():
            a, b = (m(make_batch()).loss_per_row for m in (model, same))
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)

    def test_compensated_rows_lower_the_error_of_the_outputs(self) -> None:
        torch.manual_seed(0)
        weight, x = torch.randn(24, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        hessian = x.T @ x / len(x) + 0.05 * torch.eye(64)
        plain, compensated = pack_int8(weight), pack_int8_compensated(weight, hessian, dynamic=True)
        assert compensated.dynamic and torch.equal(compensated.scale, plain.scale)
        assert output_error(weight, unpack(compensated), hessian) < 0.5 * output_error(weight, unpack(plain), hessian)

    def test_a_share_of_the_products_keeps_its_activations(self, tmp_path: Path) -> None:
        losses = []
        for share in (0.0, 1.0):
            packed = quantize(make_model(), Options("int8", float_share=share, compensate=False), (make_batch(),))
            forms = set(packed.forms.values())
            assert forms == ({"w8a8"} if share == 0 else forms | {"bf16", "int8"})  # a last one may not fit
            assert all(row["error"] > 0 for row in packed.quantization.report["layers"].values())
            assert set(packed.quantization.kept) == {n for n, form in packed.forms.items() if form == "bf16"}
            folder = tmp_path / str(share)
            write_checkpoint(packed.config, packed.tensors, folder, quantization=packed.quantization.to_dict())
            model, _, read = load_packed(folder)
            assert read.kept == packed.quantization.kept
            with torch.inference_mode():
                losses.append(model(make_batch()).loss_per_row)
        with torch.inference_mode():
            want = make_model()(make_batch()).loss_per_row
        errors = [(got - want).norm() for got in losses]
        assert errors[1] < 0.7 * errors[0] < 0.05 * want.norm()

    def test_the_report_names_every_layer(self) -> None:
        packed = quantize(self.outliers(), Options("int8", float_share=0.0), (make_batch(),))
        layers = packed.quantization.report["layers"]
        assert layers.keys() == linear_modules(make_model()).keys()
        assert all(row["form"] == "w8a8" and 0 < row["error"] < 0.2 for row in layers.values())
        assert 0 < layers[QKV]["alpha"] < 1

    @pytest.mark.parametrize(
        ("same", "right", "passed"), [(990, 797, True), (989, 800, False), (1000, 796, False), (990, 900, True)]
    )
    def test_the_gate(self, same: int, right: int, passed: bool) -> None:
        gate = judged(1000, same, 800, right)
        assert gate["passed"] is passed and verdict({"gate": gate})[0] is passed and bool(gate["why"]) is not passed
        assert not judged(999, 999, 800, 800)["passed"] and verdict({}) == (False, verdict({})[1])


class TestRunsPacked:
    """Loaded without the original, mapped, under the precision of its scheme alone."""

    @pytest.mark.parametrize("scheme", ["int8", "int8-weight", "fp8", "int4-weight", "nf4", "llm-int8"])
    def test_the_packed_model_computes_what_the_unpacked_one_does(self, tmp_path: Path, scheme: str) -> None:
        if scheme in ("nf4", "llm-int8"):
            pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: the scheme is not tested")
        folder = write(tmp_path / "c", Options(scheme), (make_batch(),))  # type: ignore[arg-type]
        dense, _ = load_checkpoint(folder)
        packed, report, quantization = load_packed(folder)
        assert quantization.scheme == scheme and len(report.digest) == 64
        assert linear_modules(packed).keys() == set(quantization.kept)
        with torch.inference_mode():
            a, b = (m.prepare()(make_batch()).loss_per_row for m in (dense, packed))
        assert (a - b).norm() / a.norm() < (1e-4 if scheme in ("int8-weight", "int4-weight", "nf4") else 0.03)

    def test_fp8_reports_and_is_never_autos_choice(self, tmp_path: Path) -> None:
        """Errors stand in the report with the inputs rounded to float8 too; auto on a CPU, which has no such product,
        runs it unpacked whatever the gate says."""
        packed = quantize(make_model(), Options("fp8"), (make_batch(),))
        report = packed.quantization.report
        assert report["forms"] == {"fp8": len(linear_modules(make_model()))} and packed.quantization.kept == []
        assert all(row["form"] == "fp8" and 0.005 < row["error"] < 0.06 for row in report["layers"].values())
        assert packed.nbytes < 0.45 * report["bytes_before"]
        quantization = packed.quantization.to_dict()
        quantization["report"] = report | {"gate": judged(1000, 1000, 800, 800)}
        write_checkpoint(packed.config, packed.tensors, tmp_path / "c", quantization=quantization)
        dense, loaded = load_model(tmp_path / "c", "auto", "cpu")
        assert linear_modules(dense) and "no float8 product" in loaded.notes[0]
        model, _ = load_model(tmp_path / "c", "fp8", "cpu")
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert layers and not linear_modules(model)
        assert all(layer.packed.data.dtype == torch.float8_e4m3fn and not layer.takes_codes for layer in layers)
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        save_checkpoint(make_model(), tmp_path / "plain")
        with pytest.raises(ValueError, match="--scheme fp8` makes one"):
            load_model(tmp_path / "plain", "fp8", "cpu")

    @pytest.mark.parametrize(
        ("capability", "refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)]
    )
    def test_fp8_wants_a_gpu_that_has_it(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        check_float8("cpu")
        if not refused:
            check_float8("cuda")
            return
        with pytest.raises(ValueError, match=r"a GPU has compute capability 8\.\d; float8 products need 8\.9"):
            check_float8("cuda:1")

    def test_packed_bytes_stay_in_the_file(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "c", Options("int8-weight"))
        tensors = map_tensors(folder / "model.safetensors").tensors
        whole = {value.untyped_storage().data_ptr() for value in tensors.values()}
        assert len(whole) == 1  # views of one mapping
        read, _ = read_tensors(folder / "model.safetensors")
        assert all(torch.equal(tensors[name], value) for name, value in read.items()) and tensors.keys() == read.keys()
        file = map_tensors(folder / "model.safetensors")
        before = {name: value.clone() for name, value in file.tensors.items()}
        file.forget()  # what was read is read again
        assert all(torch.equal(file.tensors[name], value) for name, value in before.items())
        model, _, _ = load_packed(folder, dtype=torch.bfloat16)
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        mapped = {layer.packed.data.untyped_storage().nbytes() for layer in layers}
        assert mapped == {(folder / "model.safetensors").stat().st_size}
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())

    @pytest.mark.parametrize("scheme", ["int8", "int8-weight", "int4-weight"])
    def test_laid_out_as_it_is_read(self, tmp_path: Path, scheme: str) -> None:
        folder = write(tmp_path / "c", Options(scheme))  # type: ignore[arg-type]
        model, at_once = load_packed(folder)[0], load_packed(folder, prepared=True)[0]
        assert at_once.state_dict().keys() == model.state_dict().keys()
        with torch.inference_mode():
            assert torch.equal(at_once(make_batch()).loss_per_row, model.prepare()(make_batch()).loss_per_row)
        del model
        for layer in (m for m in at_once.modules() if isinstance(m, QuantLinear)):
            assert layer.packed.prepared is not None or extension.missing() is not None
        if scheme != "int4-weight" and extension.missing() is None and Path("/proc/self/maps").exists():
            assert str(folder) not in Path("/proc/self/maps").read_text()  # nothing reads the file any more

    def test_int8_of_a_plain_checkpoint_is_made_as_it_is_read(self, tmp_path: Path) -> None:
        folder = tmp_path / "c"
        save_checkpoint(make_model(), folder)
        dense, before = load_checkpoint(folder)
        want = use_int8(dense.to(torch.bfloat16))
        for prepared in (False, True):
            model, report = load_int8(folder, prepared=prepared)
            assert report == before
            assert not any(p.requires_grad for p in model.parameters())
            for (name, a), (_, b) in zip(model.named_modules(), want.named_modules(), strict=True):
                if isinstance(a, QuantLinear):
                    assert torch.equal(unpack(a.packed), unpack(b.packed)), name  # type: ignore[union-attr,arg-type]
            state = want.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
            with torch.inference_mode():
                got, wanted = (m.prepare()(make_batch()).loss_per_row for m in (model, want))
            assert torch.equal(got, wanted)
        whole = bytearray((folder / "model.safetensors").read_bytes())
        whole[-5000] ^= 1
        (folder / "model.safetensors").write_bytes(whole)
        with pytest.raises(CheckpointError, match="altered"):
            load_int8(folder)
        values = saved_state(make_model())
        save_file({n: v for n, v in values.items() if n != QKV}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"missing: {QKV}"):
            load_int8(folder)

    def test_a_prepared_model_goes_on_with_other_rows_and_stays_the_same(self, tmp_path: Path) -> None:
        """Its rows are given up: who wants them gets them out of the panels."""
        save_checkpoint(make_model(), tmp_path / "c")
        model = load_model(tmp_path / "c", "int8", "cpu")[0].float()
        with torch.inference_mode():
            want = model(make_batch()).loss_per_row
            with use(quant_linear_w8a8="reference", quant_linear_rows="reference"):
                torch.testing.assert_close(model(make_batch()).loss_per_row, want, atol=1e-3, rtol=1e-3)
        assert torch.equal(model.to("cpu")(make_batch()).loss_per_row, want)

    def test_auto_takes_what_passed_the_gate(self, tmp_path: Path) -> None:
        for passed in (True, False, None):
            packed = quantize(make_model(), Options("int8"))
            report = {} if passed is None else {"gate": judged(1000, 1000 if passed else 900, 800, 800)}
            quantization = packed.quantization.to_dict() | {"report": report}
            write_checkpoint(packed.config, packed.tensors, tmp_path / "c", quantization=quantization)
            model, loaded = load_model(tmp_path / "c", "auto", "cpu")
            assert bool(linear_modules(model)) is not bool(passed)
            assert len(loaded.notes) == 1
            assert ("passed the agreement" if passed else "--precision int8") in loaded.notes[0]
            assert not linear_modules(load_model(tmp_path / "c", "int8", "cpu")[0])
            dense, loaded = load_model(tmp_path / "c", "fp32", "cpu")
            assert linear_modules(dense) and "unpacked" in loaded.notes[0]
            with pytest.raises(ValueError, match="carries int8"):
                load_model(tmp_path / "c", "nf4", "cpu")

    def test_storage_schemes_stay_as_they_were(self, tmp_path: Path) -> None:
        write(tmp_path / "c", Options("small-mixed"))
        model, report = load_model(tmp_path / "c", "auto", "cpu")
        assert linear_modules(model) and report.notes == ()
        assert not linear_modules(load_model(tmp_path / "c", "int8", "cpu")[0])

    @pytest.mark.parametrize("damage", ["truncated", "header", "byte", "config"])
    def test_damage(self, tmp_path: Path, damage: str) -> None:
        folder = write(tmp_path / "c", Options("int8"))
        path = folder / "model.safetensors"
        whole = bytearray(path.read_bytes())
        if damage == "truncated":
            path.write_bytes(whole[:-1000])
        elif damage == "config":
            values = json.loads((folder / "config.json").read_text())
            values["vision"]["intermediate_size"] = 128
            (folder / "config.json").write_text(json.dumps(values))
        else:
            whole[{"header": 100, "byte": len(whole) - 5000}[damage]] ^= 1
            path.write_bytes(whole)
        with pytest.raises(CheckpointError, match="truncated|altered|fit"):
            load_packed(folder)

    def test_a_layer_that_is_stated_to_be_kept_but_is_packed(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "c", Options("int8"))
        values = json.loads((folder / "config.json").read_text())
        values["quantization"]["kept"] = [QKV]
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=f"stated to be kept: {QKV}"):
            load_packed(folder)

    def test_a_plain_checkpoint_is_refused(self, tmp_path: Path) -> None:
        save_checkpoint(make_model(), tmp_path / "c")
        with pytest.raises(CheckpointError, match="not packed"):
            load_packed(tmp_path / "c")


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return write(tmp_path / "c", Options("int4"))

    def rewrite(self, folder: Path, change) -> None:  # type: ignore[no-untyped-def]
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")  # without digests, as another program would

    def test_a_missing_part(self, folder: Path) -> None:
        name = "encoder.layers.0.mlp.input.weight"
        self.rewrite(folder, lambda t: t.pop(f"{name}.scale"))
        with pytest.raises(CheckpointError, match=f"{name}.scale"):
            load_checkpoint(folder)

    def test_a_part_of_another_shape(self, folder: Path) -> None:
        name = "encoder.layers.0.mlp.input.weight"
        self.rewrite(folder, lambda t: t.update({f"{name}.data": t[f"{name}.data"][1:].clone()}))
        with pytest.raises(CheckpointError, match=f"{name}.data"):
            load_checkpoint(folder)

    def test_another_shape_altogether(self, folder: Path) -> None:
        name = "encoder.layers.0.mlp.input.weight"
        other = "decoder.head.transform.weight"
        parts = ("data", "scale", "layout")
        self.rewrite(folder, lambda t: t.update({f"{name}.{p}": t[f"{other}.{p}"].clone() for p in parts}))
        with pytest.raises(CheckpointError, match=rf"{name} is \[64, 64\]"):
            load_checkpoint(folder)

    def test_an_altered_byte(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        whole = bytearray(path.read_bytes())
        whole[-5000] ^= 1
        path.write_bytes(whole)
        with pytest.raises(CheckpointError, match="altered"):
            load_checkpoint(folder)

    @pytest.mark.parametrize("change", [{"colour": 1}, {"version": 2}, {"shapes": {"vision.patch_embed.weight": [3]}}])
    def test_a_description_that_does_not_fit(self, folder: Path, change: dict[str, object]) -> None:
        values = json.loads((folder / "config.json").read_text())
        values["quantization"].update(change)
        (folder / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match="packed tensors do not fit"):
            load_checkpoint(folder)


class TestCommand:
    @pytest.fixture
    def parent(self, tmp_path: Path) -> Path:
        (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        save_checkpoint(make_model(), tmp_path / "parent", tokenizer=build_tokenizer(tmp_path / "vocab.txt"))
        return tmp_path / "parent"

    def test_calibrated_within_a_budget(self, tmp_path: Path, parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = []
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
            row = {"image": f"{i}.png", "question": "is this a lung", "answer": "yes"}
            rows += [{"qid": f"{i}.{k}", **row} for k in range(3)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags = ["--dataset", "jsonl", "--data", str(tmp_path / "rows.jsonl"), "--num-images", "2"]
        flags += ["--check-split", "train"]
        budget = 260_000
        command = ["quantize", str(parent), str(tmp_path / "c"), "--budget", str(budget), "--max-positions", "24"]
        assert run([*command, *flags]) == 0
        total = sum(file.stat().st_size for file in (tmp_path / "c").iterdir())
        assert budget * 0.7 < total <= budget
        loaded, _ = load_checkpoint(tmp_path / "c")
        report = json.loads((tmp_path / "c/config.json").read_text())["quantization"]["report"]
        assert report["agreement"]["rows"] == 6 and report["calibration_rows"] == 6
        assert (tmp_path / "c/tokenizer.json").read_bytes() == (parent / "tokenizer.json").read_bytes()
        assert loaded.config.encoder.max_positions == 24
        assert f"{total:,} bytes" in capsys.readouterr().out

    def test_int8_is_held_against_its_parent(
        self, tmp_path: Path, parent: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = []
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
            rows += [{"qid": f"{i}.{k}", "image": f"{i}.png", "question": "is a lung", "answer": "yes"} for k in "ab"]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags = ["--dataset", "jsonl", "--data", str(tmp_path / "rows.jsonl"), "--check-split", "train"]
        for _ in range(2):  # the card keeps one section
            assert run(["quantize", str(parent), str(tmp_path / "c"), "--scheme", "int8", "--overwrite", *flags]) == 0
        report = json.loads((tmp_path / "c/config.json").read_text())["quantization"]["report"]
        assert report["answers"]["table"]["all"]["questions"] == report["gate"]["questions"] == 4
        assert not report["gate"]["passed"] and "at least 1000" in report["gate"]["why"][0]
        assert len(report["answers"]["changed"]) == 4 - report["answers"]["table"]["all"]["same"]
        assert report["layers"].keys() == linear_modules(make_model()).keys()
        card = (tmp_path / "c/README.md").read_text()
        assert card.count("## How it was packed") == 1 and "not passed" in card and "McNemar" in card
        assert "at least 1000" in load_model(tmp_path / "c", "auto", "cpu")[1].notes[0]
        assert "gate" in capsys.readouterr().out

    @pytest.mark.skipif(not (CHECKPOINTS / "miss-small").is_dir(), reason="the shipped checkpoint is not here")
    def test_fp8_of_the_shipped_checkpoint_answers(self, tmp_path: Path) -> None:
        """Packed by the command line, with its tables and its parent's as the torch row multiplies them on a CPU."""
        source, image = CHECKPOINTS / "miss-small", tmp_path / "image.png"
        Image.new("RGB", (64, 64), (90, 120, 60)).save(image)
        assert run(["quantize", str(source), str(tmp_path / "c"), "--scheme", "fp8"]) == 0
        report = json.loads((tmp_path / "c/config.json").read_text())["quantization"]["report"]
        assert max(row["error"] for row in report["layers"].values()) < 0.04  # e4m3 has steps of 6 %
        questions = ("is this an x-ray?", "what organ is shown?")
        parent, engine = Engine.load(source, "fp32"), Engine.load(tmp_path / "c", "fp8")
        for question in questions:
            wanted, got = (e.answer(image, question, SamplingParams(num_alternatives=0)) for e in (parent, engine))
            assert got.text and got.logprob == pytest.approx(wanted.logprob, abs=0.7)

    def test_refusals(self, tmp_path: Path, parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for flags, reason in (
            ([str(tmp_path / "none"), str(tmp_path / "c")], "no such file"),
            ([str(parent), str(parent)], "--overwrite"),
            ([str(parent), str(tmp_path / "c"), "--budget", "1000"], "budget"),
        ):
            assert run(["quantize", *flags]) == 1
            error = capsys.readouterr().err
            assert reason in error and error.count("\n") == 1
            assert not (tmp_path / "c").exists()
        with pytest.raises(SystemExit) as code:
            run(["quantize", str(parent), str(tmp_path / "c"), "--scheme", "int5"])
        assert code.value.code == 2

    def test_a_packed_folder_converts_back(self, tmp_path: Path, parent: Path) -> None:
        assert run(["quantize", str(parent), str(tmp_path / "c"), "--scheme", "int8"]) == 0
        assert run(["convert", str(tmp_path / "c"), str(tmp_path / "dense")]) == 0
        a, b = (saved_state(load_checkpoint(tmp_path / name)[0]) for name in ("c", "dense"))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert "quantization" not in json.loads((tmp_path / "dense/config.json").read_text())
