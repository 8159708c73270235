"""Real architectures and the ways they are run, by name: a model, its data, its likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import networks as own
import pretrained as hub
import torch
from models import Net
from torch import Tensor, nn

SAMPLES = 5
Forward = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Scene:
    """One model and one batch, with what ``fisher_diagonal`` is told about them."""

    model: nn.Module
    inputs: Any
    targets: Tensor
    forward: Forward | None = None


@dataclass(frozen=True)
class Architecture:
    """How to make a scene, and which Fisher of it is asked for."""

    build: Callable[[], Scene]
    estimator: str = "empirical"
    likelihood: str = "categorical"
    arithmetic: torch.dtype = torch.float32


def classified(model: nn.Module, inputs: Any, classes: int = own.CLASSES) -> Scene:
    return Scene(model, inputs, torch.arange(SAMPLES) % classes)


def hub_classified(model: nn.Module, inputs: dict[str, Tensor]) -> Scene:
    return classified(model, inputs, hub.LABELS)


def language(model: nn.Module, forward: Forward = hub.classes_second) -> Scene:
    """Predict every next token of padded sequences."""
    inputs = hub.padded(SAMPLES)
    return Scene(model, inputs, hub.next_words(inputs), forward)


def translated(model: nn.Module, source: dict[str, Tensor]) -> Scene:
    """Predict every token of a second sequence."""
    inputs = source | {"decoder_input_ids": hub.words(SAMPLES, 5)}
    return Scene(model, inputs, hub.words(SAMPLES, 5), hub.classes_second)


def masked_words() -> Scene:
    inputs = hub.padded(SAMPLES)
    hidden = torch.rand(inputs["input_ids"].shape) < 0.4
    targets = inputs["input_ids"].masked_fill(~hidden, -100)
    return Scene(hub.bert("MaskedLM"), inputs, targets, hub.classes_second)


def tokens() -> Tensor:
    return torch.randint(1, own.WORDS, (SAMPLES, own.LENGTH))


def spoken(model: nn.Module) -> Scene:
    return Scene(model, tokens(), tokens())


def vectors() -> Tensor:
    return torch.randn(SAMPLES, own.LENGTH, own.WIDTH)


def pictures(channels: int = 3, size: int = 12) -> Tensor:
    return torch.randn(SAMPLES, channels, size, size)


def in_autocast(scene: Scene) -> Scene:
    call = scene.forward or (lambda model, inputs: model(inputs))

    def forward(model: nn.Module, inputs: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = call(model, inputs)
        # The oracle's float64 stays: autocast leaves it alone.
        return outputs if outputs.dtype == torch.float64 else outputs.float()

    return Scene(scene.model, scene.inputs, scene.targets, forward)


def in_bfloat16(scene: Scene) -> Scene:
    floating = scene.inputs.is_floating_point()
    inputs = scene.inputs.bfloat16() if floating else scene.inputs
    return Scene(scene.model.bfloat16(), inputs, scene.targets, scene.forward)


def mostly_frozen() -> Scene:
    """Only the norms, one projection and the head are trained."""
    scene = language(hub.gpt2())
    for name, param in scene.model.named_parameters():
        param.requires_grad_("ln_" in name or "h.1.mlp.c_proj" in name)
    return scene


def channels_last() -> Scene:
    scene = classified(own.batch_normed(memory_format=torch.channels_last), pictures())
    return Scene(scene.model, scene.inputs.to(memory_format=torch.channels_last), scene.targets)


def several_inputs() -> Scene:
    model = Net(own.two_towers, see=nn.Conv2d(1, 4, 3), read=nn.EmbeddingBag(own.WORDS, 4),
                head=own.head())  # fmt: skip
    return classified(model, (pictures(1, 5), tokens(), torch.rand(SAMPLES, 1)))


def different_lengths() -> Scene:
    model = Net(own.packed_gru, head=own.head(2 * own.CLASSES), gru=nn.GRU(
        own.WIDTH, own.WIDTH // 2, bidirectional=True, batch_first=True))  # fmt: skip
    return classified(model, (vectors(), torch.tensor([2, own.LENGTH, 4, 4, 1])))


def looked_up_positions() -> Scene:
    model = Net(own.looked_up_positions, embed=nn.Embedding(own.WORDS, own.WIDTH),
                positions=nn.Embedding(own.LENGTH, own.WIDTH), head=own.head())  # fmt: skip
    return classified(model, tokens())


def unused_layers() -> Scene:
    """The pooler runs for nothing, and the second head is not run at all."""
    scene = hub_classified(hub.vit(), hub.images(SAMPLES))
    scene.model.second_head = nn.Linear(hub.WIDTH, 2)
    return scene


def adapted(make: Callable[[], nn.Module]) -> Architecture:
    return Architecture(lambda: hub_classified(make(), hub.padded(SAMPLES)), "exact")


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(lambda: language(hub.gpt2())),
    "gpt2_sampled": Architecture(lambda: language(hub.gpt2()), "sampled"),
    "llama": Architecture(lambda: language(hub.llama())),
    "mamba": Architecture(lambda: language(hub.mamba())),
    "mixtral": Architecture(lambda: language(hub.mixtral(), hub.in_float64_as_well)),
    "bert": Architecture(lambda: hub_classified(hub.bert(), hub.padded(SAMPLES)), "exact"),
    "albert": Architecture(lambda: hub_classified(hub.albert(), hub.padded(SAMPLES)), "exact"),
    "deberta": Architecture(lambda: hub_classified(hub.deberta(), hub.padded(SAMPLES)), "sampled"),
    "bert_masked_words": Architecture(masked_words),
    "t5": Architecture(lambda: translated(hub.t5(), hub.padded(SAMPLES))),
    "switch": Architecture(lambda: translated(hub.switch(), hub.padded(SAMPLES)), "sampled"),
    "whisper": Architecture(
        lambda: translated(hub.whisper(), {"input_features": torch.randn(SAMPLES, 4, 10)})
    ),
    "vit": Architecture(unused_layers, "exact"),
    "resnet": Architecture(lambda: hub_classified(hub.resnet(), hub.images(SAMPLES)), "exact"),
    "convnext": Architecture(lambda: hub_classified(hub.convnext(), hub.images(SAMPLES)), "exact"),
    "mobilenet": Architecture(lambda: hub_classified(hub.mobilenet(), hub.images(SAMPLES))),
    "swin": Architecture(lambda: hub_classified(hub.swin(), hub.images(SAMPLES)), "sampled"),
    "wav2vec": Architecture(
        lambda: hub_classified(hub.wav2vec(), {"input_values": torch.randn(SAMPLES, 80)}), "exact"
    ),
    "lora": adapted(lambda: hub.lora(init_lora_weights=False)),
    "lora_before_training": adapted(hub.lora),
    "dora": adapted(lambda: hub.lora(init_lora_weights=False, use_dora=True)),
    "prompt_tuning": adapted(lambda: hub.adapted("PromptTuningConfig", num_virtual_tokens=3)),
    "prefix_tuning": adapted(lambda: hub.adapted("PrefixTuningConfig", num_virtual_tokens=3)),
    "lstm": Architecture(lambda: spoken(own.LanguageLSTM())),
    "gru_over_packed_sequences": Architecture(different_lengths, "sampled"),
    "unet_of_classes": Architecture(
        lambda: Scene(own.UNet(3), pictures(1, 8), torch.randint(3, (SAMPLES, 8, 8)))
    ),
    "unet_of_values": Architecture(
        lambda: Scene(own.UNet(1), pictures(1, 8), pictures(1, 8)), "sampled", "gaussian"
    ),
    "unet_of_masks": Architecture(
        lambda: Scene(own.UNet(1), pictures(1, 8), (pictures(1, 8) > 0).float()),
        likelihood="bernoulli",
    ),
    "mixture_of_experts": Architecture(
        lambda: classified(own.MixtureOfExperts(), tokens()), "exact"
    ),
    "transformer": Architecture(lambda: spoken(own.Transformer()), "sampled"),
    "transformer_time_first": Architecture(
        lambda: classified(own.time_first_transformer(), (vectors(), vectors())), "exact"
    ),
    "attention_bias_k": Architecture(
        lambda: classified(own.attention(add_bias_kv=True), vectors()), "exact"
    ),
    "attention_zero_key": Architecture(
        lambda: classified(own.attention(add_zero_attn=True), vectors()), "sampled"
    ),
    "positions_looked_up_once": Architecture(looked_up_positions, "exact"),
    "several_inputs": Architecture(several_inputs, "sampled"),
    "channels_last": Architecture(channels_last, "exact"),
    "frozen_layers": Architecture(mostly_frozen),
    "checkpointed": Architecture(lambda: spoken(own.checkpointed(use_reentrant=False))),
    "checkpointed_reentrant": Architecture(lambda: spoken(own.checkpointed(use_reentrant=True))),
    "compiled": Architecture(
        lambda: spoken(torch.compile(own.Transformer(blocks=1), backend="aot_eager"))
    ),
    "compiled_eager": Architecture(
        lambda: classified(torch.compile(own.batch_normed(), backend="eager"), pictures()), "exact"
    ),
    "autocast": Architecture(
        lambda: in_autocast(spoken(own.Transformer())), arithmetic=torch.bfloat16
    ),
    "autocast_gpt2": Architecture(
        lambda: in_autocast(language(hub.gpt2())), arithmetic=torch.bfloat16
    ),
    "bfloat16": Architecture(
        lambda: in_bfloat16(spoken(own.Transformer())), arithmetic=torch.bfloat16
    ),
    "bfloat16_convolutions": Architecture(
        lambda: in_bfloat16(Scene(own.UNet(3), pictures(1, 8), torch.randint(3, (SAMPLES, 8, 8)))),
        arithmetic=torch.bfloat16,
    ),
}
