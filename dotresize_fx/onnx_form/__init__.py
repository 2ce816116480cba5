"""The ONNX form of the neutral view."""
