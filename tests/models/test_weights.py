"""Checkpoint folders and names: nothing is lost on the way, nothing wrong gets in."""

import csv
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miss.models.config import ConfigError, MissConfig, PreprocessConfig, TextConfig, VisionConfig
from miss.models.conversion import Choices, untied
from miss.models.files import atomic_folder
from miss.models.fitting import CheckpointError, fit, fresh_tensor
from miss.models.hugging_face import from_hf, hf_files, to_hf
from miss.models.names import TIED_COPIES, Depths, entries, split, stack
from miss.models.original import from_original, to_original
from miss.models.tensor_file import digest
from miss.models.vqa import MissVQA
from miss.models.weights import load_checkpoint, model_shapes, save_checkpoint, saved_state, write_checkpoint

FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "generation_config.json", "README.md")


def tiny(
    vision_layers: int = 1, encoder_layers: int = 2, decoder_layers: int = 2, tie: bool = True, width: int = 8
) -> MissConfig:
    text = TextConfig(60, width, encoder_layers, 2, 2 * width, 16, source_width=width)
    return MissConfig(
        VisionConfig(12, 4, width, vision_layers, 2, 2 * width),
        text,
        replace(text, num_layers=decoder_layers),
        PreprocessConfig(image_size=12),
        tie_embeddings=tie,
        max_question_length=16,
        name="tiny",
        **{"generation": replace(MissConfig().generation, max_new_tokens=5)},
    )


def random_tensors(config: MissConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in model_shapes(config).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(MissVQA(tiny()), tmp_path / "saved")
    return tmp_path / "saved"


class TestFolder:
    def test_round_trip_is_bit_equal_and_reported(self, saved: Path) -> None:
        model, report = load_checkpoint(saved)
        assert sorted(p.name for p in saved.iterdir()) == sorted(FILES)
        assert model.config == tiny()
        assert same(saved_state(model), load_file(saved / "model.safetensors"))
        assert len(report.matched) == len(model_shapes(tiny())) and not report.missing and not report.unexpected
        assert report.digest == digest(saved_state(model))
        assert not model.training

    def test_the_same_model_makes_the_same_files(self, saved: Path, tmp_path: Path) -> None:
        for i in range(4):
            save_checkpoint(load_checkpoint(saved)[0], tmp_path / f"copy{i}")
            for name in FILES:
                assert (tmp_path / f"copy{i}" / name).read_bytes() == (saved / name).read_bytes(), name

    def test_a_shared_table_is_saved_once_and_stays_shared(self, saved: Path) -> None:
        assert not any(name.startswith("decoder.embeddings") for name in load_file(saved / "model.safetensors"))
        model, _ = load_checkpoint(saved)
        assert model.decoder.embeddings.word.weight is model.encoder.embeddings.word.weight

    def test_parameters_of_a_loaded_model_are_its_own(self, saved: Path) -> None:
        model, _ = load_checkpoint(saved)
        parameters = list(model.parameters())
        assert all(p.requires_grad and p.device.type == "cpu" for p in parameters)
        assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)

    def test_the_file_may_vanish_under_a_loaded_model(self, saved: Path) -> None:
        model, report = load_checkpoint(saved)
        (saved / "model.safetensors").write_bytes(b"")
        assert digest(saved_state(model)) == report.digest

    def test_dtype_and_the_files_it_was_given(self, tmp_path: Path) -> None:
        model = MissVQA(tiny())
        save_checkpoint(model, tmp_path / "c", card="# mine", files={"recipe.yaml": b"seed: 1\n"})
        assert (tmp_path / "c/README.md").read_text() == "# mine"
        assert (tmp_path / "c/recipe.yaml").read_bytes() == b"seed: 1\n"
        save_checkpoint(model, tmp_path / "c")  # keeps what it does not write
        assert (tmp_path / "c/README.md").read_text() == "# mine" and (tmp_path / "c/recipe.yaml").exists()
        loaded, _ = load_checkpoint(tmp_path / "c", dtype=torch.bfloat16)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}

    def test_the_default_card_says_what_it_is_not_for(self, saved: Path) -> None:
        assert "not for diagnosis" in (saved / "README.md").read_text().lower()


