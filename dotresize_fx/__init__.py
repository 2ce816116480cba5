"""dotresize-fx: a compiler that makes transformers narrower."""
