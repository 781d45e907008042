"""The model against Hugging Face's BLIP and BERT on the same random weights: states, logits, loss, gradients.

float64 must agree to 1e-10: the two are then the same function, not similar ones. `--full-size` (`make parity`) runs
the whole base model in float64 as well.
"""

import dataclasses

import pytest
import torch

from miss.kernels.registry import use
from miss.models.config import MissConfig, PreprocessConfig, TextConfig, VisionConfig
from miss.models.joint import JointEncoder
from miss.models.names import depths_of, entries, stack
from miss.models.vqa import MissVQA, VQABatch
from tests.helpers import assert_as_good_as

transformers = pytest.importorskip("transformers", reason="the peer to compare with; `make setup` installs it")

VOCABULARY, IMAGES, QUESTION, ANSWER = 97, 2, 7, 5
USED = (
    "attention",
    "attention_varlen",
    "cross_attention",
    "layer_norm",
    "add_layer_norm",
    "gelu_mlp",
    "linear_cross_entropy",
    "patch_embed",
)


def small_config() -> MissConfig:
    text = TextConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_layers=2, num_heads=3, intermediate_size=64, source_width=48
    )
    return MissConfig(
        vision=VisionConfig(
            image_size=40, patch_size=8, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=96
        ),
        encoder=dataclasses.replace(text, source_width=64),
        decoder=text,
        preprocess=PreprocessConfig(image_size=40, rescale_factor=1.0),
    )


def hugging_face(config: MissConfig):
    """BlipForQuestionAnswering of the same shape; LayerNorm's eps is not its default (miss.md: 1e-6)."""
    text, vision = config.encoder, config.vision
    blip = transformers.BlipConfig(
        text_config=dict(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            encoder_hidden_size=text.source_width,
            intermediate_size=text.intermediate_size,
            projection_dim=32,
            num_hidden_layers=text.num_layers,
            num_attention_heads=text.num_heads,
            layer_norm_eps=text.layer_norm_eps,
            attention_probs_dropout_prob=0.0,
            hidden_dropout_prob=0.0,
            is_decoder=True,
            label_smoothing=0.1,
        ),
        vision_config=dict(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.layer_norm_eps,
            attention_dropout=0.0,
        ),
    )
    torch.manual_seed(0)
    model = transformers.BlipForQuestionAnswering(blip).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms start at 0 and 1: make every one count
            p.add_(torch.randn_like(p) * (0.02 if p.dim() > 1 else 0.1))
    # Its decoder reads question states of the width of the encoder; with another image width it would be built wrong.
    if text.source_width != text.hidden_size:
        for layer in model.text_decoder.bert.encoder.layer:
            cross = layer.crossattention.self
            for name in ("key", "value"):
                setattr(cross, name, torch.nn.Linear(text.hidden_size, text.hidden_size))
    return model


def mend_cross_attention_mask(model) -> None:
    """Transformers 5.23 loses the cross-attention's mask between BlipTextAttention and BlipTextSelfAttention (the one
    passes it as `attention_mask`, the other reads `encoder_attention_mask`), so that its decoder attends to the
    padding of the questions even in training. This hands the mask on, as BLIP's own code does."""

    def hand_on(module, args, kwargs):
        return args, {**kwargs, "encoder_attention_mask": kwargs.get("attention_mask")}

    for stack_of in (model.text_encoder.encoder, model.text_decoder.bert.encoder):
        for layer in stack_of.layer:
            layer.crossattention.self.register_forward_pre_hook(hand_on, with_kwargs=True)


def ours_from(theirs, config: MissConfig, dtype: torch.dtype) -> MissVQA:
    state = {k: v.detach().clone() for k, v in theirs.state_dict().items()}
    table = entries(depths_of(state, "hf"), "hf")
    named, _ = stack(table, state)
    model = MissVQA(config)
    missing, unexpected = model.load_state_dict(named, strict=False)
    assert not missing and not unexpected
    return model.to(dtype).eval()


