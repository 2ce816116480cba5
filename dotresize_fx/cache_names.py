"""What inputs and outputs of a graph with a cache are called, beside input_ids, attention_mask and logits."""

from __future__ import annotations

# Of layer N: past_key_values.N.key and past_key_values.N.value; out of it come present.N.key and present.N.value.
PAST, PRESENT, POSITIONS = "past_key_values", "present", "position_ids"
