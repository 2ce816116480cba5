"""The torch.fx form of the neutral view, and running it."""
