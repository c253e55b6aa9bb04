"""The data plane: tensors to peers and back, and what is measured of the links to them."""
