"""Depth: how alike blocks are, how much each changes the stream, and how two become one."""