class TestDamage:
    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
    def test_truncated_weights(self, saved: Path, share: float) -> None:
        path = saved / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(CheckpointError, match="model.safetensors"):
            load_checkpoint(saved)

    def test_any_altered_byte_of_the_weights_is_noticed(self, saved: Path) -> None:
        path = saved / "model.safetensors"
        whole = path.read_bytes()
        places = torch.randint(len(whole), (60,), generator=torch.Generator().manual_seed(1)).tolist()
        for place in [0, 7, 8, len(whole) - 1, *places]:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            with pytest.raises((CheckpointError, ConfigError)):
                load_checkpoint(saved)
        path.write_bytes(whole)
        load_checkpoint(saved)

    @pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
    def test_an_altered_meaning_is_noticed(self, saved: Path, name: str) -> None:
        values = json.loads((saved / name).read_text())
        values |= {"behaviour": "compat"} if name == "config.json" else {"resample": "bicubic"}
        (saved / name).write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=f"{name}: altered"):
            load_checkpoint(saved)
        load_checkpoint(saved, verify=False)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
    def test_missing_file(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name}: no such file"):
            load_checkpoint(saved)

    def test_unknown_config_key(self, saved: Path) -> None:
        values = json.loads((saved / "config.json").read_text())
        values["encoder"]["num_layer"] = 2
        (saved / "config.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=r"config.json: unknown key encoder.num_layer \(did you mean num_layers"):
            load_checkpoint(saved)

    def test_config_that_is_not_json(self, saved: Path) -> None:
        (saved / "config.json").write_text('{"vision": ')
        with pytest.raises(CheckpointError, match="config.json: not JSON"):
            load_checkpoint(saved)

    def test_someone_elses_folder(self, saved: Path) -> None:
        (saved / "config.json").write_text('{"model_type": "blip"}')
        with pytest.raises(CheckpointError, match="miss convert"):
            load_checkpoint(saved)

    def test_config_of_another_size_names_the_tensors(self, saved: Path) -> None:
        values = json.loads((saved / "config.json").read_text())
        values["decoder"]["intermediate_size"] = 24
        (saved / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=r"decoder.layers.0.mlp.input.weight is \[16, 8\].*wanted \[24, 8\]"):
            load_checkpoint(saved)


class TestStrictness:
    def write(self, folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
        write_checkpoint(tiny(), tensors, folder)
        return folder

    def test_missing_tensor(self, tmp_path: Path) -> None:
        tensors = random_tensors(tiny())
        del tensors["vision.norm.bias"], tensors["decoder.cross_kv.weight"]
        folder = self.write(tmp_path / "c", tensors)
        with pytest.raises(CheckpointError, match="missing: vision.norm.bias, decoder.cross_kv.weight"):
            load_checkpoint(folder)
        with pytest.raises(CheckpointError, match="missing: vision.norm.bias"):
            load_checkpoint(folder, allow_missing=["decoder.*"])
        model, report = load_checkpoint(folder, allow_missing=["decoder.*", "vision.norm.*"])
        assert report.missing == ("vision.norm.bias", "decoder.cross_kv.weight")
        assert torch.equal(model.vision.norm.bias, torch.zeros(8))
        again, _ = load_checkpoint(folder, allow_missing=["*"])
        assert torch.equal(model.decoder.cross_kv.weight, again.decoder.cross_kv.weight)
        assert 0.01 < model.decoder.cross_kv.weight.std() < 0.03

    def test_unexpected_tensor(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path / "c", random_tensors(tiny()) | {"extra.weight": torch.ones(1)})
        with pytest.raises(CheckpointError, match="unexpected: extra.weight"):
            load_checkpoint(folder)
        _, report = load_checkpoint(folder, allow_unexpected=["extra.*"])
        assert report.unexpected == ("extra.weight",)

    def test_wrong_shape_and_wrong_kind(self, tmp_path: Path) -> None:
        tensors = random_tensors(tiny())
        tensors["vision.norm.bias"] = torch.zeros(7)
        tensors["vision.norm.weight"] = torch.zeros(8, dtype=torch.int32)
        folder = self.write(tmp_path / "c", tensors)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(folder, allow_missing=["*"], allow_unexpected=["*"], allow_resize=True)
        assert "vision.norm.bias is [7] float32, wanted [8]" in str(error.value)
        assert "vision.norm.weight is [8] int32" in str(error.value)

    def test_positions_are_resized_on_request_alone(self, tmp_path: Path) -> None:
        tensors = random_tensors(tiny()) | {"vision.position_embedding": torch.randn(1, 17, 8)}
        folder = self.write(tmp_path / "c", tensors)
        with pytest.raises(CheckpointError, match="vision.position_embedding"):
            load_checkpoint(folder)
        model, report = load_checkpoint(folder, allow_resize=True)
        assert [(r.before, r.after) for r in report.resized] == [((1, 17, 8), (1, 10, 8))]
        assert "vision.position_embedding" not in report.matched
        assert torch.equal(model.vision.position_embedding[:, 0], tensors["vision.position_embedding"][:, 0])

    def test_positions_of_another_width_or_no_square_are_not(self) -> None:
        expected = {"vision.position_embedding": (1, 10, 8)}
        for shape in ((1, 17, 6), (1, 16, 8), (17, 8)):
            with pytest.raises(CheckpointError, match="wrong shape"):
                fit(expected, {"vision.position_embedding": torch.zeros(shape)}, allow_resize=True)

    def test_fresh_tensors_are_the_same_in_any_order(self) -> None:
        a = fresh_tensor("a.weight", (3, 4), seed=5)
        torch.manual_seed(99)
        assert torch.equal(a, fresh_tensor("a.weight", (3, 4), seed=5))
        assert not torch.equal(a, fresh_tensor("b.weight", (3, 4), seed=5))
        assert not torch.equal(a, fresh_tensor("a.weight", (3, 4), seed=6))


class TestAtomic:
    def test_a_failed_write_leaves_the_old_folder(self, saved: Path) -> None:
        before = {p.name: p.read_bytes() for p in saved.iterdir()}
        with pytest.raises(RuntimeError), atomic_folder(saved) as temporary:
            (temporary / "config.json").write_text("half")
            raise RuntimeError
        assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
        assert [p.name for p in saved.parent.iterdir()] == ["saved"]

    def test_a_killed_write_leaves_the_old_folder_and_the_next_cleans_up(self, saved: Path) -> None:
        script = textwrap.dedent(
            f"""
            import os, signal
            from miss.models.files import atomic_folder
            with atomic_folder({str(saved)!r}) as temporary:
                (temporary / "model.safetensors").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        assert subprocess.run([sys.executable, "-c", script]).returncode == -9
        load_checkpoint(saved)
        assert len(list(saved.parent.iterdir())) == 2
        model, _ = load_checkpoint(saved)
        save_checkpoint(model, saved)
        assert [p.name for p in saved.parent.iterdir()] == ["saved"]

    def test_what_is_not_a_flat_folder_is_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "home/nested").mkdir(parents=True)
        (tmp_path / "file").write_text("x")
        for name in ("home", "file"):
            with pytest.raises(FileExistsError):
                save_checkpoint(MissVQA(tiny()), tmp_path / name)
        assert (tmp_path / "home/nested").is_dir() and (tmp_path / "file").read_text() == "x"

    def test_files_are_readable_as_the_umask_says(self, saved: Path) -> None:
        mask = os.umask(0)
        os.umask(mask)
        assert {p.stat().st_mode & 0o777 for p in saved.iterdir()} == {0o666 & ~mask}


class TestNames:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["original", "hf"]))
    def test_there_and_back_at_any_depth(self, vision: int, encoder: int, decoder: int, family: str) -> None:
        config = tiny(vision, encoder, decoder, tie=False)
        tensors = random_tensors(config)
        table = entries(Depths(vision, encoder, decoder), family)  # type: ignore[arg-type]
        theirs = split(table, tensors)
        assert len({t.untyped_storage().data_ptr() for t in theirs.values()}) == len(theirs)
        back, lacking = stack(table, theirs)
        assert same(back, tensors) and not lacking

    def test_what_is_stacked_and_in_which_order(self) -> None:
        config = tiny(tie=False)
        tensors = random_tensors(config)
        theirs = to_original(config, tensors)
        layer = "text_decoder.bert.encoder.layer.1"
        stacked = [theirs[f"{layer}.attention.self.{p}.weight"] for p in ("query", "key", "value")]
        assert torch.equal(torch.cat(stacked), tensors["decoder.layers.1.self_attention.qkv.weight"])
        assert torch.equal(theirs[f"{layer}.crossattention.self.key.bias"], tensors["decoder.cross_kv.bias"][16:24])
        assert torch.equal(theirs[f"{layer}.crossattention.self.value.bias"], tensors["decoder.cross_kv.bias"][24:])

    def test_two_layers_have_exactly_these_original_names(self) -> None:
        assert set(to_original(tiny(2, 2, 2), random_tensors(tiny(2, 2, 2)))) == expected_original(2)

    def test_every_key_of_the_original_is_accounted_for(self) -> None:
        path = Path(__file__).parents[3] / "shared/docs/miss_state_dict_keys.tsv"
        if not path.is_file():
            pytest.skip("miss_state_dict_keys.tsv is not beside the repository")
        rows = [row for row in csv.reader(path.open(), delimiter="\t") if not row[0].startswith("#")]
        # Narrow stand-ins of the right depth: names do not depend on widths.
        vqa = {row[1]: row[3].split(" ")[0] for row in rows if row[0] == "vqa480"}
        config = tiny(12, 12, 12, tie=False, width=4)
        tensors = random_tensors(config)
        original = to_original(config, tensors)
        assert set(original) == set(vqa)
        back = from_original(original, None, Choices(num_heads=2, text_num_heads=2), "file")
        assert same(back.tensors, tensors) and len(back.report.matched) == len(tensors)
        named = {name for name in vqa.values() if not name.startswith("(drop")}
        assert set(to_hf(config, tensors)) | set(TIED_COPIES) == named
        for mine, theirs in zip(
            entries(Depths(12, 12, 12), "original"), entries(Depths(12, 12, 12), "hf"), strict=True
        ):
            assert [vqa[name] for name in mine.theirs] == list(theirs.theirs)

        pretrain = {row[1] for row in rows if row[0] == "pretrain224"}
        state = {name: original.get(name, torch.zeros(2)) for name in pretrain}
        taken = from_original(state, None, Choices(num_heads=2, text_num_heads=2), "file")
        assert same(taken.tensors, tensors)
        assert set(taken.report.dropped) == pretrain - set(vqa) | {n for n in vqa if "position_ids" in n} | set(
            TIED_COPIES
        )


def expected_original(num_layers: int) -> set[str]:
    """Written out by hand from the original's code, apart from the table that is tested."""
    both = ("weight", "bias")
    names = {f"visual_encoder.{n}" for n in ("cls_token", "pos_embed")}
    names |= {f"visual_encoder.{n}.{k}" for n in ("patch_embed.proj", "norm") for k in both}
    for i in range(num_layers):
        for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            names |= {f"visual_encoder.blocks.{i}.{n}.{k}" for k in both}
    for tower in ("text_encoder", "text_decoder.bert"):
        names |= {f"{tower}.embeddings.{n}" for n in ("position_ids", "word_embeddings.weight")}
        names |= {
            f"{tower}.embeddings.{n}" for n in ("position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
        }
        for i in range(num_layers):
            for a in ("attention", "crossattention"):
                for n in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm"):
                    names |= {f"{tower}.encoder.layer.{i}.{a}.{n}.{k}" for k in both}
            for n in ("intermediate.dense", "output.dense", "output.LayerNorm"):
                names |= {f"{tower}.encoder.layer.{i}.{n}.{k}" for k in both}
    head = "text_decoder.cls.predictions"
    names |= {f"{head}.transform.{n}.{k}" for n in ("dense", "LayerNorm") for k in both}
    return names | {f"{head}.bias", f"{head}.decoder.weight", f"{head}.decoder.bias"}


class TestOriginal:
    choices = Choices(num_heads=2, text_num_heads=2)

    def test_sizes_come_from_shapes(self) -> None:
        config = tiny(3, 2, 1, tie=False, width=12)
        found = from_original(to_original(config, random_tensors(config)), None, self.choices, "file").config
        assert found.vision == config.vision
        assert (found.encoder, found.decoder) == (config.encoder, config.decoder)
        assert found.preprocess == PreprocessConfig(image_size=12)  # bilinear, /255 twice, no mean
        assert (found.generation.num_beams, found.generation.max_new_tokens) == (3, 9)
        assert not found.tie_embeddings

    def test_blip_preprocessing_and_behaviour(self) -> None:
        config = tiny(tie=False)
        state = to_original(config, random_tensors(config))
        found = from_original(state, None, replace(self.choices, preprocess="blip", behaviour="compat"), "file").config
        assert found.preprocess.resample == "bicubic" and found.preprocess.rescale_factor == 1 / 255
        assert found.preprocess.image_mean[0] == pytest.approx(0.48145466) and found.behaviour == "compat"

    def test_our_own_configuration_comes_back(self) -> None:
        config = replace(tiny(), preprocess=replace(tiny().preprocess, resample="bicubic"), behaviour="compat")
        tensors = random_tensors(config)
        back = from_original(to_original(config, tensors), config.to_dict(), Choices(), "file")
        assert back.config == config and same(back.tensors, tensors)

    def test_a_table_trained_apart_is_not_dropped(self) -> None:
        config = tiny()
        state = to_original(config, random_tensors(config))
        for name in (
            "text_decoder.bert.embeddings.word_embeddings.weight",
            "text_decoder.cls.predictions.decoder.weight",
        ):
            state[name] = state[name] + 1
        back = from_original(state, config.to_dict(), Choices(), "file")
        assert not back.config.tie_embeddings
        gap = back.tensors["decoder.embeddings.word.weight"] - back.tensors["encoder.embeddings.word.weight"]
        assert gap.mean() == pytest.approx(1, abs=1e-5)

    def test_shared_pretraining_tensors_are_untied(self) -> None:
        config = tiny(tie=False)
        state = to_original(config, random_tensors(config))
        for name in list(state):
            if name.startswith("text_encoder.") and ".attention." not in name:
                state[name] = state[name.replace("text_encoder.", "text_decoder.bert.")]  # one tensor, two names
        state |= {"temp": torch.ones(()), "image_queue": torch.ones(4, 8), "text_encoder_m.x.weight": torch.ones(2)}
        taken = from_original(state, None, self.choices, "file")
        assert {"temp", "image_queue", "text_encoder_m.x.weight"} <= set(taken.report.dropped)
        model = MissVQA(taken.config)
        from miss.models.weights import build

        model, _ = build(taken.config, taken.tensors)
        with torch.no_grad():
            model.encoder.embeddings.word.weight.zero_()
        assert model.decoder.embeddings.word.weight.abs().sum() > 0

    def test_a_pretrained_decoder_of_another_source_width_is_an_error_until_allowed(self) -> None:
        config = tiny(tie=False)
        config = replace(
            config,
            vision=replace(config.vision, hidden_size=12, num_heads=2),
            encoder=replace(config.encoder, source_width=12),
        )
        state = to_original(config, random_tensors(config))
        for name in list(state):
            if name.startswith("text_decoder") and name.endswith(("self.key.weight", "self.value.weight")):
                if "crossattention" in name:
                    state[name] = torch.ones(8, 12)
        with pytest.raises(CheckpointError, match="missing: decoder.cross_kv.weight, decoder.cross_kv.bias"):
            from_original(state, None, self.choices, "file")
        taken = from_original(state, None, replace(self.choices, allow_missing=["decoder.cross_kv.*"]), "file")
        assert taken.report.missing == ("decoder.cross_kv.weight", "decoder.cross_kv.bias")
        assert taken.tensors["decoder.cross_kv.weight"].shape == (32, 8)

    def test_errors_name_the_tensor(self) -> None:
        config = tiny(tie=False)
        whole = to_original(config, random_tensors(config))
        key = "text_encoder.encoder.layer.1.attention.self.key.weight"
        with pytest.raises(CheckpointError, match=f"missing: {key}"):
            from_original({k: v for k, v in whole.items() if k != key}, None, self.choices, "file")
        with pytest.raises(CheckpointError, match=f"wrong shape: {key} is"):
            from_original(whole | {key: torch.zeros(4, 8)}, None, self.choices, "file")
        with pytest.raises(CheckpointError, match="unexpected: surprise"):
            from_original(whole | {"surprise": torch.zeros(1)}, None, self.choices, "file")
        with pytest.raises(CheckpointError, match="decoder.weight differs from"):
            copy = "text_decoder.cls.predictions.decoder.weight"
            from_original(whole | {copy: whole[copy] + 1}, None, self.choices, "file")
        wrapped = {k.replace("text_encoder.", "text_encoder.base_model.model."): v for k, v in whole.items()}
        with pytest.raises(CheckpointError, match="peft.*merge"):
            from_original(wrapped, None, self.choices, "file")

    def test_image_size_resizes_positions_and_says_so(self) -> None:
        config = tiny(tie=False)
        state = to_original(config, random_tensors(config))
        taken = from_original(state, None, replace(self.choices, image_size=20), "file")
        assert (taken.config.vision.image_size, taken.config.preprocess.image_size) == (20, 20)
        assert [(r.before, r.after) for r in taken.report.resized] == [((1, 10, 8), (1, 26, 8))]
        back = from_original(state, None, replace(self.choices, image_size=12), "file")
        assert not back.report.resized


class TestHuggingFace:
    def convert(self, config: MissConfig, **changes: dict) -> MissConfig:
        files = hf_files(config)
        values = {k: v for k, v in files["config.json"].items() if k != "miss_engine"}
        for part, change in changes.items():
            target = (
                values if part == "config" else files["preprocessor_config.json"] if part == "pre" else values[part]
            )
            target.update(change)
        state = to_hf(config, random_tensors(config))
        return from_hf(
            state, values, files["preprocessor_config.json"], files["generation_config.json"], Choices(), "folder"
        ).config

    def test_without_our_own_key_the_meaning_comes_back(self) -> None:
        config = replace(tiny(tie=False), name="blip-converted")
        assert self.convert(config) == config

    def test_its_settings_are_read(self) -> None:
        config = tiny(tie=False)
        found = self.convert(config, vision_config={"layer_norm_eps": 1e-5}, text_config={"hidden_dropout_prob": 0})
        assert found.vision.layer_norm_eps == 1e-5 and found.encoder.dropout == 0.0
        found = self.convert(
            config, pre={"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 24}
        )
        assert found.preprocess.affine[1] == (-2.0, -2.0, -2.0) and found.preprocess.image_size == 24

    def test_settings_that_contradict_the_tensors(self) -> None:
        with pytest.raises(CheckpointError, match="config.json says text_config.hidden_size 16, its tensors have 8"):
            self.convert(tiny(tie=False), text_config={"hidden_size": 16})
        with pytest.raises(CheckpointError, match="resample is 0"):
            self.convert(tiny(tie=False), pre={"resample": 0})
        with pytest.raises(CheckpointError, match="size is"):
            self.convert(tiny(tie=False), pre={"size": {"shortest_edge": 224}})

    def test_what_its_class_cannot_express(self) -> None:
        with pytest.raises(CheckpointError, match="num_layers"):
            hf_files(tiny(1, 2, 1))

    def test_its_class_loads_it_whole_and_computes_the_same(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = tiny(2, 2, 2)
        tensors = random_tensors(config)
        save_file(to_hf(config, tensors), tmp_path / "model.safetensors", {"format": "pt"})
        for name, values in hf_files(config).items():
            (tmp_path / name).write_text(json.dumps(values))
        theirs, info = transformers.BlipForQuestionAnswering.from_pretrained(
            tmp_path, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        state = theirs.state_dict()
        assert same({n: state[n] for n in to_hf(config, tensors)}, to_hf(config, tensors))
        assert theirs.config.vision_config.layer_norm_eps == 1e-6 and theirs.config.miss_engine["name"] == "tiny"

        from miss.models.weights import build

        ours, _ = build(config, tensors)
        pixels = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
        scale, shift = (torch.tensor(v) for v in config.preprocess.affine)
        with torch.no_grad():
            hidden = theirs.eval().vision_model((pixels * scale + shift).permute(0, 3, 1, 2)).last_hidden_state
            torch.testing.assert_close(ours.encode_images(pixels), hidden, atol=2e-5, rtol=1e-4)

    def test_an_untied_copy_of_a_shared_table(self) -> None:
        config = tiny()
        tensors = random_tensors(config)
        own = untied(config, tensors)
        assert torch.equal(own["decoder.embeddings.word.weight"], tensors["encoder.embeddings.word.weight"])
        assert len(own) == len(model_shapes(replace(config, tie_embeddings=False)))
