"""Keys and values of accepted drafts go to their slots. A program copies a few rows of features of a layer and a sequence,
a row for each window position and group; where the count says that there are none, it ends. Bound by latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from freedave_kernels.triton.draft_attention import common_unit, strides
from freedave_kernels.triton.launch import ceil_div, kernel, power_of_two, short_range

ELEMENTS = 4096  # of the keys, and as many values, that a program copies


@triton.jit
def copy_rows(
    window,
    stored,
    position,
    place,
    group,
    copied,
    window_position,
    window_group,
    stored_position,
    stored_group,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    UNIT: tl.constexpr,
):
    feature = tl.arange(0, D_PADDED)[None, :]
    mask = copied[:, None] & (feature < D)
    source = window + ((position * window_position + group * window_group) * UNIT)[:, None] + feature
    target = stored + ((place * stored_position + group * stored_group) * UNIT)[:, None] + feature
    tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)


@kernel(aligned=("window_key", "window_value", "stored_key", "stored_value"))
def keep_rows(
    window_key, window_value, stored_key, stored_value, accepted, start, count, slots,
    drafts: tl.int32, length: tl.int32, groups: tl.int32, num_slots: tl.int32, capacity: tl.int32,
    window_key_layer: tl.int64, window_key_row: tl.int64, window_key_draft: tl.int64, window_key_position: tl.int64,
    window_key_group: tl.int64,
    window_value_layer: tl.int64, window_value_row: tl.int64, window_value_draft: tl.int64,
    window_value_position: tl.int64, window_value_group: tl.int64,
    stored_key_layer: tl.int64, stored_key_slot: tl.int64, stored_key_position: tl.int64, stored_key_group: tl.int64,
    stored_value_layer: tl.int64, stored_value_slot: tl.int64, stored_value_position: tl.int64,
    stored_value_group: tl.int64,
    accepted_step: tl.int64, start_step: tl.int64, count_step: tl.int64, slots_step: tl.int64,
    D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    position, group = (row // groups).to(tl.int64), (row % groups).to(tl.int64)
    index, layer = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    number = tl.minimum(tl.load(count + index * count_step).to(tl.int64), length)
    if (tl.program_id(0) * ROWS) // groups < number:
        draft = tl.load(accepted + index * accepted_step).to(tl.int64)
        place = tl.load(start + index * start_step).to(tl.int64) + position
        slot = tl.load(slots + index * slots_step).to(tl.int64) if HAS_SLOTS else index
        number = tl.where((draft >= 0) & (draft < drafts) & (slot >= 0) & (slot < num_slots), number, 0)
        copied = (position < number) & (place >= 0) & (place < capacity)
        copy_rows(
            window_key + (layer * window_key_layer + index * window_key_row + draft * window_key_draft) * UNIT,
            stored_key + (layer * stored_key_layer + slot * stored_key_slot) * UNIT,
            position,
            place,
            group,
            copied,
            window_key_position,
            window_key_group,
            stored_key_position,
            stored_key_group,
            D,
            D_PADDED,
            UNIT,
        )
        copy_rows(
            window_value + (layer * window_value_layer + index * window_value_row + draft * window_value_draft) * UNIT,
            stored_value + (layer * stored_value_layer + slot * stored_value_slot) * UNIT,
            position,
            place,
            group,
            copied,
            window_value_position,
            window_value_group,
            stored_value_position,
            stored_value_group,
            D,
            D_PADDED,
            UNIT,
        )


def keep(
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    accepted: torch.Tensor,
    start: torch.Tensor,
    count: torch.Tensor,
    stored_key: torch.Tensor,
    stored_value: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> None:
    layers, batch, drafts, length, groups, features = window_key.shape
    if window_key.numel() == 0 or stored_key.numel() == 0:
        return
    tensors = (window_key, window_value, stored_key, stored_value)
    unit = common_unit(tensors)
    padded = power_of_two(features)
    rows = min(max(1, ELEMENTS // padded), power_of_two(length * groups))
    numbers = (accepted, start, count, start if slots is None else slots)
    keep_rows.launch(
        (ceil_div(length * groups, rows), batch, layers),
        (*tensors, *numbers, drafts, length, groups, *stored_key.shape[1:3],
         *(stride for tensor in tensors for stride in strides(tensor, unit)),
         *(number.stride(0) for number in numbers)),
        (features, padded, rows, unit, slots is not None),
        (window_key.dtype, *(number.dtype for number in numbers),
         *(tensor.data_ptr() % 16 == 0 for tensor in tensors), *map(short_range, tensors)),
    )  # fmt: skip