def inputs(config: MissConfig, pixels: int, dtype: torch.dtype) -> VQABatch:
    """Three questions over two images, padded: lengths 7, 4, 2; answers 5, 3, 4."""
    g = torch.Generator().manual_seed(1)
    vocabulary = config.encoder.vocab_size
    lengths, answers = torch.tensor([QUESTION, 4, 2]), torch.tensor([ANSWER, 3, 4])

    def tokens(rows: torch.Tensor, longest: int) -> torch.Tensor:
        ids = torch.randint(1, vocabulary, (len(rows), longest), generator=g)
        return ids.masked_fill(torch.arange(longest) >= rows[:, None], 0)

    return VQABatch(
        pixels=torch.randn(IMAGES, pixels, pixels, 3, generator=g, dtype=torch.float64).to(dtype),
        image_tokens=None,
        question_ids=tokens(lengths, QUESTION),
        question_lengths=lengths.int(),
        image_index=torch.tensor([0, 0, 1], dtype=torch.int32),
        answer_ids=tokens(answers, ANSWER),
        answer_lengths=answers.int(),
    )


def run_theirs(model, batch: VQABatch) -> dict[str, torch.Tensor]:
    pixels = batch.pixels.permute(0, 3, 1, 2)[batch.image_index.long()]
    question_mask = (torch.arange(batch.question_ids.shape[1]) < batch.question_lengths[:, None]).long()
    answer_mask = (torch.arange(batch.answer_ids.shape[1]) < batch.answer_lengths[:, None]).long()
    images = model.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    states = model.text_encoder(
        input_ids=batch.question_ids,
        attention_mask=question_mask,
        encoder_hidden_states=images,
        encoder_attention_mask=torch.ones(images.shape[:-1], dtype=torch.long),
    ).last_hidden_state
    out = model.text_decoder(
        input_ids=batch.answer_ids,
        attention_mask=answer_mask,
        encoder_hidden_states=states,
        encoder_attention_mask=question_mask,
        labels=batch.answer_ids.masked_fill(answer_mask == 0, -100),
        reduction="mean",
    )
    return {
        "images": images,
        "states": states[question_mask.bool()],
        "logits": out.logits[answer_mask.bool()],
        "loss": out.loss.mean(),
    }


