"""What the inputs of a graph with a cache are called, beside input_ids and attention_mask."""

from __future__ import annotations

# Of layer N: past_key_values.N.key and past_key_values.N.value.
PAST, POSITIONS = "past_key_values", "position_ids"
