"""Rules by which a network's jaxpr is read: which positions of its arrays belong to one unit."""