def real(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Which positions hold tokens and not padding: bool (R, T)."""
    return torch.arange(ids.shape[1]) < lengths[:, None]


def run_ours(model: MissVQA, batch: VQABatch) -> dict[str, torch.Tensor]:
    tokens = model.encode_images(batch.pixels)
    kv = model.project_images(tokens)
    states = model.encode_questions(batch.question_ids, batch.question_lengths, kv, batch.image_index)
    rows = torch.arange(len(states), dtype=torch.int32)
    hidden = model.decoder(
        batch.answer_ids, model.project_questions(states), rows, batch.question_lengths, batch.answer_lengths
    )
    out = model(batch, label_smoothing=0.1)
    return {
        "images": tokens[batch.image_index.long()],
        "states": states[real(batch.question_ids, batch.question_lengths)],
        "logits": model.decoder.logits(model.decoder.head(hidden))[real(batch.answer_ids, batch.answer_lengths)],
        "loss": out.loss_per_row.sum() / out.num_tokens.sum(),
    }


def gradients(model, table_of=None) -> dict[str, torch.Tensor]:
    named = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    if table_of is None:
        return named
    for tied in ("text_decoder.cls.predictions.decoder.weight", "text_decoder.cls.predictions.decoder.bias"):
        named.setdefault(tied, torch.zeros(()))
    return stack(table_of, named)[0]


@pytest.mark.parametrize("kernels", ["torch", "reference"])
@pytest.mark.parametrize("pixels", [40, 72])
def test_float64_is_the_same_function(kernels, pixels):
    """72 px is not the grid that the positions were learned on: they are interpolated."""
    compare_float64(small_config(), pixels, kernels)


def test_full_size(request):
    if not request.config.getoption("--full-size"):
        pytest.skip("the whole base model takes minutes and 8 GB: `make parity`")
    config = MissConfig(preprocess=PreprocessConfig(image_size=384, rescale_factor=1.0))
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=384))
    compare_float64(config, 384, "torch")


def compare_float64(config: MissConfig, pixels: int, kernels: str) -> None:
    theirs = hugging_face(config).double()
    mend_cross_attention_mask(theirs)
    ours = ours_from(theirs, config, torch.float64)
    batch = inputs(config, pixels, torch.float64)
    want = run_theirs(theirs, batch)
    with use(**dict.fromkeys(USED, kernels)):
        got = run_ours(ours, batch)
        got["loss"].backward()
    torch.testing.assert_close(got["images"], want["images"], rtol=0, atol=1e-10)
    for name in ("states", "logits", "loss"):
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-10)
    want["loss"].backward()
    expected = gradients(theirs, entries(depths_of(theirs.state_dict(), "hf"), "hf"))
    found = gradients(ours)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_good_as_theirs(dtype):
    config = small_config()
    theirs = hugging_face(config)
    mend_cross_attention_mask(theirs)
    exact = run_theirs(theirs.double(), inputs(config, 40, torch.float64))
    ours = ours_from(theirs, config, dtype)
    batch = inputs(config, 40, dtype)
    with torch.no_grad():
        plain, got = run_theirs(theirs.to(dtype), batch), run_ours(ours, batch)
    for name in ("images", "logits", "loss"):
        assert_as_good_as(got[name], plain[name], exact[name])


@torch.no_grad()
def test_padding_that_is_attended_to_is_theirs_as_shipped():
    """What the original does when it answers (`compat`), and Transformers always: every padded position counts."""
    config = small_config()
    theirs = hugging_face(config).double()
    ours = ours_from(theirs, config, torch.float64)
    batch = inputs(config, 40, torch.float64)
    kv = ours.project_images(ours.encode_images(batch.pixels))
    states = ours.encode_questions(batch.question_ids, batch.question_lengths, kv, batch.image_index, padded=True)
    rows = torch.arange(len(states), dtype=torch.int32)
    hidden = ours.decoder(batch.answer_ids, ours.project_questions(states), rows, None, batch.answer_lengths)
    got = ours.decoder.logits(ours.decoder.head(hidden))[real(batch.answer_ids, batch.answer_lengths)]
    torch.testing.assert_close(got, run_theirs(theirs, batch)["logits"], rtol=0, atol=1e-10)


def test_text_mode_is_bert():
    """Without an image, the joint encoder is BERT: what it shares with MiniLM and bert-base checkpoints."""
    config = TextConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=40, source_width=32)
    torch.manual_seed(0)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
        ),
        add_pooling_layer=False,
    )
    bert = bert.double().eval()
    ours = JointEncoder(config).double().eval()
    state = bert.state_dict()
    named = {
        "embeddings.word.weight": state["embeddings.word_embeddings.weight"],
        "embeddings.position.weight": state["embeddings.position_embeddings.weight"]
        + state["embeddings.token_type_embeddings.weight"][:1],
        "embeddings.norm.weight": state["embeddings.LayerNorm.weight"],
        "embeddings.norm.bias": state["embeddings.LayerNorm.bias"],
    }
    for i in range(config.num_layers):
        layer, here = f"encoder.layer.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            qkv = [state[f"{layer}attention.self.{n}.{kind}"] for n in ("query", "key", "value")]
            named[f"{here}self_attention.qkv.{kind}"] = torch.cat(qkv)
            for mine, his in (
                ("self_attention.output", "attention.output.dense"),
                ("self_attention.norm", "attention.output.LayerNorm"),
                ("mlp.input", "intermediate.dense"),
                ("mlp.output", "output.dense"),
                ("mlp.norm", "output.LayerNorm"),
            ):
                named[f"{here}{mine}.{kind}"] = state[f"{layer}{his}.{kind}"]
    missing, unexpected = ours.load_state_dict(named, strict=False)
    assert not unexpected and all("cross" in name for name in missing)
    ids = torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([6, 3, 1], dtype=torch.int32)
    mask = torch.arange(6) < lengths[:, None]
    want = bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(ids, lengths)[mask], want[mask], rtol=0, atol=1e-10)
