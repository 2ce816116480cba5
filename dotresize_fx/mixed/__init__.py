"""One budget for widths, ranks and depth: what each can save at what loss, and the least loss that saves enough."""
