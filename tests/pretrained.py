"""Models of transformers and peft, tiny and with random parameters; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDTH, WORDS, LENGTH, LABELS, PIXELS = 16, 40, 7, 3, 16
SMALL = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = SMALL | {"vocab_size": WORDS, "intermediate_size": 24, "pad_token_id": 0}
IMAGE = {"image_size": PIXELS, "num_labels": LABELS}


def _made(config: str, model: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return _as_if_trained(getattr(transformers, model)(getattr(transformers, config)(**options)))


def _as_if_trained(model: nn.Module) -> nn.Module:
    """Draw all parameters such that every one counts.

    Of fresh models most do not: matrices of 0.02 in as small a model make attention constant, and
    where biases are 0 and scales are 1 a rule that forgets them goes unnoticed.
    """
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad and param.dim() == 1:
                param.add_(torch.randn_like(param), alpha=0.2)
            elif param.requires_grad:
                inputs = param.shape[-1] if param.dim() == 3 else param[0].numel()
                param.normal_(std=inputs**-0.5)
    return model


def gpt2() -> nn.Module:
    """Its output layer is tied to the embedding, its weights are transposed (Conv1D)."""
    return _made("GPT2Config", "GPT2LMHeadModel", vocab_size=WORDS, n_positions=LENGTH,
                 n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)  # fmt: skip


def llama() -> nn.Module:
    """Rotary positions, grouped queries, gated units, no biases."""
    return _made("LlamaConfig", "LlamaForCausalLM", **TEXT, num_key_value_heads=1)


def mixtral() -> nn.Module:
    """Every position passes two of three experts, whose weights are one tensor."""
    return _made("MixtralConfig", "MixtralForCausalLM", **TEXT,
                 num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)  # fmt: skip


def bert(task: str = "SequenceClassification", **options: Any) -> nn.Module:
    return _made("BertConfig", f"BertFor{task}", **TEXT | options, num_labels=LABELS)


def albert() -> nn.Module:
    """Both layers are the same one."""
    return _made("AlbertConfig", "AlbertForSequenceClassification",
                 **TEXT, embedding_size=8, num_labels=LABELS)  # fmt: skip


def deberta() -> nn.Module:
    """Attention to contents and to positions, which are gathered by distance."""
    return _made("DebertaV2Config", "DebertaV2ForSequenceClassification", **TEXT,
                 num_labels=LABELS, relative_attention=True, max_relative_positions=4,
                 pos_att_type=["p2c", "c2p"])  # fmt: skip


def t5() -> nn.Module:
    """Relative positions: one table for all layers, looked up once for all samples."""
    return _made("T5Config", "T5ForConditionalGeneration", vocab_size=WORDS, d_model=WIDTH, d_kv=8,
                 d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)  # fmt: skip


def switch() -> nn.Module:
    """T5 in which every position of every second layer passes one of three experts."""
    return _made("SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration",
                 vocab_size=WORDS, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2,
                 num_decoder_layers=2, num_heads=2, num_sparse_encoder_layers=1,
                 num_sparse_decoder_layers=1, num_experts=3, decoder_start_token_id=0)  # fmt: skip


def whisper() -> nn.Module:
    """Convolutions over time before the encoder; its sinusoids are frozen parameters."""
    return _made("WhisperConfig", "WhisperForConditionalGeneration",
                 vocab_size=WORDS, num_mel_bins=4, d_model=WIDTH, max_source_positions=5,
                 max_target_positions=LENGTH, encoder_layers=1, decoder_layers=1,
                 encoder_attention_heads=2, decoder_attention_heads=2,
                 encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0, bos_token_id=1,
                 eos_token_id=2, decoder_start_token_id=1)  # fmt: skip


def vit() -> nn.Module:
    return _made("ViTConfig", "ViTForImageClassification",
                 **SMALL, **IMAGE, intermediate_size=24, patch_size=4)  # fmt: skip


def swin() -> nn.Module:
    """Attention within windows: rows are parts of samples."""
    return _made("SwinConfig", "SwinForImageClassification", **IMAGE, patch_size=2, embed_dim=8,
                 depths=[2], num_heads=[2], window_size=4)  # fmt: skip


def wav2vec() -> nn.Module:
    """Convolutions of the raw sound, group norm, positions by a convolution in weight norm."""
    return _made("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", **TEXT,
                 conv_dim=[8, 8], conv_stride=[4, 2], conv_kernel=[6, 3],
                 num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
                 classifier_proj_size=8, num_labels=LABELS, apply_spec_augment=False)  # fmt: skip


def resnet() -> nn.Module:
    return _made("ResNetConfig", "ResNetForImageClassification", embedding_size=8,
                 hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic",
                 num_labels=LABELS)  # fmt: skip


def convnext() -> nn.Module:
    return _made("ConvNextConfig", "ConvNextForImageClassification", patch_size=2,
                 num_stages=2, hidden_sizes=[8, 16], depths=[1, 1],
                 layer_scale_init_value=0.5, **IMAGE)  # fmt: skip


def mobilenet() -> nn.Module:
    """Depthwise convolutions, batch norm."""
    return _made("MobileNetV2Config", "MobileNetV2ForImageClassification",
                 depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, **IMAGE)  # fmt: skip


def mamba() -> nn.Module:
    """A state that is updated position by position, after a convolution over time."""
    return _made("MambaConfig", "MambaForCausalLM", vocab_size=WORDS, hidden_size=WIDTH,
                 state_size=4, num_hidden_layers=1, time_step_rank=2)  # fmt: skip


def adapted(config: str, **options: Any) -> nn.Module:
    """BERT, frozen, with few parameters of peft's beside its own."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(bert(), getattr(peft, config)(task_type="SEQ_CLS", **options))


def lora(**options: Any) -> nn.Module:
    """Low-rank updates of frozen weights; before training one of the two factors is 0."""
    return adapted("LoraConfig", r=2, target_modules=["query", "value"], **options)


def words(samples: int, length: int = LENGTH) -> Tensor:
    return torch.randint(3, WORDS, (samples, length))


def padded(samples: int) -> dict[str, Tensor]:
    """Return token sequences of different lengths, and which positions count."""
    lengths = torch.arange(samples) % 3 + LENGTH - 2
    mask = torch.arange(LENGTH) < lengths[:, None]
    return {"input_ids": words(samples) * mask, "attention_mask": mask.long()}


def next_words(inputs: dict[str, Tensor]) -> Tensor:
    """Return each position's next token as its label; what is not there does not count."""
    tokens = inputs["input_ids"].roll(-1, 1)
    tokens[:, -1] = 0
    return tokens.masked_fill(tokens == 0, -100)


def images(samples: int, channels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(samples, channels, PIXELS, PIXELS)}


def in_float64_as_well(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Run experts as the library does by default, but for float64, which its product lacks."""
    wide = next(model.parameters()).dtype == torch.float64
    model.set_experts_implementation("eager" if wide else "grouped_mm")
    return classes_second(model, inputs)


def classes_second(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of each position, with the classes in dimension 1."""
    return model(**inputs).logits.transpose(1, 2)
