"""More operations with parameters: norms, sums and products, attention, recurrence, others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import FEATURES, POSITIONS, Net, features, sequences
from operations import (
    OWN_BACKWARD,
    SAMPLE_BY_SAMPLE,
    Operation,
    images,
    layer,
    of,
    parameter,
    positive,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

C = (FEATURES,)


def with_statistics(norm: nn.Module) -> nn.Module:
    """Return a norm that is not the identity, as it would be without training."""
    for values in norm.parameters():
        nn.init.normal_(values)
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return norm


def norm(make: Callable[[], nn.Module], inputs: Callable[[int], Any]) -> Operation:
    return layer(lambda: with_statistics(make()), inputs)


NORMS = {
    "layer_norm": norm(lambda: nn.LayerNorm(FEATURES), sequences),
    "layer_norm_of_rows": norm(lambda: nn.LayerNorm(FEATURES), features),
    "layer_norm_over_two_dimensions": norm(lambda: nn.LayerNorm((POSITIONS, FEATURES)), sequences),
    "layer_norm_without_bias": norm(lambda: nn.LayerNorm(FEATURES, bias=False), sequences),
    "layer_norm_time_first": Operation(
        lambda m, x: m.body(x.transpose(0, 1)).transpose(0, 1),
        lambda: {"body": with_statistics(nn.LayerNorm(FEATURES))}, sequences,
    ),
    "group_norm": norm(lambda: nn.GroupNorm(2, 4), images(4, 3)),
    "group_norm_1d": norm(lambda: nn.GroupNorm(2, 4), images(4, 3, 1)),
    "group_norm_of_rows": norm(lambda: nn.GroupNorm(2, 4), lambda n: torch.randn(n, 4)),
    "instance_norm_1d": norm(lambda: nn.InstanceNorm1d(3, affine=True), images(3, 6, 1)),
    "instance_norm_2d": norm(lambda: nn.InstanceNorm2d(3, affine=True), images(3, 3)),
    "instance_norm_with_running_statistics": norm(
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), images(3, 3)
    ),
    "rms_norm": norm(lambda: nn.RMSNorm(FEATURES), sequences),
    "rms_norm_over_two_dimensions": norm(lambda: nn.RMSNorm((POSITIONS, FEATURES)), sequences),
    "rms_norm_by_hand": of(
        lambda m, x: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * m.w,
        inputs=sequences, w=C,
    ),
    "batch_norm_1d": norm(lambda: nn.BatchNorm1d(FEATURES), features),
    "batch_norm_1d_of_sequences": norm(lambda: nn.BatchNorm1d(POSITIONS), sequences),
    "batch_norm_2d": norm(lambda: nn.BatchNorm2d(3), images(3, 3)),
    "batch_norm_3d": norm(lambda: nn.BatchNorm3d(2), images(2, 3, 3)),
}  # fmt: skip

BROADCASTS = {
    "mul": of(lambda m, x: x * m.w, w=C),
    "mul_with_the_parameter_first": of(lambda m, x: m.w * x, w=C),
    "mul_by_one_number": of(lambda m, x: x * m.w, w=()),
    "mul_in_place": of(lambda m, x: x.tanh().mul_(m.w), w=C),
    "mul_by_one_for_each_position": of(lambda m, x: x * m.w, inputs=sequences, w=(POSITIONS, 1)),
    "add": of(lambda m, x: x + m.w, w=C),
    "add_alpha": of(lambda m, x: torch.add(x, m.w, alpha=3), w=C),
    "add_a_table_of_positions": of(lambda m, x: x + m.w, inputs=sequences,
                                   w=(1, POSITIONS, FEATURES)),
    "add_part_of_a_table": of(lambda m, x: x + m.w[:, :POSITIONS], inputs=sequences,
                              w=(1, POSITIONS + 2, FEATURES)),
    "sub": of(lambda m, x: x - m.w, w=C),
    "sub_with_the_parameter_first": of(lambda m, x: m.w - x, w=C),
    "rsub": of(lambda m, x: torch.rsub(m.w, x, alpha=2), OWN_BACKWARD, w=C),
    "div": Operation(lambda m, x: x / m.w, lambda: {"w": positive(FEATURES)}, features,
                     OWN_BACKWARD),
    "div_with_the_parameter_first": of(lambda m, x: m.w / (x.abs() + 1), OWN_BACKWARD, w=C),
    "pow_of_the_parameter": Operation(
        lambda m, x: x.abs() ** m.w, lambda: {"w": positive(FEATURES)}, features, OWN_BACKWARD
    ),
    "pow_with_the_parameter_first": Operation(
        lambda m, x: m.w ** x, lambda: {"w": positive(FEATURES)}, features, OWN_BACKWARD
    ),
    "where": of(lambda m, x: torch.where(x > 0, x, m.w), OWN_BACKWARD, w=C),
    "masked_fill": of(lambda m, x: x.masked_fill(x > 0, m.w), SAMPLE_BY_SAMPLE, w=()),
    "lerp": of(lambda m, x: torch.lerp(x, m.a, m.b.sigmoid()), OWN_BACKWARD, a=C, b=C),
    "addcmul": of(lambda m, x: torch.addcmul(m.a, x, m.b, value=0.5), OWN_BACKWARD, a=C, b=C),
    "addcdiv": Operation(
        lambda m, x: torch.addcdiv(m.a, x, m.b),
        lambda: {"a": parameter(FEATURES), "b": positive(FEATURES)}, features, OWN_BACKWARD,
    ),
    "maximum": of(lambda m, x: torch.maximum(x, m.w), OWN_BACKWARD, w=C),
    "minimum": of(lambda m, x: torch.minimum(m.w, x), OWN_BACKWARD, w=C),
    "clamp": of(lambda m, x: x.clamp(min=m.w), OWN_BACKWARD, w=C),
    "atan2": of(lambda m, x: torch.atan2(x, m.w), OWN_BACKWARD, w=C),
    "hypot": of(lambda m, x: torch.hypot(x, m.w), OWN_BACKWARD, w=C),
    "copysign": of(lambda m, x: torch.copysign(m.w, x), OWN_BACKWARD, w=C),
    "expand": of(lambda m, x: torch.stack([x, m.w.expand_as(x)], 1), w=C),
    "expand_a_class_token": of(
        lambda m, x: torch.cat([m.w.expand(len(x), -1, -1), x], 1), inputs=sequences,
        w=(1, 1, FEATURES),
    ),
    "repeat": of(lambda m, x: torch.cat([m.w.repeat(len(x), 1, 1), x], 1), inputs=sequences,
                 w=(1, 1, FEATURES)),
    "repeat_interleave": of(
        lambda m, x: torch.cat([m.w.repeat_interleave(len(x), 0), x], 1),
        inputs=sequences, w=(1, 1, FEATURES),
    ),
    "tile_over_samples_and_positions": of(
        lambda m, x: x + m.w.tile(len(x), POSITIONS, 1), SAMPLE_BY_SAMPLE, sequences,
        w=(1, 1, FEATURES),
    ),
    "broadcast_to_two_dimensions": of(
        lambda m, x: x[:, :, None] * m.w, w=(FEATURES, 3)
    ),
    "writing_into_outputs": of(
        lambda m, x: torch.zeros(len(x), 2, FEATURES).index_fill(1, torch.tensor(0), 1.0)
        .slice_scatter(m.w.expand(len(x), 1, -1), 1, 1, 2) * x[:, None], w=C,
    ),
    "prelu": layer(nn.PReLU, features, OWN_BACKWARD),
    "prelu_for_each_channel": layer(lambda: nn.PReLU(2), images(2, 3), OWN_BACKWARD),
    "prelu_by_hand": of(lambda m, x: x.relu() + m.w * x.clamp(max=0), w=C),
    "softplus_of_a_temperature": of(lambda m, x: x / F.softplus(m.w), OWN_BACKWARD, w=()),
    "gate": of(lambda m, x: x.tanh() * m.w.tanh() + x, w=()),
    "grid_sample_of_a_parameter": of(
        lambda m, x: F.grid_sample(m.w.expand(len(x), -1, -1, -1), x.tanh()[:, :, None, :2],
                                   align_corners=False),
        inputs=sequences, w=(1, 2, 3, 3),
    ),
}  # fmt: skip


def attention(**options: Any) -> Operation:
    """Self-attention over sequences, which may be time first in the layer."""
    first = options.get("batch_first", False)

    def run(m: Net, x: Tensor) -> Tensor:
        h = x[..., :4] if first else x[..., :4].transpose(0, 1)
        mixed, _ = m.body(h, h, h, need_weights=options.get("kdim") is None)
        return mixed if first else mixed.transpose(0, 1)

    return Operation(run, lambda: {"body": nn.MultiheadAttention(4, 2, **options)}, sequences)


def across(m: Net, x: Tensor, y: Tensor) -> Tensor:
    return m.body(x[..., :4], y, y.flip(1)[..., :3], need_weights=False)[0]


def masked(m: Net, x: Tensor) -> Tensor:
    h = x.unsqueeze(1)
    return F.scaled_dot_product_attention(h, h.flip(2), h, attn_mask=m.w)


def layer_of_transformer(**options: Any) -> Operation:
    return layer(
        lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options),
        lambda n: torch.randn(n, POSITIONS, 4),
    )


BATCH_FIRST = {"batch_first": True}
ATTENTION = {
    "attention": attention(),
    "attention_batch_first": attention(**BATCH_FIRST),
    "attention_without_bias": attention(bias=False, **BATCH_FIRST),
    "attention_bias_kv": attention(add_bias_kv=True, **BATCH_FIRST),
    "attention_bias_kv_time_first": attention(add_bias_kv=True),
    "attention_zero_key": attention(add_zero_attn=True, **BATCH_FIRST),
    "attention_other_keys_and_values": Operation(
        across, lambda: {"body": nn.MultiheadAttention(4, 2, kdim=FEATURES, vdim=3, **BATCH_FIRST)},
        lambda n: (sequences(n), sequences(n)),
    ),
    "attention_with_a_learned_bias": of(masked, inputs=sequences, w=(1, 1, POSITIONS, POSITIONS)),
    "attention_by_hand_with_a_learned_bias": of(
        lambda m, x: (x @ x.mT + m.w).softmax(-1) @ x, inputs=sequences, w=(POSITIONS, POSITIONS)
    ),
    "attention_of_learned_queries": of(
        lambda m, x: F.scaled_dot_product_attention(m.w.expand(len(x), -1, -1), x, x),
        inputs=sequences, w=(2, FEATURES),
    ),
    "transformer_layer": layer_of_transformer(),
    "transformer_layer_norm_first": layer_of_transformer(norm_first=True, activation="gelu"),
}  # fmt: skip


def recurrent(kind: str, **options: Any) -> Operation:
    """A recurrent layer over sequences, which are time first unless the layer says otherwise."""
    first = options.get("batch_first", False)

    def run(m: Net, x: Tensor) -> Tensor:
        states, _ = m.body(x if first else x.transpose(0, 1))
        return states if first else states.transpose(0, 1)

    return Operation(run, lambda: {"body": getattr(nn, kind)(FEATURES, 3, **options)}, sequences)


def packed(m: Net, x: Tensor, lengths: Tensor) -> Tensor:
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=m.falling)
    states, _ = pad_packed_sequence(m.body(rows)[0], batch_first=True, total_length=POSITIONS)
    return states


def of_lengths(kind: str, *lengths: int, falling: bool = False, **options: Any) -> Operation:
    def parts() -> dict[str, Any]:
        body = getattr(nn, kind)(FEATURES, 3, batch_first=True, **options)
        return {"body": body, "falling": falling}

    return Operation(packed, parts, lambda n: (sequences(n), torch.tensor(lengths[:n])))


def cells(m: Net, x: Tensor) -> Tensor:
    state = None
    for step in x.unbind(1):
        state = m.body(step, state)
    return state[0] if isinstance(state, tuple) else state


KINDS = ("RNN", "LSTM", "GRU")
OPTIONS = {
    "": {},
    "batch_first": BATCH_FIRST,
    "two_layers": {"num_layers": 2},
    "two_ways": {"bidirectional": True},
    "two_layers_two_ways": {"num_layers": 2, "bidirectional": True, **BATCH_FIRST},
    "without_bias": {"bias": False},
}
RECURRENT = {
    **{f"{kind}_{name}".rstrip("_"): recurrent(kind, **options)
       for kind in KINDS for name, options in OPTIONS.items()},
    "RNN_relu": recurrent("RNN", nonlinearity="relu"),
    "LSTM_projected": recurrent("LSTM", proj_size=2, **BATCH_FIRST),
    "LSTM_projected_two_ways": recurrent("LSTM", proj_size=2, num_layers=2, bidirectional=True),
    **{f"{kind}Cell": Operation(
        cells, lambda kind=kind: {"body": getattr(nn, f"{kind}Cell")(FEATURES, 3)}, sequences)
       for kind in KINDS},
}  # fmt: skip

# The graph has as many steps as the longest sequence of a batch.
PACKED = {
    **{f"{kind}_packed": of_lengths(kind, 2, 4, 1, 3) for kind in KINDS},
    **{f"{kind}_packed_falling": of_lengths(kind, 4, 3, 3, 1, falling=True) for kind in KINDS},
    "GRU_packed_two_ways": of_lengths("GRU", 2, 4, 1, 3, bidirectional=True, num_layers=2),
}  # fmt: skip

LAYERS = NORMS | BROADCASTS | ATTENTION | RECURRENT
