"""Text features against transformers run by hand, on tiny random LLaMA, LLaVA and CLIP models."""

from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from hunyuan_train.encoders.config import EncoderDtype, TextEncoderConfig, TextEncoderKind
from hunyuan_train.encoders.templates import PICTURE_TEMPLATE, TEMPLATES
from hunyuan_train.encoders.text import TextEncoder, build_text_encoder

CAPTIONS = [
    "a red circle moving left",
    "",
    "the camera movements of objects: two {} braces and text",
    " ".join(["size"] * 40),  # longer than MAX_LENGTH
]
CLOSE = {"rtol": 0, "atol": 2e-6}
"""Less padding rounds otherwise."""
MAX_LENGTH = 24
TEXT_DIM, POOLED_DIM = 32, 24

# LLaMA-3's published split rule. Every piece of the templates is one token in its vocabulary, so a
# vocabulary of whole pieces counts the same tokens as the real tokenizer: 36 and 95.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def llama_tokenizer(
    add_bos: bool = True, pad: bool = True, pictures: bool = False
) -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    vocab = {word: number for number, word in enumerate([*SPECIAL, "<pad>", "<unk>"])}
    special = [*SPECIAL, *(["<image>"] if pictures else [])]
    vocab |= {"<image>": len(vocab)} if pictures else {}
    prompts = [template.text for template in (*TEMPLATES.values(), PICTURE_TEMPLATE)]
    for text in [*prompts, *CAPTIONS, " size size"]:
        for marker in special:
            text = text.replace(marker, "\0")
        for part in text.split("\0"):
            for piece, _ in split.pre_tokenize_str(part):
                vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[3],
        unk_token="<unk>",
        additional_special_tokens=[*SPECIAL[1:3], *special[4:]],
        padding_side="left",  # as LLaMA tokenizers are often saved; the encoder must not follow it
        **({"pad_token": "<pad>"} if pad else {}),
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocab = {w: i for i, w in enumerate(["<|startoftext|>", "<|endoftext|>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",  # CLIP pads with its end token
        unk_token="<unk>",
    )


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return model


def llama_config(num_layers: int = 5) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=TEXT_DIM,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )


def clip_text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=128,
        hidden_size=POOLED_DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


@pytest.fixture
def llm_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "llm"
    randomise(LlamaModel(llama_config()), 0).save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "clip"
    randomise(CLIPTextModel(clip_text_config()), 1).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder


def config(llm_folder: Path, clip_folder: Path, **changes: object) -> TextEncoderConfig:
    fields = {
        "kind": TextEncoderKind.hunyuan,
        "llm_folder": str(llm_folder),
        "clip_folder": str(clip_folder),
        "max_length": MAX_LENGTH,
        "text_dim": TEXT_DIM,
        "pooled_dim": POOLED_DIM,
        "dtype": EncoderDtype.float32,
    }
    return TextEncoderConfig(**{**fields, **changes})


def by_hand(
    llm: torch.nn.Module, llm_folder: Path, media: str, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden_states[-3] of the whole model, cropped, and the mask."""
    template = TEMPLATES[media]
    tokenizer = AutoTokenizer.from_pretrained(llm_folder, padding_side="right")
    batch = tokenizer(
        [template.text.replace("{}", caption, 1) for caption in captions],
        padding="max_length",
        truncation=True,
        max_length=MAX_LENGTH + template.crop_start,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = llm(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
        )
    states = output.hidden_states[-3][:, template.crop_start :]
    return states, batch["attention_mask"][:, template.crop_start :].bool()


def check_states(encoder: TextEncoder, llm: torch.nn.Module, folder: Path, media: str) -> None:
    features = encoder.encode(CAPTIONS, media)
    states, mask = by_hand(llm, folder, media, CAPTIONS)
    assert torch.equal(features.mask, mask)
    torch.testing.assert_close(features.states[mask], states[mask], **CLOSE)
    assert not features.states[~mask].any()
    assert features.states.shape == (len(CAPTIONS), MAX_LENGTH, TEXT_DIM)
    assert features.states.std() > 0.05


@pytest.mark.parametrize("media", ["image", "video"])
def test_token_states_equal_hidden_states_minus_three(
    llm_folder: Path, clip_folder: Path, media: str
) -> None:
    encoder = build_text_encoder(config(llm_folder, clip_folder))
    check_states(encoder, LlamaModel.from_pretrained(llm_folder), llm_folder, media)


def test_features_equal_the_ones_of_the_diffusers_pipeline(
    llm_folder: Path, clip_folder: Path
) -> None:
    clip = CLIPTextModel.from_pretrained(clip_folder)
    pipeline = HunyuanVideoPipeline(
        text_encoder=LlamaModel.from_pretrained(llm_folder),
        tokenizer=AutoTokenizer.from_pretrained(llm_folder, padding_side="right"),
        transformer=None,
        vae=None,
        scheduler=None,
        text_encoder_2=clip,
        tokenizer_2=AutoTokenizer.from_pretrained(clip_folder),
    )
    with torch.no_grad():
        states, pooled, mask = pipeline.encode_prompt(
            CAPTIONS, device=torch.device("cpu"), max_sequence_length=MAX_LENGTH
        )
    features = build_text_encoder(config(llm_folder, clip_folder)).encode(CAPTIONS, "video")
    assert torch.equal(features.mask, mask.bool())
    torch.testing.assert_close(features.states[features.mask], states[mask.bool()], **CLOSE)
    torch.testing.assert_close(features.pooled, pooled, **CLOSE)


def test_batches_are_of_like_length_and_padded_to_their_longest(
    llm_folder: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [" ".join(["size"] * count) for count in (9, 1, 20, 3, 2, 18, 10)]
    encoder = build_text_encoder(config(llm_folder, clip_folder, batch_size=2))
    shapes = []
    monkeypatch.setattr(
        type(encoder._llm), "forward", _recording(type(encoder._llm).forward, shapes)
    )
    features = encoder.encode(captions, "video")
    crop = TEMPLATES["video"].crop_start + 1  # and the closing token
    assert shapes == [(2, crop + 2), (2, crop + 9), (2, crop + 18), (1, crop + 20)]
    monkeypatch.undo()
    states, mask = by_hand(LlamaModel.from_pretrained(llm_folder), llm_folder, "video", captions)
    assert torch.equal(features.mask, mask)  # in the order asked for
    torch.testing.assert_close(features.states[mask], states[mask], **CLOSE)


def _recording(forward, shapes: list[tuple[int, ...]]):
    def record(self, *args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    return record


def test_states_do_not_depend_on_the_batch(llm_folder: Path, clip_folder: Path) -> None:
    whole = build_text_encoder(config(llm_folder, clip_folder)).encode(CAPTIONS, "video")
    single = build_text_encoder(config(llm_folder, clip_folder, batch_size=1))
    parts = single.encode(CAPTIONS, "video")
    assert torch.equal(whole.mask, parts.mask)
    torch.testing.assert_close(whole.states, parts.states, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.pooled, parts.pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["causal_lm", "llava"])
def test_other_saved_forms_of_the_language_model_give_the_same_states(
    tmp_path: Path, clip_folder: Path, form: str
) -> None:
    folder = tmp_path / form
    if form == "causal_lm":
        saved = randomise(LlamaForCausalLM(llama_config()), 2)
        reference = saved.model
    else:
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        saved = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=llama_config(), image_token_index=200)
        )
        randomise(saved, 3)
        reference = saved.model.language_model
    saved.save_pretrained(folder)
    llama_tokenizer().save_pretrained(folder)
    encoder = build_text_encoder(config(folder, clip_folder))
    check_states(encoder, reference.eval(), folder, "video")


def test_pooled_equals_clip_pooler_output(llm_folder: Path, clip_folder: Path) -> None:
    encoder = build_text_encoder(config(llm_folder, clip_folder))
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    batch = tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    clip = CLIPTextModel.from_pretrained(clip_folder)
    with torch.no_grad():
        expected = clip(input_ids=batch["input_ids"]).pooler_output
    for media in ("image", "video"):  # no template, so no difference
        pooled = encoder.encode(CAPTIONS, media).pooled
        torch.testing.assert_close(pooled, expected, **CLOSE)
    assert expected.std(dim=0).max() > 0.05


def test_full_clip_folder_gives_the_same_pooled_vectors(llm_folder: Path, tmp_path: Path) -> None:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    full = CLIPModel(CLIPConfig(text_config=clip_text_config(), vision_config=vision))
    randomise(full, 4).save_pretrained(tmp_path / "full")
    clip_tokenizer().save_pretrained(tmp_path / "full")
    encoder = build_text_encoder(config(llm_folder, tmp_path / "full"))
    tokens = clip_tokenizer()(
        CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        expected = full.eval().text_model(input_ids=tokens["input_ids"]).pooler_output
    torch.testing.assert_close(encoder.encode(CAPTIONS, "video").pooled, expected, **CLOSE)


def test_empty_caption_keeps_the_closing_token(llm_folder: Path, clip_folder: Path) -> None:
    features = build_text_encoder(config(llm_folder, clip_folder)).encode([""], "video")
    assert features.mask.sum().item() == 1
    assert features.mask[0, 0]


def test_long_caption_is_cut_and_reported_once(
    llm_folder: Path, clip_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = build_text_encoder(config(llm_folder, clip_folder))
    encoder.encode([CAPTIONS[0]], "video")
    assert "longer than text.max_length" not in caplog.text
    encoder.encode(CAPTIONS, "video")
    encoder.encode(CAPTIONS, "image")
    # 40 words and the closing token against 24 places.
    assert caplog.text.count("a caption is 17 tokens longer than text.max_length=24") == 1


def test_fingerprint_follows_weights_template_sizes_not_the_place(
    llm_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    first = build_text_encoder(config(llm_folder, clip_folder)).fingerprint
    moved = llm_folder.rename(tmp_path / "elsewhere")
    assert build_text_encoder(config(moved, clip_folder)).fingerprint == first
    longer = config(moved, clip_folder, max_length=25)
    assert build_text_encoder(longer).fingerprint != first
    half = config(moved, clip_folder, dtype=EncoderDtype.bfloat16)
    assert build_text_encoder(half).fingerprint != first
    randomise(LlamaModel(llama_config()), 9).save_pretrained(moved)
    assert build_text_encoder(config(moved, clip_folder)).fingerprint != first


def test_features_are_float32_in_half_precision(llm_folder: Path, clip_folder: Path) -> None:
    exact = build_text_encoder(config(llm_folder, clip_folder)).encode(CAPTIONS, "video")
    cfg = config(llm_folder, clip_folder, dtype=EncoderDtype.bfloat16)
    half = build_text_encoder(cfg).encode(CAPTIONS, "video")
    assert half.states.dtype == half.pooled.dtype == torch.float32
    assert 0 < (half.states - exact.states).abs().max() < 0.1 * exact.states.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_dim": 40}, r"text\.llm_folder=.* has hidden size 32, but text\.text_dim=40"),
        ({"pooled_dim": 40}, r"text\.clip_folder=.* has hidden size 24, but text\.pooled_dim=40"),
    ],
)
def test_other_widths_are_refused(
    llm_folder: Path, clip_folder: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_text_encoder(config(llm_folder, clip_folder, **changes))


def test_two_layers_are_too_few(llm_folder: Path, clip_folder: Path) -> None:
    LlamaModel(llama_config(num_layers=2)).save_pretrained(llm_folder)
    with pytest.raises(ValueError, match=r"text\.llm_folder=.* has 2 layers"):
        build_text_encoder(config(llm_folder, clip_folder))


def test_tokenizer_without_begin_of_text_is_refused(llm_folder: Path, clip_folder: Path) -> None:
    llama_tokenizer(add_bos=False).save_pretrained(llm_folder)
    message = r"makes 35 tokens of the image prompt .* the released weights expect 36"
    with pytest.raises(ValueError, match=message):
        build_text_encoder(config(llm_folder, clip_folder))


def test_tokenizer_without_padding_token_is_refused(llm_folder: Path, clip_folder: Path) -> None:
    for file in llm_folder.glob("tokenizer*"):
        file.unlink()
    llama_tokenizer(pad=False).save_pretrained(llm_folder)
    with pytest.raises(ValueError, match=r"text\.llm_folder=.* has no padding token"):
        build_text_encoder(config(llm_folder, clip_folder))


def test_missing_weights_are_refused_instead_of_made_up(
    llm_folder: Path, clip_folder: Path
) -> None:
    from safetensors.torch import load_file, save_file

    file = llm_folder / "model.safetensors"
    tensors = load_file(file)
    removed = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[removed]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for 1 tensors, .*layers\.1\.mlp\.up_proj"):
        build_text_encoder(config(llm_folder, clip_folder))


def test_damaged_weights_are_one_sentence(llm_folder: Path, clip_folder: Path) -> None:
    file = llm_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"text\.llm_folder=.* cannot be loaded"):
        build_text_encoder(config(llm_folder, clip_folder))
